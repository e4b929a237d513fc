r"""BrainVision recordings: a text header (`.vhdr`), a file of samples and a file of markers, decoded by MNE.

Every `New Segment` marker begins a segment; where it carries a date, the gap before it is known. A channel without
a unit is in microvolts, as the format says. Markers are named as MNE names them, `Stimulus/S  1`. A pointer to
another file counts by its file name alone, so no header leads out of its folder.
Source: BrainVision Core Data Format 1.0.
"""

import re
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import mne
import numpy as np

from engine.readers.frames import whole_frames
from engine.readers.magic import is_brainvision
from engine.readers.mne_raw import annotation, prefilter_of, read_blocks, reading, refuse_pointer, unit_of
from engine.readers.timeline import Timeline, timeline
from engine.recording import Annotation, Channel, Recording
from manifests.errors import RecordingError

_SAMPLE_BYTES = {"INT_16": 2, "INT_32": 4, "IEEE_FLOAT_32": 4}
_MARKER_LINE = re.compile(r"(?m)^Mk\d+=(.*)$")
# Type, text (some writers leave commas in it), position, length, channel, date.
_MARKER = re.compile(r"([^,]*),(.*?),\s*(\d+),\s*(-?\d*)\s*(?:,\s*-?\d*)?\s*(?:,\s*(\d*))?\s*")
_NEW_SEGMENT = "New Segment"
_MAX_HEADER_BYTES = 16 << 20
_SCALED = {"µS": "S", "uS": "S"}  # units that MNE turns into their base unit and does not mark

_Sections = dict[str, dict[str, str]]


def companions(path: Path) -> list[Path]:
    """Samples and markers that a header names, by file name in its own folder."""
    try:
        common = _common(_sections(_header_text(path)))
    except RecordingError:
        return []
    found = [_pointed(path, common.get(key, ""), suffixes, []) for key, suffixes in _POINTERS.items()]
    return [name for name in found if name is not None]


_POINTERS = {"datafile": (".eeg", ".dat", ".avg", ".seg"), "markerfile": (".vmrk",)}


def read_header(path: Path, layout: Mapping[str, object]) -> Recording:
    """Channels, segments and markers; no sample is read.

    `extra` holds `format`, `start_time` (HH:MM:SS or empty) and `start_subsecond`.

    Raises:
        RecordingError: `NOT_A_RECORDING`, `HEADER_INVALID`, `TRUNCATED` or `FORMAT_UNSUPPORTED`.
    """
    repairs: list[str] = []
    text = _header_text(path)
    sections = _sections(text)
    rate = _rate(path, _common(sections))
    raw = _open(path, text, repairs)
    num_samples = _num_samples(sections, raw, repairs)
    markers = _markers(path, sections, repairs)
    times, date = _timeline(markers, rate, num_samples, repairs)
    annotations = _annotations(markers, times, repairs)
    labels = [fields[0].replace(r"\1", ",") for fields in _channel_fields(path, sections)]
    prefilter = prefilter_of(raw)
    return Recording(
        path=path,
        channels=tuple(
            Channel(
                index=index,
                label=label,
                rate=rate,
                unit=_unit(raw, index, sections),
                prefilter=prefilter,
                num_samples=num_samples,
            )
            for index, label in enumerate(labels)
        ),
        segments=times.segments,
        annotations=annotations,
        repairs=tuple(dict.fromkeys(repairs)),
        extra={
            "format": "BrainVision",
            "start_time": f"{date:%H:%M:%S}" if date else "",
            "start_subsecond": str(Fraction(date.microsecond, 10**6)) if date else "0",
        },
        layout=dict(layout),
    )


def read_signals(recording: Recording, indices: Sequence[int]) -> list[np.ndarray]:
    """Channels as float32 (num_samples,), in V where the header's unit is one of volts, else as stored.

    Raises:
        RecordingError: `SIGNAL_INVALID` or `TRUNCATED`.
    """
    raw = _open(recording.path, _header_text(recording.path), [])
    return read_blocks(raw, indices, [(0, recording.channels[0].num_samples)], recording.path)


def _header_text(path: Path) -> str:
    with path.open("rb") as stream:
        data = stream.read(_MAX_HEADER_BYTES + 1)
    refuse_pointer(path, data)
    if not is_brainvision(data) or len(data) > _MAX_HEADER_BYTES:
        raise RecordingError("NOT_A_RECORDING", f"{path}: {len(data)} bytes that are no BrainVision header (.vhdr)")
    return _decoded(data)


