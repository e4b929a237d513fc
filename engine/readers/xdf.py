"""XDF files (Lab Streaming Layer), decoded by pyxdf: streams with clocks of their own on one regular time base.

pyxdf maps every stream to the recorder's clock and smooths the time stamps. What follows is ours, and explicit:
a stream keeps its nominal rate, exactly, where the measured one agrees within 0.1 %; otherwise the file is refused,
unless its layout asks for the measured rate. Nothing is resampled. A pause in the time stamps ends a segment, and only
what all streams cover is kept; each segment begins with the sample of each stream that lies nearest, which is at most
half a sample off.
"""

import logging
import math
import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal
from xml.etree.ElementTree import ParseError

import numpy as np
import pyxdf
from pydantic import BaseModel, ConfigDict, Field

from engine.readers.text import parse_layout
from engine.recording import Annotation, Channel, Recording, Segment
from manifests.errors import RecordingError

_LIBRARY_ERRORS = (ValueError, TypeError, LookupError, OSError, EOFError, ArithmeticError, struct.error, ParseError)
logging.getLogger("pyxdf").setLevel(logging.CRITICAL)  # what it left out is counted and told here
_HEADER_CHUNK, _SAMPLES_CHUNK = 2, 3
_WIDTHS = {b"int8": 1, b"int16": 2, b"int32": 4, b"float32": 4, b"int64": 8, b"double64": 8}
_BREAK_SAMPLES = 3  # a pause is longer than this many samples as well, for streams of a few Hz
_RATE_TOLERANCE = 1e-3
_MIN_MEASURED = 10  # samples that a rate is measured over


