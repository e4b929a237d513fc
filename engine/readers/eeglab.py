"""EEGLAB sets (`.set`, samples in it or in a `.fdt`), MATLAB 5 to 7.3: continuous ones, and epochs as segments.

EEGLAB keeps signals in microvolts and says so nowhere; the unit is that convention. A `boundary` event begins a
segment; its length is the gap, as far as the file tells. MNE, which reads these sets too, loads every sample of one
that is a single variable or HDF5 just to tell its channels, so pymatreader and h5py read them here; only a MATLAB 5
struct that holds its samples must be decoded whole (4 or 8 bytes per sample and channel).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pymatreader
import scipy.io

from engine.readers.frames import Frames, read_rows, whole_frames
from engine.readers.magic import HDF5_MAGIC, MAT5_MAGIC, MAT73_MAGIC
from engine.readers.mne_raw import annotation, reading, refuse_pointer
from engine.readers.timeline import Timeline, exact_rate, timeline, to_micro
from engine.recording import Annotation, Channel, Recording
from manifests.errors import RecordingError

_FIELDS = ("nbchan", "trials", "pnts", "srate", "chanlocs", "event", "epoch")
_BOUNDARY = "boundary"
_BLOCK_BYTES = 16 << 20
_FDT_TYPE = np.dtype("<f4")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Set:
    """What a set says about itself; `fdt` is the name of its file of samples, empty where it holds them itself."""

    fields: Mapping[str, Any]
    num_channels: int
    num_points: int
    num_trials: int
    rate: Fraction
    fdt: str


def companions(path: Path) -> list[Path]:
    """The `.fdt` of the set's name, or where that is missing the one that the set names."""
    if path.with_suffix(".fdt").is_file():
        return [path.with_suffix(".fdt")]
    if not any(path.parent.glob("*.fdt")):  # telling the name may take decoding the whole set
        return []
    try:
        named = _fdt_path(path, _describe(path).fdt, [])
    except (RecordingError, OSError):
        named = None
    return [named] if named else []


def read_header(path: Path, layout: Mapping[str, object]) -> Recording:
    """Channels, segments and events. No samples are kept; see the module about those that are decoded.

    Raises:
        RecordingError: `NOT_A_RECORDING`, `HEADER_INVALID`, `TRUNCATED` or `FORMAT_UNSUPPORTED`.
    """
    repairs: list[str] = []
    found = _describe(path)
    labels = _labels(path, found, repairs)
    num_samples = _num_samples(path, found, repairs)
    events = _events(found.fields.get("event"), repairs)
    if found.num_trials > 1:
        times, annotations = _of_epochs(found, num_samples, repairs)
    else:
        times, annotations = _of_events(events, found.rate, num_samples, repairs)
    return Recording(
        path=path,
        channels=tuple(
            Channel(index=index, label=label, rate=found.rate, unit="uV", prefilter="", num_samples=num_samples)
            for index, label in enumerate(labels)
        ),
        segments=times.segments,
        annotations=annotations,
        repairs=tuple(dict.fromkeys(repairs)),
        extra={"format": "EEGLAB epochs" if found.num_trials > 1 else "EEGLAB", "start_time": ""},
        layout=dict(layout),
    )


def read_signals(recording: Recording, indices: Sequence[int]) -> list[np.ndarray]:
    """Channels as float32 (num_samples,) in µV, as stored; trials one after another.

    Raises:
        RecordingError: `SIGNAL_INVALID` or `TRUNCATED`.
    """
    path, num_samples = recording.path, recording.channels[0].num_samples
    found = _describe(path)
    if found.fdt:
        fdt = _fdt_path(path, found.fdt, [])
        if fdt is None:
            raise RecordingError("TRUNCATED", f"{path}: its .fdt is gone")
        frames = Frames(path=fdt, offset=0, dtype=_FDT_TYPE, num_rows=found.num_channels, num_samples=num_samples)
        return read_rows(frames, indices, [1.0] * len(indices), [0.0] * len(indices))
    with reading(path, what="signals"):
        if _is_hdf5(path):
            return _hdf5_rows(path, indices, num_samples)
        return [_flat(row) for row in _mat5_samples(path, found)[list(indices)]]


def _flat(row: np.ndarray) -> np.ndarray:
    """One channel's points (and trials) as float32, trials one after another."""
    return np.ascontiguousarray(row.ravel(order="F"), dtype=np.float32)


def _is_hdf5(path: Path) -> bool:
    with path.open("rb") as stream:
        start = stream.read(1024)
    refuse_pointer(path, start)
    if not start.startswith((MAT5_MAGIC, MAT73_MAGIC, HDF5_MAGIC)):
        raise RecordingError("NOT_A_RECORDING", f"{path}: no MATLAB 5 or 7.3 file; save the set again in EEGLAB")
    return not start.startswith(MAT5_MAGIC)


