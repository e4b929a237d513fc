"""WFDB records: values as wfdb gives them, native rates, gaps, missing samples, damage."""

from fractions import Fraction

import numpy as np
import pytest
import wfdb

from engine.read import read_header, read_signals
from manifests.errors import RecordingError

SOUND = [
    "mitdb/100.hea",
    "mitdb/100-no-len.hea",
    "cpsc2021_af/data_101_6.hea",
    "challenge2021_12lead/Q/Q0010.hea",
    "wfdb_variants/03700181.hea",
    "wfdb_variants/binformats.hea",
    "wfdb_variants/mixedsignals.hea",
    "wfdb_variants/test01_00s_frame.hea",
    "wfdb_variants/test01_00s_skew.hea",
    "wfdb_variants/3000003_0003.hea",
    "wfdb_variants/multi-segment/041s/041s.hea",
]


def everything(path):
    recording = read_header(path, "wfdb")
    return recording, read_signals(recording, [channel.index for channel in recording.channels])


def write(folder, samples, lines, name="a", record_line=None):
    """A format-16 record in `a.dat` with the given signal lines."""
    np.asarray(samples, dtype="<i2").tofile(folder / "a.dat")
    head = record_line or f"{name} {len(lines)} 100 {len(samples)}"
    (folder / "a.hea").write_text("\n".join([head, *lines]) + "\n")
    return folder / "a.hea"


@pytest.mark.parametrize("name", SOUND)
def test_every_sample_equals_wfdb(shared_data, name):
    recording, signals = everything(shared_data / name)
    record = wfdb.rdrecord(str((shared_data / name).with_suffix("")), smooth_frames=False)
    assert len(signals) == record.n_sig
    for channel, ours, theirs in zip(recording.channels, signals, record.e_p_signal, strict=True):
        assert ours.dtype == np.float32
        assert ours.shape == (channel.num_samples,)
        assert np.allclose(ours, theirs, rtol=3e-7, atol=1e-6 * np.nanmax(np.abs(theirs)), equal_nan=True)
        assert channel.rate * recording.duration == channel.num_samples
    assert [channel.unit for channel in recording.channels] == list(record.units)


def test_frames_with_several_samples_keep_their_native_rates(shared_data):
    recording = read_header(shared_data / "wfdb_variants/mixedsignals.hea", "wfdb")
    assert [channel.rate for channel in recording.channels] == [
        Fraction("62.4725") * count for count in (4, 4, 4, 2, 2, 1)
    ]


def test_null_segments_are_left_out_and_the_rest_keeps_its_time(shared_data):
    name = "wfdb_variants/multi-segment/s25047/s25047-2704-05-04-10-44"
    recording, signals = everything(shared_data / f"{name}.hea")
    (segment,) = recording.segments
    assert segment.start == Fraction(25740, 125)
    record = wfdb.rdrecord(str(shared_data / name), smooth_frames=False)
    assert np.allclose(signals[0], record.e_p_signal[0][25740:], equal_nan=True, rtol=1e-6)


def test_georgia_headers_with_a_suffix_in_the_record_name_are_read(shared_data):
    recording, signals = everything(shared_data / "challenge2021_12lead/E/E00009.hea")
    assert "E00009.mat" in recording.repairs[0]
    assert recording.extra["Dx"] == "428750005,39732003,427084000"
    assert (recording.extra["Age"], recording.extra["Sex"]) == ("76", "Male")
    digital = np.fromfile(shared_data / "challenge2021_12lead/E/E00009.mat", dtype="<i2", offset=24).reshape(-1, 12)
    assert np.allclose(np.stack(signals, axis=1), digital / 4880, rtol=1e-6)


def test_the_invalid_code_is_nan_and_gain_0_is_uncalibrated(tmp_path):
    samples = [[1, 10], [-32768, 20], [3, -32768]]
    recording, (raw, scaled) = everything(write(tmp_path, samples, ["a.dat 16 0 16 0 0", "a.dat 16 10(5)/uV 16 0 0"]))
    assert [channel.calibrated for channel in recording.channels] == [False, True]
    assert np.array_equal(raw, np.float32([1, np.nan, 3]), equal_nan=True)
    assert np.allclose(scaled, np.float32([0.5, 1.5, np.nan]), equal_nan=True)


def test_a_missing_gain_is_said(tmp_path):
    recording, (signal,) = everything(write(tmp_path, [[200], [400]], ["a.dat 16"]))
    assert signal.tolist() == [1, 2]
    assert "no gain" in recording.repairs[0]
    assert recording.channels[0].calibrated


def test_a_short_signal_file_is_read_as_far_as_it_goes(tmp_path):
    path = write(tmp_path, [[1, 2], [3, 4]], ["a.dat 16 1/uV 16 0 0"] * 2, record_line="a 2 100 5")
    recording, signals = everything(path)
    assert recording.repairs == ("truncated: 2 of 5 frames in the signal file",)
    assert [signal.tolist() for signal in signals] == [[1, 3], [2, 4]]
    (tmp_path / "a.dat").write_bytes(b"")
    with pytest.raises(RecordingError) as caught:
        read_header(path, "wfdb")
    assert caught.value.reason == "TRUNCATED"


def test_a_checksum_that_differs_is_refused(tmp_path, shared_data):
    for suffix in ("hea", "mat"):
        (tmp_path / f"Q0010.{suffix}").write_bytes(
            (shared_data / f"challenge2021_12lead/Q/Q0010.{suffix}").read_bytes()
        )
    data = bytearray((tmp_path / "Q0010.mat").read_bytes())
    data[5000] ^= 4
    (tmp_path / "Q0010.mat").write_bytes(data)
    with pytest.raises(RecordingError, match="checksum") as caught:
        everything(tmp_path / "Q0010.hea")
    assert caught.value.reason == "SIGNAL_INVALID"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("wfdb_variants/1003.hea", "TRUNCATED"),
        ("sleep_edf/SC4001E0_PSG.hea", "TRUNCATED"),
        ("README.md", "HEADER_INVALID"),
    ],
)
def test_what_cannot_be_read_has_a_reason(shared_data, name, reason):
    with pytest.raises(RecordingError) as caught:
        read_header(shared_data / name, "wfdb")
    assert caught.value.reason == reason


def test_channels_come_in_the_order_asked(shared_data):
    recording = read_header(shared_data / "mitdb/100.hea", "wfdb")
    first, second = read_signals(recording, [0, 1])
    swapped = read_signals(recording, [1, 0])
    assert np.array_equal(first, swapped[1])
    assert np.array_equal(second, swapped[0])
