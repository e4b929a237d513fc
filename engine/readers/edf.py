"""EDF, EDF+, BDF and BDF+ files, gzip-compressed too: blocks of records, annotations, gaps; suffixes are not asked.

A header that contradicts its file is repaired only where no sample value can depend on it; every repair is
listed in `Recording.repairs`, in words that never quote the header. Anything else is refused with a reason.

Compared sample by sample with edfio, pyedflib and MNE on every real file at hand (tests/engine/test_edf_peers.py
states each difference): values differ by the rounding of float32 only. Where a peer differs, it refuses the file
(pyedflib: wrong record counts, gaps, a physical range of nothing), joins the pieces of an EDF+D file, makes every
rate the highest one (MNE), or scales a channel that has no gain.
"""

import contextlib
import gzip
import io
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from engine.readers.edf_header import GZIP_MAGIC, Header, Signal, parse_header
from engine.readers.edf_tals import Record, annotations_of, origin_of, parse_record, refuse_unreadable, segments_of
from engine.readers.text import parse_layout
from engine.recording import Channel, Recording, Segment
from manifests.errors import RecordingError

_BLOCK_BYTES = 1 << 20  # about 60 records of a clinical EEG; larger blocks fall out of the L2 cache
_SCAN_BYTES = 64 << 20  # bytes looked at for damage by a text conversion
_FEW_PAIRS = 16  # line ends below which nothing is concluded from them
_END_RECORDS = 16  # records at either end of a file that are tested for a shift
_OUTSIDE_SHARE = 0.02  # of these samples may lie outside the digital range
_MAX_RATIO = 200  # of a compressed recording: real ones reach 10, DEFLATE's limit is 1032
_FREE_BYTES = 64 << 20  # below which the ratio does not matter
_MAX_TOTAL_S = 400 * 86400  # longest recording believed; ResMed's summary of a year has 365 days

_Stream = io.FileIO | gzip.GzipFile


class EdfLayout(BaseModel):
    """`layout` of a corpus with `reader: edf`.

    Attributes:
        encoding: Of labels and annotations that are not UTF-8. It is declared because no file says it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    encoding: Literal["latin-1", "cp1252", "cp1251", "shift_jis", "euc_jp", "euc_kr", "gb18030"] = "latin-1"


def read_header(path: Path, layout: Mapping[str, object]) -> Recording:
    """Channels with exact native rates, contiguous segments and annotations; no signal is read.

    `extra` holds `format`, `start_time` (HH:MM:SS or empty) and `start_subsecond`: seconds, a fraction as text,
    from that start time to the first sample, which EDF+ states in its first record.

    Raises:
        RecordingError: `NOT_A_RECORDING`, `HEADER_INVALID`, `TRUNCATED`, `ANNOTATION_INVALID`, or `SIGNAL_INVALID`
            for a compressed file that is damaged or blows up.
        ConfigError: The layout breaks its schema.
    """
    encoding = parse_layout(EdfLayout, layout, "edf").encoding
    repairs: list[str] = []
    with _opened(path) as stream:
        size = _size_of(stream, path)
        header = parse_header(stream, str(path), repairs, encoding=encoding)
        _refuse_impossible(header, path)
        records: list[Record] = []
        num_records = _whole_records(header, size)
        if header.annotation_signals:
            records = [parse_record(raw) for raw in _annotation_bytes(stream, header, num_records)]
        refuse_unreadable(records, header.kind, str(path), repairs)
        num_records = _settle_size(header, stream, size, path=path, records=records, repairs=repairs)
    records = records[:num_records]
    channels = _channels(header, num_records, repairs)
    segments = _segments(header, records, num_records=num_records, channels=channels, where=str(path), repairs=repairs)
    origin = origin_of(records, header.record_duration)
    return Recording(
        path=path,
        channels=channels,
        segments=segments if channels else (),
        annotations=annotations_of(records, origin, encoding, repairs),
        repairs=tuple(repairs),
        extra={"format": header.kind, "start_time": header.start_time, "start_subsecond": str(origin)},
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
    encoding = parse_layout(EdfLayout, recording.layout, "edf").encoding
    with _opened(recording.path) as stream:
        header = parse_header(stream, str(recording.path), [], encoding=encoding)
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


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Stream]:
    """The file's bytes, decompressed where it is gzip."""
    with path.open("rb", buffering=0) as raw:
        is_gzip = raw.read(2) == GZIP_MAGIC
        raw.seek(0)
        if not is_gzip:
            yield raw
            return
        try:
            with gzip.GzipFile(fileobj=raw) as stream:
                yield stream
        except EOFError:
            raise RecordingError("TRUNCATED", f"{path}: the compressed file ends early; fetch it again") from None
        except (zlib.error, gzip.BadGzipFile) as error:
            raise RecordingError("SIGNAL_INVALID", f"{path}: damaged gzip file: {error}; get a sound copy") from error


def _size_of(stream: _Stream, path: Path) -> int:
    """Size in bytes of what can be read; a compressed file is read through once, as its own count may wrap."""
    compressed = path.stat().st_size
    if not isinstance(stream, gzip.GzipFile):
        return compressed
    size = 0
    while block := stream.read(_BLOCK_BYTES):
        size += len(block)
        if size > max(_FREE_BYTES, _MAX_RATIO * compressed):
            raise RecordingError(
                "SIGNAL_INVALID",
                f"{path}: {compressed} bytes hold more than {_MAX_RATIO} times as many: no sensor gives such samples",
            )
    stream.seek(0)
    return size


