import datetime
from fractions import Fraction

import edfio
import mne
import pyedflib
import pytest

from engine.annotate import write_annotations
from manifests.errors import ContractError

ROWS = [
    (Fraction(0), Fraction(30), "Sleep stage W"),
    (Fraction(30), Fraction(30), "Sleep stage N2"),
    (Fraction(7681, 256), Fraction(10), "rhythm: Vorhofflimmern ä µ"),
]


def test_three_libraries_read_the_rows_back(tmp_path):
    path = tmp_path / "night-predicted.edf"
    start = datetime.datetime(2024, 2, 29, 22, 30, 5)
    write_annotations(path, ROWS, start)
    expected = [(float(onset), float(duration), text) for onset, duration, text in ROWS]

    edf = edfio.read_edf(path)
    assert sorted((a.onset, a.duration, a.text) for a in edf.annotations) == expected
    assert (edf.startdate, edf.starttime) == (start.date(), start.time())
    assert edf.num_signals == 0

    notes = mne.read_annotations(path)
    assert list(zip(notes.onset, notes.duration, notes.description, strict=True)) == expected

    with pyedflib.EdfReader(str(path)) as reader:
        onsets, durations, texts = reader.readAnnotations()
        # pyedflib counts in units of 100 ns.
        assert [round(onset, 6) for onset in onsets] == [round(onset, 6) for onset, _, _ in expected]
        assert list(zip(durations, texts, strict=True)) == [row[1:] for row in expected]


def test_unknown_start(tmp_path):
    write_annotations(tmp_path / "a.edf", ROWS)
    edf = edfio.read_edf(tmp_path / "a.edf")
    assert len(edf.annotations) == 3
    assert edf.local_recording_identification == "Startdate X X X kymo"
    assert [path.name for path in tmp_path.iterdir()] == ["a.edf"]


def test_no_rows_are_refused(tmp_path):
    with pytest.raises(ContractError, match="no annotation to write"):
        write_annotations(tmp_path / "a.edf", [])


@pytest.mark.parametrize("row", [(Fraction(-1), Fraction(1), "a"), (Fraction(0), Fraction(-1), "a"), (0, 0, " ")])
def test_impossible_rows_are_refused_before_anything_is_written(tmp_path, row):
    with pytest.raises(ContractError, match="must be 0 s or more"):
        write_annotations(tmp_path / "a.edf", [row])
    assert not list(tmp_path.iterdir())
