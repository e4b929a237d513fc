"""EGI recordings: simple binary files (`.raw`, continuous or segmented) and `.mff` folders.

Numbered inputs are labelled `E1`…; their electrodes depend on the net. Values are in microvolts. In a simple binary
file with a range and a number of bits the values are range / 2^bits microvolts each, as EEGLAB has it; MNE takes
that product for volts. Segments of either form and breaks between epochs of a folder become segments with their
own times. Source: EGI simple binary and MFF format descriptions.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from engine.readers import mff
from engine.readers.magic import EGI_HEAD, is_simple_binary
from engine.readers.mne_raw import annotation, refuse_pointer
from engine.readers.timeline import timeline
from engine.recording import Annotation, Channel, Recording
from manifests.errors import RecordingError

_TYPES = {2: np.dtype(">i2"), 4: np.dtype(">f4"), 6: np.dtype(">f8")}
_BLOCK_BYTES = 8 << 20
_MAX_ROWS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    """A simple binary file; each segment has `lead` bytes (category and time in ms) before its frames."""

    rate: Fraction
    num_channels: int
    gain: float
    dtype: np.dtype
    codes: list[str]
    categories: list[str]
    num_segments: int
    num_samples: int
    offset: int
    lead: int
    clock: str

    @property
    def row_bytes(self) -> int:
        """Bytes of a frame: channels and event rows."""
        return (self.num_channels + len(self.codes)) * self.dtype.itemsize

    @property
    def segment_bytes(self) -> int:
        """Bytes of a segment with its lead."""
        return self.lead + self.num_samples * self.row_bytes


def companions(path: Path) -> list[Path]:
    """The files of an `.mff` folder; none of a simple binary one."""
    return mff.files(path) if path.is_dir() else []


def read_header(path: Path, layout: Mapping[str, object]) -> Recording:
    """Channels in µV, segments and events; of a simple binary file the event rows are read.

    Raises:
        RecordingError: `NOT_A_RECORDING`, `HEADER_INVALID`, `TRUNCATED` or `FORMAT_UNSUPPORTED`.
    """
    if path.is_dir():
        return mff.read_header(path, layout)
    repairs: list[str] = []
    header = _parse(path)
    held = _held(path, header, repairs)
    leads, events = _events(path, header, held)
    total = sum(held)
    breaks = [
        (number * header.num_samples, Fraction(time - leads[0][1], 1000)) for number, (_, time) in enumerate(leads)
    ]
    times = timeline(header.rate, total, breaks, repairs)
    categories = [
        annotation(segment.start, segment.duration, header.categories[category - 1])
        for segment, (category, _) in zip(times.segments, leads, strict=True)
        if 0 < category <= len(header.categories)
    ]
    marks = [annotation(times.time_of(sample), Fraction(0), code) for sample, code in events]
    return Recording(
        path=path,
        channels=tuple(
            Channel(index=index, label=f"E{index + 1}", rate=header.rate, unit="uV", prefilter="", num_samples=total)
            for index in range(header.num_channels)
        ),
        segments=times.segments,
        annotations=_in_order([*categories, *marks]),
        repairs=tuple(repairs),
        extra={"format": "EGI simple binary", "start_time": header.clock},
        layout=dict(layout),
    )


def read_signals(recording: Recording, indices: Sequence[int]) -> list[np.ndarray]:
    """Channels as float32 (num_samples,) in µV, segments one after another.

    Raises:
        RecordingError: `TRUNCATED`.
    """
    path = recording.path
    if path.is_dir():
        return mff.read_signals(recording, indices)
    header = _parse(path)
    outputs = [np.empty(recording.channels[0].num_samples, dtype=np.float32) for _ in indices]
    filled = 0
    for block in _blocks(path, header, _held(path, header, [])):
        with np.errstate(invalid="ignore", over="ignore"):  # floats of a damaged file
            for index, output in zip(indices, outputs, strict=True):
                output[filled : filled + len(block)] = block[:, index].astype(np.float64) * header.gain
        filled += len(block)
    if outputs and filled < len(outputs[0]):
        raise RecordingError("TRUNCATED", f"{path}: has lost samples since its header was read")
    return outputs


def _in_order(annotations: Sequence[Annotation]) -> tuple[Annotation, ...]:
    return tuple(sorted(annotations, key=lambda item: item.onset))


def _parse(path: Path) -> _Header:
    with path.open("rb") as stream:
        data = stream.read(1 << 20)
    refuse_pointer(path, data)
    if not is_simple_binary(data):
        raise RecordingError("NOT_A_RECORDING", f"{path}: no simple binary file of EGI's")
    version, _, _, _, hour, minute, second, _, rate, channels, _, bits, span = EGI_HEAD.unpack_from(data)
    try:
        place = EGI_HEAD.size
        categories: list[str] = []
        segments, lead = 1, 0
        if version % 2:
            (count,) = struct.unpack_from(">h", data, place)
            place += 2
            for _ in range(count):
                length = data[place]
                categories.append(data[place + 1 : place + 1 + length].decode("latin-1"))
                place += 1 + length
            (segments,) = struct.unpack_from(">h", data, place)
            place += 2
            lead = 6
        samples, num_codes = struct.unpack_from(">ih", data, place)
        place += 6
        codes = [data[place + 4 * k : place + 4 * k + 4].decode("latin-1").strip("\0 ") for k in range(num_codes)]
        place += 4 * max(0, num_codes)
    except (struct.error, IndexError) as error:
        raise RecordingError("TRUNCATED", f"{path}: ends in its header: {error}") from None
    if place > len(data):
        raise RecordingError("TRUNCATED", f"{path}: ends in its header of {place} bytes")
    if segments <= 0 or samples <= 0 or not 0 <= num_codes <= _MAX_ROWS:
        raise RecordingError(
            "HEADER_INVALID", f"{path}: {segments} segments of {samples} samples with {num_codes} kinds of events"
        )
    return _Header(
        rate=Fraction(rate),
        num_channels=channels,
        gain=span / 2.0**bits if span and 0 < bits <= 64 else 1.0,
        dtype=_TYPES[version & 6],
        codes=codes,
        categories=categories,
        num_segments=segments,
        num_samples=samples,
        offset=place,
        lead=lead,
        clock=f"{hour:02d}:{minute:02d}:{second:02d}",
    )


def _held(path: Path, header: _Header, repairs: list[str]) -> list[int]:
    """Samples of each segment that are there; of a segmented file only whole segments."""
    size = path.stat().st_size - header.offset
    promised = header.num_segments * header.num_samples
    if header.lead:
        held = [header.num_samples] * min(header.num_segments, max(0, size) // header.segment_bytes)
    else:
        held = [min(header.num_samples, max(0, size) // header.row_bytes)]
    if not sum(held):
        raise RecordingError("TRUNCATED", f"{path}: not one of {promised} samples is there; fetch the file again")
    if sum(held) < promised:
        repairs.append(f"truncated: {sum(held)} of {promised} samples per channel are there")
    return held


def _blocks(path: Path, header: _Header, held: Sequence[int]) -> Iterator[np.ndarray]:
    """Frames (N, rows), a few megabytes at a time, segment by segment."""
    rows = header.row_bytes // header.dtype.itemsize
    step = max(1, _BLOCK_BYTES // header.row_bytes)
    with path.open("rb") as stream:
        for number, length in enumerate(held):
            stream.seek(header.offset + number * header.segment_bytes + header.lead)
            for first in range(0, length, step):
                count = min(step, length - first)
                data = np.fromfile(stream, dtype=header.dtype, count=count * rows)
                yield data[: len(data) // rows * rows].reshape(-1, rows)


def _events(path: Path, header: _Header, held: Sequence[int]) -> tuple[list[tuple[int, int]], list[tuple[int, str]]]:
    """Category and time in ms of each segment, and sample and code where an event row begins to differ from 0."""
    leads = [(0, 0)] * len(held)
    if header.lead:
        with path.open("rb") as stream:
            for number in range(len(held)):
                stream.seek(header.offset + number * header.segment_bytes)
                leads[number] = struct.unpack(">hi", stream.read(6))
    found: list[tuple[int, str]] = []
    if header.codes:
        before = np.zeros(len(header.codes), dtype=bool)
        position = 0
        for block in _blocks(path, header, held):
            active = block[:, header.num_channels :] != 0
            rises = active & ~np.concatenate((before[np.newaxis], active[:-1]))
            samples, rows = np.nonzero(rises)
            found += [(position + int(sample), header.codes[row]) for sample, row in zip(samples, rows, strict=True)]
            before = active[-1]
            position += len(block)
    return leads, found
