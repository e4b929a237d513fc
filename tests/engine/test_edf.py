"""EDF family: values and edges of real files, gaps, repairs, encodings, refusals; peers are in test_edf_peers."""

import gzip
import struct
import warnings
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import edfio
import numpy as np
import pytest

from engine.read import read_header, read_signals, sniff
from engine.recording import Recording
from manifests.errors import ConfigError, RecordingError

SOUND = [
    "eegmmidb/S001/S001R04.edf",
    "sleep_edf/short_psg_SC4001_first5min.edf",
    "sleep_edf/short_psg_SC4001_first5min.bdf",
    "dreams_spindles/excerpt3.edf",
    "cap_sleep/brux2_100s_5ch.edf",
    "ucddb_epochs/ucd018_C3A2_reassembled.edf",
    "malformed_edge_cases/bdf_test.bdf",
    "malformed_edge_cases/bdf_test.edf",
    "malformed_edge_cases/duplicate_channel_labels.edf",
    "malformed_edge_cases/edfAnnonC.edf",
    "malformed_edge_cases/edfPlusD.edf",
    "malformed_edge_cases/eeglab_test_nrec_minus1.bdf",
    "malformed_edge_cases/pyedflib_test_generator.bdf",
    "malformed_edge_cases/test_reduced_11rates.edf",
    "malformed_edge_cases/test_uneven_samp.edf",
    "mne_python_testdata/edf/test.bdf",
    "resmed_cpap/DATALOG/20230822/20230822_225132_BRP.edf",
]


@dataclass
class Signal:
    """A signal to write: digital values per record, and its header fields."""

    label: str = "C3"
    unit: str = "uV"
    limits: tuple = ("-100", "100", "-1000", "1000")
    records: list = field(default_factory=lambda: [np.arange(i * 4, i * 4 + 4) for i in range(5)])


def tal(text: str, width: int = 40, encoding: str = "utf-8") -> np.ndarray:
    raw = text.encode(encoding).ljust(width, b"\0")
    return np.frombuffer(raw, dtype="<i2")


def annotations(*texts: str) -> Signal:
    return Signal("EDF Annotations", "", ("-1", "1", "-32768", "32767"), [tal(text) for text in texts])


def write(path: Path, signals, *, reserved="", **fields) -> Path:
    """EDF with the given header fields as they stand, right or wrong."""
    values = {
        "num_records": str(len(signals[0].records)),
        "duration": "1",
        "header_bytes": str(256 * (1 + len(signals))),
        "start_date": "01.02.03",
        "start_time": "22.30.00",
        **fields,
    }
    widths = [8, 80, 80, 8, 8, 8, 44, 8, 8, 4]
    texts = ["0", "X", "X", values["start_date"], values["start_time"], values["header_bytes"], reserved]
    texts += [values["num_records"], values["duration"], str(len(signals))]
    header = b"".join(text.encode("latin-1").ljust(width) for text, width in zip(texts, widths, strict=True))
    columns = [(16, [s.label for s in signals]), (80, [""] * len(signals)), (8, [s.unit for s in signals])]
    columns += [(8, [s.limits[i] for s in signals]) for i in range(4)]
    columns += [(80, [""] * len(signals)), (8, [str(len(s.records[0])) for s in signals]), (32, [""] * len(signals))]
    for width, column in columns:
        header += b"".join(text.encode("latin-1").ljust(width) for text in column)
    records = b"".join(
        np.asarray(s.records[i], dtype="<i2").tobytes() for i in range(len(signals[0].records)) for s in signals
    )
    path.write_bytes(header + records + fields.get("extra", b""))
    return path


def everything(path: Path) -> tuple[Recording, list[np.ndarray]]:
    recording = read_header(path, "edf")
    return recording, read_signals(recording, [channel.index for channel in recording.channels])


def refusal(path: Path) -> RecordingError:
    with pytest.raises(RecordingError) as caught:
        read_header(path, "edf")
    return caught.value


def reference(path: Path) -> list:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with path.open("rb") as stream:
            is_bdf = stream.read(1) == b"\xff"
        return list((edfio.read_bdf if is_bdf else edfio.read_edf)(path.read_bytes()).signals)