class XdfLayout(BaseModel):
    """`layout` of a corpus with `reader: xdf`; empty: every stream of numbers with a nominal rate.

    Attributes:
        streams: Names or types of the streams to read, `[EEG]`; one that the file lacks is an error.
        rate: `nominal`, or `measured`: the rate that the time stamps show, to 0.01 Hz.
        prefix: Whether the stream's name stands before each label, `Muse/TP9`.
        gap_s: Pause in the time stamps in seconds that ends a segment.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    streams: tuple[str, ...] = ()
    rate: Literal["nominal", "measured"] = "nominal"
    prefix: bool = False
    gap_s: Annotated[int, Field(gt=0)] = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stream:
    """Samples (n, channels) of a stream, their times in s, and its stretches without a pause as [first, stop)."""

    labels: tuple[str, ...]
    units: tuple[str, ...]
    rate: Fraction
    times: np.ndarray
    values: np.ndarray
    stretches: tuple[tuple[int, int], ...]

    def spans(self) -> list[tuple[float, float]]:
        """Time from the first sample to the end of the last one, for each stretch."""
        return [
            (float(self.times[first]), float(self.times[stop - 1]) + float(1 / self.rate))
            for first, stop in self.stretches
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """One segment: its time, and which samples of each stream it takes."""

    segment: Segment
    begin: float
    samples: tuple[slice, ...]


def read_header(path: Path, layout: Mapping[str, object]) -> Recording:
    """Channels of the regular streams, segments that all of them cover, markers as annotations.

    The whole file is read: XDF has no table of contents.

    Raises:
        ConfigError: The layout breaks its schema.
        RecordingError: `NOT_A_RECORDING`, `HEADER_INVALID`, `TRUNCATED` or `SIGNAL_INVALID`.
    """
    rules = parse_layout(XdfLayout, layout, "xdf")
    found, repairs = _load(path, rules)
    streams, notes = _signal_streams(found, rules, path)
    cuts = _cuts(streams, path)
    channels = [
        (label, unit, stream.rate, sum(cut.samples[number].stop - cut.samples[number].start for cut in cuts))
        for number, stream in enumerate(streams)
        for label, unit in zip(stream.labels, stream.units, strict=True)
    ]
    return Recording(
        path=path,
        channels=tuple(
            Channel(index=index, label=label, rate=rate, unit=unit, prefilter="", num_samples=num_samples)
            for index, (label, unit, rate, num_samples) in enumerate(channels)
        ),
        segments=tuple(cut.segment for cut in cuts),
        annotations=_markers(found, cuts, streams[0]),
        repairs=(*repairs, *notes),
        layout=dict(layout),
    )


def read_signals(recording: Recording, indices: Sequence[int]) -> list[np.ndarray]:
    """Channels as float32 (num_samples,) in the unit that the stream states, segments one after another."""
    rules = parse_layout(XdfLayout, recording.layout, "xdf")
    streams, _ = _signal_streams(_load(recording.path, rules)[0], rules, recording.path)
    cuts = _cuts(streams, recording.path)
    where = [(number, row) for number, stream in enumerate(streams) for row in range(len(stream.labels))]
    return [
        np.concatenate([streams[number].values[cut.samples[number], row] for cut in cuts]).astype(np.float32)
        for number, row in (where[i] for i in indices)
    ]


def _load(path: Path, rules: XdfLayout) -> tuple[list[dict[str, Any]], list[str]]:
    """Streams of pyxdf, and what could not be read of them."""
    declared, repairs = _walk(path)
    try:
        found, _ = pyxdf.load_xdf(
            path,
            jitter_break_threshold_seconds=rules.gap_s,
            jitter_break_threshold_samples=_BREAK_SAMPLES,
        )
    except _LIBRARY_ERRORS as error:
        raise RecordingError("SIGNAL_INVALID", f"{path}: {type(error).__name__}: {error}"[:300]) from error
    for stream in found:
        lost = declared[stream["info"]["stream_id"]] - len(stream["time_stamps"])
        if lost:
            repairs.append(f"stream {stream['info']['stream_id']}: {lost} samples that cannot be decoded left out")
    return found, repairs


def _walk(path: Path) -> tuple[Counter[int], list[str]]:
    """Samples that each stream declares; sizes are checked against the bytes before anything is allocated.

    Source: https://github.com/sccn/xdf/wiki/Specifications, "Chunk".
    """
    with path.open("rb") as stream:
        start = stream.read(4)
        if start != b"XDF:":
            raise RecordingError("NOT_A_RECORDING", f"{path}: begins with {start!r}, expected XDF:")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _chunks(data, path)


def _chunks(data: mmap.mmap, path: Path) -> tuple[Counter[int], list[str]]:
    samples: Counter[int] = Counter()
    widths: dict[int, int] = {}
    position = 4
    while position < len(data):
        try:
            length, start = _length(data, position)
            tag, stream = struct.unpack_from("<HI", data, start) if length >= 6 else (0, 0)
        except struct.error:
            length, start, tag, stream = len(data), position, 0, 0
        if not 2 <= length <= len(data) - start:
            if not samples:
                raise RecordingError("TRUNCATED", f"{path}: chunk at byte {position} ends beyond the file, no samples")
            return samples, [f"the last {len(data) - position} bytes are a chunk that is cut off, left out"]
        if tag == _HEADER_CHUNK:
            widths[stream] = _width(data[start + 6 : start + length])
        elif tag == _SAMPLES_CHUNK:
            count, inner = _length(data, start + 6)
            if count * widths.get(stream, 1) > start + length - inner:
                raise RecordingError(
                    "HEADER_INVALID",
                    f"{path}: chunk at byte {position} declares {count} samples in {length} bytes; damaged or a bomb",
                )
            samples[stream] += count
        position = start + length
    return samples, []


def _length(data: mmap.mmap, position: int) -> tuple[int, int]:
    """A number of 1, 4 or 8 bytes that is preceded by its width, and where it ends."""
    width = {1: "<B", 4: "<I", 8: "<Q"}.get(data[position] if position < len(data) else 0)
    if width is None:
        raise struct.error("no width of 1, 4 or 8")
    return struct.unpack_from(width, data, position + 1)[0], position + 1 + struct.calcsize(width)


def _width(header: bytes) -> int:
    """Least bytes of one sample with its time stamp."""
    count = re.search(rb"<channel_count>\s*(\d+)", header)
    form = re.search(rb"<channel_format>\s*(\w+)", header)
    return 1 + (int(count[1]) if count else 1) * (_WIDTHS.get(form[1], 1) if form else 1)


def _signal_streams(
    found: Sequence[dict[str, Any]], rules: XdfLayout, path: Path
) -> tuple[list[_Stream], tuple[str, ...]]:
    """Streams of numbers at a regular rate that hold samples, in the file's order, with notes on their rates."""
    kept = [
        stream
        for stream in found
        if float(_first(stream, "nominal_srate") or 0) > 0
        and isinstance(stream["time_series"], np.ndarray)
        and len(stream["time_stamps"])
        and (not rules.streams or {_first(stream, "name"), _first(stream, "type")} & set(rules.streams))
    ]
    names = {name for stream in kept for name in (_first(stream, "name"), _first(stream, "type"))}
    missing = [name for name in rules.streams if name not in names]
    if missing or not kept:
        raise RecordingError(
            "HEADER_INVALID", f"{path}: no regular stream of numbers with samples {missing or ''}; it has {len(found)}"
        )
    notes: list[str] = []
    streams: list[_Stream] = []
    for stream in sorted(kept, key=lambda stream: stream["info"]["stream_id"]):
        times = np.asarray(stream["time_stamps"], dtype=np.float64)
        stretches = tuple((int(first), int(last) + 1) for first, last in stream["info"]["segments"])
        rate, note = _rate(stream, times, stretches, rules=rules, path=path)
        notes += [note] if note else []
        labels, units = _labels(stream, rules)
        streams.append(
            _Stream(
                labels=labels, units=units, rate=rate, times=times, values=stream["time_series"], stretches=stretches
            )
        )
    return streams, tuple(notes)


