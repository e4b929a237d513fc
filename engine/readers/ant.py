"""ANT Neuro recordings (`.cnt` in a RIFF container), decoded by antio.

MNE asks the same library for the patient too, which kills the process where a file has none; kymo does not ask.
Marks of the amplifier being disconnected become annotations (`BAD_disconnection`), as MNE words them.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from antio import read_cnt
from antio.parser import read_meas_date, read_triggers

from engine.readers.magic import is_ant
from engine.readers.mne_raw import annotation, reading, refuse_pointer
from engine.readers.timeline import exact_rate
from engine.recording import Annotation, Channel, Recording, Segment
from manifests.errors import RecordingError

_BLOCK_BYTES = 8 << 20


def read_header(path: Path, layout: Mapping[str, object]) -> Recording:
    """Channels in the units that the file states, one segment, and triggers as annotations; no sample is read.

    Raises:
        RecordingError: `NOT_A_RECORDING`, `HEADER_INVALID` or `TRUNCATED`.
    """
    file = _open(path)
    with reading(path, what="header"):
        described = [file.get_channel(index, encoding="latin-1") for index in range(file.get_channel_count())]
        rate, total = exact_rate(float(file.get_sample_frequency())), int(file.get_sample_count())
        date = read_meas_date(file)
        found = _annotations(file, rate, total)
    if total <= 0 or not described:
        raise RecordingError("TRUNCATED", f"{path}: {total} samples of {len(described)} channels; fetch it again")
    return Recording(
        path=path,
        channels=tuple(
            Channel(index=index, label=str(label), rate=rate, unit=str(unit), prefilter="", num_samples=total)
            for index, (label, unit, *_) in enumerate(described)
        ),
        segments=(Segment(start=Fraction(0), duration=total / rate),),
        annotations=found,
        extra={"format": "ANT CNT", **_started(date)},
        layout=dict(layout),
    )


def read_signals(recording: Recording, indices: Sequence[int]) -> list[np.ndarray]:
    """Channels as float32 (num_samples,) in the file's units; every block is decoded for all channels at once.

    Raises:
        RecordingError: `SIGNAL_INVALID` or `TRUNCATED`.
    """
    path, total = recording.path, recording.channels[0].num_samples
    outputs = [np.empty(total, dtype=np.float32) for _ in indices]
    step = max(1, _BLOCK_BYTES // (4 * len(recording.channels)))
    file = _open(path)
    with reading(path, what="signals"):
        for first in range(0, total if outputs else 0, step):
            stop = min(total, first + step)
            block = file.get_samples_as_nparray(first, stop)
            for index, output in zip(indices, outputs, strict=True):
                output[first:stop] = block[index]
    return outputs


def _open(path: Path) -> Any:
    with path.open("rb") as stream:
        start = stream.read(64)
    refuse_pointer(path, start)
    if not is_ant(start):
        raise RecordingError("NOT_A_RECORDING", f"{path}: does not begin as an ANT file does")
    promised = int.from_bytes(start[4:8], "little") + 8
    if start[:4] == b"RIFF" and path.stat().st_size < promised:  # its tables stand at the end
        raise RecordingError("TRUNCATED", f"{path}: {path.stat().st_size} of {promised} bytes; fetch it again")
    with reading(path, what="header"):
        return read_cnt(str(path))


def _started(date: datetime | None) -> dict[str, str]:
    if date is None:
        return {"start_time": "", "start_subsecond": "0"}
    return {"start_time": f"{date:%H:%M:%S}", "start_subsecond": str(Fraction(date.microsecond, 1_000_000))}


def _annotations(file: Any, rate: Fraction, total: int) -> tuple[Annotation, ...]:
    """Triggers by code and condition, and stretches without amplifier."""
    onsets, lengths, texts, _, gone = read_triggers(file)
    marks = list(zip(onsets, lengths, texts, strict=True))
    ends = iter(sorted(gone["stop"]))
    for start in sorted(gone["start"]):
        end = next((stop for stop in ends if stop >= start), total)
        marks.append((start, end - start, "BAD_disconnection"))
    return tuple(
        annotation(int(onset) / rate, int(length) / rate, text)
        for onset, length, text in sorted(marks, key=lambda mark: mark[0])
        if 0 <= onset < total
    )