@pytest.mark.parametrize("name", SOUND)
def test_every_sample_equals_edfio(shared_data, name):
    recording, signals = everything(shared_data / name)
    expected = reference(shared_data / name)
    assert [channel.label for channel in recording.channels] == [signal.label for signal in expected]
    for channel, ours, theirs in zip(recording.channels, signals, expected, strict=True):
        assert ours.dtype == np.float32
        assert ours.shape == theirs.data.shape == (channel.num_samples,)
        assert float(channel.rate) == pytest.approx(theirs.sampling_frequency, rel=1e-12)
        assert channel.unit == theirs.physical_dimension
        scale = np.abs(theirs.data).max() or 1.0
        offset = abs((theirs.physical_max + theirs.physical_min) / 2)
        assert np.abs(ours - theirs.data).max() <= 4e-7 * (scale + offset), channel.label
    assert sum(segment.duration for segment in recording.segments) == recording.duration
    assert all(channel.rate * recording.duration == channel.num_samples for channel in recording.channels)


def test_hypnogram_file_has_annotations_and_no_channels(shared_data):
    recording = read_header(shared_data / "sleep_edf/SC4001EC-Hypnogram.edf", "edf")
    assert recording.channels == ()
    assert recording.segments == ()
    assert len(recording.annotations) == 154
    assert recording.annotations[0].text == "Sleep stage W"
    assert recording.annotations[0].duration == 30630
    assert {a.text for a in recording.annotations} >= {"Sleep stage R", "Sleep stage 4", "Sleep stage ?"}


def test_gaps_of_edf_plus_d_become_segments(shared_data):
    recording = read_header(shared_data / "malformed_edge_cases/edfPlusD.edf", "edf")
    assert len(recording.segments) == 6
    ends = [segment.start + segment.duration for segment in recording.segments]
    assert all(end < after.start for end, after in zip(ends, recording.segments[1:], strict=False))


@pytest.mark.parametrize("reserved", ["EDF+C", "EDF+D"])
def test_a_jump_in_record_onsets_is_a_gap_in_both_kinds(tmp_path, reserved):
    stamps = ["+0.5\x14\x14\0", "+1.5\x14\x14\0+1.75\x151.5\x14Sleep stage 2\x14\0"]
    stamps += ["+10.25\x14\x14\0", "+11.25\x14\x14\0", "+12.25\x14\x14\0"]
    path = write(tmp_path / "gap.edf", [Signal(), annotations(*stamps)], reserved=reserved)
    recording, (signal,) = everything(path)
    spans = [(segment.start, segment.duration) for segment in recording.segments]
    assert spans == [(0, 2), (Fraction(39, 4), 3)]
    (stage,) = recording.annotations
    assert (stage.onset, stage.duration, stage.text) == (Fraction(5, 4), Fraction(3, 2), "Sleep stage 2")
    assert signal == pytest.approx(np.arange(20) / 10)


def test_onsets_rounded_to_milliseconds_are_no_gaps(tmp_path):
    stamps = [f"+{i / 3:.3f}\x14\x14\0" for i in range(5)]
    path = write(tmp_path / "a.edf", [Signal(), annotations(*stamps)], reserved="EDF+C", duration="0.333333")
    recording = read_header(path, "edf")
    assert len(recording.segments) == 1
    assert recording.channels[0].rate == Fraction(4) / Fraction("0.333333")


def test_latin_1_annotations_are_read(tmp_path):
    signal = annotations(*["+0\x14\x14\0"] * 5)
    signal.records = [tal(f"+{i}\x14\x14\0") for i in range(5)]
    raw = "+0\x14\x14\0+1\x14Öffnen\x14\0".encode("latin-1").ljust(40, b"\0")
    signal.records[0] = np.frombuffer(raw, dtype="<i2")
    recording = read_header(write(tmp_path / "a.edf", [Signal(), signal], reserved="EDF+C"), "edf")
    assert [annotation.text for annotation in recording.annotations] == ["Öffnen"]


