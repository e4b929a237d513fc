"""BrainVision: real headers of every kind, files written by pybv, gaps, pointers that lie, damage."""

from fractions import Fraction

import numpy as np
import pybv
import pytest

from engine.read import read_header, read_signals, sniff
from engine.readers.brainvision import companions
from engine.windows import window_recording
from manifests.corpora import Corpus
from manifests.errors import RecordingError
from manifests.recipes import load_recipe

LABELS = ["C3", "C4", "EOG"]


@pytest.fixture
def written(tmp_path):
    """Ten seconds at 500 Hz by pybv, in µV at a resolution of 0.1, and the volts that it stored."""
    rng = np.random.default_rng(7)
    signals = np.round(rng.normal(size=(3, 5000)) * 300) * 1e-7
    events = [
        {"onset": 1000, "duration": 250, "description": 3, "type": "Stimulus"},
        {"onset": 1500, "duration": 1, "description": "by Ann, awake", "type": "Comment"},
    ]
    pybv.write_brainvision(
        data=signals,
        sfreq=500,
        ch_names=LABELS,
        fname_base="night",
        folder_out=tmp_path,
        events=events,
        resolution=0.1,
        unit="µV",
        fmt="binary_int16",
    )
    stored = np.fromfile(tmp_path / "night.eeg", "<i2").reshape(-1, 3).T * 1e-7  # pybv cuts, it does not round
    np.testing.assert_allclose(stored, signals, atol=1.1e-7)
    return tmp_path / "night.vhdr", stored


