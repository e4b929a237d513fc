"""WFDB records (PhysioNet), decoded by the `wfdb` package: native rates, gaps, missing samples as NaN.

Signals come in blocks of frames, one segment of a multi-segment record after the other, so that a day of Holter
costs little more memory than its float32 samples. Skew and calibration are applied here: wfdb cannot shift two
signals by different counts, and reads a gain of 0 as 200.

Source: https://wfdb.io/spec/header-files.html, https://wfdb.io/spec/signal-files.html.
"""

import contextlib
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import wfdb

from engine.readers.physionet_samples import (
    BITS,
    DIRECT,
    SAMPLE_BYTES,
    flac_length,
    read_samples,
    scale_samples,
    sum_16,
)
from engine.recording import Channel, Recording, Segment
from manifests.errors import RecordingError

_BLOCK_FRAMES = 12 << 16  # a multiple of the 2 or 3 samples that formats 212, 310 and 311 pack together
_DIRECT_SAMPLES = 1 << 17  # of all signals in a block that no decoder of wfdb has to be called for: fits the L2 cache
_MAX_HEADER_BYTES = 16 << 20  # headers are text of some kilobytes; a day in a thousand segments has 100
_MAX_RATE_HZ, _MAX_GAIN = 10**8, 1e30
_COMMENT = re.compile(r"\s*([A-Za-z]\w{0,30})\s*:\s*(.*)")
_RECORD_NAME = re.compile(r"([-\w]+)(\.\w+)(?=[ \t])")
_MULTI = re.compile(r"[-\w]+/\d+")
_GAIN = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
# wfdb's records are `Any` below: it declares every attribute as optional.
# What wfdb raises on a file that breaks the format; its own HeaderSyntaxError is a ValueError.
_WFDB_ERRORS = (ValueError, IndexError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError, NameError)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A single-segment record inside the whole: where wfdb finds it, its first frame, and its usable frames.

    `rows` tells which of its signals is which of the whole record's; `gains` are as written, None where absent.
    """

    name: str
    record: Any
    gains: list[str | None]
    first: int
    num_frames: int
    rows: dict[int, int]


def companions(path: Path) -> list[Path]:
    """Signal files that a `.hea` names, and the headers and signal files of its segments; some may be missing.

    A name with a folder in it is left out: such a record is refused by `read_header`.
    """
    names, is_multi = _beside(path)
    if not is_multi:
        return [path.parent / name for name in names]
    found: list[Path] = []
    for name in names:
        segment = path.parent / f"{name}.hea"
        found.append(segment)
        if segment != path and segment.is_file():
            found += [path.parent / other for other in _beside(segment)[0]]
    return list(dict.fromkeys(found))


def _beside(path: Path) -> tuple[list[str], bool]:
    """Names below the record line that can lie beside the header, and whether they are segments; none if unreadable."""
    try:
        lines = _lines(_header_text(path))
    except (RecordingError, OSError):
        return [], False
    names = [name for name in _names(lines) if name != "~" and not _is_elsewhere(name)]
    return names, bool(lines and _MULTI.fullmatch(lines[0].split()[0]))


def read_header(path: Path, layout: Mapping[str, object]) -> Recording:
    """Channels and segments of the record whose `.hea` is given; header comments `Key: value` go to `extra`.

    Raises:
        RecordingError: `NOT_A_RECORDING`, `HEADER_INVALID` or `TRUNCATED`.
    """
    repairs: list[str] = []
    with _opened(path, repairs) as (record, parts):
        described = _described(record)
        frame_rate = _frame_rate(record, path)
        runs = _runs(parts)
        channels = [
            _channel(described, parts, index, frame_rate=frame_rate, num_frames=sum(b - a for a, b in runs))
            for index in range(described.n_sig)
        ]
    repairs += [
        f"signal {index}: no gain in the header: 200 per unit, as the standard says"
        for index in range(len(channels))
        if any(part.gains[part.rows[index]] is None for part in parts if index in part.rows)
    ]
    return Recording(
        path=path,
        channels=tuple(channels),
        segments=tuple(Segment(start=a / frame_rate, duration=(b - a) / frame_rate) for a, b in runs),
        repairs=tuple(repairs),
        extra=_comments(record.comments or []),
        layout=dict(layout),
    )


def read_signals(recording: Recording, indices: Sequence[int]) -> list[np.ndarray]:
    """Whole channels in the header's unit, float32 (num_samples,), NaN where the record has no valid sample.

    Raises:
        RecordingError: `SIGNAL_INVALID` (also for a checksum that differs from the header's) or `TRUNCATED`.
    """
    by_index = {channel.index: channel for channel in recording.channels}
    outputs = [np.empty(by_index[index].num_samples, dtype=np.float32) for index in indices]
    if not indices:
        return []
    with _opened(recording.path, []) as (record, parts):
        per_frame = [_described(record).samps_per_frame[index] or 1 for index in indices]
        if any(sum(part.num_frames for part in parts) * n != len(o) for n, o in zip(per_frame, outputs, strict=True)):
            raise RecordingError("TRUNCATED", f"{recording.path}: its files changed while they were read")
        done = 0
        for part in parts:
            views = {
                index: output[done * n : (done + part.num_frames) * n]
                for index, output, n in zip(indices, outputs, per_frame, strict=True)
            }
            done += part.num_frames
            for index in set(indices) - set(part.rows):
                views[index].fill(np.nan)
            present = {part.rows[index]: view for index, view in views.items() if index in part.rows}
            if present:
                is_raw = {part.rows[i]: not by_index[i].calibrated for i in indices if i in part.rows}
                _decode(part, present, is_raw, recording.path)
    return outputs


def _decode(part: _Part, views: Mapping[int, np.ndarray], is_raw: Mapping[int, bool], path: Path) -> None:
    """Signals of one part, written to `views` by signal: shifted by their skew, in units or as digital values."""
    record = part.record
    sums = dict.fromkeys(views, 0)
    for row, start, digital in _digital(part, list(views), path):
        per_frame = record.samps_per_frame[row] or 1
        sums[row] += sum_16(digital)
        first = (start - (record.skew[row] or 0)) * per_frame
        scale_samples(
            digital[max(0, -first) :],
            views[row][max(0, first) : max(0, first + len(digital))],
            name=record.fmt[row],
            gain=1.0 if is_raw[row] else record.adc_gain[row],
            baseline=0 if is_raw[row] else record.baseline[row] or 0,
        )
    for row, view in views.items():
        if skew := (record.skew[row] or 0) * (record.samps_per_frame[row] or 1):
            view[-skew:] = np.nan
    if part.num_frames == record.sig_len:
        _check_sums(record, sums, path)


def _digital(part: _Part, rows: Sequence[int], path: Path) -> Iterator[tuple[int, int, np.ndarray]]:
    """Signal, first frame and digital values of block after block, (frames * samples per frame,)."""
    record = part.record
    for name in dict.fromkeys(record.file_name[row] for row in rows):
        wanted = [row for row in rows if record.file_name[row] == name]
        if record.fmt[wanted[0]] in DIRECT:
            yield from _direct_blocks(part, name, wanted, path)
        else:
            yield from _wfdb_blocks(part, wanted, path)


def _direct_blocks(part: _Part, name: str, rows: Sequence[int], path: Path) -> Iterator[tuple[int, int, np.ndarray]]:
    record = part.record
    signals = [index for index, other in enumerate(record.file_name) if other == name]
    counts = [record.samps_per_frame[index] or 1 for index in signals]
    width = sum(counts)
    places = {row: sum(counts[: signals.index(row)]) for row in rows}
    step = max(12, min(_BLOCK_FRAMES, _DIRECT_SAMPLES // width) // 12 * 12)
    for start in range(0, part.num_frames, step):
        num_frames = min(step, part.num_frames - start)
        try:
            block = read_samples(
                Path(part.name).parent / name,
                record.fmt[signals[0]],
                offset=record.byte_offset[signals[0]] or 0,
                first=start * width,
                count=num_frames * width,
            ).reshape(num_frames, width)
        except OSError as error:
            raise RecordingError("TRUNCATED", f"{path}: signal file {name} cannot be read: {error.strerror}") from error
        for row in rows:
            per_frame = record.samps_per_frame[row] or 1
            yield row, start, np.ascontiguousarray(block[:, places[row] : places[row] + per_frame]).reshape(-1)


def _wfdb_blocks(part: _Part, rows: list[int], path: Path) -> Iterator[tuple[int, int, np.ndarray]]:
    record = part.record
    is_whole_only = record.sig_len is None or "8" in record.fmt  # format 8 holds differences
    step = part.num_frames if is_whole_only else _BLOCK_FRAMES
    for start in range(0, part.num_frames, step):
        stop = min(part.num_frames, start + step)
        block = _read(part.name, path, rows, (start, None if record.sig_len is None else stop))
        for row, digital in zip(rows, block, strict=True):
            count = (stop - start) * (record.samps_per_frame[row] or 1)
            if len(digital) != count:
                raise RecordingError("TRUNCATED", f"{path}: {len(digital)} samples of signal {row}, not {count}")
            yield row, start, digital


def _lines(text: str) -> list[str]:
    """Lines of a header without comments and blank ones."""
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def _names(lines: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(line.split()[0] for line in lines[1:]))


def _is_elsewhere(name: str) -> bool:
    return "/" in name or "\\" in name or name in {".", ".."}


def _header_text(path: Path) -> str:
    size = path.stat().st_size
    data = path.read_bytes() if size <= _MAX_HEADER_BYTES else b""
    if b"\0" in data or not data.strip():
        raise RecordingError("NOT_A_RECORDING", f"{path}: not a text header ({size} bytes); give the .hea")
    return data.decode("latin-1")


@contextlib.contextmanager
def _opened(path: Path, repairs: list[str]) -> Iterator[tuple[Any, list[_Part]]]:
    """The record's header and its parts, while wfdb can find them."""
    text = _header_text(path)
    elsewhere = [name for name in _names(_lines(text)) if _is_elsewhere(name)]
    if elsewhere:
        raise RecordingError(
            "HEADER_INVALID", f"{path}: names files in other folders ({elsewhere[0][:80]!r}); they must lie beside it"
        )
    with _record_name(path, text, repairs) as name:
        record = _parse(name, path)
        yield record, _parts(record, name, path, repairs)


@contextlib.contextmanager
def _record_name(path: Path, text: str, repairs: list[str]) -> Iterator[str]:
    """Record name that wfdb opens. Georgia's headers call the record `E00009.mat`, which wfdb refuses."""
    lines = _lines(text)
    match = _RECORD_NAME.match(lines[0]) if lines else None
    if not match:
        yield str(path.with_suffix(""))
        return
    repairs.append("record name with a suffix read without it")
    with tempfile.TemporaryDirectory(prefix="kymo-wfdb-") as folder:
        copy = Path(folder, path.name)
        copy.write_text(text.replace(match.group(), match[1], 1), encoding="latin-1")
        for signal_file in _names(lines):
            Path(folder, signal_file).symlink_to(path.parent.resolve() / signal_file)
        yield str(copy.with_suffix(""))


def _parse(name: str, path: Path) -> Any:
    try:
        record: Any = wfdb.rdheader(name, rd_segments=True)
    except FileNotFoundError as error:
        missing = Path(error.filename or "").name
        reason = "HEADER_INVALID" if missing == f"{Path(name).name}.hea" else "TRUNCATED"  # a segment's header
        raise RecordingError(reason, f"{path}: {missing} is missing; a record's header is a .hea file") from error
    except OSError as error:
        what = error.strerror or type(error).__name__
        raise RecordingError("HEADER_INVALID", f"{path}: a header cannot be read: {what}") from error
    except _WFDB_ERRORS as error:
        # wfdb quotes what it cannot read, and a header may name a person anywhere.
        what = f"breaks the rules of a WFDB header ({type(error).__name__}); compare it with wfdb.io/spec"
        if "git-lfs" in _header_text(path):
            what = "a git-lfs pointer; fetch the file itself"
        raise RecordingError("HEADER_INVALID", f"{path}: {what}") from error
    for single in record.segments if _is_multi(record) else [record]:
        if single is not None:
            _check_header(single, path)
    return record


def _check_header(record: Any, path: Path) -> None:
    """Raise where a single-segment header contradicts itself or cannot be true."""
    if _is_multi(record):
        raise RecordingError("HEADER_INVALID", f"{path}: a segment that has segments itself")
    names = record.file_name or []
    if not record.n_sig or record.n_sig != len(names):
        raise RecordingError("HEADER_INVALID", f"{path}: {record.n_sig} signals, but {len(names)} lines for them")
    groups = list(dict.fromkeys(names))
    if names != sorted(names, key=groups.index):
        raise RecordingError("HEADER_INVALID", f"{path}: signals of one file do not follow each other")
    if 0 in record.samps_per_frame:
        raise RecordingError("HEADER_INVALID", f"{path}: 0 samples per frame")


def _frame_rate(record: Any, path: Path) -> Fraction:
    if not record.fs or not 0 < record.fs <= _MAX_RATE_HZ:
        raise RecordingError("HEADER_INVALID", f"{path}: {record.fs} frames per second")
    rate = Fraction(str(record.fs)).limit_denominator(1_000_000)
    if not rate:
        raise RecordingError("HEADER_INVALID", f"{path}: {record.fs} frames per second")
    return rate


def _read(name: str, path: Path, rows: list[int], span: tuple[int, int | None]) -> list[np.ndarray]:
    """Digital values of some signals of a single-segment record, in a span of frames."""
    start, stop = span
    try:
        options: dict[str, Any] = {"physical": False, "smooth_frames": False, "ignore_skew": True, "return_res": 32}
        record: Any = wfdb.rdrecord(name, channels=rows, sampfrom=start, sampto=stop, **options)
    except OSError as error:
        what = error.strerror or type(error).__name__
        raise RecordingError("TRUNCATED", f"{path}: a signal file cannot be opened: {what}") from error
    except _WFDB_ERRORS as error:
        raise RecordingError(
            "SIGNAL_INVALID", f"{path}: wfdb cannot decode a signal file ({type(error).__name__}); get a sound copy"
        ) from error
    return record.e_d_signal


def _is_multi(record: Any) -> bool:
    return isinstance(record, wfdb.MultiRecord)


def _described(record: Any) -> Any:
    """The header that describes the signals: of the layout or first segment where there are several."""
    if _is_multi(record):
        return next(segment for segment in record.segments if segment is not None)
    return record


def _parts(record: Any, name: str, path: Path, repairs: list[str]) -> list[_Part]:
    """Single-segment records with samples, in time order."""
    folder = Path(name).parent
    if not _is_multi(record):
        rows = {index: index for index in range(record.n_sig)}
        return [_part(record, name, path, first=0, length=None, rows=rows, repairs=repairs)]
    if all(segment is None for segment in record.segments):
        raise RecordingError("TRUNCATED", f"{path}: none of {len(record.seg_name)} segments holds a sample")
    parts: list[_Part] = []
    position = 0
    for seg_name, length, segment in zip(record.seg_name, record.seg_len, record.segments, strict=True):
        if segment is not None and length:
            if segment.fs != record.fs:
                raise RecordingError("HEADER_INVALID", f"{path}: a segment of {segment.fs} Hz in one of {record.fs}")
            rows = _rows(_described(record), segment, path, is_fixed=record.layout == "fixed")
            parts.append(
                _part(segment, str(folder / seg_name), path, first=position, length=length, rows=rows, repairs=repairs)
            )
        position += length
    if not parts:
        raise RecordingError("TRUNCATED", f"{path}: none of {len(record.seg_name)} segments holds a sample")
    return parts


def _part(
    record: Any, name: str, path: Path, *, first: int, length: int | None, rows: dict[int, int], repairs: list[str]
) -> _Part:
    num_frames = _num_frames(record, name, path, repairs)
    if length is not None and length < num_frames:
        raise RecordingError("HEADER_INVALID", f"{path}: {length} frames of a segment that has {num_frames}")
    lines = [line.split() for line in _lines(_header_text(Path(f"{name}.hea")))]
    gains = [line[2] if len(line) > 2 else None for line in lines[1:]]
    if any(gain is not None and not _GAIN.match(gain) for gain in gains):
        raise RecordingError("HEADER_INVALID", f"{path}: a gain that begins with no number")
    return _Part(name=name, record=record, gains=gains, first=first, num_frames=num_frames, rows=rows)


def _rows(described: Any, segment: Any, path: Path, *, is_fixed: bool) -> dict[int, int]:
    """Signal of a segment for each of the whole record's that it has: by place, or by name in a variable layout."""
    rows: dict[int, int] = {}
    names = [name or "" for name in described.sig_name]
    if is_fixed:
        if segment.n_sig != described.n_sig:
            raise RecordingError("HEADER_INVALID", f"{path}: segments of {described.n_sig} and {segment.n_sig} signals")
        rows = {index: index for index in range(described.n_sig)}
    else:
        free = {(name or "", nth): row for row, (name, nth) in enumerate(_counted(segment.sig_name))}
        rows = {index: free[key] for index, key in enumerate(_counted(names)) if key in free}
        if len(rows) != segment.n_sig:
            raise RecordingError("HEADER_INVALID", f"{path}: a segment has signals that the layout does not name")
    for index, row in rows.items():
        here = (segment.units[row], segment.samps_per_frame[row] or 1)
        if here != (described.units[index], described.samps_per_frame[index] or 1):
            raise RecordingError(
                "HEADER_INVALID", f"{path}: signal {index} changes its unit or its rate between segments"
            )
    return rows


def _counted(names: Sequence[str | None]) -> list[tuple[str, int]]:
    """Each name with how often it stood before, so that equal ones stay apart."""
    texts = [name or "" for name in names]
    return [(text, texts[:place].count(text)) for place, text in enumerate(texts)]


def _runs(parts: Sequence[_Part]) -> list[tuple[int, int]]:
    """Contiguous stretches as first frame and the one after the last."""
    runs: list[tuple[int, int]] = []
    for part in parts:
        if runs and runs[-1][1] == part.first:
            runs[-1] = (runs[-1][0], part.first + part.num_frames)
        else:
            runs.append((part.first, part.first + part.num_frames))
    return runs


def _channel(described: Any, parts: Sequence[_Part], index: int, *, frame_rate: Fraction, num_frames: int) -> Channel:
    per_frame = described.samps_per_frame[index] or 1
    return Channel(
        index=index,
        label=described.sig_name[index] or "",
        rate=frame_rate * per_frame,
        unit=described.units[index] or "",
        prefilter="",
        num_samples=num_frames * per_frame,
        calibrated=all(_is_gain(part.gains[part.rows[index]]) for part in parts if index in part.rows),
    )


def _is_gain(text: str | None) -> bool:
    """Whether a gain as written calibrates; absent it is 200 by the standard, 0 says that there is none."""
    match = _GAIN.match(text or "200")
    value = abs(float(match.group())) if match else 200.0
    return math.isfinite(value) and 1 / _MAX_GAIN <= value <= _MAX_GAIN


def _num_frames(record: Any, name: str, path: Path, repairs: list[str]) -> int:
    """Frames that header and signal files agree on."""
    held: list[int] = []
    for file_name in dict.fromkeys(record.file_name):
        signals = [index for index, other in enumerate(record.file_name) if other == file_name]
        signal_path = Path(name).parent / file_name
        if not signal_path.is_file():
            raise RecordingError("TRUNCATED", f"{path}: signal file {file_name} is missing")
        held.append(_frames_in(signal_path, record, signals, path))
    if record.sig_len is None:
        repairs.append(f"no length in the header: {min(held)} frames by the size of the signal file")
        num_frames = min(held)
    else:
        num_frames = min([record.sig_len, *held])
        if num_frames < record.sig_len:
            repairs.append(f"truncated: {num_frames} of {record.sig_len} frames in the signal file")
    if num_frames <= 0:
        raise RecordingError("TRUNCATED", f"{path}: no complete frame in the signal file")
    if any((skew or 0) >= num_frames for skew in record.skew):
        raise RecordingError("HEADER_INVALID", f"{path}: a skew longer than the {num_frames} frames")
    return num_frames


def _frames_in(signal_path: Path, record: Any, signals: Sequence[int], path: Path) -> int:
    """Whole frames of one signal file."""
    formats = {record.fmt[index] for index in signals}
    counts = [record.samps_per_frame[index] or 1 for index in signals]
    offset = record.byte_offset[signals[0]] or 0
    if len(formats) > 1 or not formats <= {*BITS, *SAMPLE_BYTES}:
        shown = ", ".join(sorted(formats))
        raise RecordingError("FORMAT_UNSUPPORTED", f"{path}: formats {shown} in one file; expected one known to WFDB")
    (name,) = formats
    if name in SAMPLE_BYTES:
        return max(0, int((signal_path.stat().st_size - offset) / (SAMPLE_BYTES[name] * sum(counts))))
    return max(0, flac_length(signal_path, path) - offset) // counts[0]


def _check_sums(record: Any, sums: Mapping[int, int], path: Path) -> None:
    """Refuse a whole signal whose 16-bit sum differs from the header's: its bytes are not those once written."""
    for row, found in sums.items():
        expected = record.checksum[row]
        if expected is not None and (found - expected) % 65536:
            raise RecordingError(
                "SIGNAL_INVALID",
                f"{path}: signal {row}: checksum {found % 65536}, header says {expected % 65536}; "
                "the signal file is damaged: get a sound copy",
            )


def _comments(lines: Sequence[str]) -> dict[str, str]:
    """`Key: value` comments by key, and the rest joined under `comment`."""
    matches = [(_COMMENT.fullmatch(line), line.strip()) for line in lines]
    found = {match[1]: match[2].strip() for match, _ in matches if match}
    free = "\n".join(line for match, line in matches if not match)
    return {**found, **({"comment": free} if free else {})}