def test_negative_gain_inverts_and_is_never_swapped(tmp_path):
    for limits in (("100", "-100", "-1000", "1000"), ("-100", "100", "1000", "-1000")):
        _, (signal,) = everything(write(tmp_path / "a.edf", [Signal(limits=limits)]))
        assert signal == pytest.approx(-np.arange(20) / 10, abs=1e-6)


NO_GAIN = [
    ("5", "5", "-1", "1"),
    ("-1", "1", "7", "7"),
    ("", "1", "-1", "1"),
    ("0", "9e99", "-1", "1"),
    ("nan", "1", "0", "1"),
]
NO_GAIN += [("0", "1e-40", "-1", "1"), ("inf", "1", "0", "1"), ("1e999", "1", "0", "1"), ("1/2", "1", "0", "1")]


@pytest.mark.parametrize("limits", NO_GAIN)
def test_a_channel_without_gain_is_uncalibrated_and_the_others_stay(tmp_path, limits):
    recording, signals = everything(write(tmp_path / "a.edf", [Signal(limits=limits), Signal()]))
    assert [channel.calibrated for channel in recording.channels] == [False, True]
    assert np.array_equal(signals[0], np.arange(20))
    assert signals[1] == pytest.approx(np.arange(20) / 10)
    assert "has no gain" in recording.repairs[0]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_records": "-1"}, "number of records -1 replaced by the 5"),
        ({"header_bytes": "9999"}, "header byte count '9999' replaced by 512"),
        ({"num_records": "8"}, "truncated: 5 of 8 records"),
        ({"num_records": "3"}, "file holds 5 records where the header says 3"),
        ({"extra": b"\x01\x02\x03"}, "3 bytes after the last complete record"),
        ({"start_date": "00.00.00"}, "start date does not exist"),
        ({"start_time": "25.61.00"}, "start time does not exist"),
        ({"duration": "1\0\0"}, "NUL"),
    ],
)
def test_header_repairs_are_listed_and_change_no_sample(tmp_path, change, word):
    recording, (signal,) = everything(write(tmp_path / "a.edf", [Signal()], **change))
    assert [repair for repair in recording.repairs if word in repair], recording.repairs
    assert signal == pytest.approx(np.arange(20) / 10)


def test_a_sound_file_needs_no_repair(tmp_path):
    recording = read_header(write(tmp_path / "a.edf", [Signal()]), "edf")
    assert recording.repairs == ()
    assert recording.extra["start_time"] == "22:30:00"


def test_decimal_commas_are_read_as_points(tmp_path):
    recording, (signal,) = everything(write(tmp_path / "a.edf", [Signal(limits=("-100,5", "100,5", "-1000", "1000"))]))
    assert signal == pytest.approx(np.arange(20) * 0.1005)
    assert "decimal comma" in recording.repairs[0]


def test_content_decides_and_not_the_suffix(tmp_path):
    path = write(tmp_path / "a.rec", [Signal()])
    assert read_header(path, "edf").channels[0].label == "C3"
    (tmp_path / "b.edf").write_bytes(b"onset,duration\n1,2\n")
    assert refusal(tmp_path / "b.edf").reason == "NOT_A_RECORDING"


@pytest.mark.parametrize(
    ("name", "reason", "word"),
    [
        ("malformed_edge_cases/gitlfs_pointer_short_psg.edf", "NOT_A_RECORDING", "git-lfs"),
        ("malformed_edge_cases/crlf_mangled_S001R04.edf", "HEADER_INVALID", "line ends"),
        ("malformed_edge_cases/truncated_ds001787_sub-001_eeg.bdf", "TRUNCATED", "no complete record"),
        ("resmed_cpap/DATALOG/20230822/20230822_224924_BRP.edf", "TRUNCATED", "no complete record"),
    ],
)
def test_what_is_no_recording_is_refused_with_a_reason(shared_data, name, reason, word):
    error = refusal(shared_data / name)
    assert error.reason == reason
    assert word in str(error)
    assert Path(name).name in str(error)


