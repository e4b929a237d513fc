"""EDF, EDF+, BDF and BDF+ files: signals read in blocks of records, annotations, gaps; suffixes are not asked.

A header that contradicts its file is repaired only where no sample value can depend on it; every repair is
listed in `Recording.repairs`. Anything else is refused with a reason.
"""

import io
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from engine.readers.edf_header import Header, Signal, parse_header
from engine.recording import Annotation, Channel, Recording, Segment
from manifests.errors import RecordingError

_BLOCK_BYTES = 1 << 20  # about 60 records of a clinical EEG; larger blocks fall out of the L2 cache
_SCAN_BYTES = 64 << 20  # bytes looked at for damage by a text conversion
_FEW_PAIRS = 16  # line ends below which nothing is concluded from them
_END_RECORDS = 16  # records at either end of a file that are tested for a shift
_OUTSIDE_SHARE = 0.02  # of these samples may lie outside the digital range
_ONSET = re.compile(rb"[+-]\d+(?:\.\d*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """Annotations of one data record; onset is the text of its timekeeping TAL, None without one."""

    onset: bytes | None
    annotations: tuple[tuple[bytes, bytes, bytes], ...]


def read_header(path: Path, layout: Mapping[str, object]) -> Recording:
    """Channels with exact native rates, contiguous segments and annotations; no signal is read.

    Raises:
        RecordingError: `NOT_A_RECORDING`, `HEADER_INVALID`, `TRUNCATED` or `ANNOTATION_INVALID`.
    """
    repairs: list[str] = []
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = parse_header(stream, str(path), repairs)
        records: list[_Record] = []
        num_records = _whole_records(header, size)
        if header.annotation_signals:
            records = [_parse_record(raw) for raw in _annotation_bytes(stream.fileno(), header, num_records)]
        num_records = _settle_size(header, size, path, records, repairs)
    records = records[:num_records]
    channels = _channels(header, num_records, repairs)
    segments = _segments(header, records, num_records=num_records, channels=channels, where=str(path), repairs=repairs)
    return Recording(
        path=path,
        channels=channels,
        segments=segments if channels else (),
        annotations=_annotations(records),
        repairs=tuple(repairs),
        extra={"format": header.kind, "start_time": header.start_time},
        layout=dict(layout),
    )


def read_signals(recording: Recording, indices: Sequence[int]) -> list[np.ndarray]:
    """Whole channels in the header's physical unit, float32 (num_samples,), segments one after another.

    Args:
        recording: What `read_header` gave for the same file.
        indices: `Channel.index` of the channels wanted. An uncalibrated one comes as digital values.

    Raises:
        RecordingError: `TRUNCATED` if the file has lost bytes since its header was read.
    """
    by_index = {channel.index: channel for channel in recording.channels}
    with recording.path.open("rb", buffering=0) as stream:
        header = parse_header(stream, str(recording.path), [])
        signals = [header.signals[index] for index in indices]
        outputs = [np.empty(by_index[index].num_samples, dtype=np.float32) for index in indices]
        if not signals:
            return []
        num_records = outputs[0].size // signals[0].num_samples
        block_records = max(1, min(num_records, _BLOCK_BYTES // header.record_bytes))
        buffer = bytearray(block_records * header.record_bytes)
        stream.seek(header.data_start)
        for first in range(0, num_records, block_records):
            count = min(block_records, num_records - first)
            _fill(stream, memoryview(buffer)[: count * header.record_bytes], recording.path)
            block = np.frombuffer(buffer, dtype=np.uint8).reshape(block_records, -1)[:count]
            for signal, output in zip(signals, outputs, strict=True):
                rows = output.reshape(num_records, signal.num_samples)[first : first + len(block)]
                _decode(block, signal, header.sample_bytes, out=rows)
    return outputs


def _fill(stream: io.FileIO, view: memoryview, path: Path) -> None:
    while view:
        count = stream.readinto(view)
        if not count:
            raise RecordingError("TRUNCATED", f"{path}: the file became shorter while it was read; convert again")
        view = view[count:]


def _digital(block: np.ndarray, signal: Signal, sample_bytes: int) -> np.ndarray:
    """Digital values of one signal, (records, samples) integer, from (records, bytes) uint8."""
    start = signal.offset_samples * sample_bytes
    raw = block[:, start : start + signal.num_samples * sample_bytes]
    if sample_bytes == 2:
        return raw.view("<i2")
    # 24 bits go to the upper three bytes of 32, then shift down with the sign
    digital = np.zeros((len(raw), signal.num_samples), dtype="<i4")
    digital.view(np.uint8).reshape(*digital.shape, 4)[..., 1:] = raw.reshape(*digital.shape, 3)
    digital >>= 8
    return digital


def _decode(block: np.ndarray, signal: Signal, sample_bytes: int, *, out: np.ndarray) -> None:
    """Physical values of one signal, written to out (records, samples) float32; block (records, bytes) uint8."""
    digital = _digital(block, signal, sample_bytes)
    # 16 bits times float32 is exact enough and fast; 24 bits need the product in float64
    gain = np.float32(signal.gain) if sample_bytes == 2 else np.float64(signal.gain)
    np.multiply(digital, gain, out=out, casting="same_kind")
    if signal.offset:
        out += np.float32(signal.offset)


def _whole_records(header: Header, size: int) -> int:
    return max(0, size - header.data_start) // header.record_bytes if header.record_bytes else 0


def _settle_size(header: Header, size: int, path: Path, records: Sequence[_Record], repairs: list[str]) -> int:
    """Number of data records to trust, or a refusal where samples may have shifted."""
    declared, whole = header.num_records, _whole_records(header, size)
    rest = max(0, size - header.data_start) - whole * header.record_bytes
    found = (
        f"{path}: header says {declared} records of {header.record_bytes} bytes, file holds {whole} and {rest} bytes"
    )
    if whole == 0:
        raise RecordingError("TRUNCATED", f"{found}: no complete record")
    if declared != whole or rest:
        _refuse_line_ends(path, found)
        if records and not all(record.onset for record in records):
            raise RecordingError(
                "HEADER_INVALID",
                f"{found}, and record times are unreadable: bytes were lost or added; get a sound copy",
            )
        if declared >= 0:
            _refuse_shifted(header, path, whole, found)
        if whole > declared >= 0 and rest and not records:
            raise RecordingError("HEADER_INVALID", f"{found}: nothing tells where records begin; get a sound copy")
    if declared < 0:
        repairs.append(f"number of records {declared} replaced by the {whole} in the file")
    elif whole < declared:
        lost_s = float((declared - whole) * header.record_duration)
        repairs.append(f"truncated: {whole} of {declared} records in the file, {lost_s:g} s lost")
    elif whole > declared:
        repairs.append(f"file holds {whole} records where the header says {declared}: all are read")
    if rest:
        repairs.append(f"{rest} bytes after the last complete record left out")
    return whole


def _refuse_line_ends(path: Path, found: str) -> None:
    """Raise if every LF stands after a CR: in sound recordings next to none does."""
    with path.open("rb") as stream:
        data = stream.read(_SCAN_BYTES)
    feeds, pairs = data.count(b"\n"), data.count(b"\r\n")
    if feeds >= _FEW_PAIRS and pairs == feeds:
        raise RecordingError(
            "HEADER_INVALID", f"{found}; every LF stands after a CR: line ends were converted; get a sound copy"
        )


def _refuse_shifted(header: Header, path: Path, num_records: int, found: str) -> None:
    """Raise if bytes went missing in the middle, which shifts the samples after them.

    Samples read across the wrong borders leave the digital range of their header. A sound file may have a signal
    that always does (a sensor that was off), hence the comparison with the file's beginning. That no CR LF is
    left proves nothing: sound files of eegmmidb have none among 10,000 of each.
    """
    with path.open("rb") as stream:
        count = min(_END_RECORDS, num_records)
        ends = []
        for first in (0, num_records - count):
            stream.seek(header.data_start + first * header.record_bytes)
            raw = np.frombuffer(stream.read(count * header.record_bytes), dtype=np.uint8)
            ends.append(_outside_shares(raw.reshape(count, -1), header))
    num_worse = int(np.sum(ends[1] > ends[0] + _OUTSIDE_SHARE))
    if num_worse >= min(2, len(ends[1])) > 0:
        raise RecordingError(
            "TRUNCATED",
            f"{found}; {num_worse} of {len(ends[1])} signals leave their digital range at its end and not at its "
            "beginning: bytes were lost or added between; get a sound copy",
        )


def _outside_shares(block: np.ndarray, header: Header) -> np.ndarray:
    """Per signal, the share of samples outside its digital range; block (records, bytes) uint8."""
    shares = []
    for signal in header.signals:
        if not signal.is_annotation and signal.num_samples:
            low, high = signal.digital_limits
            digital = _digital(block, signal, header.sample_bytes)
            shares.append(np.mean((digital < low) | (digital > high)))
    return np.array(shares)


def _annotation_bytes(descriptor: int, header: Header, num_records: int) -> Iterator[list[bytes]]:
    """Per record, the bytes of each annotation signal."""
    places = [
        (signal.offset_samples * header.sample_bytes, signal.num_samples * header.sample_bytes)
        for signal in header.annotation_signals
    ]
    for index in range(num_records):
        start = header.data_start + index * header.record_bytes
        yield [os.pread(descriptor, count, start + offset) for offset, count in places]


def _parse_record(parts: Sequence[bytes]) -> _Record:
    """Time-stamped annotation lists of one record (EDF+ 2.2.2); what is not one is passed over."""
    onset: bytes | None = None
    found: list[tuple[bytes, bytes, bytes]] = []
    for position, raw in enumerate(parts):
        for place, tal in enumerate(raw.split(b"\0")):
            stamp, *texts = tal.split(b"\x14")
            start, _, duration = stamp.partition(b"\x15")
            if not texts or not _ONSET.fullmatch(start):
                continue
            if position == 0 and place == 0 and not texts[0]:
                onset = start
            found.extend((start, duration, text) for text in texts if text)
    return _Record(onset=onset, annotations=tuple(found))


def _annotations(records: Sequence[_Record]) -> tuple[Annotation, ...]:
    origin = Fraction((records[0].onset or b"0").decode()) if records else Fraction(0)
    return tuple(
        Annotation(onset=_seconds(onset) - origin, duration=_seconds(duration), text=_decode_text(text))
        for record in records
        for onset, duration, text in record.annotations
    )


def _seconds(raw: bytes) -> Fraction:
    try:
        return Fraction(raw.decode("ascii")) if raw else Fraction(0)
    except ValueError:
        return Fraction(0)


def _decode_text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8").strip()
    except UnicodeDecodeError:
        return raw.decode("latin-1").strip()


def _channels(header: Header, num_records: int, repairs: list[str]) -> tuple[Channel, ...]:
    channels: list[Channel] = []
    for signal in header.signals:
        if signal.is_annotation:
            continue
        if not header.record_duration or not signal.num_samples:
            repairs.append(f"signal {signal.index} {signal.label!r} has no sampling rate: left out")
            continue
        channels.append(
            Channel(
                index=signal.index,
                label=signal.label,
                rate=signal.num_samples / header.record_duration,
                unit=signal.unit,
                prefilter=signal.prefilter,
                num_samples=signal.num_samples * num_records,
                calibrated=signal.calibrated,
            )
        )
    return tuple(channels)


def _segments(
    header: Header,
    records: Sequence[_Record],
    *,
    num_records: int,
    channels: Sequence[Channel],
    where: str,
    repairs: list[str],
) -> tuple[Segment, ...]:
    """Runs of records whose onsets follow each other, in EDF+C as in EDF+D: either may hide a gap."""
    duration = header.record_duration
    whole = (Segment(start=Fraction(0), duration=num_records * duration),)
    if not records or not channels:
        if header.kind.endswith("D") and channels:
            raise RecordingError("ANNOTATION_INVALID", f"{where}: EDF+D without annotations: gaps cannot be placed")
        if header.kind.endswith("C") and not records:
            repairs.append("EDF+ without an annotation channel read as EDF")
        return whole
    missing = sum(record.onset is None for record in records)
    if missing:
        if header.kind.endswith("D"):
            raise RecordingError("ANNOTATION_INVALID", f"{where}: {missing} records of an EDF+D file have no onset")
        repairs.append(f"{missing} of {num_records} records have no onset: read as contiguous")
        return whole
    onsets = np.array([float(record.onset or 0) for record in records])
    tolerance = max(1e-3, 1 / float(max(channel.rate for channel in channels)))
    jumps = np.diff(onsets) - float(duration)
    starts = [0, *(np.flatnonzero(np.abs(jumps) > tolerance) + 1).tolist(), num_records]
    repairs.extend(
        f"record {start} begins {-jumps[start - 1]:g} s before the end of the one before it"
        for start in starts[1:-1]
        if jumps[start - 1] < 0
    )
    origin = _seconds(records[0].onset or b"")
    return tuple(
        Segment(start=_seconds(records[first].onset or b"") - origin, duration=(stop - first) * duration)
        for first, stop in itertools.pairwise(starts)
    )
