"""FIF files of MNE and MEG systems, decoded by MNE: raw recordings with all parts of a split one, and epochs.

Values come in SI units (V, T, T/m), as FIF keeps them. Stretches that were not recorded (`BAD_ACQ_SKIP`) and joins
(`BAD boundary`) end a segment. Epochs become segments with an annotation each.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import mne
import numpy as np

from engine.readers.magic import FIF_MAGIC, FIF_SPLIT_NAME, is_later_fif
from engine.readers.mne_raw import (
    annotation,
    prefilter_of,
    read_blocks,
    reading,
    refuse_pointer,
    start_extra,
    unit_of,
)
from engine.readers.timeline import FLOAT32_TOLERANCE, Timeline, exact_rate, timeline, to_micro
from engine.recording import Annotation, Channel, Recording, Segment
from manifests.errors import RecordingError

_SKIP = "BAD_ACQ_SKIP"
_JOINS = frozenset({"BAD boundary", "EDGE boundary"})
_TAG_BYTES = 16
_EPOCH_BYTES = 32 << 20
_NO_EPOCHS = ("Could not find event data", "Could not find epochs data")
_NO_RAW = "No raw data"


def companions(path: Path) -> list[Path]:
    """Later parts of a split recording, `x-1.fif` or `x_split-02_meg.fif`, as far as they follow one another."""
    found: list[Path] = []
    for name in _later_names(path.name):
        if not (path.parent / name).is_file():
            break
        found.append(path.parent / name)
    return found


def _later_names(name: str) -> Iterator[str]:
    split = FIF_SPLIT_NAME.fullmatch(name)
    stem, _, suffix = name.partition(".fif")
    for number in range(1, 1000):
        if split:
            yield f"{split['stem']}_split-{int(split['number']) + number:0{len(split['number'])}d}{split['rest']}"
        else:
            yield f"{stem}-{number}.fif{suffix}"


def read_header(path: Path, layout: Mapping[str, object]) -> Recording:
    """Channels, segments and annotations; no sample is read.

    `extra` holds `format` (`FIF` or `FIF epochs`), `start_time` (HH:MM:SS or empty) and `start_subsecond`.

    Raises:
        RecordingError: `NOT_A_RECORDING` (also for a later part of a split recording), `HEADER_INVALID`, `TRUNCATED`
            (a part is missing) or `FORMAT_UNSUPPORTED` (averages, raw MaxShield data).
    """
    with path.open("rb") as stream:
        start = stream.read(64)
    refuse_pointer(path, start)
    if not start.startswith((FIF_MAGIC, b"\x1f\x8b")):
        raise RecordingError("NOT_A_RECORDING", f"{path}: does not begin as a FIF file does")
    if is_later_fif(path):
        raise RecordingError("NOT_A_RECORDING", f"{path}: a later part of a split recording; read its first part")
    repairs: list[str] = []
    raw = _open_raw(path, repairs)
    return _raw_header(path, raw, repairs, layout) if raw is not None else _epochs_header(path, repairs, layout)


def read_signals(recording: Recording, indices: Sequence[int]) -> list[np.ndarray]:
    """Channels as float32 (num_samples,) in SI units; a raw file in blocks, epochs a few at a time.

    Raises:
        RecordingError: `SIGNAL_INVALID` or `TRUNCATED`.
    """
    path = recording.path
    raw = _open_raw(path, [])
    if raw is None:
        return _epochs_signals(_open_epochs(path, []), indices, path)
    return read_blocks(raw, indices, _spans(raw), path)


def _open_raw(path: Path, repairs: list[str]) -> Any:
    """MNE's raw object; None for a file without a continuous recording."""
    try:
        with reading(path, what="header", repairs=repairs):
            return mne.io.read_raw_fif(path, preload=False, verbose="WARNING")
    except RecordingError as error:
        text = str(error)
        if _NO_RAW in text:
            return None
        if "next file" in text:
            raise RecordingError(
                "TRUNCATED", f"{path}: a later part is missing; put it beside the first one"
            ) from error
        if "Active Shielding" in text or "MaxShield" in text:
            raise RecordingError("FORMAT_UNSUPPORTED", f"{path}: raw MaxShield data; apply SSS first") from error
        raise


def _open_epochs(path: Path, repairs: list[str]) -> Any:
    try:
        with reading(path, what="header", repairs=repairs):
            return mne.read_epochs(path, proj=False, preload=False, verbose="WARNING")
    except RecordingError as error:
        if any(mark in str(error) for mark in _NO_EPOCHS):
            raise RecordingError("FORMAT_UNSUPPORTED", f"{path}: neither a raw recording nor epochs") from error
        raise


def _channels(source: Any, rate: Fraction, num_samples: int) -> tuple[Channel, ...]:
    prefilter = prefilter_of(source)
    return tuple(
        Channel(
            index=index,
            label=label,
            rate=rate,
            unit=unit_of(source, index),
            prefilter=prefilter,
            num_samples=num_samples,
        )
        for index, label in enumerate(source.ch_names)
    )


