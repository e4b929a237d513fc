"""WFDB records: values as wfdb gives them, native rates, gaps, missing samples, damage."""

from fractions import Fraction

import numpy as np
import pytest
import wfdb

from engine.read import read_header, read_signals
from engine.readers.physionet import companions
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
    "wfdb_variants/100_3chan.hea",
    "wfdb_variants/310derive.hea",
    "wfdb_variants/311derive.hea",
    "wfdb_variants/a103l.hea",
    "wfdb_variants/flac_3_constant.hea",
    "wfdb_variants/flacformats.hea",
    "wfdb_variants/s0010_re.hea",
    "wfdb_variants/test01_00s.hea",
    "wfdb_variants/test01_00s_skewframe.hea",
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
    assert recording.repairs == ("record name with a suffix read without it",)
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


NUM_FRAMES = 1001  # neither even nor a multiple of 3
BITS = {"16": 16, "24": 24, "32": 32, "80": 8, "212": 12, "508": 8, "516": 16, "524": 24}


def packed(name: str, x: np.ndarray) -> bytes:
    """One signal in a format that wfdb does not write, by https://wfdb.io/spec/signal-files.html."""
    if name == "8":
        return np.diff(x, prepend=0).astype("<i1").tobytes()
    if name == "61":
        return x.astype(">i2").tobytes()
    if name == "160":
        return (x + 32768).astype("<u2").tobytes()
    first, second, third = np.pad(x, (0, -len(x) % 3)).reshape(-1, 3).T & 1023
    if name == "310":
        words = [first << 1 | (third & 31) << 11, second << 1 | third >> 5 << 11]
        return np.stack(words, axis=1).astype("<u2").tobytes()
    return (first | second << 10 | third << 20).astype("<u4").tobytes()


@pytest.mark.parametrize("name", [*BITS, "8", "61", "160", "310", "311"])
def test_every_format_gives_the_samples_that_were_written(tmp_path, monkeypatch, name):
    monkeypatch.setattr("engine.readers.physionet._BLOCK_FRAMES", 120)
    bits = BITS.get(name, {"61": 16, "160": 16}.get(name, 10))
    lowest = -(1 << (bits - 1))
    x = np.random.default_rng(1).integers(lowest + 1, -lowest, NUM_FRAMES)
    if name == "8":
        x = np.cumsum(np.random.default_rng(1).integers(-127, 128, NUM_FRAMES))
    x[[0, 500, -1]] = lowest if name != "8" else x[[0, 500, -1]]
    if name in BITS:
        wfdb.wrsamp("a", fs=100, units=["uV"], sig_name=["C3"], d_signal=x[:, None], fmt=[name], adc_gain=[2.5],
                    baseline=[7], write_dir=str(tmp_path))  # fmt: skip
    else:
        (tmp_path / "a.dat").write_bytes(packed(name, x))
        (tmp_path / "a.hea").write_text(f"a 1 100 {NUM_FRAMES}\na.dat {name} 2.5(7)/uV 16 0 0 {x.sum() % 65536} 0 C3\n")
    recording, (signal,) = everything(tmp_path / "a.hea")
    expected = (x - 7) / 2.5
    if name != "8":
        expected[[0, 500, -1]] = np.nan
    assert np.array_equal(signal, expected.astype(np.float32), equal_nan=True)
    theirs = wfdb.rdrecord(str(tmp_path / "a")).p_signal[:, 0]
    assert np.allclose(signal, theirs, rtol=3e-7, atol=1e-30, equal_nan=True)
    assert (recording.channels[0].label, recording.channels[0].unit, recording.repairs) == ("C3", "uV", ())
    wrong = np.fromfile(tmp_path / "a.dat", dtype=np.uint8)
    wrong[len(wrong) // 2 & ~3] ^= 16
    wrong.tofile(tmp_path / "a.dat")
    with pytest.raises(RecordingError) as caught:
        everything(tmp_path / "a.hea")
    assert caught.value.reason == "SIGNAL_INVALID"


def test_blocks_of_frames_join_without_a_seam(shared_data, monkeypatch):
    for name in (
        "wfdb_variants/mixedsignals.hea",
        "wfdb_variants/test01_00s_skewframe.hea",
        "wfdb_variants/03700181.hea",
    ):
        _, whole = everything(shared_data / name)
        monkeypatch.setattr("engine.readers.physionet._BLOCK_FRAMES", 996)
        _, blocks = everything(shared_data / name)
        monkeypatch.undo()
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(whole, blocks, strict=True))