def test_a_file_that_lost_carriage_returns_is_refused(shared_data, tmp_path):
    data = (shared_data / "dreams_spindles/excerpt3.edf").read_bytes()
    assert data.count(b"\r\n") == 65
    (tmp_path / "lost.edf").write_bytes(data.replace(b"\r\n", b"\n"))
    error = refusal(tmp_path / "lost.edf")
    assert error.reason == "TRUNCATED"
    assert "bytes were lost" in str(error)
    (tmp_path / "short.edf").write_bytes(data[:-67])  # merely cut: read, and said
    assert "truncated: 899 of 900 records" in read_header(tmp_path / "short.edf", "edf").repairs[0]


@pytest.mark.parametrize("name", [name for name in SOUND if "edf/test.bdf" not in name])
def test_a_sound_file_that_is_merely_cut_is_still_read(shared_data, tmp_path, name):
    data = (shared_data / name).read_bytes()
    (tmp_path / "cut").write_bytes(data[:-1])
    whole, cut = read_header(shared_data / name, "edf"), read_header(tmp_path / "cut", "edf")
    assert cut.repairs[len(whole.repairs) :] or "truncated" in " ".join(cut.repairs)
    first = [whole.channels[0].index]
    before, after = read_signals(whole, first)[0], read_signals(cut, first)[0]
    assert 0 < len(after) < len(before)
    assert np.array_equal(before[: len(after)], after)


def test_bytes_in_the_middle_that_shift_the_record_times_are_refused(tmp_path):
    signals = [Signal(), annotations(*[f"+{i}\x14\x14\0" for i in range(5)])]
    path = write(tmp_path / "a.edf", signals, reserved="EDF+C")
    data = path.read_bytes()
    path.write_bytes(data[:780] + b"\x0d" + data[780:])
    error = refusal(path)
    assert error.reason == "HEADER_INVALID"
    assert "record times are unreadable" in str(error)


def test_more_bytes_than_a_record_that_are_no_record_are_refused(tmp_path):
    error = refusal(write(tmp_path / "a.edf", [Signal()], num_records="3", extra=b"\1\2\3"))
    assert error.reason == "HEADER_INVALID"


def test_edf_plus_d_without_record_times_is_refused(tmp_path):
    assert refusal(write(tmp_path / "a.edf", [Signal()], reserved="EDF+D")).reason == "ANNOTATION_INVALID"


@pytest.mark.parametrize("cut", [0, 7, 100, 300, 511])
def test_a_cut_header_is_refused_whatever_its_length(tmp_path, cut):
    path = write(tmp_path / "a.edf", [Signal()])
    path.write_bytes(path.read_bytes()[:cut])
    assert refusal(path).reason in {"NOT_A_RECORDING", "TRUNCATED"}


def test_24_bits_keep_their_sign(tmp_path):
    path = write(tmp_path / "a.bdf", [Signal(limits=("-8388608", "8388607", "-8388608", "8388607"))])
    header = bytearray(path.read_bytes()[:512])
    header[:8] = b"\xffBIOSEMI"
    values = [-8388608, -1, 0, 8388607] * 5
    path.write_bytes(bytes(header) + b"".join(struct.pack("<i", value)[:3] for value in values))
    _, (signal,) = everything(path)
    assert signal.tolist() == values


def test_channels_come_in_the_order_asked(shared_data):
    recording = read_header(shared_data / "sleep_edf/short_psg_SC4001_first5min.edf", "edf")
    first, third = read_signals(recording, [0, 3])
    swapped = read_signals(recording, [3, 0])
    assert np.array_equal(first, swapped[1])
    assert np.array_equal(third, swapped[0])
    assert len(third) == 300


def stamped(*onsets: str) -> Signal:
    return annotations(*[f"{onset}\x14\x14\0" for onset in onsets])


def test_records_that_overlap_begin_where_the_one_before_ends(tmp_path):
    path = write(tmp_path / "a.edf", [Signal(), stamped("+0", "+1", "+1.5", "+2.5", "+5")], reserved="EDF+D")
    recording, (signal,) = everything(path)
    assert [(s.start, s.duration) for s in recording.segments] == [(0, 2), (2, 2), (5, 1)]
    assert recording.repairs == ("1 records overlap the one before: they begin where it ends",)
    assert signal == pytest.approx(np.arange(20) / 10)


