"""Persyst recordings: a text header (`.lay`) and a file of multiplexed samples (`.dat`), read by numpy.

Labels stay as the header has them (MNE upper-cases them and cuts `-Ref`, joins what the clock says was apart, and
needs the patient's birth date). Values are in microvolts, which the format's calibration leads to.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from engine.readers.frames import Frames, read_rows, whole_frames
from engine.readers.magic import is_persyst
from engine.readers.mne_raw import annotation, refuse_pointer
from engine.readers.timeline import Timeline, timeline, to_micro
from engine.recording import Annotation, Channel, Recording
from manifests.errors import RecordingError

_TYPES = {"0": np.dtype("<i2"), "7": np.dtype("<i4")}
_MAX_HEADER_BYTES = 64 << 20
_JITTER_S = Fraction(1, 100)  # SampleTimes have two or more digits behind the point


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    labels: list[str]
    rate: Fraction
    calibration: float
    dtype: np.dtype
    data: Path
    lines: Mapping[str, list[str]]


def companions(path: Path) -> list[Path]:
    """The file of samples that a header names, by file name in its own folder."""
    try:
        found = _data_path(path, _lines(path), [])
    except RecordingError:
        return []
    return [found] if found else []


def read_header(path: Path, layout: Mapping[str, object]) -> Recording:
    """Channels, segments by the header's sample times, and comments as annotations.

    Raises:
        RecordingError: `NOT_A_RECORDING`, `HEADER_INVALID`, `TRUNCATED` or `FORMAT_UNSUPPORTED`.
    """
    repairs: list[str] = []
    header = _parse(path, repairs)
    count = len(header.labels)
    num_samples = whole_frames(
        header.data, offset=0, frame_bytes=count * header.dtype.itemsize, promised=None, repairs=repairs
    )
    times, begun = _timeline(header, num_samples, repairs)
    return Recording(
        path=path,
        channels=tuple(
            Channel(
                index=index,
                label=label,
                rate=header.rate,
                unit="uV",
                prefilter="",
                num_samples=num_samples,
                calibrated=header.calibration != 0,
            )
            for index, label in enumerate(header.labels)
        ),
        segments=times.segments,
        annotations=_comments(header, repairs),
        repairs=tuple(dict.fromkeys(repairs)),
        extra={"format": "Persyst", "start_time": begun},
        layout=dict(layout),
    )


def read_signals(recording: Recording, indices: Sequence[int]) -> list[np.ndarray]:
    """Channels as float32 (num_samples,) in µV.

    Raises:
        RecordingError: `TRUNCATED`.
    """
    header = _parse(recording.path, [])
    frames = Frames(
        path=header.data,
        offset=0,
        dtype=header.dtype,
        num_rows=len(header.labels),
        num_samples=recording.channels[0].num_samples,
    )
    return read_rows(frames, indices, [header.calibration or 1.0] * len(indices), [0.0] * len(indices))


def _lines(path: Path) -> dict[str, list[str]]:
    """Lines by section in lower case."""
    with path.open("rb") as stream:
        data = stream.read(_MAX_HEADER_BYTES)
    refuse_pointer(path, data)
    if not is_persyst(data):
        raise RecordingError("NOT_A_RECORDING", f"{path}: no Persyst header; it would begin with [FileInfo]")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    sections: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if len(stripped) > 2 and stripped.startswith("[") and stripped.endswith("]"):
            current = sections.setdefault(stripped[1:-1].lower(), [])
        elif stripped:
            current.append(stripped)
    return sections


def _pairs(lines: Sequence[str]) -> dict[str, str]:
    return {key.strip().lower(): value.strip() for key, _, value in (line.partition("=") for line in lines)}


def _data_path(path: Path, lines: Mapping[str, list[str]], repairs: list[str]) -> Path | None:
    name = re.split(r"[/\\]", _pairs(lines.get("fileinfo", [])).get("file", ""))[-1]
    if name not in {"", ".", ".."} and (path.parent / name).is_file():
        return path.parent / name
    for suffix in (".dat", ".DAT"):
        if (other := path.with_suffix(suffix)).is_file():
            repairs.append("a pointer to a file that is not there: the .dat file of the header's name taken")
            return other
    return None


def _parse(path: Path, repairs: list[str]) -> _Header:
    lines = _lines(path)
    info = _pairs(lines.get("fileinfo", []))
    if info.get("filetype", "Interleaved").lower() != "interleaved":
        raise RecordingError("FORMAT_UNSUPPORTED", f"{path}: FileType={info['filetype']}; kymo reads Interleaved")
    try:
        rate, calibration = Fraction(info["samplingrate"]), float(info["calibration"])
        count, dtype = int(info["waveformcount"]), _TYPES[info["datatype"]]
        offset = int(info.get("headerlength") or "0")
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise RecordingError("HEADER_INVALID", f"{path}: [FileInfo]: {type(error).__name__}: {error}") from None
    if offset:
        raise RecordingError("FORMAT_UNSUPPORTED", f"{path}: samples behind a header of {offset} bytes")
    numbered = [line.rpartition("=") for line in lines.get("channelmap", [])]
    try:
        labels = [label for _, label in sorted((int(number), label) for label, _, number in numbered)]
    except ValueError as error:
        raise RecordingError("HEADER_INVALID", f"{path}: [ChannelMap]: {error}") from None
    if len(labels) != count or not labels or rate <= 0 or not np.isfinite(calibration):
        raise RecordingError(
            "HEADER_INVALID", f"{path}: {len(labels)} labels for {count} channels at {rate} Hz × {calibration}"
        )
    data = _data_path(path, lines, repairs)
    if data is None:
        raise RecordingError("TRUNCATED", f"{path}: its file of samples is missing; put it beside the header")
    with data.open("rb") as stream:
        refuse_pointer(data, stream.read(64) or b"")
    return _Header(labels=labels, rate=rate, calibration=calibration, dtype=dtype, data=data, lines=lines)


def _timeline(header: _Header, num_samples: int, repairs: list[str]) -> tuple[Timeline, str]:
    """Timeline by `[SampleTimes]` (sample=seconds of the day), and the clock of the first sample."""
    marks: list[tuple[int, Fraction]] = []
    for line in header.lines.get("sampletimes", []):
        sample, _, seconds = line.partition("=")
        try:
            marks.append((int(sample), to_micro(float(seconds))))
        except ValueError:
            repairs.append("a sample time that is no number: left out")
    marks.sort()
    if not marks:
        return timeline(header.rate, num_samples, [], repairs), ""
    first, begun = marks[0]
    begun -= first / header.rate
    breaks: list[tuple[int, Fraction | None]] = []
    gone = Fraction(0)
    day = Fraction(0)
    for sample, seconds in marks[1:]:
        elapsed = seconds + day - begun
        if elapsed < sample / header.rate - 43_200:  # past midnight, where the clock starts again
            day += 86_400
            elapsed += 86_400
        if elapsed - sample / header.rate - gone > _JITTER_S:
            gone = elapsed - sample / header.rate
            breaks.append((sample, elapsed))
    whole = int(begun) % 86_400
    clock = f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"
    return timeline(header.rate, num_samples, breaks, repairs), clock


def _comments(header: _Header, repairs: list[str]) -> tuple[Annotation, ...]:
    """Comments: time and duration in seconds, state, kind, text."""
    found = []
    for line in header.lines.get("comments", []):
        onset, duration, *rest = [*line.split(",", 4), "", ""]
        try:
            found.append(
                annotation(to_micro(float(onset)), to_micro(float(duration)), rest[2] if len(rest) > 2 else "")
            )
        except ValueError:
            repairs.append("a comment without a time: left out")
    return tuple(sorted(found, key=lambda item: item.onset))