def replace(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def add_marker(path, line):
    with path.with_suffix(".vmrk").open("a", encoding="utf-8") as stream:
        stream.write(f"\n{line}\n")


def refusal(path):
    with pytest.raises(RecordingError) as caught:
        read_signals(read_header(path, "brainvision"), [0])
    return caught.value.reason


def test_what_pybv_wrote_is_read_sample_by_sample(written):
    path, signals = written
    recording = read_header(path, "brainvision")
    assert sniff(path) == "brainvision"
    assert [channel.label for channel in recording.channels] == LABELS
    assert {(channel.rate, channel.unit, channel.num_samples) for channel in recording.channels} == {(500, "V", 5000)}
    assert [(part.start, part.duration) for part in recording.segments] == [(0, 10)]
    assert not recording.repairs
    got = read_signals(recording, [2, 0])
    assert got[0].dtype == np.float32
    np.testing.assert_allclose(got, signals[[2, 0]], rtol=1e-6, atol=1e-12)


def test_markers_are_annotations_and_a_comma_in_one_comes_back(written):
    found = read_header(written[0], "brainvision").annotations
    assert [(mark.onset, mark.duration, mark.text) for mark in found] == [
        (2, Fraction(1, 2), "Stimulus/S  3"),
        (3, Fraction(1, 500), "Comment/by Ann, awake"),
    ]


def test_a_dated_new_segment_is_a_gap_and_shifts_what_follows(written):
    path, signals = written
    add_marker(path, "Mk9=New Segment,,1,1,0,20240102230000000000")
    add_marker(path, "Mk4=New Segment,,2001,1,0,20240102230104500000")
    add_marker(path, "Mk5=New Segment,,4001,1,0")
    add_marker(path, "Mk6=Response,R1,2501,0,0")
    recording = read_header(path, "brainvision")
    start = Fraction(129, 2)  # 23:01:04.5 after 23:00:00
    assert [(part.start, part.duration) for part in recording.segments] == [(0, 4), (start, 4), (start + 4, 2)]
    assert [mark.onset for mark in recording.annotations] == [2, 3, start + 1]
    assert not any("Segment" in mark.text for mark in recording.annotations)
    assert recording.extra["start_time"] == "23:00:00"
    np.testing.assert_allclose(read_signals(recording, [1])[0], signals[1], rtol=1e-6, atol=1e-12)


def test_a_clock_that_goes_back_is_said_and_loses_nothing(written):
    path, _ = written
    add_marker(path, "Mk9=New Segment,,1,1,0,20240102230000000000")
    add_marker(path, "Mk4=New Segment,,2001,1,0,20240102220000000000")
    recording = read_header(path, "brainvision")
    assert [(part.start, part.duration) for part in recording.segments] == [(0, 4), (4, 6)]
    assert any("begins before the end" in repair for repair in recording.repairs)


def test_an_interval_that_no_decimal_holds_stays_exact(written):
    replace(written[0], "SamplingInterval=2000.0", "SamplingInterval=3906.25")
    assert read_header(written[0], "brainvision").channels[0].rate == 256
    replace(written[0], "SamplingInterval=3906.25", "SamplingInterval=3000")
    assert read_header(written[0], "brainvision").channels[0].rate == Fraction(1000, 3)


def test_two_channels_of_one_label_keep_it(written):
    replace(written[0], "Ch2=C4,", "Ch2=C3,")
    assert [channel.label for channel in read_header(written[0], "brainvision").channels] == ["C3", "C3", "EOG"]


def test_files_that_were_renamed_are_found_by_the_name_of_the_header(written):
    path, _ = written
    for suffix in (".vhdr", ".vmrk", ".eeg"):
        path.with_suffix(suffix).rename(path.with_name(f"sub-01_eeg{suffix}"))
    moved = path.with_name("sub-01_eeg.vhdr")
    recording = read_header(moved, "brainvision")
    assert len(recording.annotations) == 2
    assert any("pointer" in repair for repair in recording.repairs)
    assert {name.name for name in companions(moved)} == {"sub-01_eeg.eeg", "sub-01_eeg.vmrk"}


def test_a_pointer_never_leads_out_of_the_folder(written):
    path, _ = written
    inner = path.parent / "inner"
    inner.mkdir()
    moved = path.rename(inner / path.name)
    for pointer in ("../night.eeg", str(path.parent / "night.eeg"), "..\\night.eeg"):
        moved.write_text(moved.read_text().replace("DataFile=night.eeg", f"DataFile={pointer}"))
        assert companions(moved) == []
        assert refusal(moved) == "TRUNCATED"


def test_a_shorter_file_is_kept_and_said(written):
    path, signals = written
    data = path.with_suffix(".eeg")
    data.write_bytes(data.read_bytes()[: 6 * 1234 + 5])
    recording = read_header(path, "brainvision")
    assert recording.channels[0].num_samples == 1234
    assert [repair for repair in recording.repairs if "incomplete" in repair]
    assert [repair for repair in recording.repairs if "markers outside" in repair]
    np.testing.assert_allclose(read_signals(recording, [0])[0], signals[0, :1234], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("SamplingInterval=2000.0", "SamplingInterval=0", "HEADER_INVALID"),
        ("SamplingInterval=2000.0", "SamplingInterval=fast", "HEADER_INVALID"),
        ("NumberOfChannels=3", "NumberOfChannels=4", "HEADER_INVALID"),
        ("NumberOfChannels=3", "NumberOfChannels=-3", "HEADER_INVALID"),
        ("NumberOfChannels=3", "NumberOfChannels=999999999", "HEADER_INVALID"),
        ("BinaryFormat=INT_16", "BinaryFormat=INT_24", "FORMAT_UNSUPPORTED"),
        ("DataOrientation=MULTIPLEXED", "DataOrientation=DIAGONAL", "FORMAT_UNSUPPORTED"),
        ("DataOrientation=MULTIPLEXED", "Orientation=", "HEADER_INVALID"),
        ("Brain Vision Data", "Brian Vision Data", "NOT_A_RECORDING"),
    ],
)
def test_a_header_that_lies_is_refused_by_name(written, old, new, reason):
    text = written[0].read_text(encoding="utf-8").replace("BrainVision", "Brain Vision")
    assert old in text
    written[0].write_text(text.replace(old, new), encoding="utf-8")
    assert refusal(written[0]) == reason


def test_missing_and_empty_and_pointer_files_are_refused(written):
    path, _ = written
    data = path.with_suffix(".eeg")
    data.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert refusal(path) == "NOT_A_RECORDING"
    data.write_bytes(b"")
    assert refusal(path) == "TRUNCATED"
    data.unlink()
    assert refusal(path) == "TRUNCATED"


