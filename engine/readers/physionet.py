"""WFDB records (PhysioNet), decoded by the `wfdb` package: native rates, gaps, missing samples as NaN.

Source: https://wfdb.io/spec/header-files.html.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import wfdb

from engine.recording import Channel, Recording, Segment
from manifests.errors import RecordingError

# Bytes of one sample, by format; compressed formats (508, 516, 524) have none.
_SAMPLE_BYTES = {
    "8": Fraction(1),
    "16": Fraction(2),
    "24": Fraction(3),
    "32": Fraction(4),
    "61": Fraction(2),
    "80": Fraction(1),
    "160": Fraction(2),
    "212": Fraction(3, 2),
    "310": Fraction(4, 3),
    "311": Fraction(4, 3),
}
_SUMMED = frozenset({"16", "212"})  # formats whose digital values wfdb hands out, for the checksum
_COMMENT = re.compile(r"\s*([A-Za-z]\w{0,30})\s*:\s*(.*)")
_RECORD_NAME = re.compile(r"([-\w]+)(\.\w+)(?=[ \t])")
# wfdb's records are `Any` below: it declares every attribute as optional.
# What wfdb raises on a file that breaks the format; its own HeaderSyntaxError is a ValueError.
_WFDB_ERRORS = (ValueError, IndexError, TypeError, KeyError, AttributeError, RuntimeError)


def companions(path: Path) -> list[Path]:
    """Signal files, or segment headers, that a `.hea` names."""
    lines = path.read_text(encoding="latin-1").splitlines()
    return [path.parent / line.split()[0] for line in lines if line.strip() and not line.startswith("#")]


def read_header(path: Path, layout: Mapping[str, object]) -> Recording:
    """Channels and segments of the record whose `.hea` is given; header comments `Key: value` go to `extra`.

    Raises:
        RecordingError: `NOT_A_RECORDING`, `HEADER_INVALID` or `TRUNCATED`.
    """
    repairs: list[str] = []
    text = _header_text(path)
    with _record_name(path, text, repairs) as name:
        record = _parse(name, path)
        described = _described(record)
        if not described.n_sig or not record.fs:
            raise RecordingError("HEADER_INVALID", f"{path}: {described.n_sig} signals at {record.fs} Hz")
        runs = _runs(record, name, path, repairs)
    frame_rate = Fraction(str(record.fs)).limit_denominator(1_000_000)
    gains = _gains(text) if described is record else []
    channels = []
    for index in range(described.n_sig):
        per_frame = described.samps_per_frame[index] or 1
        gain = gains[index] if gains else ""
        if gain is None:
            repairs.append(f"signal {index}: no gain in the header: 200 per unit, as the standard says")
        channels.append(
            Channel(
                index=index,
                label=described.sig_name[index] or "",
                rate=frame_rate * per_frame,
                unit=described.units[index] or "",
                prefilter="",
                num_samples=sum(stop - start for start, stop in runs) * per_frame,
                calibrated=gain is None or not re.fullmatch(r"[-+]?0*\.?0*(e.*)?", gain or "1"),
            )
        )
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
    if not indices:
        return []
    path = recording.path
    by_index = {channel.index: channel for channel in recording.channels}
    channels = [by_index[index] for index in indices]
    with _record_name(path, _header_text(path), []) as name:
        header = _parse(name, path)
        per_frame = _described(header).samps_per_frame[channels[0].index] or 1
        last = recording.segments[-1]
        num_frames = int((last.start + last.duration) * channels[0].rate / per_frame)
        record = _read(
            name,
            path,
            channels=list(indices),
            sampto=None if header.sig_len is None else num_frames,
            physical=_is_multi(header) or not _SUMMED.issuperset(header.fmt),
        )
    if record.e_d_signal is not None:
        _check_sums(record, header.sig_len, path)
        record.dac(expanded=True, return_res=32, inplace=True)
    signals = list(record.e_p_signal)
    for row, channel in enumerate(channels):
        if not channel.calibrated:
            signals[row] = signals[row] * record.adc_gain[row] + record.baseline[row]
    return [_cut(signal, channel, recording) for signal, channel in zip(signals, channels, strict=True)]


def _header_text(path: Path) -> str:
    data = path.read_bytes()
    if b"\0" in data or not data.strip():
        raise RecordingError("NOT_A_RECORDING", f"{path}: not a text header ({len(data)} bytes); give the .hea")
    return data.decode("latin-1")


@contextlib.contextmanager
def _record_name(path: Path, text: str, repairs: list[str]) -> Iterator[str]:
    """Record name that wfdb opens. Georgia's headers call the record `E00009.mat`, which wfdb refuses."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    match = _RECORD_NAME.match(lines[0]) if lines else None
    if not match:
        yield str(path.with_suffix(""))
        return
    repairs.append(f"record name {match.group()!r} read as {match[1]!r}")
    with tempfile.TemporaryDirectory(prefix="kymo-wfdb-") as folder:
        copy = Path(folder, path.name)
        copy.write_text(text.replace(match.group(), match[1], 1), encoding="latin-1")
        for signal_file in {line.split()[0] for line in lines[1:]}:
            Path(folder, Path(signal_file).name).symlink_to(path.parent.resolve() / Path(signal_file).name)
        yield str(copy.with_suffix(""))


