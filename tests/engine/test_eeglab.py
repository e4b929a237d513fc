"""EEGLAB sets: a real one with its .fdt, sets of both MATLAB versions by eeglabio, boundaries, epochs, damage."""

import shutil
from fractions import Fraction

import eeglabio.epochs
import eeglabio.raw
import h5py
import mne
import numpy as np
import pytest
import scipy.io

from engine.read import read_header, read_signals, sniff
from engine.readers.eeglab import companions
from engine.windows import window_recording
from manifests.corpora import Corpus
from manifests.errors import RecordingError
from manifests.recipes import load_recipe

FORMATS = ("v5", "v7.3")


@pytest.fixture
def signals():
    return np.random.default_rng(5).normal(size=(3, 1000)) * 1e-5


@pytest.fixture
def real(shared_data, tmp_path):
    """A copy of EEGLAB's sample set, which keeps its samples in a .fdt."""
    for suffix in (".set", ".fdt"):
        shutil.copyfile(shared_data / f"eeglab/eeglab_data{suffix}", tmp_path / f"eeglab_data{suffix}")
    return tmp_path / "eeglab_data.set"


def export(path, signals, marks=(), **options):
    names, onsets, lengths = zip(*marks, strict=True) if marks else ((), (), ())
    annotations = [np.array(names), np.array(onsets, float), np.array(lengths, float)] if marks else None
    labels = ["C3", "C4", "C3"][: len(signals)]
    eeglabio.raw.export_set(str(path), signals, 100.0, labels, annotations=annotations, **options)
    return path


def times(recording):
    return [(part.start, part.duration) for part in recording.segments]


def refusal(path):
    with pytest.raises(RecordingError) as caught:
        read_signals(read_header(path, "eeglab"), [0])
    return caught.value.reason


def test_a_real_set_gives_the_floats_of_its_fdt(shared_data):
    path = shared_data / "eeglab/eeglab_data.set"
    recording = read_header(path, "eeglab")
    assert sniff(path) == "eeglab"
    assert companions(path) == [path.with_suffix(".fdt")]
    stored = np.fromfile(path.with_suffix(".fdt"), "<f4").reshape(-1, 32).T
    np.testing.assert_array_equal(read_signals(recording, [31, 0]), stored[[31, 0]])
    raw = mne.io.read_raw_eeglab(path, verbose="ERROR")
    assert [channel.label for channel in recording.channels] == raw.ch_names
    assert {(channel.rate, channel.unit, channel.num_samples) for channel in recording.channels} == {(128, "uV", 30504)}
    assert [mark.text for mark in recording.annotations] == list(raw.annotations.description)
    np.testing.assert_allclose([float(mark.onset) for mark in recording.annotations], raw.annotations.onset, atol=1e-6)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_boundary_is_a_gap_in_either_version(tmp_path, signals, fmt):
    marks = [("a", 1.0, 0.0), ("boundary", 2.0, 3.0), ("b", 5.0, 0.5), ("boundary", 7.0, 0.0)]
    path = export(tmp_path / "a.set", signals, marks, fmt=fmt)
    recording = read_header(path, "eeglab")
    assert [channel.label for channel in recording.channels] == ["C3", "C4", "C3"]
    assert times(recording) == [(0, 2), (5, 5), (10, 3)]  # 3 s are gone, then an unknown time
    assert [(mark.onset, mark.duration, mark.text) for mark in recording.annotations] == [
        (1, 0, "a"),
        (8, Fraction(1, 2), "b"),
    ]
    np.testing.assert_allclose(read_signals(recording, [2, 0]), signals[[2, 0]] * 1e6, rtol=1e-6)


@pytest.mark.parametrize("fmt", FORMATS)
def test_one_channel_stays_one_channel(tmp_path, signals, fmt):
    recording = read_header(export(tmp_path / "a.set", signals[:1], fmt=fmt), "eeglab")
    assert [channel.label for channel in recording.channels] == ["C3"]
    np.testing.assert_allclose(read_signals(recording, [0])[0], signals[0] * 1e6, rtol=1e-6)


def test_epochs_are_segments_with_the_name_of_their_event(tmp_path):
    trials = np.random.default_rng(6).normal(size=(4, 2, 50)) * 1e-5
    events = np.c_[np.arange(4) * 100, np.zeros(4, int), [1, 2, 1, 2]]
    path = tmp_path / "trials.set"
    names = {"left": 1, "right": 2}
    eeglabio.epochs.export_set(str(path), trials, 100.0, events, 0, 0.49, ["C3", "C4"], event_id=names)
    recording = read_header(path, "eeglab")
    half = Fraction(1, 2)
    assert times(recording) == [(half * k, half) for k in range(4)]
    assert [mark.text for mark in recording.annotations] == ["left", "right", "left", "right"]
    assert recording.repairs
    np.testing.assert_allclose(read_signals(recording, [1])[0], trials[:, 1].ravel() * 1e6, rtol=1e-6)