@pytest.mark.parametrize("reserved", ["EDF+C", "EDF+D"])
def test_record_times_that_go_back_are_refused(tmp_path, reserved):
    path = write(tmp_path / "a.edf", [Signal(), stamped("+0", "+1", "+2", "+0", "+1")], reserved=reserved)
    error = refusal(path)
    assert error.reason == "HEADER_INVALID"
    assert "record 3 begins 3 s before" in str(error)


def test_a_missing_record_time_follows_the_one_before_and_hides_no_gap(tmp_path):
    signals = [Signal(), annotations("+7\x14\x14\0", "", "+9\x14\x14\0", "+20\x14\x14\0", "")]
    recording = read_header(write(tmp_path / "a.edf", signals, reserved="EDF+C"), "edf")
    assert [(s.start, s.duration) for s in recording.segments] == [(0, 3), (13, 2)]
    assert recording.repairs == ("2 of 5 records have no onset: taken to follow the one before",)
    assert refusal(write(tmp_path / "a.edf", signals, reserved="EDF+D")).reason == "ANNOTATION_INVALID"


def test_record_times_with_too_few_decimals_are_no_gaps_and_full_seconds_are(tmp_path):
    rounded = write(tmp_path / "a.edf", [Signal(), stamped("+0", "+0.33", "+0.67", "+1.00", "+1.33")],
                    reserved="EDF+C", duration="0.333333")  # fmt: skip
    assert len(read_header(rounded, "edf").segments) == 1
    exact = write(tmp_path / "b.edf", [Signal(), stamped("+0", "+1", "+3", "+4", "+5")], reserved="EDF+C")
    assert [s.start for s in read_header(exact, "edf").segments] == [0, 3]


def test_record_times_that_drift_are_said(tmp_path):
    long = Signal(records=[np.arange(4)] * 600)
    onsets = [f"+{index * 1.0005:.4f}" for index in range(600)]
    recording = read_header(write(tmp_path / "a.edf", [long, stamped(*onsets)], reserved="EDF+C"), "edf")
    assert len(recording.segments) == 1
    assert recording.repairs == ("record times of segment 0 drift by 0.299 s: placed by sampling rate",)


def test_the_first_record_tells_the_fraction_of_a_second(tmp_path):
    signals = [
        Signal(),
        annotations("+0.25\x14\x14\0+2\x14Lights off\x14\0", *[f"+{i}.25\x14\x14\0" for i in range(1, 5)]),
    ]
    recording = read_header(write(tmp_path / "a.edf", signals, reserved="EDF+C"), "edf")
    assert (recording.extra["start_time"], recording.extra["start_subsecond"]) == ("22:30:00", "1/4")
    assert recording.annotations[0].onset == Fraction(7, 4)
    assert read_header(write(tmp_path / "b.edf", [Signal()]), "edf").extra["start_subsecond"] == "0"


WORDS = {"shift_jis": "睡眠", "utf-8": "睡眠", "latin-1": "Öl"}


@pytest.mark.parametrize(
    ("encoding", "declared", "expected", "said"),
    [
        ("utf-8", {}, "睡眠", ["1 header fields are not ASCII: read as utf-8"]),
        ("latin-1", {}, "Öl", ["1 header fields are not ASCII: read as latin-1", "1 different annotation texts"]),
        ("shift_jis", {"encoding": "shift_jis"}, "睡眠", ["read as shift_jis", "not UTF-8: read as shift_jis"]),
        ("shift_jis", {}, "睡眠".encode("shift_jis").decode("latin-1"), ["read as latin-1", "read as latin-1"]),
    ],
)
def test_labels_and_annotations_are_utf_8_or_what_is_declared(tmp_path, encoding, declared, expected, said):
    word = WORDS[encoding].encode(encoding).decode("latin-1")
    notes = stamped("+0", "+1", "+2", "+3", "+4")
    notes.records[0] = tal(f"+0\x14\x14\0+1\x14{word}\x14\0", encoding="latin-1")
    recording = read_header(write(tmp_path / "a.edf", [Signal(label=word), notes], reserved="EDF+C"), "edf", declared)
    assert recording.channels[0].label == recording.annotations[0].text == expected
    assert len(recording.repairs) == len(said)
    assert all(part in repair for part, repair in zip(said, recording.repairs, strict=True))
    assert np.array_equal(read_signals(recording, [0])[0], everything(write(tmp_path / "b.edf", [Signal()]))[1][0])


