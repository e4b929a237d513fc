"""DICOM waveforms: a real 12-lead ECG against pydicom, groups in time, padding, damage, and no name of a patient."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, generate_uid

from engine.read import read_header, read_signals, sniff
from engine.recording import Segment
from engine.windows import window_recording
from manifests.corpora import Corpus
from manifests.errors import ConfigError, RecordingError
from manifests.recipes import load_recipe

REAL = "ecg_dicom/anonymous_ecg.dcm"


def group(values: np.ndarray, **changes) -> Dataset:
    """A multiplex group of int16 channels, 1.25 uV a step, 500 Hz."""
    item = Dataset()
    item.MultiplexGroupTimeOffset = 0
    item.WaveformOriginality = "ORIGINAL"
    item.NumberOfWaveformSamples, item.NumberOfWaveformChannels = values.shape
    item.SamplingFrequency = 500
    item.WaveformBitsAllocated = 16
    item.WaveformSampleInterpretation = "SS"
    item.add_new("WaveformData", "OW", values.astype("<i2").tobytes())
    item.ChannelDefinitionSequence = [channel(number) for number in range(values.shape[1])]
    for name, value in changes.items():
        if name == "WaveformPaddingValue":
            item.add_new(name, "OW", value)
        else:
            setattr(item, name, value)
    return item


def channel(number: int, **changes) -> Dataset:
    definition, source, unit = Dataset(), Dataset(), Dataset()
    source.CodeMeaning = f"Lead V{number + 1}"
    unit.CodeValue = "uV"
    definition.ChannelSourceSequence, definition.ChannelSensitivityUnitsSequence = [source], [unit]
    definition.ChannelSensitivity, definition.ChannelSensitivityCorrectionFactor = 1.25, 2
    definition.ChannelBaseline = 10 * number
    for name, value in changes.items():
        setattr(definition, name, value)
    return definition


def written(path: Path, *groups: Dataset, syntax: str = ExplicitVRLittleEndian) -> Path:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.9.1.1", generate_uid()
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = "Planted^Name", "PLANTED7", "19010203"
    dataset.WaveformSequence = list(groups)
    dataset.save_as(path, enforce_file_format=True)
    return path


def refused(path: Path, layout: dict | None = None) -> str:
    with pytest.raises(RecordingError) as caught:
        read_signals(read_header(path, "dicom", layout or {}), [0])
    return caught.value.reason


def test_a_real_ecg_is_what_pydicom_gives(shared_data):
    path = shared_data / REAL
    assert sniff(path) == "dicom"
    recording = read_header(path, "dicom")
    assert recording.segments == (Segment(start=0, duration=10),)  # the median beat is no part of it
    assert [(found.label, found.rate, found.unit) for found in recording.channels[:2]] == [
        ("Lead I (Einthoven)", 1000, "uV"),
        ("Lead II", 1000, "uV"),
    ]
    assert recording.channels[0].prefilter == "HP:0.05Hz LP:300Hz"
    dataset = pydicom.dcmread(path)
    assert np.array_equal(np.stack(read_signals(recording, range(12)), axis=1), dataset.waveform_array(0))
    beat = read_header(path, "dicom", {"groups": [1]})
    assert beat.duration * 1000 == 1200
    assert np.array_equal(read_signals(beat, [11])[0], dataset.waveform_array(1)[:, 11])


def test_a_real_ecg_becomes_a_window(shared_data):
    corpus = Corpus(
        id="ecg_dicom",
        title="one ECG",
        licence="MIT",
        access="open",
        reader="dicom",
        files=["*.dcm"],
        subject={"pattern": "^(?P<subject>[^.]+)"},
        channels={"Lead I (Einthoven)": "ecg:I"},
    )
    path = shared_data / REAL
    (window,) = window_recording(path, corpus=corpus, recipe=load_recipe("ecg500"), root=path.parent)
    assert window.arrays["ecg"].shape == (12, 5000)
    tags = window.meta["ucs"]["ecg"]
    assert [tag["symbol"] for tag in tags[:4]] == ["ecg:I", "ecg:II", "ecg:III", "ecg:aVR"]
    assert 0.1 < tags[1]["sd"] < 1.0  # mV


def test_sensitivity_correction_baseline_and_padding(tmp_path):
    raw = np.random.default_rng(1).integers(-900, 900, (1000, 3))
    raw[5, 1] = -32768
    path = written(tmp_path / "a.dcm", group(raw, WaveformPaddingValue=np.int16(-32768).tobytes()))
    signals = np.stack(read_signals(read_header(path, "dicom"), [0, 1, 2]), axis=1)
    assert np.argwhere(np.isnan(signals)).tolist() == [[5, 1]]
    reference = pydicom.dcmread(path).waveform_array(0)
    signals[5, 1] = reference[5, 1]
    assert np.array_equal(signals, reference.astype(np.float32))
    assert signals[0, 2] == raw[0, 2] * 2.5 + 20


def test_nothing_about_the_patient_is_told(tmp_path):
    recording = read_header(written(tmp_path / "a.dcm", group(np.ones((1000, 2)))), "dicom")
    text = json.dumps(asdict(recording), default=str)
    assert not any(word in text for word in ("Planted", "PLANTED7", "1901"))


def test_what_is_said_of_a_damaged_file_names_nobody(tmp_path, caplog, recwarn):
    whole = written(tmp_path / "a.dcm", group(np.ones((50, 2)))).read_bytes()
    said: list[str] = []
    for place in range(128, 500, 3):
        (tmp_path / "a.dcm").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            said += read_header(tmp_path / "a.dcm", "dicom").repairs
        except RecordingError as error:
            said.append(str(error))
    text = " ".join([*said, caplog.text, *(str(warning.message) for warning in recwarn)])
    assert "Planted" not in text


def test_groups_after_another_are_segments_and_groups_beside_are_channels(tmp_path):
    one, two = np.full((1000, 2), 1), np.full((500, 2), 2)
    later = group(two, MultiplexGroupTimeOffset=5000)
    recording = read_header(written(tmp_path / "a.dcm", group(one), later), "dicom")
    assert recording.segments == (Segment(start=0, duration=2), Segment(start=5, duration=1))
    assert read_signals(recording, [0])[0].tolist() == [2.5] * 1000 + [5.0] * 500
    fast = group(np.full((2000, 1), 3), SamplingFrequency=1000)
    beside = read_header(written(tmp_path / "b.dcm", group(one), fast), "dicom")
    assert [(found.rate, found.num_samples) for found in beside.channels] == [(500, 1000), (500, 1000), (1000, 2000)]
    assert read_signals(beside, [2])[0].tolist() == [7.5] * 2000
    overlapping = written(tmp_path / "c.dcm", group(one), group(two, MultiplexGroupTimeOffset=1000))
    assert refused(overlapping) == "HEADER_INVALID"
    assert read_header(overlapping, "dicom", {"groups": [1]}).duration == 1


def test_a_channel_without_sensitivity_is_uncalibrated(tmp_path):
    item = group(np.ones((1000, 1)))
    del item.ChannelDefinitionSequence[0].ChannelSensitivity
    (found,) = read_header(written(tmp_path / "a.dcm", item), "dicom").channels
    assert not found.calibrated


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"NumberOfWaveformSamples": 1001}, "TRUNCATED"),
        ({"NumberOfWaveformSamples": 1 << 31}, "TRUNCATED"),
        ({"NumberOfWaveformSamples": 0}, "TRUNCATED"),
        ({"NumberOfWaveformChannels": 3}, "HEADER_INVALID"),
        ({"SamplingFrequency": 0}, "HEADER_INVALID"),
        ({"WaveformBitsAllocated": 8}, "HEADER_INVALID"),
        ({"WaveformSampleInterpretation": "MB"}, "FORMAT_UNSUPPORTED"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path, changes, reason):
    assert refused(written(tmp_path / "a.dcm", group(np.ones((1000, 2)), **changes))) == reason


def test_what_is_no_waveform_is_refused(tmp_path, shared_data):
    whole = (shared_data / REAL).read_bytes()
    for content in (b"", b"version https://git-lfs", bytes(200), bytes(128) + b"DICM"):
        (tmp_path / "a.dcm").write_bytes(content)
        assert refused(tmp_path / "a.dcm") == "NOT_A_RECORDING"
    for length in range(200, len(whole), len(whole) // 20):
        (tmp_path / "a.dcm").write_bytes(whole[:length])
        assert refused(tmp_path / "a.dcm") in {"NOT_A_RECORDING", "TRUNCATED", "HEADER_INVALID"}
    deflated = written(tmp_path / "b.dcm", group(np.ones((1000, 2))), syntax=DeflatedExplicitVRLittleEndian)
    assert refused(deflated) == "FORMAT_UNSUPPORTED"
    assert refused(written(tmp_path / "c.dcm"), {"groups": [4]}) == "NOT_A_RECORDING"
    with pytest.raises(ConfigError, match=r"layout\.group "):
        read_header(tmp_path / "a.dcm", "dicom", {"group": [0]})


def test_flipped_bytes_end_with_a_reason_or_a_signal(tmp_path):
    whole = written(tmp_path / "a.dcm", group(np.ones((50, 2)))).read_bytes()
    for place in range(0, len(whole), 17):
        (tmp_path / "a.dcm").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            recording = read_header(tmp_path / "a.dcm", "dicom")
            assert len(read_signals(recording, [0])[0]) == recording.channels[0].num_samples
        except RecordingError:
            continue
