"""FIF: a real recording and files written by MNE; splits, skips, joins, epochs, cut files."""

from fractions import Fraction

import mne
import numpy as np
import pytest

from engine.read import read_header, read_signals, sniff
from engine.readers.fif import companions
from engine.windows import window_recording
from manifests.corpora import Corpus
from manifests.errors import RecordingError
from manifests.recipes import load_recipe


def raw_of(num_samples=1000, rate=100.0, seed=0):
    info = mne.create_info(["C3-M2", "C4-M1", "STI"], rate, ["eeg", "eeg", "stim"])
    signals = np.random.default_rng(seed).normal(size=(3, num_samples)) * 1e-5
    return mne.io.RawArray(signals, info, verbose="ERROR")


def save(raw, path, **options):
    raw.save(path, overwrite=True, verbose="ERROR", **options)
    return path


def times(recording):
    return [(part.start, part.duration) for part in recording.segments]


def refusal(path):
    with pytest.raises(RecordingError) as caught:
        read_signals(read_header(path, "fif"), [0])
    return caught.value.reason


def test_a_real_recording_gives_the_stored_floats(shared_data):
    path = shared_data / "yasa/data_resting_EO_200Hz_raw.fif"
    recording = read_header(path, "fif")
    assert sniff(path) == "fif"
    assert [channel.label for channel in recording.channels] == ["F4-A1", "CZ-A2"]
    assert {(channel.rate, channel.unit, channel.num_samples) for channel in recording.channels} == {(200, "V", 72000)}
    got = np.stack(read_signals(recording, [1, 0]))
    # Independent of MNE's tree: the first buffer of samples is a tag of kind 300 (data buffer), type 4 (float32).
    data = path.read_bytes()
    place = data.index(b"\x00\x00\x01\x2c\x00\x00\x00\x04")
    size = int.from_bytes(data[place + 8 : place + 12], "big")
    stored = np.frombuffer(data[place + 16 : place + 16 + size], ">f4").reshape(-1, 2)
    info = mne.io.read_info(path, verbose="ERROR")
    cals = [float(ch["cal"]) * float(ch["range"]) for ch in info["chs"]]
    np.testing.assert_allclose(got[1][: len(stored)], stored[:, 0] * cals[0], rtol=1e-6)
    np.testing.assert_allclose(got[0][: len(stored)], stored[:, 1] * cals[1], rtol=1e-6)


def test_the_parts_of_a_split_recording_are_one(tmp_path):
    raw = raw_of(300_000)
    path = save(raw, tmp_path / "night_raw.fif", split_size="2MB", buffer_size_sec=10)
    later = companions(path)
    assert [name.name for name in later] == [f"night_raw-{k}.fif" for k in range(1, len(later) + 1)]
    assert len(later) >= 2
    recording = read_header(path, "fif")
    assert times(recording) == [(0, 3000)]
    np.testing.assert_allclose(read_signals(recording, [1])[0], raw.get_data()[1], rtol=1e-6, atol=1e-14)
    assert sniff(later[0]) is None
    assert refusal(later[0]) == "NOT_A_RECORDING"
    later[0].unlink()
    assert refusal(path) == "TRUNCATED"


def test_parts_named_by_bids_are_found(tmp_path):
    raw = raw_of(300_000)
    path = tmp_path / "sub-01_meg.fif"
    save(raw, path, split_size="2MB", buffer_size_sec=10, split_naming="bids")
    first = tmp_path / "sub-01_split-01_meg.fif"
    assert companions(first)[0].name == "sub-01_split-02_meg.fif"
    assert sniff(first) == "fif"
    assert sniff(companions(first)[0]) is None
    assert read_header(first, "fif").channels[0].num_samples == 300_000


def test_skips_and_joins_end_segments_and_are_no_annotations(tmp_path):
    raw = mne.concatenate_raws([raw_of(seed=1), raw_of(seed=2)], verbose="ERROR")  # joined at 10 s
    raw.set_meas_date(1.7e9)
    raw.annotations.append(3, 1, "spindle")
    raw.annotations.append(12, 2, "BAD_ACQ_SKIP")
    raw.annotations.append(15, 0.5, "K complex")
    raw.crop(1)
    path = save(raw, tmp_path / "joined_raw.fif")
    recording = read_header(path, "fif")
    assert times(recording) == [(0, 9), (9, 2), (13, 6)]
    found = [(mark.onset, mark.duration, mark.text) for mark in recording.annotations]
    assert found == [(2, 1, "spindle"), (14, Fraction(1, 2), "K complex")]
    assert recording.extra["start_time"] == "22:13:21"  # of the first sample, not of the file's date
    whole = raw.get_data()[0]
    expected = np.concatenate([whole[:1100], whole[1300:]])
    np.testing.assert_allclose(read_signals(recording, [0])[0], expected, rtol=1e-6, atol=1e-14)