def _decoded(data: bytes) -> str:
    """Text in the encoding that the file names, in UTF-8, or in Latin-1, which old recorders took without a word."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1" if b"Codepage=UTF-8" in data else "cp1252", errors="replace")


def _sections(text: str) -> _Sections:
    """Keys and values by section, both in lower case save for the values; the comment section is left out."""
    sections: _Sections = {}
    current: dict[str, str] = {}
    for line in text.splitlines()[1:]:
        stripped = line.strip()
        if stripped.startswith("[") and stripped.endswith("]"):
            if stripped.lower() == "[comment]":
                break
            current = sections.setdefault(stripped[1:-1].lower(), {})
        elif stripped and not stripped.startswith(";") and "=" in stripped:
            key, _, value = stripped.partition("=")
            current.setdefault(key.strip().lower(), value.strip())
    return sections


def _common(sections: _Sections) -> dict[str, str]:
    return sections.get("common infos", {})


def _rate(path: Path, common: Mapping[str, str]) -> Fraction:
    """Exact rate from the sampling interval in microseconds."""
    written = common.get("samplinginterval", "")
    try:
        interval = Fraction(written.replace(",", "."))
    except (ValueError, ZeroDivisionError):
        interval = Fraction(0)
    if interval <= 0:
        raise RecordingError("HEADER_INVALID", f"{path}: SamplingInterval={written!r}; expected microseconds above 0")
    return 1_000_000 / interval


def _channel_fields(path: Path, sections: _Sections) -> list[list[str]]:
    """Name, reference, resolution and unit of each channel, in the order of their numbers."""
    common = _common(sections)
    try:
        count = int(common.get("numberofchannels", ""))
        by_number = {int(key[2:]): value.split(",") for key, value in sections.get("channel infos", {}).items()}
    except ValueError as error:
        raise RecordingError("HEADER_INVALID", f"{path}: number of channels or of a channel: {error}") from None
    missing = [number for number in range(1, count + 1) if number not in by_number] if 0 < count <= 1 << 16 else [0]
    if missing:
        raise RecordingError("HEADER_INVALID", f"{path}: {count} channels, and no line Ch{missing[0]} among them")
    return [by_number[number] for number in range(1, count + 1)]


def _unit(raw: Any, index: int, sections: _Sections) -> str:
    fields = sections["channel infos"][f"ch{index + 1}"].split(",")
    written = (fields[3].strip() if len(fields) > 3 else "") or "µV"
    return unit_of(raw, index, _SCALED.get(written, written))


def _pointed(path: Path, written: str, suffixes: Sequence[str], repairs: list[str]) -> Path | None:
    """File beside the header that a pointer names, or one of the header's stem; None where neither exists."""
    name = re.split(r"[/\\]", written.replace("$b", path.stem))[-1].strip()
    if name not in {"", ".", ".."} and (path.parent / name).is_file():
        if name != written.replace("$b", path.stem):
            repairs.append("a pointer with a folder in it: the file of that name beside the header taken")
        return path.parent / name
    for suffix in [*suffixes, *(suffix.upper() for suffix in suffixes)]:
        if (other := path.with_suffix(suffix)).is_file():
            repairs.append(f"a pointer to a file that is not there: the {suffix} file of the header's name taken")
            return other
    return None


def _open(path: Path, text: str, repairs: list[str]) -> Any:
    """MNE's raw object on the samples.

    MNE gets a copy of the header in UTF-8, without its markers (which it reads in the machine's encoding), and
    without the comments where it stumbles over the amplifier's settings in them.
    """
    sections = _sections(text)
    common = _common(sections)
    if common.get("datatype", "TIMEDOMAIN").upper() != "TIMEDOMAIN":
        raise RecordingError("FORMAT_UNSUPPORTED", f"{path}: DataType={common['datatype']}; kymo reads TIMEDOMAIN")
    data = _pointed(path, common.get("datafile", ""), _POINTERS["datafile"], repairs)
    if data is None:
        raise RecordingError("TRUNCATED", f"{path}: its file of samples is missing; put it beside the header")
    _rate(path, common)
    _check_size(path, sections, data)
    plain = re.split(r"(?mi)^\[(?:coordinates|comment)\]", text)[0]
    plain = re.sub(r"(?mi)^Codepage=.*$", "Codepage=UTF-8", plain)
    names = [fields[0] for fields in _channel_fields(path, sections)]
    if len(set(names)) < len(names):  # MNE wants one unit per name
        plain = re.sub(r"(?mi)^(Ch(\d+))=[^,\r\n]*", r"\1=\2", plain)
    comment = re.split(r"(?mi)^\[comment\]", text, maxsplit=1)[1:]
    heard: list[str] = []
    for number, header in enumerate([*(f"{plain}\n[Comment]{rest}" for rest in comment), plain]):
        try:
            raw = _by_mne(path, header, data, heard)
        except RecordingError:
            if number == len(comment):
                raise
            heard.append("settings of the amplifier in the comments could not be parsed: left out")
        else:
            repairs += heard
            return raw
    raise AssertionError("one of the headers is opened or refused")


