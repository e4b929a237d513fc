"""Neuroscan `.cnt` recordings (SEED and others), 16 or 32 bits, with their table of events.

The header does not say how many bytes a sample has. It follows from the place of the table of events and the number
of samples; where these contradict each other, a corpus declares `data_format`, nothing is guessed. MNE computes the
same values (tests compare them) but refuses truncated files and reads tables of events that are not there.
Source: SETUP, ELECTLOC and EVENT structures, http://paulbourke.net/dataformats/eeg/.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from engine.readers.frames import Frames, read_rows, whole_frames
from engine.readers.magic import is_neuroscan
from engine.readers.mne_raw import annotation, refuse_pointer
from engine.readers.text import parse_layout
from engine.readers.timeline import Timeline, timeline
from engine.recording import Annotation, Channel, Recording
from manifests.errors import RecordingError

_HEAD_BYTES = 900
_CHANNEL_BYTES = 75
_MAX_CHANNELS = 4096
_MAX_EVENT_BYTES = 64 << 20
_EVENT = np.dtype([("stim", "<u2"), ("keyboard", "u1"), ("keypad", "u1"), ("offset", "<i4")])
_EVENT_BYTES = {1: 8, 2: 19, 3: 19}
_STOPS = frozenset({0xE, 0xB})  # accept nibbles of a recorder that was started again or stopped
_PROMISE_TOLERANCE = 0.05
_PROBE_SAMPLES = 4096
_SAMPLES = {2: np.dtype("<i2"), 4: np.dtype("<i4")}


class CntLayout(BaseModel):
    """`layout` of a corpus with `reader: cnt`.

    Attributes:
        data_format: Of samples, where header and file contradict each other.
        block_samples: Successive samples of one channel, where header and samples contradict each other.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data_format: Literal["auto", "int16", "int32"] = "auto"
    block_samples: Annotated[int, Field(ge=1)] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    labels: list[str]
    gains: list[float]
    offsets: list[float]
    rate: Fraction
    sample_bytes: int
    num_samples: int
    run: int
    table: int


def read_header(path: Path, layout: Mapping[str, object]) -> Recording:
    """Channels in µV, one segment, or several where the recorder was started again, and events.

    Raises:
        RecordingError: `NOT_A_RECORDING`, `HEADER_INVALID` or `TRUNCATED`.
        ConfigError: The layout breaks its schema.
    """
    repairs: list[str] = []
    header = _parse(path, layout, repairs)
    events = _events(path, header, repairs)
    breaks = [(sample, None) for sample, accept, _ in events if accept in _STOPS]
    times = timeline(header.rate, header.num_samples, breaks, repairs)
    return Recording(
        path=path,
        channels=tuple(
            Channel(
                index=index,
                label=label,
                rate=header.rate,
                unit="uV",
                prefilter="",
                num_samples=header.num_samples,
                calibrated=header.gains[index] != 0,
            )
            for index, label in enumerate(header.labels)
        ),
        segments=times.segments,
        annotations=_annotations(events, times),
        repairs=tuple(repairs),
        extra={"format": "Neuroscan CNT", "start_time": _clock(path)},
        layout=dict(layout),
    )


def read_signals(recording: Recording, indices: Sequence[int]) -> list[np.ndarray]:
    """Channels as float32 (num_samples,) in µV.

    Raises:
        RecordingError: `TRUNCATED`.
    """
    header = _parse(recording.path, recording.layout, [])
    frames = Frames(
        path=recording.path,
        offset=_HEAD_BYTES + _CHANNEL_BYTES * len(header.labels),
        dtype=_SAMPLES[header.sample_bytes],
        num_rows=len(header.labels),
        num_samples=recording.channels[0].num_samples,
        run=header.run,
    )
    kept = {channel.index: channel.calibrated for channel in recording.channels}
    gains = [header.gains[index] if kept[index] else 1.0 for index in indices]
    offsets = [header.offsets[index] if kept[index] else 0.0 for index in indices]
    return read_rows(frames, indices, gains, offsets)