def test_epochs_are_segments_where_their_events_lie(tmp_path):
    signals = np.random.default_rng(3).normal(size=(5, 2, 50)) * 1e-5
    info = mne.create_info(["C3", "C4"], 100.0, "eeg")
    for spacing, apart in ((80, True), (1, False)):
        events = np.c_[np.arange(5) * spacing, np.zeros(5, int), [1, 2, 1, 2, 1]]
        epochs = mne.EpochsArray(signals, info, events=events, event_id={"left": 1, "right": 2}, verbose="ERROR")
        epochs.save(tmp_path / "trials-epo.fif", overwrite=True, verbose="ERROR")
        recording = read_header(tmp_path / "trials-epo.fif", "fif")
        half = Fraction(1, 2)
        assert times(recording) == [(Fraction(4, 5) * k if apart else half * k, half) for k in range(5)]
        assert [mark.text for mark in recording.annotations] == ["left", "right", "left", "right", "left"]
        assert [mark.onset for mark in recording.annotations] == [part.start for part in recording.segments]
        assert bool(recording.repairs) is not apart
        np.testing.assert_allclose(read_signals(recording, [1])[0], signals[:, 1].ravel(), rtol=1e-6, atol=1e-14)


def test_a_rate_stored_as_float32_is_the_fraction_that_was_meant(tmp_path):
    path = save(raw_of(rate=1000 / 3), tmp_path / "a_raw.fif")
    assert read_header(path, "fif").channels[0].rate == Fraction(1000, 3)


def test_a_cut_file_keeps_what_is_whole(tmp_path):
    raw = raw_of(10_000)
    path = save(raw, tmp_path / "a_raw.fif", buffer_size_sec=10)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    recording = read_header(path, "fif")
    kept = recording.channels[0].num_samples
    assert 1000 < kept < 6000
    assert recording.repairs[0].startswith("truncated")
    np.testing.assert_allclose(read_signals(recording, [0])[0], raw.get_data()[0, :kept], rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[:40], "HEADER_INVALID"),
        (lambda data: b"RIFF" + data[4:], "NOT_A_RECORDING"),
        (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "NOT_A_RECORDING"),
        (lambda _: b"", "NOT_A_RECORDING"),
        (lambda data: data[:100] + bytes(400) + data[500:], "HEADER_INVALID"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, change, reason):
    path = save(raw_of(), tmp_path / "a_raw.fif")
    path.write_bytes(change(path.read_bytes()))
    assert refusal(path) == reason


def test_averages_are_no_recording(tmp_path):
    evoked = mne.EvokedArray(np.zeros((2, 50)), mne.create_info(["C3", "C4"], 100.0, "eeg"), verbose="ERROR")
    evoked.save(tmp_path / "mean-ave.fif", verbose="ERROR")
    assert refusal(tmp_path / "mean-ave.fif") == "FORMAT_UNSUPPORTED"


def test_the_person_stays_in_the_file(tmp_path):
    raw = raw_of()
    raw.info["subject_info"] = {"last_name": "Planted", "first_name": "Person"}
    raw.info["experimenter"] = "Planted"
    recording = read_header(save(raw, tmp_path / "a_raw.fif"), "fif")
    assert "Planted" not in repr(recording)


def test_a_fif_file_becomes_samples(tmp_path):
    path = save(raw_of(9000), tmp_path / "S01_raw.fif")
    corpus = Corpus.model_validate(
        {
            "id": "fif",
            "title": "fif",
            "licence": "CC0",
            "access": "",
            "reader": "fif",
            "files": ["*.fif"],
            "subject": {"pattern": r"(?P<subject>S\d+)_raw\.fif"},
        }
    )
    samples = list(window_recording(path, corpus=corpus, recipe=load_recipe("sleep128"), root=tmp_path))
    assert samples
    assert {tag["symbol"] for tag in samples[0].meta["ucs"]["eeg"]} == {"eeg:C3-M2", "eeg:C4-M1"}