def test_a_vectorised_file_that_is_too_short_is_refused_not_shifted(written):
    path, _ = written
    replace(path, "DataOrientation=MULTIPLEXED", "DataOrientation=VECTORIZED\nDataPoints=5000")
    data = path.with_suffix(".eeg")
    values = np.frombuffer(data.read_bytes(), "<i2").reshape(-1, 3)
    data.write_bytes(np.ascontiguousarray(values.T).tobytes())
    got = read_signals(read_header(path, "brainvision"), [1])[0]
    np.testing.assert_allclose(got, values[:, 1] * 1e-7, rtol=1e-6)
    data.write_bytes(data.read_bytes()[:-6])
    assert refusal(path) == "TRUNCATED"


@pytest.mark.parametrize("name", ["test", "testv2", "test_units"])
def test_units_of_a_real_header_lead_to_the_stored_numbers(shared_data, name):
    folder = shared_data / "mne_python_testdata/brainvision"
    recording = read_header(folder / f"{name}.vhdr", "brainvision")
    stored = np.frombuffer((folder / "test.eeg").read_bytes(), "<i2").reshape(-1, 32)
    got = read_signals(recording, [0, 1, 2, 3])  # in test_units: 500 nV, 0.0005 mV, 0.0000005 V, 0.5 µV
    np.testing.assert_allclose(got, stored[:, :4].T * 0.5e-6, rtol=1e-6)
    assert {recording.channels[index].unit for index in range(4)} == {"V"}


def test_a_real_float_file_without_units_is_in_microvolts(shared_data):
    path = shared_data / "eeglab/testbva.vhdr"
    recording = read_header(path, "brainvision")
    stored = np.fromfile(path.with_suffix(".dat"), "<f4").reshape(-1, 32)
    np.testing.assert_allclose(read_signals(recording, [31])[0], stored[:, 31] * 1e-6, rtol=1e-6)
    assert len(recording.annotations) == 16


def test_an_old_latin_1_header_and_a_cut_openneuro_file_are_read(shared_data):
    folder = shared_data / "mne_python_testdata/brainvision"
    old = read_header(folder / "test_old_layout_latin1_software_filter.vhdr", "brainvision")
    assert (len(old.channels), old.channels[0].rate, old.channels[0].num_samples) == (29, 250, 251)
    assert old.channels[0].prefilter == "HP:0.176839Hz LP:50Hz"
    cut = shared_data / "malformed_edge_cases/truncated_ds002336/sub-xp101_task-motorloc_eeg.vhdr"
    recording = read_header(cut, "brainvision")
    assert recording.channels[0].num_samples == 256
    assert recording.annotations == ()
    assert read_signals(recording, [63])[0].shape == (256,)


def test_a_brainvision_file_becomes_samples(tmp_path):
    time = np.arange(90 * 200) / 200
    signals = np.stack([3e-5 * np.sin(2 * np.pi * 10 * time), 2e-5 * np.sin(2 * np.pi * 6 * time)])
    pybv.write_brainvision(
        data=signals, sfreq=200, ch_names=["C3-M2", "C4-M1"], fname_base="S01", folder_out=tmp_path, unit="µV"
    )
    corpus = Corpus.model_validate(
        {
            "id": "bv",
            "title": "bv",
            "licence": "CC0",
            "access": "",
            "reader": "brainvision",
            "files": ["*.vhdr"],
            "subject": {"pattern": r"(?P<subject>S\d+)\.vhdr"},
        }
    )
    recipe = load_recipe("eeg200")
    samples = list(window_recording(tmp_path / "S01.vhdr", corpus=corpus, recipe=recipe, root=tmp_path))
    assert len(samples) >= 90 // recipe.window_s - 1
    tag = samples[1].meta["ucs"]["eeg"][0]
    assert tag["symbol"] == "eeg:C3-M2"
    assert samples[1].arrays["eeg"][0].astype(np.float64).std() * tag["scale"] == pytest.approx(
        30 / np.sqrt(2), rel=0.05
    )
