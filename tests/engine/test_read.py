"""The dispatch: readers by name, readers by content."""

import pickle
from typing import get_args

import pytest

from engine.read import READERS, read_header, read_signals, sniff
from manifests.corpora import Corpus
from manifests.errors import ConfigError, RecordingError


def test_readers_are_those_a_corpus_file_may_name():
    assert set(READERS) == set(get_args(Corpus.model_fields["reader"].annotation))


def test_an_unknown_reader_is_the_operators(tmp_path):
    with pytest.raises(ConfigError, match=r"'edff'.*edf, wfdb"):
        read_header(tmp_path / "a.edf", "edff")


def test_a_missing_file_is_a_recording_error(tmp_path):
    for reader in ("edf", "wfdb"):
        with pytest.raises(RecordingError) as caught:
            read_header(tmp_path / "none.hea", reader)
        assert caught.value.reason == "NOT_A_RECORDING"


def test_a_header_survives_a_process_border_and_still_reads(shared_data):
    recording = pickle.loads(pickle.dumps(read_header(shared_data / "cap_sleep/brux2_100s_5ch.edf", "edf")))
    assert read_signals(recording, [4])[0].shape == (25600,)
    with pytest.raises(ValueError, match=r"\[5\]"):
        read_signals(recording, [4, 5])


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("cap_sleep/brux2_100s_5ch.edf", "edf"),
        ("malformed_edge_cases/bdf_test.bdf", "edf"),
        ("malformed_edge_cases/gitlfs_pointer_short_psg.edf", "edf"),
        ("mitdb/100.hea", "wfdb"),
        ("challenge2021_12lead/E/E00009.hea", "wfdb"),
        ("mitdb/100.dat", None),
        ("dreams_spindles/excerpt1.txt", None),
        ("README.md", None),
    ],
)
def test_content_names_the_reader(shared_data, name, reader):
    assert sniff(shared_data / name) == reader


def test_an_edf_of_any_name_is_recognised(tmp_path, shared_data):
    (tmp_path / "night.rec").write_bytes((shared_data / "cap_sleep/brux2_100s_5ch.edf").read_bytes())
    assert sniff(tmp_path / "night.rec") == "edf"