def test_an_encoding_that_nobody_knows_is_a_fault_of_the_corpus_file(tmp_path):
    with pytest.raises(ConfigError, match="shift_jis"):
        read_header(write(tmp_path / "a.edf", [Signal()]), "edf", {"encoding": "klingon"})


def test_no_repair_and_no_message_quotes_the_header(tmp_path):
    name = "Doe Jane"
    fields = {"num_records": "-1", "header_bytes": name, "start_date": name, "start_time": name, "duration": "1\0"}
    bad = Signal(label=name, unit="µ" + name[:6], limits=(name, "1,5", name, "\0" + name[:7]))
    recording = read_header(write(tmp_path / "a.edf", [bad, Signal()], **fields), "edf")
    assert len(recording.repairs) >= 7
    assert not [repair for repair in recording.repairs if "Doe" in repair or "Jane" in repair]
    for duration, num_records in ((name, "5"), ("1", name)):
        broken = write(tmp_path / "b.edf", [bad, Signal()], duration=duration, num_records=num_records)
        broken.write_bytes(broken.read_bytes()[:700])
        assert "Doe" not in str(refusal(broken))


def test_records_of_no_duration_hold_annotations_and_nothing_else(tmp_path):
    notes = stamped("+0", "+0", "+0", "+0", "+0")
    recording = read_header(write(tmp_path / "a.edf", [Signal(), notes], reserved="EDF+C", duration="0"), "edf")
    assert (recording.channels, recording.segments) == ((), ())
    assert recording.repairs == ("signal 0 has no sampling rate: left out",)
    assert refusal(write(tmp_path / "a.edf", [Signal()], duration="0")).reason == "HEADER_INVALID"


@pytest.mark.parametrize("duration", ["-1", "nan", "inf", "1e308", "1e-99", "1e99999", "1/3", "1_0", "9999999", ""])
def test_a_record_duration_that_is_none_is_refused(tmp_path, duration):
    assert refusal(write(tmp_path / "a.edf", [Signal()], duration=duration)).reason == "HEADER_INVALID"


def test_a_compressed_file_reads_like_the_plain_one(shared_data, tmp_path):
    for name in ("sleep_edf/short_psg_SC4001_first5min.bdf", "malformed_edge_cases/edfPlusD.edf"):
        path = tmp_path / f"{Path(name).name}.gz"
        path.write_bytes(gzip.compress((shared_data / name).read_bytes(), 1))
        assert sniff(path) == "edf"
        (plain, signals), (packed, same) = everything(shared_data / name), everything(path)
        assert replace(packed, path=plain.path) == plain
        assert all(np.array_equal(a, b) for a, b in zip(signals, same, strict=True))


def test_a_damaged_or_exploding_compressed_file_is_refused(tmp_path):
    data = gzip.compress(write(tmp_path / "a.edf", [Signal()]).read_bytes())
    for raw, reason in [
        (data[:-20], "TRUNCATED"),
        (data[:-8] + b"\0" * 8, "SIGNAL_INVALID"),
        (data[:40] + bytes(30) + data[70:], "SIGNAL_INVALID"),
    ]:
        (tmp_path / "a.edf.gz").write_bytes(raw)
        assert refusal(tmp_path / "a.edf.gz").reason == reason
    with gzip.open(tmp_path / "bomb.edf.gz", "wb", compresslevel=1) as bomb:
        bomb.write((tmp_path / "a.edf").read_bytes())
        for _ in range(100):
            bomb.write(bytes(1 << 20))
    error = refusal(tmp_path / "bomb.edf.gz")
    assert error.reason == "SIGNAL_INVALID"
    assert "no sensor" in str(error)