def _raw_header(path: Path, raw: Any, repairs: list[str], layout: Mapping[str, object]) -> Recording:
    rate = exact_rate(raw.info["sfreq"], FLOAT32_TOLERANCE)
    spans = _spans(raw)
    if not spans:
        raise RecordingError("TRUNCATED", f"{path}: not one sample of it was recorded or is left")
    if lost := sum(stop - start for start, stop in _lost(raw)):
        repairs.append(f"truncated: the last {lost} of {raw.n_times} samples per channel are not there")
    first = spans[0][0]
    return Recording(
        path=path,
        channels=_channels(raw, rate, sum(stop - start for start, stop in spans)),
        segments=tuple(Segment(start=(a - first) / rate, duration=(b - a) / rate) for a, b in spans),
        annotations=_annotations(raw, first / rate),
        repairs=tuple(repairs),
        extra={"format": "FIF", **start_extra(raw, first)},
        layout=dict(layout),
    )


def _marks(raw: Any) -> Iterator[tuple[float, float, str]]:
    """Onset in seconds from the first sample of the file, duration, text."""
    shift = raw.first_time if raw.annotations.orig_time is not None else 0.0
    for onset, duration, text in zip(
        raw.annotations.onset, raw.annotations.duration, raw.annotations.description, strict=True
    ):
        yield float(onset) - shift, float(duration), str(text)


def _spans(raw: Any) -> list[tuple[int, int]]:
    """Recorded stretches: first sample and the one after the last."""
    rate, total = raw.info["sfreq"], int(raw.n_times)
    skips = _lost(raw)
    cuts = {0, total}
    for onset, duration, text in _marks(raw):
        start = max(0, round(onset * rate))
        if text == _SKIP and duration > 0:
            skips.append((start, min(total, round((onset + duration) * rate))))
        elif text in _JOINS:
            cuts.add(min(total, max(0, round(onset * rate + 0.25))))  # marked half a sample before the new piece
    spans: list[tuple[int, int]] = []
    begin = 0
    for start, stop in [*sorted(skips), (total, total)]:
        if start > begin:
            edges = [begin, *sorted(cut for cut in cuts if begin < cut < start), start]
            spans += itertools.pairwise(edges)
        begin = max(begin, stop)
    return spans


def _lost(raw: Any) -> list[tuple[int, int]]:
    """Stretches whose bytes lie behind the end of a truncated file."""
    lost: list[tuple[int, int]] = []
    offset = 0
    for part in vars(raw)["_raw_extras"]:
        bounds = [int(bound) - int(part["bounds"][0]) + offset for bound in part["bounds"]]
        offset = bounds[-1]
        if part["filename"].suffix == ".gz":  # places count in the decompressed stream
            continue
        size = part["filename"].stat().st_size
        lost += [
            (start, stop)
            for entry, start, stop in zip(part["ent"], bounds, bounds[1:], strict=False)
            if entry is not None and entry.pos + _TAG_BYTES + entry.size > size
        ]
    return lost


def _annotations(raw: Any, first: Fraction) -> tuple[Annotation, ...]:
    return tuple(
        annotation(to_micro(onset) - first, to_micro(duration), text)
        for onset, duration, text in _marks(raw)
        if text != _SKIP and text not in _JOINS
    )


def _epochs_header(path: Path, repairs: list[str], layout: Mapping[str, object]) -> Recording:
    epochs = _open_epochs(path, repairs)
    rate = exact_rate(epochs.info["sfreq"], FLOAT32_TOLERANCE)
    length, count = len(epochs.times), len(epochs.events)
    if not count:
        raise RecordingError("TRUNCATED", f"{path}: not one epoch in it")
    times = _epoch_times(epochs.events[:, 0], length, rate, repairs)
    names = {code: name for name, code in epochs.event_id.items()}
    segments = times.segments
    return Recording(
        path=path,
        channels=_channels(epochs, rate, length * count),
        segments=segments,
        annotations=tuple(
            annotation(segment.start, segment.duration, names.get(int(code), str(code)))
            for segment, code in zip(segments, epochs.events[:, 2], strict=True)
        ),
        repairs=tuple(dict.fromkeys(repairs)),
        extra={"format": "FIF epochs", "start_time": "", "start_subsecond": "0"},
        layout=dict(layout),
    )


def _epoch_times(events: np.ndarray, length: int, rate: Fraction, repairs: list[str]) -> Timeline:
    """Epochs where their events say they lie, or one after another where that would make them overlap."""
    apart = bool(np.all(np.diff(events) >= length))
    if not apart:
        repairs.append("epochs overlap or have no times: placed one after another")
    breaks = [
        (number * length, (int(event) - int(events[0])) / rate if apart else None)
        for number, event in enumerate(events)
    ]
    return timeline(rate, length * len(events), breaks, repairs)


def _epochs_signals(epochs: Any, indices: Sequence[int], path: Path) -> list[np.ndarray]:
    length, count = len(epochs.times), len(epochs.events)
    outputs = [np.empty(length * count, dtype=np.float32) for _ in indices]
    if not outputs:
        return []
    step = max(1, _EPOCH_BYTES // (8 * length * len(epochs.ch_names)))
    with reading(path, what="signals"):
        for first in range(0, count, step):
            block = epochs.get_data(picks=list(indices), item=slice(first, first + step), copy=False, verbose="WARNING")
            for number, output in enumerate(outputs):
                output[first * length : (first + len(block)) * length] = block[:, number].ravel()
    return outputs