def _parse(path: Path, layout: Mapping[str, object], repairs: list[str]) -> _Header:
    rules = parse_layout(CntLayout, layout, "cnt")
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
        refuse_pointer(path, head)
        if not is_neuroscan(head):
            raise RecordingError("NOT_A_RECORDING", f"{path}: does not begin as a Neuroscan file does")
        if len(head) < _HEAD_BYTES:
            raise RecordingError("TRUNCATED", f"{path}: {len(head)} bytes; its header alone takes {_HEAD_BYTES}")
        (count,) = struct.unpack_from("<H", head, 370)
        (rate,) = struct.unpack_from("<H", head, 376)
        if not 0 < count <= _MAX_CHANNELS or not rate:
            raise RecordingError("HEADER_INVALID", f"{path}: {count} channels at {rate} Hz")
        described = stream.read(_CHANNEL_BYTES * count)
    if len(described) < _CHANNEL_BYTES * count:
        raise RecordingError("TRUNCATED", f"{path}: ends among the descriptions of its {count} channels")
    (promised,), (table,), (run,) = (struct.unpack_from("<i", head, place) for place in (864, 886, 894))
    begin = _HEAD_BYTES + len(described)
    table = table if begin < table <= size else 0
    width, samples = _width(path, (promised, table - begin if table else 0, size - begin), count, rules.data_format)
    held = whole_frames(path, offset=begin, frame_bytes=width * count, promised=samples, repairs=repairs)
    if promised > 0 and samples != promised:
        repairs.append(f"{promised} samples per channel in the header, {samples} before the table of events")
    frames = Frames(path=path, offset=begin, dtype=_SAMPLES[width], num_rows=count, num_samples=held)
    run = _run(path, frames, run // width, rules.block_samples)
    channels = [described[place : place + _CHANNEL_BYTES] for place in range(0, len(described), _CHANNEL_BYTES)]
    gains = [struct.unpack_from("<f", text, 59)[0] * struct.unpack_from("<f", text, 71)[0] / 204.8 for text in channels]
    gains = [gain if np.isfinite(gain) else 0.0 for gain in gains]
    baselines = [struct.unpack_from("<h", text, 47)[0] for text in channels]
    return _Header(
        labels=[text[:10].split(b"\0")[0].decode("latin-1") for text in channels],
        gains=gains,
        offsets=[-baseline * gain for baseline, gain in zip(baselines, gains, strict=True)],
        rate=Fraction(rate),
        sample_bytes=width,
        num_samples=held - held % run,
        run=run,
        table=table or begin + width * count * samples,
    )


def _width(path: Path, sizes: tuple[int, int, int], count: int, declared: str) -> tuple[int, int]:
    """Bytes of a sample and samples per channel that the header means.

    Args:
        path: For messages.
        sizes: Samples per channel by the header (0: unknown), bytes before the table of events (0: unknown), and
            bytes to the end of the file.
        count: Channels.
        declared: `auto` or what the layout says.
    """
    promised, before_table, to_end = sizes
    if declared != "auto":
        width = 2 if declared == "int16" else 4
        return width, before_table // (width * count) if before_table else promised or to_end // (width * count)
    if promised > 0 and before_table:
        for width in (2, 4):  # the number of samples in a header is often off by a few blocks, never by a factor
            held, rest = divmod(before_table, width * count)
            if not rest and abs(held - promised) <= _PROMISE_TOLERANCE * promised:
                return width, held
    elif promised * count * 2 <= to_end < promised * count * 4:
        return 2, promised
    raise RecordingError(
        "HEADER_INVALID",
        f"{path}: {promised} samples of {count} channels in {before_table or to_end} bytes are neither 2 nor 4 bytes "
        "each; declare layout.data_format: int16 or int32",
    )


def _run(path: Path, frames: Frames, written: int, declared: int | None) -> int:
    """Successive samples of a channel: 1 or the header's, which some recorders write and do not follow.

    Of the two orders the one is true in which neighbouring samples of a channel resemble each other.
    """
    if declared is not None or written <= 1 or frames.num_rows == 1:
        return declared or 1
    count = min(frames.num_samples, _PROBE_SAMPLES) // written * written
    with path.open("rb") as stream:
        stream.seek(frames.offset)
        data = np.fromfile(stream, dtype=frames.dtype, count=count * frames.num_rows).astype(np.float64)
    if data.size < count * frames.num_rows or not count:
        return 1
    mixed = np.abs(np.diff(data.reshape(-1, frames.num_rows), axis=0)).mean()
    blocked = np.abs(np.diff(data.reshape(-1, frames.num_rows, written), axis=2)).mean()
    if max(mixed, blocked) < 2 * min(mixed, blocked):
        raise RecordingError(
            "HEADER_INVALID", f"{path}: blocks of {written} samples or of 1? declare layout.block_samples"
        )
    return written if blocked < mixed else 1


def _clock(path: Path) -> str:
    with path.open("rb") as stream:
        stream.seek(235)
        text = stream.read(12).split(b"\0")[0].decode("latin-1").strip()
    parts = text.split(":")
    return text if len(parts) == 3 and all(part.isdigit() and len(part) == 2 for part in parts) else ""


def _events(path: Path, header: _Header, repairs: list[str]) -> list[tuple[int, int, str]]:
    """Sample, accept nibble and text of each event, in order; empty where the file ends before its table."""
    with path.open("rb") as stream:
        stream.seek(header.table)
        teeg = stream.read(9)
        kind, size = struct.unpack_from("<Bi", teeg) if len(teeg) == 9 else (0, 0)
        if kind not in _EVENT_BYTES or not 0 <= size <= _MAX_EVENT_BYTES:
            repairs.append("no table of events behind the samples: no annotations")
            return []
        data = stream.read(size)
    width = _EVENT_BYTES[kind]
    if len(data) < size or size % width:
        repairs.append("the table of events ends early: the whole ones kept")
    rows = np.frombuffer(data[: len(data) // width * width], dtype=np.uint8).reshape(-1, width)
    events = np.ascontiguousarray(rows[:, :8]).view(_EVENT)[:, 0]
    frame = header.sample_bytes * len(header.labels)
    places = events["offset"].astype(np.int64)
    if kind != 3:  # bytes from the start of the file; type 3 counts samples
        places = (places - _HEAD_BYTES - _CHANNEL_BYTES * len(header.labels)) // frame
    found = [
        (int(place), int(event["keypad"]) >> 4, _text(event))
        for place, event in zip(places, events, strict=True)
        if 0 <= place < header.num_samples
    ]
    if len(found) < len(events):
        repairs.append(f"{len(events) - len(found)} events outside of the samples: left out")
    return sorted(found)


def _text(event: np.void) -> str:
    """Text of an event as MNE words it."""
    if keypad := int(event["keypad"]) & 0xF:
        return f"KeyPad Response {keypad}"
    if keyboard := int(event["keyboard"]):
        return f"Keyboard Response {keyboard}"
    return str(int(event["stim"]))


def _annotations(events: Sequence[tuple[int, int, str]], times: Timeline) -> tuple[Annotation, ...]:
    """Events as annotations; a rejected stretch is one from its mark to the next accepting one."""
    found: list[Annotation] = []
    rejected: int | None = None
    for sample, accept, text in events:
        if accept == 0xC:
            rejected = sample if rejected is None else rejected
        elif accept == 0xD:
            if rejected is not None:
                begin = times.time_of(rejected)
                found.append(annotation(begin, times.time_of(sample) - begin, "BAD_reject"))
            rejected = None
        elif accept not in _STOPS:
            found.append(annotation(times.time_of(sample), Fraction(0), text))
    if rejected is not None:
        begin = times.time_of(rejected)
        found.append(annotation(begin, times.time_of(times.num_samples) - begin, "BAD_reject"))
    return tuple(sorted(found, key=lambda item: item.onset))
