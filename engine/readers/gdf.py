"""GDF 1 and 2 recordings, read by numpy: every channel keeps its own rate, type and unit.

MNE makes every rate the highest one, knows three units and drops the breaks between runs; here an event 0x7ffe (new
segment) begins a segment. Events are named by the decimal number of their type. Source: GDF 2.51, arXiv:cs/0608052.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from engine.readers.magic import is_gdf
from engine.readers.mne_raw import annotation, refuse_pointer
from engine.readers.timeline import Timeline, exact_rate, timeline
from engine.recording import Annotation, Channel, Recording
from manifests.errors import RecordingError

_TYPES = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<i8", 8: "<u8", 16: "<f4", 17: "<f8"}
_PREFIXES = {0: "", 3: "k", 18: "m", 19: "u", 20: "n", 21: "p"}
_UNITS = {512: "", 544: "%", 2496: "Hz", 3840: "mmHg", 4256: "V", 4288: "ohm", 6048: "degC"}
_FIXED_BYTES = 256
_BLOCK_BYTES = 4 << 20
_MAX_CHANNELS = 4096
_MAX_EVENTS = 1 << 24
_NEW_SEGMENT = 0x7FFE


@dataclass(frozen=True, slots=True, kw_only=True)
class _Signal:
    """One channel: where it lies in a record, and what its values mean."""

    label: str
    unit: str
    prefilter: str
    dtype: np.dtype
    per_record: int
    offset: int
    gain: float
    zero: float
    calibrated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    version: float
    signals: tuple[_Signal, ...]
    record_s: Fraction
    num_records: int
    data_start: int
    record_bytes: int


def read_header(path: Path, layout: Mapping[str, object]) -> Recording:
    """Channels with exact native rates, segments and events; no sample is read.

    Raises:
        RecordingError: `NOT_A_RECORDING`, `HEADER_INVALID` or `TRUNCATED`.
    """
    repairs: list[str] = []
    header = _parse(path, repairs)
    duration = header.num_records * header.record_s
    events, rate = _events(path, header, repairs)
    breaks = [(position, None) for position, kind, _ in events if kind == _NEW_SEGMENT]
    times = timeline(rate, math.ceil(duration * rate), breaks, repairs)
    return Recording(
        path=path,
        channels=tuple(
            Channel(
                index=index,
                label=signal.label,
                rate=signal.per_record / header.record_s,
                unit=signal.unit,
                prefilter=signal.prefilter,
                num_samples=signal.per_record * header.num_records,
                calibrated=signal.calibrated,
            )
            for index, signal in enumerate(header.signals)
            if signal.per_record
        ),
        segments=times.segments,
        annotations=_annotations(events, times),
        repairs=tuple(dict.fromkeys(repairs)),
        extra={"format": f"GDF {header.version:g}", "start_time": ""},
        layout=dict(layout),
    )


def read_signals(recording: Recording, indices: Sequence[int]) -> list[np.ndarray]:
    """Channels in their physical units as float32 (num_samples,); an uncalibrated one as stored.

    Raises:
        RecordingError: `TRUNCATED`.
    """
    path = recording.path
    header = _parse(path, [])
    by_index = {channel.index: channel for channel in recording.channels}
    outputs = [np.empty(by_index[index].num_samples, dtype=np.float32) for index in indices]
    step = max(1, _BLOCK_BYTES // header.record_bytes)
    with path.open("rb") as stream:
        stream.seek(header.data_start)
        for first in range(0, header.num_records if outputs else 0, step):
            count = min(step, header.num_records - first)
            data = np.fromfile(stream, dtype=np.uint8, count=count * header.record_bytes)
            if data.size < count * header.record_bytes:
                raise RecordingError("TRUNCATED", f"{path}: has lost samples since its header was read")
            block = data.reshape(count, header.record_bytes)
            for index, output in zip(indices, outputs, strict=True):
                signal = header.signals[index]
                stop = signal.offset + signal.per_record * signal.dtype.itemsize
                values = np.ascontiguousarray(block[:, signal.offset : stop]).view(signal.dtype).astype(np.float64)
                with np.errstate(invalid="ignore", over="ignore"):  # floats of a damaged file
                    if signal.calibrated:
                        values = values * signal.gain + signal.zero
                    output[first * signal.per_record : (first + count) * signal.per_record] = values.ravel()
    return outputs


def _text(data: bytes) -> str:
    return data.split(b"\0")[0].decode("latin-1").strip()


def _parse(path: Path, repairs: list[str]) -> _Header:
    size = path.stat().st_size
    with path.open("rb") as stream:
        fixed = stream.read(_FIXED_BYTES)
        refuse_pointer(path, fixed)
        if not is_gdf(fixed):
            raise RecordingError("NOT_A_RECORDING", f"{path}: does not begin as a GDF file does")
        if len(fixed) < _FIXED_BYTES:
            raise RecordingError("TRUNCATED", f"{path}: {len(fixed)} bytes; its header alone takes {_FIXED_BYTES}")
        version = float(fixed[4:8])
        is_old = version < 1.9
        (promised,) = struct.unpack_from("<q", fixed, 236)
        numerator, denominator = struct.unpack_from("<2I", fixed, 244)
        (count,) = struct.unpack_from("<I" if is_old else "<H", fixed, 252)
        (start,) = struct.unpack_from("<q", fixed, 184) if is_old else (struct.unpack_from("<H", fixed, 184)[0] * 256,)
        if not 0 < count <= _MAX_CHANNELS or start < _FIXED_BYTES * (count + 1) or not denominator:
            raise RecordingError(
                "HEADER_INVALID",
                f"{path}: {count} channels, header of {start} bytes, record of {numerator}/{denominator}",
            )
        table = stream.read(_FIXED_BYTES * count)
    if len(table) < _FIXED_BYTES * count or start > size:
        raise RecordingError("TRUNCATED", f"{path}: ends among the descriptions of its {count} channels")
    if not numerator:
        repairs.append("no record length in the header: one second taken")
    signals = _signals(path, table, count, is_old=is_old)
    record_bytes = sum(signal.per_record * signal.dtype.itemsize for signal in signals)
    if not record_bytes:
        raise RecordingError("HEADER_INVALID", f"{path}: {count} channels without a sample")
    held = (size - start) // record_bytes
    if promised < 0:
        repairs.append("no number of records in the header: counted")
    elif promised > held:
        repairs.append(f"truncated: {held} of {promised} records are there")
    num_records = held if promised < 0 else min(promised, held)
    if num_records <= 0:
        raise RecordingError("TRUNCATED", f"{path}: not one whole record of {record_bytes} bytes")
    return _Header(
        version=version,
        signals=signals,
        record_s=Fraction(numerator or 1, denominator),
        num_records=num_records,
        data_start=start,
        record_bytes=record_bytes,
    )


def _signals(path: Path, table: bytes, count: int, *, is_old: bool) -> tuple[_Signal, ...]:
    """The table of channels: every field for all channels, one field after another."""

    def column(offset: int, kind: str) -> np.ndarray:
        """A field whose bytes begin `offset` × channels into the table."""
        return np.frombuffer(table, dtype=kind, count=count, offset=offset * count)

    labels = column(0, "S16")
    low, high = column(104, "<f8"), column(112, "<f8")
    floor, ceiling = (column(120, "<i8" if is_old else "<f8"), column(128, "<i8" if is_old else "<f8"))
    per_record, kinds = column(216, "<i4"), column(220, "<i4")
    units = (
        [_text(bytes(text)) for text in column(96, "S8")] if is_old else [_unit(code) for code in column(102, "<u2")]
    )
    filters = [""] * count if is_old else _filters(column(204, "<f4"), column(208, "<f4"))
    found: list[_Signal] = []
    offset = 0
    for index in range(count):
        if (kind := int(kinds[index])) not in _TYPES or per_record[index] < 0:
            raise RecordingError(
                "HEADER_INVALID", f"{path}: channel {index}: {per_record[index]} samples of type {kind}"
            )
        dtype = np.dtype(_TYPES[kind])
        span, steps = float(high[index]) - float(low[index]), float(ceiling[index]) - float(floor[index])
        good = bool(np.isfinite(span) and np.isfinite(steps)) and span != 0 and steps != 0
        gain = span / steps if good else 1.0
        found.append(
            _Signal(
                label=_text(bytes(labels[index])),
                unit=units[index],
                prefilter=filters[index],
                dtype=dtype,
                per_record=int(per_record[index]),
                offset=offset,
                gain=gain,
                zero=float(low[index]) - float(floor[index]) * gain if good else 0.0,
                calibrated=good,
            )
        )
        offset += int(per_record[index]) * dtype.itemsize
    return tuple(found)


def _unit(code: int) -> str:
    """Unit of a code: a base unit in the upper bits and a decimal factor in the lower five; empty where unknown."""
    base = _UNITS.get(int(code) & ~31)
    prefix = _PREFIXES.get(int(code) & 31)
    return f"{prefix}{base}" if base and prefix is not None else ""


def _filters(lows: np.ndarray, highs: np.ndarray) -> list[str]:
    """Corner frequencies as an EDF header words them; a value that is no number says nothing."""
    return [
        " ".join([*([f"HP:{high:g}Hz"] if high > 0 else []), *([f"LP:{low:g}Hz"] if 0 < low < np.inf else [])])
        for low, high in zip(lows.tolist(), highs.tolist(), strict=True)
    ]


def _events(path: Path, header: _Header, repairs: list[str]) -> tuple[list[tuple[int, int, int]], Fraction]:
    """First sample, type and length in samples of each event, and the rate that these count at."""
    fastest = max(Fraction(signal.per_record) for signal in header.signals) / header.record_s
    with path.open("rb") as stream:
        stream.seek(header.data_start + header.num_records * header.record_bytes)
        head = stream.read(8)
        if len(head) < 8 or head[0] not in {1, 3}:
            return [], fastest
        if header.version < 1.94:
            rate_hz, count = float(int.from_bytes(head[1:4], "little")), int.from_bytes(head[4:8], "little")
        else:
            count, rate_hz = int.from_bytes(head[1:4], "little"), float(np.frombuffer(head[4:8], "<f4")[0])
        width = 6 if head[0] == 1 else 12
        data = stream.read(min(count, _MAX_EVENTS) * width)
    if len(data) < count * width:
        repairs.append("the table of events ends early: no annotations")
        return [], fastest
    rate = exact_rate(rate_hz) if 0 < rate_hz < np.inf else fastest
    positions = np.frombuffer(data, "<u4", count).astype(np.int64) - 1
    kinds = np.frombuffer(data, "<u2", count, offset=4 * count)
    lengths = np.frombuffer(data, "<u4", count, offset=8 * count) if head[0] == 3 else np.zeros(count, np.uint32)
    return sorted(zip(positions.tolist(), kinds.tolist(), lengths.tolist(), strict=True)), rate


def _annotations(events: Sequence[tuple[int, int, int]], times: Timeline) -> tuple[Annotation, ...]:
    return tuple(
        annotation(times.time_of(position), length / times.rate, str(kind))
        for position, kind, length in events
        if kind != _NEW_SEGMENT and 0 <= position < times.num_samples
    )