def _parse(name: str, path: Path) -> Any:
    try:
        return wfdb.rdheader(name, rd_segments=True)
    except OSError as error:
        raise RecordingError("HEADER_INVALID", f"{path}: {error}") from error
    except _WFDB_ERRORS as error:
        what = "a git-lfs pointer; fetch the file itself" if "git-lfs" in _header_text(path) else str(error)
        raise RecordingError("HEADER_INVALID", f"{path}: {what}") from error


def _read(name: str, path: Path, *, channels: list[int], sampto: int | None, physical: bool) -> Any:
    try:
        return wfdb.rdrecord(
            name, channels=channels, sampto=sampto, physical=physical, smooth_frames=False, return_res=32
        )
    except OSError as error:
        raise RecordingError("TRUNCATED", f"{path}: a signal file cannot be opened: {error}") from error
    except _WFDB_ERRORS as error:
        raise RecordingError("SIGNAL_INVALID", f"{path}: {type(error).__name__}: {error}") from error


def _is_multi(record: Any) -> bool:
    return isinstance(record, wfdb.MultiRecord)


def _described(record: Any) -> Any:
    """The header that describes the signals: of the layout or first segment where there are several."""
    if _is_multi(record):
        return next(segment for segment in record.segments if segment is not None)
    return record


def _runs(record: Any, name: str, path: Path, repairs: list[str]) -> list[tuple[int, int]]:
    """Contiguous stretches as first frame and the one after the last."""
    if not _is_multi(record):
        return [(0, _num_frames(record, name, path, repairs))]
    runs: list[tuple[int, int]] = []
    position = 0
    for segment, length in zip(record.seg_name, record.seg_len, strict=True):
        if segment != "~" and length:
            if runs and runs[-1][1] == position:
                runs[-1] = (runs[-1][0], position + length)
            else:
                runs.append((position, position + length))
        position += length
    if not runs:
        raise RecordingError("TRUNCATED", f"{path}: none of {len(record.seg_name)} segments holds a sample")
    return runs


def _num_frames(record: Any, name: str, path: Path, repairs: list[str]) -> int:
    """Frames that header and signal files agree on."""
    held: list[int] = []
    for file_name in dict.fromkeys(record.file_name):
        signals = [index for index, other in enumerate(record.file_name) if other == file_name]
        signal_path = Path(name).parent / file_name
        if not signal_path.exists():
            raise RecordingError("TRUNCATED", f"{path}: signal file {file_name} is missing")
        sizes = [_SAMPLE_BYTES.get(record.fmt[index]) for index in signals]
        if any(size is None for size in sizes):
            continue
        frame = sum((size or 0) * (record.samps_per_frame[i] or 1) for size, i in zip(sizes, signals, strict=True))
        held.append(int((signal_path.stat().st_size - (record.byte_offset[signals[0]] or 0)) / frame))
    if record.sig_len is None:
        if not held:
            raise RecordingError("HEADER_INVALID", f"{path}: no length in the header of a compressed record")
        repairs.append(f"no length in the header: {min(held)} frames by the size of the signal file")
        num_frames = min(held)
    else:
        num_frames = min([record.sig_len, *held])
        if num_frames < record.sig_len:
            repairs.append(f"truncated: {num_frames} of {record.sig_len} frames in the signal file")
    if num_frames <= 0:
        raise RecordingError("TRUNCATED", f"{path}: no complete frame in the signal file")
    return num_frames


def _check_sums(record: Any, num_frames: int | None, path: Path) -> None:
    """Refuse a whole signal whose 16-bit sum differs from the header's: its bytes are not those once written."""
    for index, signal in enumerate(record.e_d_signal):
        is_whole = len(signal) == (num_frames or 0) * (record.samps_per_frame[index] or 1)
        expected = record.checksum[index]
        if expected is None or record.skew[index] or not is_whole:
            continue
        found = int(np.sum(signal, dtype=np.int64))
        if (found - expected) % 65536:
            raise RecordingError(
                "SIGNAL_INVALID",
                f"{path}: {record.sig_name[index]}: checksum {found % 65536}, header says {expected % 65536}; "
                "the signal file is damaged: get a sound copy",
            )


def _gains(text: str) -> list[str | None]:
    """Gain of each signal as written, None where the line has none."""
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [line[2] if len(line) > 2 else None for line in lines[1:]]


def _comments(lines: Sequence[str]) -> dict[str, str]:
    """`Key: value` comments by key, and the rest joined under `comment`."""
    matches = [(_COMMENT.fullmatch(line), line.strip()) for line in lines]
    found = {match[1]: match[2].strip() for match, _ in matches if match}
    free = "\n".join(line for match, line in matches if not match)
    return {**found, **({"comment": free} if free else {})}


def _cut(signal: np.ndarray, channel: Channel, recording: Recording) -> np.ndarray:
    """The segments of a signal that covers the whole record, gaps included."""
    parts = [
        signal[int(part.start * channel.rate) : int((part.start + part.duration) * channel.rate)]
        for part in recording.segments
    ]
    whole = np.concatenate(parts) if len(parts) > 1 else parts[0]
    if len(whole) != channel.num_samples:
        raise RecordingError(
            "SIGNAL_INVALID", f"{recording.path}: {len(whole)} samples of {channel.label!r}, not {channel.num_samples}"
        )
    return whole.astype(np.float32, copy=False)