def test_signals_are_shifted_by_different_skews(tmp_path):
    samples = np.arange(1, 31).reshape(10, 3)
    lines = ["a.dat 16:3 1/uV 16 0 1", "a.dat 16 1/uV 16 0 2", "a.dat 16:1 1/uV 16 0 3"]
    _, signals = everything(write(tmp_path, samples, lines))
    for column, (signal, skew) in enumerate(zip(signals, (3, 0, 1), strict=True)):
        expected = np.append(samples[skew:, column].astype(float), [np.nan] * skew)
        assert np.array_equal(signal, expected, equal_nan=True)


def test_a_byte_offset_and_a_negative_gain_are_honoured(tmp_path):
    path = write(tmp_path, [[1, 2], [3, 4]], ["a.dat 16+24 -2(1)/mV 16 0 1", "a.dat 16+24 1e1/mV 16 0 2"])
    (tmp_path / "a.dat").write_bytes(bytes(24) + (tmp_path / "a.dat").read_bytes())
    _, signals = everything(path)
    assert [signal.tolist() for signal in signals] == [[0, -1], [np.float32(0.2), np.float32(0.4)]]


def test_a_gain_of_0_stays_uncalibrated_with_a_unit(tmp_path):
    recording, _ = everything(write(tmp_path, [[1, 2]], ["a.dat 16 0/mV 16 0 0", "a.dat 16 1e400/mV 16 0 0"]))
    assert [channel.calibrated for channel in recording.channels] == [False, False]


def segments(folder, lines, layout=None, **parts):
    """A multi-segment record of format-16 segments given as arrays (frames, signals); gains are 10."""
    for name, (samples, labels) in parts.items():
        np.asarray(samples, dtype="<i2").tofile(folder / f"{name}.dat")
        head = [f"{name} {len(labels)} 100 {len(samples)}"]
        sums = np.sum(samples, axis=0)
        head += [f"{name}.dat 16 10/uV 16 0 {samples[0][i]} {sums[i]} 0 {label}" for i, label in enumerate(labels)]
        (folder / f"{name}.hea").write_text("\n".join(head) + "\n")
    if layout:
        text = [f"layout {len(layout)} 100 0", *(f"~ 0 10/uV 16 0 0 0 0 {label}" for label in layout)]
        (folder / "layout.hea").write_text("\n".join(text) + "\n")
    (folder / "m.hea").write_text("\n".join(lines) + "\n")
    return folder / "m.hea"


ONE, TWO = np.arange(10, 30).reshape(10, 2), np.arange(50, 62).reshape(6, 2)


def test_a_fixed_layout_with_a_missing_segment_has_a_gap(tmp_path):
    lines = ["m/4 2 100 24", "one 10", "~ 5", "two 6", "~ 3"]
    path = segments(tmp_path, lines, one=(ONE, ["C3", "C4"]), two=(TWO, ["C3", "C4"]))
    recording, signals = everything(path)
    assert [(s.start, s.duration) for s in recording.segments] == [
        (0, Fraction(1, 10)),
        (Fraction(15, 100), Fraction(6, 100)),
    ]
    for column, signal in enumerate(signals):
        assert signal.tolist() == pytest.approx(np.concatenate([ONE[:, column], TWO[:, column]]) / 10)
    with pytest.raises(AttributeError):  # wfdb takes a fixed layout to have no missing segments
        wfdb.rdrecord(str(path.with_suffix("")))


def test_a_variable_layout_places_signals_by_name_and_leaves_the_others_missing(tmp_path):
    lines = ["m/3 3 100 16", "layout 0", "one 10", "two 6"]
    parts = {"one": (ONE, ["C4", "C3"]), "two": (TWO, ["O1", "C3"])}
    recording, signals = everything(segments(tmp_path, lines, layout=["C3", "C4", "O1"], **parts))
    nan6, nan10 = [np.nan] * 6, [np.nan] * 10
    expected = [
        np.concatenate([ONE[:, 1], TWO[:, 1]]) / 10,
        np.concatenate([ONE[:, 0] / 10, nan6]),
        np.concatenate([nan10, TWO[:, 0] / 10]),
    ]
    assert [channel.label for channel in recording.channels] == ["C3", "C4", "O1"]
    assert all(np.allclose(a, b, equal_nan=True) for a, b in zip(signals, expected, strict=True))
    theirs = wfdb.rdrecord(str(tmp_path / "m")).p_signal
    assert np.allclose(theirs, np.stack(signals, axis=1), equal_nan=True)