def _describe(path: Path) -> _Set:
    is_hdf5 = _is_hdf5(path)
    try:
        with reading(path, what="header"):
            fields, data = _hdf5_fields(path) if is_hdf5 else _mat5_fields(path)
            sizes = [_whole(fields.get(key, 1)) for key in ("nbchan", "pnts", "trials")]
            rate = exact_rate(float(fields["srate"]))
    except OSError as error:  # h5py has no better word for a damaged file
        raise RecordingError("HEADER_INVALID", f"{path}: {error}") from error
    if min(sizes) < 1:
        raise RecordingError("HEADER_INVALID", f"{path}: {sizes} channels, points and trials; expected one at least")
    if not isinstance(data, str) and data != _squeezed(sizes):
        raise RecordingError("HEADER_INVALID", f"{path}: samples of shape {data}, channels × points × trials {sizes}")
    return _Set(
        fields=fields,
        num_channels=sizes[0],
        num_points=sizes[1],
        num_trials=sizes[2],
        rate=rate,
        fdt=data if isinstance(data, str) else "",
    )


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(size) for size in shape if size != 1)


def _whole(value: Any) -> int:
    number = float(value)
    if number != int(number):
        raise ValueError(f"{value} where a count belongs")
    return int(number)


def _mat5_fields(path: Path) -> tuple[Mapping[str, Any], str | tuple[int, ...]]:
    """Header fields, and the name of the `.fdt` or the shape of the samples without its ones."""
    stored = {name: (shape, kind) for name, shape, kind in scipy.io.whosmat(path)}
    if "EEG" in stored:
        fields = pymatreader.read_mat(path, variable_names=["EEG"])["EEG"]
        return fields, _named_or_shape(fields.get("data"))
    if "ALLEEG" in stored:
        raise NotImplementedError("a study of several sets (ALLEEG); save each as a set")
    shape, kind = stored["data"]
    wanted = [*_FIELDS, *(["data"] if kind == "char" else [])]
    fields = pymatreader.read_mat(path, variable_names=wanted)
    return fields, _named_or_shape(fields["data"]) if kind == "char" else _squeezed(shape)


def _named_or_shape(data: Any) -> str | tuple[int, ...]:
    return data if isinstance(data, str) else _squeezed(np.shape(data))


def _hdf5_fields(path: Path) -> tuple[Mapping[str, Any], str | tuple[int, ...]]:
    with h5py.File(path, "r") as file:
        inside = "EEG" in file
        data = _hdf5_data(file)
        shape = tuple(reversed(data.shape))
        is_text = data.attrs.get("MATLAB_class", b"") == b"char"
        name = "".join(map(chr, data[()].ravel())) if is_text else ""
    skipped = ["data", "icaact", "times", "history", "comments", "urevent", "reject", "stats", "etc"]
    stored = pymatreader.read_mat(path, variable_names=["EEG"] if inside else _FIELDS, ignore_fields=skipped)
    return (stored["EEG"] if inside else stored), name or _squeezed(shape)


def _hdf5_data(file: h5py.File) -> h5py.Dataset:
    found = file["EEG/data"] if "EEG" in file else file["data"]
    if not isinstance(found, h5py.Dataset):
        raise TypeError("its field data is no array")
    return found