def test_epochs_in_hdf5_stand_in_reverse_order(tmp_path, signals):
    path = export(tmp_path / "a.set", signals, fmt="v7.3")
    trials = np.random.default_rng(8).normal(size=(4, 50, 3)).astype(np.float32)  # trials, points, channels
    with h5py.File(path, "r+") as file:
        group = file.get("EEG", file)
        attributes = dict(group["data"].attrs)
        del group["data"]
        group["data"] = trials
        group["data"].attrs.update(attributes)
        group["trials"][...], group["pnts"][...] = 4, 50
    recording = read_header(path, "eeglab")
    assert len(recording.segments) == 4
    np.testing.assert_array_equal(read_signals(recording, [2])[0], trials[:, :, 2].ravel())


def test_fields_without_a_struct_around_them_are_read(tmp_path, signals):
    chanlocs = np.array([("C3",), ("C4",), ("Cz",)], dtype=[("labels", object)])
    fields = {"nbchan": 3.0, "pnts": 1000.0, "trials": 1.0, "srate": 250.0, "chanlocs": chanlocs}
    path = tmp_path / "flat.set"
    scipy.io.savemat(path, {**fields, "data": signals.astype(np.float32)})
    recording = read_header(path, "eeglab")
    assert [channel.label for channel in recording.channels] == ["C3", "C4", "Cz"]
    assert recording.channels[0].rate == 250
    np.testing.assert_array_equal(read_signals(recording, [1])[0], signals[1].astype(np.float32))
    scipy.io.savemat(path, {**fields, "chanlocs": np.array([]), "data": "flat.fdt"})
    path.with_suffix(".fdt").write_bytes(signals.astype("<f4").T.tobytes())
    recording = read_header(path, "eeglab")
    assert recording.channels[2].label == "EEG 002"
    np.testing.assert_array_equal(read_signals(recording, [2])[0], signals[2].astype(np.float32))


def test_a_renamed_set_takes_the_fdt_of_its_name(real):
    for suffix in (".set", ".fdt"):
        real.with_suffix(suffix).rename(real.with_name(f"sub-01{suffix}"))
    recording = read_header(real.with_name("sub-01.set"), "eeglab")
    assert any("another file of samples" in repair for repair in recording.repairs)
    assert recording.channels[0].num_samples == 30504
    real.with_name("sub-01.fdt").rename(real.with_name("eeglab_data.fdt"))
    assert companions(real.with_name("sub-01.set")) == [real.with_name("eeglab_data.fdt")]
    assert not read_header(real.with_name("sub-01.set"), "eeglab").repairs


def test_the_fdt_must_have_the_length_that_the_set_tells(real):
    data = real.with_suffix(".fdt")
    whole = data.read_bytes()
    data.write_bytes(whole[: 128 * 1000 + 9])
    recording = read_header(real, "eeglab")
    assert recording.channels[0].num_samples == 1000
    assert recording.repairs[0] == "truncated: 1000 of 30504 samples per channel are there"
    data.write_bytes(whole + b"1234")
    assert refusal(real) == "HEADER_INVALID"
    data.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert refusal(real) == "NOT_A_RECORDING"
    data.unlink()
    assert refusal(real) == "TRUNCATED"


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.99])
def test_a_cut_set_is_refused_by_name(tmp_path, signals, fmt, share):
    path = export(tmp_path / "a.set", signals, fmt=fmt)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert refusal(path) in {"HEADER_INVALID", "SIGNAL_INVALID"}


def test_other_matlab_files_are_no_set(tmp_path):
    for content in (b"", b"\x80\x04pickle", b"text"):
        (tmp_path / "a.set").write_bytes(content)
        assert refusal(tmp_path / "a.set") == "NOT_A_RECORDING"
    scipy.io.savemat(tmp_path / "a.set", {"x": np.zeros(3)})
    assert refusal(tmp_path / "a.set") == "HEADER_INVALID"
    scipy.io.savemat(tmp_path / "b.mat", {"EEG": {"nbchan": 1}})
    assert sniff(tmp_path / "b.mat") is None


def test_an_eeglab_file_becomes_samples(tmp_path):
    signals = np.random.default_rng(0).normal(size=(2, 9000)) * 2e-5
    path = export(tmp_path / "S01.set", signals)
    corpus = Corpus.model_validate(
        {
            "id": "eeglab",
            "title": "eeglab",
            "licence": "CC0",
            "access": "",
            "reader": "eeglab",
            "files": ["*.set"],
            "channels": {"C3": "eeg:C3-M2", "C4": "eeg:C4-M1"},
            "subject": {"pattern": r"(?P<subject>S\d+)\.set"},
        }
    )
    samples = list(window_recording(path, corpus=corpus, recipe=load_recipe("sleep128"), root=tmp_path))
    assert samples
    assert len(samples[0].meta["ucs"]["eeg"]) == 2
