"""Persyst: headers and samples written by hand, gaps, midnight, pointers, damage; MNE beside it."""

from fractions import Fraction

import mne
import numpy as np
import pytest

from engine.read import read_header, read_signals, sniff
from engine.readers.persyst import companions
from manifests.errors import RecordingError

LAY = """[FileInfo]
File={file}
FileType=Interleaved
SamplingRate=200
HeaderLength=0
Calibration=0.25
WaveformCount=3
DataType={datatype}
[ChannelMap]
Fp1-Ref=1
c3-Ref=2
ECG=3
[Patient]
First=Planted
Last=Name
BirthDate=01/02/63
Sex=F
Hand=R
ID=4711
TestDate=01/02/2024
TestTime=22:15:00
[SampleTimes]
{times}
[Comments]
2.5,0.5,0,100,Eyes open, quiet
1.0,0.0,0,100,Start
"""


@pytest.fixture
def stored():
    return np.random.default_rng(4).integers(-30000, 30000, (2000, 3))


def persyst(path, stored, *, times="0=80100.0", datatype=0, file=None):
    path.with_suffix(".dat").write_bytes(stored.astype("<i4" if datatype == 7 else "<i2").tobytes())
    path.write_text(LAY.format(file=file or f"{path.stem}.dat", datatype=datatype, times=times), encoding="utf-8")
    return path


def refusal(path):
    with pytest.raises(RecordingError) as caught:
        read_signals(read_header(path, "persyst"), [0])
    return caught.value.reason


@pytest.mark.parametrize("datatype", [0, 7])
def test_samples_labels_comments_and_clock(tmp_path, stored, datatype):
    path = persyst(tmp_path / "a.lay", stored, datatype=datatype)
    recording = read_header(path, "persyst")
    assert sniff(path) == "persyst"
    assert companions(path) == [tmp_path / "a.dat"]
    assert [channel.label for channel in recording.channels] == ["Fp1-Ref", "c3-Ref", "ECG"]
    assert {(channel.rate, channel.unit, channel.num_samples) for channel in recording.channels} == {(200, "uV", 2000)}
    got = read_signals(recording, [2, 0])
    np.testing.assert_array_equal(got, stored[:, [2, 0]].T * np.float32(0.25))
    found = [(mark.onset, mark.duration, mark.text) for mark in recording.annotations]
    assert found == [(1, 0, "Start"), (Fraction(5, 2), Fraction(1, 2), "Eyes open, quiet")]
    assert recording.extra["start_time"] == "22:15:00"
    assert not {"Planted", "Name", "4711", "1963"} & set(repr(recording).replace("'", " ").split())
    raw = mne.io.read_raw_persyst(path, preload=True, verbose="ERROR")
    np.testing.assert_allclose(np.stack(got) * 1e-6, raw.get_data()[[2, 0]], rtol=1e-6)


def test_a_jump_of_the_clock_is_a_gap_and_midnight_is_none(tmp_path, stored):
    times = (
        "0=86398.0\n600=1.0\n1000=3.0\n1400=15.0\n1800=17.0"  # 600 samples later it is 0:00:01; 10 s are lost at 1400
    )
    recording = read_header(persyst(tmp_path / "a.lay", stored, times=times), "persyst")
    assert [(part.start, part.duration) for part in recording.segments] == [(0, 7), (17, 3)]
    assert recording.extra["start_time"] == "23:59:58"


def test_a_header_without_a_patient_is_read(tmp_path, stored):
    path = persyst(tmp_path / "a.lay", stored)
    text = path.read_text()
    path.write_text(text[: text.index("[Patient]")])
    recording = read_header(path, "persyst")
    assert recording.extra["start_time"] == ""
    assert len(recording.segments) == 1


def test_pointers_stay_in_the_folder(tmp_path, stored):
    folder = tmp_path / "inner"
    folder.mkdir()
    persyst(tmp_path / "other.lay", stored)
    path = persyst(folder / "a.lay", stored, file="../other.dat")
    assert companions(path) == [folder / "a.dat"]
    assert "pointer" in read_header(path, "persyst").repairs[0]
    (folder / "a.dat").unlink()
    assert companions(path) == []
    assert refusal(path) == "TRUNCATED"


def test_a_cut_file_ends_at_its_last_whole_sample(tmp_path, stored):
    path = persyst(tmp_path / "a.lay", stored)
    path.with_suffix(".dat").write_bytes(stored.astype("<i2").tobytes()[: 6 * 700 + 3])
    recording = read_header(path, "persyst")
    assert recording.channels[0].num_samples == 700
    assert recording.repairs == ("the last sample is incomplete: left out",)
    path.with_suffix(".dat").write_bytes(b"12345")
    assert refusal(path) == "TRUNCATED"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("[FileInfo]", "[Other]", "NOT_A_RECORDING"),
        ("SamplingRate=200", "SamplingRate=0", "HEADER_INVALID"),
        ("SamplingRate=200", "SamplingRate=", "HEADER_INVALID"),
        ("WaveformCount=3", "WaveformCount=4", "HEADER_INVALID"),
        ("DataType=0", "DataType=9", "HEADER_INVALID"),
        ("Calibration=0.25", "Calibration=nan", "HEADER_INVALID"),
        ("ECG=3", "ECG=three", "HEADER_INVALID"),
        ("FileType=Interleaved", "FileType=Packed", "FORMAT_UNSUPPORTED"),
        ("HeaderLength=0", "HeaderLength=64", "FORMAT_UNSUPPORTED"),
        ("HeaderLength=0", "HeaderLength=[", "HEADER_INVALID"),
    ],
)
def test_a_header_that_lies_is_refused_by_name(tmp_path, stored, old, new, reason):
    path = persyst(tmp_path / "a.lay", stored)
    path.write_text(path.read_text().replace(old, new))
    assert refusal(path) == reason
