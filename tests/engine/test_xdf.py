"""XDF: real LSL recordings, streams with their own clocks, pauses, markers, rates that do not hold, damaged files."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import pyxdf

from engine.read import read_header, read_signals, sniff
from engine.recording import Segment
from manifests.errors import ConfigError, RecordingError

HEADER = "<info><name>{name}</name><type>{kind}</type><channel_count>{count}</channel_count><nominal_srate>{rate}</nominal_srate><channel_format>{form}</channel_format><desc><channels>{channels}</channels></desc></info>"  # noqa: E501 - one line of XML
CHANNEL = "<channel><label>{label}</label><unit>microvolts</unit><type>EEG</type></channel>"


def chunk(tag: int, content: bytes) -> bytes:
    return b"\x04" + struct.pack("<IH", len(content) + 2, tag) + content


def stream_header(number: int, *, name: str, kind: str, rate: float, form: str, labels: Sequence[str]) -> bytes:
    text = HEADER.format(
        name=name,
        kind=kind,
        count=max(1, len(labels)),
        rate=rate,
        form=form,
        channels="".join(CHANNEL.format(label=label) for label in labels),
    )
    return chunk(2, struct.pack("<I", number) + text.encode())


def samples(number: int, times: np.ndarray, values: np.ndarray | Sequence[str]) -> bytes:
    """Chunks of 100 samples, each with its own time stamp."""
    parts: list[bytes] = []
    for first in range(0, len(times), 100):
        block = [
            b"\x08"
            + struct.pack("<d", time)
            + (b"\x01" + bytes([len(value)]) + value.encode() if isinstance(value, str) else value.tobytes())
            for time, value in zip(times[first : first + 100], values[first : first + 100], strict=True)
        ]
        parts.append(chunk(3, struct.pack("<I", number) + b"\x04" + struct.pack("<I", len(block)) + b"".join(block)))
    return b"".join(parts)


def eeg(number: int, times: np.ndarray, *, rate: float = 250, labels: Sequence[str] = ("Cz", "Pz"), name: str = "amp"):
    """Bytes of a stream of float32 noise, and the noise."""
    values = np.random.default_rng(number).normal(size=(len(times), len(labels))).astype(np.float32)
    head = stream_header(number, name=name, kind="EEG", rate=rate, form="float32", labels=labels)
    return head + samples(number, times, values), values


def written(path: Path, *parts: bytes) -> Path:
    path.write_bytes(b"XDF:" + chunk(1, b"<?xml version='1.0'?><info><version>1.0</version></info>") + b"".join(parts))
    return path


def refused(path: Path, layout: dict | None = None) -> RecordingError:
    with pytest.raises(RecordingError) as caught:
        read_signals(read_header(path, "xdf", layout or {}), [0])
    return caught.value


def test_a_real_recording_whose_rate_does_not_hold_is_taken_only_as_measured(shared_data):
    path = shared_data / "xdf_examples/clock_resets.xdf"
    assert sniff(path) == "xdf"
    assert "declares 100 Hz, its time stamps show 92.9344 Hz" in str(refused(path))
    recording = read_header(path, "xdf", {"rate": "measured"})
    assert {channel.rate for channel in recording.channels} == {Fraction(9293, 100)}
    assert len(recording.segments) == 2  # the clock was reset between them
    assert 270 < recording.segments[1].start - recording.segments[0].duration < 276
    reference = next(found for found in pyxdf.load_xdf(path)[0] if found["info"]["type"] == ["EEG"])
    assert np.array_equal(np.stack(read_signals(recording, range(8)), axis=1), reference["time_series"])
    assert len(recording.annotations) == 175
    assert recording.annotations[1].text == "Test"


def test_the_smallest_real_files(shared_data):
    folder = shared_data / "malformed_edge_cases"
    minimal = read_header(folder / "minimal.xdf", "xdf")
    assert minimal.segments == (Segment(start=Fraction(0), duration=Fraction(9, 10)),)
    assert read_signals(minimal, [0])[0].tolist() == [192, 12, 13, 14, 15, 12, 13, 14, 15]
    empty = read_header(folder / "empty_streams.xdf", "xdf")
    assert [(channel.label, channel.num_samples) for channel in empty.channels] == [("ch:00", 10)]


def test_a_pause_ends_a_segment_and_markers_fall_on_samples(tmp_path):
    times = 1000 + np.concatenate([np.arange(1000), 1250 + np.arange(500)]) / 250
    data, values = eeg(1, times)
    marks = stream_header(2, name="m", kind="Markers", rate=0, form="string", labels=[]) + samples(
        2, np.array([1000.8, 1004.5, 1006.0]), ["left", "lost", "right"]
    )
    codes = stream_header(3, name="c", kind="Stim", rate=0, form="int32", labels=["code"]) + samples(
        3, np.array([1001.0]), np.array([[7]], dtype=np.int32)
    )
    recording = read_header(written(tmp_path / "a.xdf", data, marks, codes), "xdf")
    assert recording.segments == (
        Segment(start=Fraction(0), duration=Fraction(4)),
        Segment(start=Fraction(5), duration=Fraction(2)),
    )
    assert [(channel.label, channel.rate, channel.unit) for channel in recording.channels] == [
        ("Cz", 250, "microvolts"),
        ("Pz", 250, "microvolts"),
    ]
    assert np.array_equal(np.stack(read_signals(recording, [0, 1]), axis=1), values)
    assert [(found.onset, found.text) for found in recording.annotations] == [
        (Fraction(4, 5), "left"),
        (1, "7"),
        (6, "right"),
    ]


def test_streams_of_two_rates_keep_what_both_cover(tmp_path):
    fast, fast_values = eeg(1, 50 + np.arange(2500) / 250)  # 50 to 60 s
    slow, slow_values = eeg(
        2, 52.004 + np.arange(1000) / 100, rate=100, labels=["GSR"], name="band"
    )  # 52.004 to 62.004
    path = written(tmp_path / "a.xdf", fast, slow)
    recording = read_header(path, "xdf")
    assert recording.segments == (Segment(start=Fraction(0), duration=Fraction("7.996")),)
    cz, gsr = read_signals(recording, [0, 2])
    assert np.array_equal(cz, fast_values[501:2500, 0])
    assert np.array_equal(gsr, slow_values[: len(gsr), 0])
    assert len(gsr) == round(Fraction("7.996") * 100)
    assert [channel.label for channel in read_header(path, "xdf", {"prefix": True}).channels] == [
        *("amp/Cz", "amp/Pz"),
        "band/GSR",
    ]
    alone = read_header(path, "xdf", {"streams": ["band"]})
    assert [channel.label for channel in alone.channels] == ["GSR"]
    assert alone.duration == 10
    assert refused(path, {"streams": ["band", "gone"]}).reason == "HEADER_INVALID"
    apart, _ = eeg(3, 500 + np.arange(100) / 250)
    assert "share no time" in str(refused(written(tmp_path / "b.xdf", fast, apart)))


@pytest.mark.parametrize(("true_rate", "is_kept"), [(250.0, True), (250.2, True), (249.8, True), (250.3, False)])
def test_a_nominal_rate_is_kept_within_a_thousandth(tmp_path, true_rate, is_kept):
    data, _ = eeg(1, 10 + np.arange(30_000) / true_rate)
    path = written(tmp_path / "a.xdf", data)
    if not is_kept:
        assert "declares 250 Hz" in str(refused(path))
        assert read_header(path, "xdf", {"rate": "measured"}).channels[0].rate == Fraction("250.3")
        return
    recording = read_header(path, "xdf")
    assert recording.channels[0].rate == 250
    assert recording.duration == 120
    assert [note.split(", ")[1] for note in recording.repairs] == (
        [] if true_rate == 250 else [f"clock off by 0.096 s over {30_000 / true_rate:.0f} s"]
    )


def test_clocks_are_aligned_by_their_offsets(tmp_path):
    """The second computer's clock is 100 s ahead, which its clock offsets tell."""
    here, _ = eeg(1, 50 + np.arange(2500) / 250)
    there, values = eeg(2, 151 + np.arange(2500) / 250, labels=["Oz"], name="other")
    offsets = b"".join(chunk(4, struct.pack("<Idd", 2, 150.0 + i, -100.0)) for i in range(12))
    recording = read_header(written(tmp_path / "a.xdf", here, there, offsets), "xdf")
    assert recording.duration == 9
    assert np.array_equal(read_signals(recording, [2])[0], values[:2250, 0])