def _rate(
    stream: dict[str, Any],
    times: np.ndarray,
    stretches: Sequence[tuple[int, int]],
    *,
    rules: XdfLayout,
    path: Path,
) -> tuple[Fraction, str]:
    """Rate of a stream, and a note where the measured one would put its end off by a sample or more."""
    nominal = Fraction(str(_first(stream, "nominal_srate")))
    periods = sum(stop - first - 1 for first, stop in stretches)
    elapsed = sum(float(times[stop - 1] - times[first]) for first, stop in stretches)
    if periods < _MIN_MEASURED or elapsed <= 0:
        return nominal, ""
    measured = periods / elapsed
    number = stream["info"]["stream_id"]
    if rules.rate == "measured":
        return Fraction(round(measured * 100), 100), f"stream {number}: measured {measured:.4f} Hz taken, not nominal"
    if abs(measured / nominal - 1) > _RATE_TOLERANCE:
        raise RecordingError(
            "HEADER_INVALID",
            f"{path}: stream {number} declares {float(nominal):g} Hz, its time stamps show {measured:.4f} Hz; "
            "leave it out with layout.streams, or take the measured rate with layout.rate: measured",
        )
    drift = abs(periods / float(nominal) - elapsed)
    if drift * nominal < 1:
        return nominal, ""
    return (
        nominal,
        f"stream {number}: nominal {float(nominal):g} Hz kept, clock off by {drift:.3f} s over {elapsed:.0f} s",
    )