def _hdf5_rows(path: Path, indices: Sequence[int], num_samples: int) -> list[np.ndarray]:
    """Channels of a MATLAB 7.3 set, a few megabytes at a time; its axes stand in reverse order."""
    outputs = [np.empty(num_samples, dtype=np.float32) for _ in indices]
    with h5py.File(path, "r") as file:
        data = _hdf5_data(file)
        trials = data.shape[0] if data.ndim == 3 else 1
        points = num_samples // trials
        step = max(1, _BLOCK_BYTES // (data.dtype.itemsize * data.shape[-1]))
        for trial in range(trials):
            for first in range(0, points, step):
                stop = min(points, first + step)
                block = data[trial, first:stop] if data.ndim == 3 else data[first:stop]
                for index, output in zip(indices, outputs, strict=True):
                    output[trial * points + first : trial * points + stop] = block[:, index]
    return outputs


def _mat5_samples(path: Path, found: _Set) -> np.ndarray:
    """Samples that stand in the set itself: (channels, points, trials)."""
    stored = scipy.io.loadmat(path, variable_names=["EEG", "data"])
    data = stored["EEG"]["data"][0, 0] if "EEG" in stored else stored["data"]
    return data.reshape((found.num_channels, found.num_points, found.num_trials), order="F")


def _rows(value: Any) -> list[Mapping[str, Any]]:
    """A MATLAB struct array as rows, in whichever of its ways pymatreader gives it."""
    if isinstance(value, Mapping):
        lengths = {len(item) for item in value.values() if isinstance(item, list)}
        if len(lengths) != 1:
            return [value]
        return [
            {key: item[number] if isinstance(item, list) else item for key, item in value.items()}
            for number in range(lengths.pop())
        ]
    if isinstance(value, np.ndarray) and value.dtype.names:
        return [dict(zip(value.dtype.names, row, strict=True)) for row in np.atleast_1d(value)]
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def _labels(path: Path, found: _Set, repairs: list[str]) -> list[str]:
    rows = _rows(found.fields.get("chanlocs"))
    labels = [str(row.get("labels", "")) if isinstance(row.get("labels"), str) else "" for row in rows]
    if found.num_channels == 1 and len(rows) > 1:
        labels = [str(found.fields["chanlocs"].get("labels", ""))]
    if not any(labels):
        repairs.append("no channel labels in the set: channels numbered")
        return [f"EEG {number:03d}" for number in range(found.num_channels)]
    if len(labels) != found.num_channels:
        raise RecordingError("HEADER_INVALID", f"{path}: {len(labels)} labels for {found.num_channels} channels")
    return labels


def _fdt_path(path: Path, written: str, repairs: list[str]) -> Path | None:
    """File of samples beside the set: the one of the set's name, or else the one it names, by file name alone."""
    if not written:
        return None
    name = written.replace("\\", "/").rpartition("/")[2]
    for candidate in (path.with_suffix(".fdt"), path.parent / name):
        if candidate.name not in {"", ".", ".."} and candidate.is_file():
            if candidate.name != name:
                repairs.append("the set names another file of samples: the .fdt of its own name taken")
            return candidate
    return None


def _num_samples(path: Path, found: _Set, repairs: list[str]) -> int:
    """Samples per channel that are there; of epochs only whole ones."""
    promised = found.num_points * found.num_trials
    if not found.fdt:
        return promised
    if found.fdt.lower().endswith(".dat"):
        raise RecordingError("FORMAT_UNSUPPORTED", f"{path}: samples in the old .dat order; save the set again")
    fdt = _fdt_path(path, found.fdt, repairs)
    if fdt is None:
        raise RecordingError("TRUNCATED", f"{path}: its .fdt is missing; put it beside the set")
    with fdt.open("rb") as stream:
        refuse_pointer(fdt, stream.read(64) or b"")
    frame = found.num_channels * _FDT_TYPE.itemsize
    if fdt.stat().st_size > promised * frame:
        raise RecordingError(
            "HEADER_INVALID", f"{path}: {fdt.stat().st_size} bytes of samples, the set tells of {promised * frame}"
        )
    held = whole_frames(fdt, offset=0, frame_bytes=frame, promised=promised, repairs=repairs)
    whole = held - held % found.num_points if found.num_trials > 1 else held
    if not whole:
        raise RecordingError("TRUNCATED", f"{path}: not one whole epoch is there")
    return whole


def _number(value: Any, default: float) -> float:
    try:
        return float(np.asarray(value).reshape(()))
    except (TypeError, ValueError):
        return default


def _events(value: Any, repairs: list[str]) -> list[tuple[str, Fraction, Fraction]]:
    """Type, place in samples from 0 and length in samples of each event, in order of place."""
    found = []
    for row in _rows(value):
        latency, length = _number(row.get("latency"), np.nan), _number(row.get("duration"), 0.0)
        if not np.isfinite(latency):
            repairs.append("an event without a place: left out")
            continue
        kind = row.get("type", "")
        name = f"{kind:g}" if isinstance(kind, int | float | np.number) else str(kind)
        found.append((name, to_micro(latency) - 1, to_micro(length) if np.isfinite(length) else Fraction(0)))
    return sorted(found, key=lambda event: event[1])


def _of_events(
    events: Sequence[tuple[str, Fraction, Fraction]], rate: Fraction, num_samples: int, repairs: list[str]
) -> tuple[Timeline, tuple[Annotation, ...]]:
    """Timeline and annotations of a continuous set."""
    breaks: list[tuple[int, Fraction | None]] = []
    gone = Fraction(0)
    for name, place, length in events:
        if name == _BOUNDARY:
            first = -(-place // 1)  # marked between two samples
            gone += max(Fraction(0), length) if 0 < first < num_samples else 0
            breaks.append((int(first), (first + gone) / rate))
    times = timeline(rate, num_samples, breaks, repairs)
    inside = [event for event in events if event[0] != _BOUNDARY and -1 <= event[1] <= num_samples]
    if len(inside) + len(breaks) < len(events):
        repairs.append(f"{len(events) - len(breaks) - len(inside)} events outside of the samples: left out")
    return times, tuple(annotation(times.time_of(place), length / rate, name) for name, place, length in inside)


def _of_epochs(found: _Set, num_samples: int, repairs: list[str]) -> tuple[Timeline, tuple[Annotation, ...]]:
    """Timeline of a set of epochs, and an annotation over each epoch with the type of its first event."""
    count = num_samples // found.num_points
    repairs.append("epochs: placed one after another, the set does not tell what was left out between them")
    times = timeline(found.rate, num_samples, [(number * found.num_points, None) for number in range(count)], repairs)
    names: dict[int, str] = {}
    for row in _rows(found.fields.get("event")):
        kind = row.get("type", "")
        name = f"{kind:g}" if isinstance(kind, int | float | np.number) else str(kind)
        number = int(_number(row.get("epoch"), 0))
        if name != _BOUNDARY:
            names.setdefault(number, name)
    return times, tuple(
        annotation(segment.start, segment.duration, names[number])
        for number, segment in enumerate(times.segments, start=1)
        if number in names
    )
