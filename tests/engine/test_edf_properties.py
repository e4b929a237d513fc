"""Properties of the EDF reader over damaged files that hypothesis makes up; `fuzz_edf_header.py` is the long search."""

import itertools
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.readers import edf
from engine.readers.edf_header import FILE_FIELDS, SIGNAL_FIELDS
from engine.readers.edf_tals import annotations_of, origin_of, parse_record
from engine.recording import Recording
from manifests.errors import RecordingError

EXAMPLES = settings(max_examples=180, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
NUMBERS = ["", "0", "1", "-1", "3", "8", "256", "99999999", "-9999999", "1e308", "1e-99", "nan", "inf", "1,5", "1.5"]
NUMBERS += [".", "1_0", "0x10", "+7", "1/3", "\0\0", "\xb5\xff"]
TIMES = ["+0", "+1", "+2", "-1", "+0.25", "+1e3", "+99999999999999999999", "", "+", "0", "+1.", "+3.000000000001"]
REPAIRABLE = {"num_records", "header_bytes", "start_date", "start_time", "patient", "recording"}


def build(num_signals: int, num_records: int, *, plus: str, times: list[str], bdf: bool) -> bytes:
    """A sound file of 1-s records: signals of 1, 2, ... samples a record, and annotations in an EDF+."""
    counts = [index + 1 for index in range(num_signals)] + ([16] if plus else [])
    ns, width = len(counts), 3 if bdf else 2
    values = {
        "version": "\xffBIOSEMI" if bdf else "0",
        "start_date": "01.02.03",
        "start_time": "22.30.00",
        "header_bytes": str(256 * (ns + 1)),
        "reserved": plus,
        "num_records": str(num_records),
        "record_duration": "1",
        "num_signals": str(ns),
    }
    head = "".join(values.get(name, "X").ljust(size) for name, size in FILE_FIELDS)
    label = ["C3"] * num_signals + (["EDF Annotations"] if plus else [])
    numbers = {"physical_min": "-100", "physical_max": "100", "digital_min": "-1000", "digital_max": "1000"}
    for name, size in SIGNAL_FIELDS:
        column = label if name == "label" else [numbers.get(name, "uV")] * ns
        column = [str(count) for count in counts] if name == "num_samples" else column
        head += "".join(text.ljust(size) for text in column)
    data = b""
    for index in range(num_records):
        total = sum(counts[:num_signals])
        digital = np.arange(index * total, (index + 1) * total, dtype="<i4").reshape(total, 1)
        data += digital.view(np.uint8)[:, :width].tobytes()
        if plus:
            text = f"{times[index]}\x14\x14\0+{index}\x150.5\x14W\x14".encode()
            data += text[: 16 * width].ljust(16 * width, b"\0")
    return head.encode("latin-1") + data


@st.composite
def files(draw: st.DrawFn, *, sound_times: bool = False) -> bytes:
    plus = draw(st.sampled_from(["", "EDF+C", "EDF+D"]))
    count = draw(st.integers(1, 5))
    sound = [f"+{index}" for index in range(count)]
    times = (
        sound
        if sound_times
        else draw(st.lists(st.sampled_from(TIMES), min_size=count, max_size=count) | st.just(sound))
    )
    return build(draw(st.integers(1, 3)), count, plus=plus, times=times, bdf=draw(st.booleans()))


@st.composite
def field_changes(draw: st.DrawFn, data: bytes, names: set[str] | None = None) -> bytes:
    """The file with one header field overwritten."""
    num_signals = int(data[252:256])
    places = [(name, position, width) for name, position, width in positions(num_signals) if not names or name in names]
    _, position, width = draw(st.sampled_from(places))
    text = draw(st.sampled_from(NUMBERS) | st.text(st.characters(max_codepoint=255), max_size=width))
    return data[:position] + text.encode("latin-1").ljust(width)[:width] + data[position + width :]


def positions(num_signals: int) -> list[tuple[str, int, int]]:
    found: list[tuple[str, int, int]] = []
    position = 0
    for name, width in FILE_FIELDS:
        found.append((name, position, width))
        position += width
    for name, width in SIGNAL_FIELDS:
        found += [(f"signal {name}", position + index * width, width) for index in range(num_signals)]
        position += width * num_signals
    return found


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    data = draw(files())
    for _ in range(draw(st.integers(1, 3))):
        if len(data) < 257 or not data[252:256].strip().isdigit():
            break
        kind = draw(st.sampled_from(["field", "field", "byte", "cut", "insert"]))
        place = draw(st.integers(0, len(data) - 1))
        if kind == "field" and 0 < int(data[252:256]) < 5:
            data = draw(field_changes(data))
        elif kind == "byte":
            data = data[:place] + bytes([draw(st.integers(0, 255))]) + data[place + 1 :]
        elif kind == "cut":
            data = data[:place]
        else:
            data = data[:place] + draw(st.binary(min_size=1, max_size=300)) + data[place:]
    return data


def read(path: Path, data: bytes) -> tuple[Recording, list[np.ndarray]]:
    path.write_bytes(data)
    recording = edf.read_header(path, {})
    return recording, edf.read_signals(recording, [channel.index for channel in recording.channels])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made up") / "a.edf"


@EXAMPLES
@given(data=damaged())
def test_any_damage_ends_as_a_recording_or_a_reason_and_never_as_memory(path: Path, data: bytes) -> None:
    tracemalloc.start()
    try:
        recording, signals = read(path, data)
    except RecordingError:
        return
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < (4 << 20) + 100 * len(data)
    assert 2 * sum(len(signal) for signal in signals) <= len(data)
    for channel, signal in zip(recording.channels, signals, strict=True):
        assert channel.num_samples == len(signal) == channel.rate * recording.duration
        assert not channel.calibrated or np.isfinite(signal).all()
    for before, after in itertools.pairwise(recording.segments):
        assert before.start + before.duration <= after.start


@EXAMPLES
@given(data=st.data())
def test_repairs_change_no_sample(path: Path, data: st.DataObject) -> None:
    sound = data.draw(files(sound_times=True))
    recording, expected = read(path, sound)
    assert recording.repairs == () or recording.extra["format"].endswith("C")
    changed = sound
    for _ in range(data.draw(st.integers(1, 3))):
        changed = data.draw(field_changes(changed, REPAIRABLE))
    repaired, signals = read(path, changed)
    assert [c.label for c in repaired.channels] == [c.label for c in recording.channels]
    assert repaired.segments == recording.segments
    assert repaired.annotations == recording.annotations
    assert all(np.array_equal(a, b) for a, b in zip(signals, expected, strict=True))


@EXAMPLES
@given(parts=st.lists(st.binary(max_size=60) | st.text("+-0123456789.\x14\x15\0 aé", max_size=60).map(str.encode)))
def test_any_bytes_are_a_record_of_annotations(parts: list[bytes]) -> None:
    record = parse_record(parts)
    found = annotations_of([record], origin_of([record], Fraction(1)), None, [])
    assert len(found) == len(record.annotations) <= sum(len(part) for part in parts)
    assert all(annotation.duration >= 0 for annotation in found)


TEXTS = st.text(st.characters(exclude_characters="\0\x14\x15", exclude_categories=["Cs"]), min_size=1, max_size=12)
LISTS = st.lists(st.tuples(st.integers(-999, 999), st.integers(0, 999), st.lists(TEXTS, min_size=1, max_size=3)))


@EXAMPLES
@given(lists=LISTS)
def test_lists_come_back_as_they_were_written(lists: list[tuple[int, int, list[str]]]) -> None:
    raw = b"+0\x14\x14\0"
    for onset, duration, texts in lists:
        raw += f"{onset:+d}.5\x15{duration}.25\x14".encode() + "".join(f"{text}\x14" for text in texts).encode() + b"\0"
    record = parse_record([raw])
    assert (record.onset, record.num_unread) == (b"+0", 0)
    found = annotations_of([record], Fraction(0), None, [])
    expected = [
        (Fraction(f"{onset:+d}.5"), Fraction(f"{duration}.25"), text.strip())
        for onset, duration, texts in lists
        for text in texts
    ]
    assert [(a.onset, a.duration, a.text) for a in found] == expected


def test_a_time_of_thousands_of_digits_is_none() -> None:
    record = parse_record([b"+" + b"9" * 5000 + b"\x14\x14\0"])
    assert (record.onset, record.num_unread) == (None, 1)