def _cuts(streams: Sequence[_Stream], path: Path) -> list[_Cut]:
    """Segments that every stream covers; the time base of the recording begins with the first."""
    spans = reduce(_intersection, (stream.spans() for stream in streams))
    fastest = max(stream.rate for stream in streams)
    cuts: list[_Cut] = []
    elapsed, end = Fraction(0), Fraction(0)
    for begin, stop in spans:
        firsts = [int(np.searchsorted(stream.times, begin - 0.5 / float(stream.rate))) for stream in streams]
        stops = [int(np.searchsorted(stream.times, stop - 0.5 / float(stream.rate))) for stream in streams]
        available = [last - first for first, last in zip(firsts, stops, strict=True)]
        length = min(count / stream.rate for count, stream in zip(available, streams, strict=True))
        length, counts = _fitted(streams, available, elapsed, math.floor(length * fastest) / fastest)
        if length <= 0:
            continue
        start = Fraction(round((begin - spans[0][0]) * fastest)) / fastest
        cuts.append(
            _Cut(
                segment=Segment(start=max(start, end), duration=length),
                begin=begin,
                samples=tuple(slice(first, first + count) for first, count in zip(firsts, counts, strict=True)),
            )
        )
        elapsed += length
        end = cuts[-1].segment.start + length
    if not cuts:
        raise RecordingError("HEADER_INVALID", f"{path}: its {len(streams)} streams share no time; name one in streams")
    return cuts


def _fitted(
    streams: Sequence[_Stream], available: Sequence[int], elapsed: Fraction, length: Fraction
) -> tuple[Fraction, list[int]]:
    """Length of a segment and its samples per stream, which end on whole samples counted from the beginning."""
    slowest = min(stream.rate for stream in streams)
    while length > 0:
        counts = [round((elapsed + length) * stream.rate) - round(elapsed * stream.rate) for stream in streams]
        if all(0 < count <= most for count, most in zip(counts, available, strict=True)):
            return length, counts
        length -= 1 / slowest
    return Fraction(0), []


def _intersection(
    one: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]
) -> list[tuple[float, float]]:
    found = [(max(a, c), min(b, d)) for a, b in one for c, d in other]
    return sorted((begin, end) for begin, end in found if end > begin)


def _markers(found: Sequence[dict[str, Any]], cuts: Sequence[_Cut], clock: _Stream) -> tuple[Annotation, ...]:
    """Entries of streams of text or without a rate, placed at the sample of the first stream that they fall on."""
    annotations = [
        Annotation(onset=onset, duration=Fraction(0), text=text)
        for stream in found
        if isinstance(stream["time_series"], list) or not float(_first(stream, "nominal_srate") or 0)
        for time, entry in zip(stream["time_stamps"], stream["time_series"], strict=True)
        if (onset := _onset(float(time), cuts, clock)) is not None
        for text in _texts(entry)
    ]
    return tuple(sorted(annotations, key=lambda annotation: annotation.onset))


def _onset(time: float, cuts: Sequence[_Cut], clock: _Stream) -> Fraction | None:
    """Seconds from the recording's start; None outside of every segment."""
    for cut in cuts:
        taken = cut.samples[0]
        place = int(np.searchsorted(clock.times, time - 0.5 / float(clock.rate)))
        if taken.start <= place < taken.stop and time >= cut.begin - 0.5 / float(clock.rate):
            return cut.segment.start + (place - taken.start) / clock.rate
    return None


def _texts(entry: Any) -> Iterator[str]:
    for value in np.atleast_1d(np.asarray(entry, dtype=object)):
        text = f"{value:g}" if isinstance(value, int | float | np.number) else str(value).strip()
        if text:
            yield text


def _first(stream: dict[str, Any], name: str) -> str:
    values = stream["info"].get(name) or [""]
    return str(values[0] or "")


def _labels(stream: dict[str, Any], rules: XdfLayout) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Labels and units from the stream's description; a channel that it does not name is `channel 1`, counted."""
    described: list[Any] = []
    for part in stream["info"].get("desc") or []:
        for group in (part or {}).get("channels") or []:
            described += (group or {}).get("channel") or []
    count = stream["time_series"].shape[1]
    told = [dict(item) if isinstance(item, Mapping) else {} for item in described] if len(described) == count else []
    told = told or [{} for _ in range(count)]
    labels = [str((item.get("label") or [""])[0] or f"channel {i}") for i, item in enumerate(told, start=1)]
    units = tuple(str((item.get("unit") or [""])[0] or "") for item in told)
    if rules.prefix:
        labels = [f"{_first(stream, 'name')}/{label}" for label in labels]
    return tuple(labels), units