def test_a_short_segment_is_read_as_far_as_it_goes_and_a_missing_one_refused(tmp_path):
    lines = ["m/2 2 100 16", "one 10", "two 6"]
    path = segments(tmp_path, lines, one=(ONE, ["C3", "C4"]), two=(TWO, ["C3", "C4"]))
    (tmp_path / "one.dat").write_bytes((tmp_path / "one.dat").read_bytes()[:-9])
    recording, signals = everything(path)
    assert recording.repairs == ("truncated: 7 of 10 frames in the signal file",)
    assert [(s.start, s.duration) for s in recording.segments] == [
        (0, Fraction(7, 100)),
        (Fraction(1, 10), Fraction(6, 100)),
    ]
    assert signals[1].tolist() == pytest.approx(np.concatenate([ONE[:7, 1], TWO[:, 1]]) / 10)
    for name in ("two.dat", "two.hea"):
        (tmp_path / name).unlink()
        with pytest.raises(RecordingError, match=name) as caught:
            read_header(path, "wfdb")
        assert caught.value.reason == "TRUNCATED"


@pytest.mark.parametrize(
    ("lines", "word"),
    [
        (["m/2 2 100 16", "one 10", "three 6"], "segments of 2 and 1 signals"),
        (["m/2 2 50 16", "one 10", "two 6"], "a segment of 100 Hz"),
        (["m/2 2 100 16", "one 8", "two 6"], "8 frames of a segment that has 10"),
        (["m/1 2 100 16", "m 16"], "breaks the rules"),
        (["m/2 2 100 16", "one 10", "../one 6"], "other folders"),
        (["m/2 2 100 16", "one 10", "/etc/passwd 6"], "other folders"),
        (["m 1 100 16", "/etc/passwd 16 1/uV"], "other folders"),
        (["m 1 100 16", "../a.dat 16 1/uV"], "other folders"),
        (["m 2 100 16", "one.dat 16 1/uV"], "2 signals, but 1 lines"),
        (["m 99999999 100 16", "one.dat 16 1/uV"], "99999999 signals"),
        (["m 1 0 16", "one.dat 16 1/uV"], "frames per second"),
        (["m 1 100 16", "one.dat 16x0 1/uV"], "0 samples per frame"),
        (["m 1 100 16", "one.dat 16:99 1/uV"], "a skew longer"),
        (["m 3 100 2", "one.dat 16 1/uV", "two.dat 16 1/uV", "one.dat 16 1/uV"], "do not follow each other"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path, lines, word):
    parts = {"one": (ONE, ["C3", "C4"]), "two": (TWO, ["C3", "C4"]), "three": (TWO[:, :1], ["C3"])}
    with pytest.raises(RecordingError, match=word) as caught:
        read_header(segments(tmp_path, lines, **parts), "wfdb")
    assert caught.value.reason == "HEADER_INVALID"


def test_no_message_quotes_the_header(tmp_path):
    lines = ["m 1 100 16", "one.dat Jane_Doe 1/uV"], ["m Jane_Doe 100 16", "one.dat 16 1/uV"], ["m 1 100 16 Jane Doe"]
    for text in lines:
        with pytest.raises(RecordingError) as caught:
            read_header(segments(tmp_path, text, one=(ONE, ["C3", "C4"])), "wfdb")
        assert "Doe" not in str(caught.value)


def test_companions_of_a_multi_segment_record_are_its_headers_and_signal_files(shared_data, tmp_path):
    folder = shared_data / "wfdb_variants/multi-segment/041s"
    names = sorted(path.name for path in companions(folder / "041s.hea"))
    assert names == ["041s01.dat", "041s01.hea", "041s02.dat", "041s02.hea"]
    parts = companions(shared_data / "wfdb_variants/multi-segment/s25047/s25047-2704-05-04-10-44.hea")
    assert len(parts) == 19 + 18
    assert all(path.is_file() for path in parts)
    georgia = companions(shared_data / "challenge2021_12lead/E/E00009.hea")
    assert [path.name for path in georgia] == ["E00009.mat"]
    (tmp_path / "a.hea").write_text("a/3 1 100 5\n../b 5\n/etc/passwd 5\na 3\nc 4\n")
    assert [path.name for path in companions(tmp_path / "a.hea")] == ["a.hea", "c.hea"]


@pytest.mark.parametrize("data", [b"", b"a 1\0", b"#\n", b"\xff\xfe\n", b"a/2 1 100\n\n~ 4\n"])
def test_a_header_that_cannot_be_read_has_no_companions_and_stops_nothing(tmp_path, data):
    (tmp_path / "a.hea").write_bytes(data)
    assert companions(tmp_path / "a.hea") == []
    assert companions(tmp_path / "none.hea") == []