def test_a_file_that_is_cut_off_is_told_and_never_invented(tmp_path):
    data, values = eeg(1, 10 + np.arange(2500) / 250)
    whole = written(tmp_path / "a.xdf", data).read_bytes()
    for length in range(0, len(whole) - 1, len(whole) // 40):
        (tmp_path / "a.xdf").write_bytes(whole[:length])
        try:
            recording = read_header(tmp_path / "a.xdf", "xdf")
        except RecordingError:
            continue
        signal = read_signals(recording, [0])[0]
        assert np.array_equal(signal, values[: len(signal), 0])
        assert any("cut off" in note for note in recording.repairs)


def test_flipped_bytes_end_with_a_reason_or_a_signal(tmp_path):
    data, _ = eeg(1, 10 + np.arange(300) / 250)
    whole = written(tmp_path / "a.xdf", data).read_bytes()
    for place in range(0, len(whole), 61):
        (tmp_path / "a.xdf").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            recording = read_header(tmp_path / "a.xdf", "xdf")
            assert len(read_signals(recording, [0])[0]) == recording.channels[0].num_samples
        except RecordingError:
            continue


def test_a_chunk_that_declares_more_than_it_holds_is_refused(tmp_path):
    head = stream_header(1, name="a", kind="EEG", rate=250, form="float32", labels=["Cz"])
    bomb = chunk(3, struct.pack("<I", 1) + b"\x08" + struct.pack("<Q", 1 << 40) + bytes(100))
    error = refused(written(tmp_path / "a.xdf", head, bomb))
    assert (error.reason, "bomb" in str(error)) == ("HEADER_INVALID", True)
    wide = stream_header(1, name="a", kind="EEG", rate=250, form="float32", labels=["Cz"]).replace(
        b"<channel_count>1<", b"<channel_count>900000000<"
    )
    wide = chunk(2, wide[7:])
    few = chunk(3, struct.pack("<I", 1) + b"\x01\x04" + bytes(100))
    assert refused(written(tmp_path / "b.xdf", wide, few)).reason == "HEADER_INVALID"


def test_a_wrong_layout_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"layout\.stream "):
        read_header(tmp_path / "a.xdf", "xdf", {"stream": ["a"]})