def _by_mne(path: Path, header: str, data: Path, repairs: list[str]) -> Any:
    with tempfile.TemporaryDirectory(prefix="kymo-bv-") as folder:
        copy = Path(folder, "header.vhdr")
        copy.write_text(header, encoding="utf-8")
        with reading(path, what="header", repairs=repairs):
            return mne.io.read_raw_brainvision(
                copy,
                overrides={"data_fname": str(data.resolve()), "marker_fname": False},
                preload=False,
                verbose="WARNING",
            )


def _check_size(path: Path, sections: _Sections, data: Path) -> None:
    """Refuse what MNE would shift: a vectorised file whose length is not the one promised."""
    common = _common(sections)
    sample = _SAMPLE_BYTES.get(sections.get("binary infos", {}).get("binaryformat", "").upper())
    size = data.stat().st_size
    if size == 0:
        raise RecordingError("TRUNCATED", f"{path}: {data.name} is empty; fetch it again")
    with data.open("rb") as stream:
        refuse_pointer(data, stream.read(64))
    if common.get("dataorientation", "").upper() != "VECTORIZED" or sample is None:
        return
    frame = sample * int(common["numberofchannels"])
    points = common.get("datapoints", "")
    if size % frame or (points.isdigit() and int(points) * frame != size):
        raise RecordingError(
            "TRUNCATED", f"{path}: {data.name} has {size} bytes, not {points} points of {frame} bytes; fetch it again"
        )


def _num_samples(sections: _Sections, raw: Any, repairs: list[str]) -> int:
    """Samples per channel; a file shorter than promised is a repair."""
    points = _common(sections).get("datapoints", "")
    promised = int(points) if points.isdigit() and int(points) else None
    sample = _SAMPLE_BYTES.get(sections.get("binary infos", {}).get("binaryformat", "").upper())
    if sample is None:
        return int(raw.n_times)
    held = whole_frames(
        Path(raw.filenames[0]), offset=0, frame_bytes=sample * len(raw.ch_names), promised=None, repairs=repairs
    )
    if promised is not None and promised > held:
        repairs.append(f"truncated: {held} of {promised} samples per channel are there")
    return held


def _markers(path: Path, sections: _Sections, repairs: list[str]) -> list[tuple[str, str, int, int, str]]:
    """Type, description, first sample (from 0), length in samples and date of each marker."""
    written = _common(sections).get("markerfile", "")
    marker_path = _pointed(path, written, _POINTERS["markerfile"], repairs) if written else None
    if marker_path is None:
        if written:
            repairs.append("the file of markers is missing: no annotations, no known gaps")
        return []
    lines = _MARKER_LINE.findall(_decoded(marker_path.read_bytes()))
    matches = [match for line in lines if (match := _MARKER.fullmatch(line))]
    if len(matches) < len(lines):
        repairs.append(f"{len(lines) - len(matches)} markers without a position: left out")
    return [
        (
            match[1].replace(r"\1", ","),
            match[2].replace(r"\1", ","),
            int(match[3]) - 1,
            int(match[4]) if match[4].isdigit() else 0,
            match[5] or "",
        )
        for match in matches
    ]


def _timeline(
    markers: Sequence[tuple[str, str, int, int, str]], rate: Fraction, num_samples: int, repairs: list[str]
) -> tuple[Timeline, datetime | None]:
    """Timeline, and the date of the first sample where a marker gives it."""
    new = [(first, _date(written)) for kind, _, first, _, written in markers if kind == _NEW_SEGMENT]
    begun = next((date for first, date in sorted(new, key=lambda item: item[0]) if first <= 0), None)
    breaks = [(first, _elapsed(begun, date)) for first, date in new]
    return timeline(rate, num_samples, breaks, repairs), begun


def _elapsed(begun: datetime | None, date: datetime | None) -> Fraction | None:
    if begun is None or date is None:
        return None
    delta = date - begun
    return Fraction((delta.days * 86400 + delta.seconds) * 10**6 + delta.microseconds, 10**6)


def _date(written: str) -> datetime | None:
    try:
        return datetime.strptime(written, "%Y%m%d%H%M%S%f") if written else None
    except ValueError:
        return None


def _annotations(
    markers: Sequence[tuple[str, str, int, int, str]], times: Timeline, repairs: list[str]
) -> tuple[Annotation, ...]:
    inside = [marker for marker in markers if 0 <= marker[2] < times.num_samples]
    if len(inside) < len(markers):
        repairs.append(f"{len(markers) - len(inside)} markers outside of the samples: left out")
    return tuple(
        annotation(times.time_of(first), length / times.rate, f"{kind}/{text}")
        for kind, text, first, length, _ in sorted(inside, key=lambda marker: marker[2])
        if kind != _NEW_SEGMENT
    )