def _fill(stream: _Stream, view: memoryview, path: Path) -> None:
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


def _refuse_impossible(header: Header, path: Path) -> None:
    """Raise where the header's times contradict its signals."""
    if not header.record_duration and not header.annotation_signals:
        raise RecordingError(
            "HEADER_INVALID",
            f"{path}: records of 0 s and no annotations: the sampling rates are unknown; get a sound copy",
        )


def _whole_records(header: Header, size: int) -> int:
    return max(0, size - header.data_start) // header.record_bytes if header.record_bytes else 0


def _settle_size(
    header: Header, stream: _Stream, size: int, *, path: Path, records: Sequence[Record], repairs: list[str]
) -> int:
    """Number of data records to trust, or a refusal where samples may have shifted."""
    declared, whole = header.num_records, _whole_records(header, size)
    rest = max(0, size - header.data_start) - whole * header.record_bytes
    found = (
        f"{path}: header says {declared} records of {header.record_bytes} bytes, file holds {whole} and {rest} bytes"
    )
    if whole == 0:
        raise RecordingError("TRUNCATED", f"{found}: no complete record")
    if whole * header.record_duration > _MAX_TOTAL_S:
        raise RecordingError(
            "HEADER_INVALID", f"{found}; records of {float(header.record_duration):g} s make more than 400 days"
        )
    if declared != whole or rest:
        _refuse_line_ends(stream, found)
        if records and not all(record.onset for record in records):
            raise RecordingError(
                "HEADER_INVALID",
                f"{found}, and record times are unreadable: bytes were lost or added; get a sound copy",
            )
        if declared >= 0:
            _refuse_shifted(header, stream, whole, found)
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


def _refuse_line_ends(stream: _Stream, found: str) -> None:
    """Raise if every LF stands after a CR: in sound recordings next to none does."""
    stream.seek(0)
    feeds = pairs = 0
    last = b""
    for _ in range(_SCAN_BYTES // _BLOCK_BYTES):
        data = last + (block := stream.read(_BLOCK_BYTES))
        feeds, pairs, last = feeds + block.count(b"\n"), pairs + data.count(b"\r\n"), block[-1:]
    if feeds >= _FEW_PAIRS and pairs == feeds:
        raise RecordingError(
            "HEADER_INVALID", f"{found}; every LF stands after a CR: line ends were converted; get a sound copy"
        )


def _refuse_shifted(header: Header, stream: _Stream, num_records: int, found: str) -> None:
    """Raise if bytes went missing in the middle, which shifts the samples after them.

    Samples read across the wrong borders leave the digital range of their header. A sound file may have a signal
    that always does (a sensor that was off), hence the comparison with the file's beginning. That no CR LF is
    left proves nothing: sound files of eegmmidb have none among 10,000 of each.
    """
    count = min(_END_RECORDS, num_records)
    ends = []
    for first in (0, num_records - count):
        stream.seek(header.data_start + first * header.record_bytes)
        raw = np.frombuffer(_exactly(stream, count * header.record_bytes), dtype=np.uint8)
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


def _exactly(stream: _Stream, count: int) -> bytes:
    """So many bytes, of which an unbuffered file may give fewer at once."""
    parts: list[bytes] = []
    while count > 0 and (part := stream.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _annotation_bytes(stream: _Stream, header: Header, num_records: int) -> Iterator[list[bytes]]:
    """Per record, the bytes of each annotation signal."""
    places = [
        (signal.offset_samples * header.sample_bytes, signal.num_samples * header.sample_bytes)
        for signal in header.annotation_signals
    ]
    if isinstance(stream, gzip.GzipFile):
        stream.seek(header.data_start)
        for _ in range(num_records):
            record = _exactly(stream, header.record_bytes)
            yield [record[offset : offset + count] for offset, count in places]
        return
    descriptor, record_bytes = stream.fileno(), header.record_bytes
    for start in range(header.data_start, header.data_start + num_records * record_bytes, max(1, record_bytes)):
        yield [os.pread(descriptor, count, start + offset) for offset, count in places]


def _channels(header: Header, num_records: int, repairs: list[str]) -> tuple[Channel, ...]:
    channels: list[Channel] = []
    for signal in header.signals:
        if signal.is_annotation:
            continue
        if not header.record_duration or not signal.num_samples:  # as ResMed's Crc16 beside its events
            repairs.append(f"signal {signal.index} has no sampling rate: left out")
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
    records: Sequence[Record],
    *,
    num_records: int,
    channels: Sequence[Channel],
    where: str,
    repairs: list[str],
) -> tuple[Segment, ...]:
    whole = (Segment(start=Fraction(0), duration=num_records * header.record_duration),)
    is_plus = header.kind.endswith(("C", "D"))
    if not channels:
        return ()
    if not records:
        if header.kind.endswith("D"):
            raise RecordingError("ANNOTATION_INVALID", f"{where}: EDF+D without annotations: gaps cannot be placed")
        if is_plus:
            repairs.append("EDF+ without an annotation channel read as EDF")
        return whole
    if not is_plus and not all(record.onset for record in records):
        repairs.append("annotations of a plain EDF do not give the times of all records: read as contiguous")
        return whole
    return segments_of(
        records,
        duration=header.record_duration,
        kind=header.kind,
        max_rate=max(channel.rate for channel in channels),
        where=where,
        repairs=repairs,
    )
