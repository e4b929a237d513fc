"""ANT Neuro recordings (`.cnt` in a RIFF container), decoded by antio through MNE.

Labels are those of the file, without MNE's endings for equal ones. The amplifier's own marks of being disconnected
become annotations (`BAD_disconnection`), as MNE words them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mne
import numpy as np
from antio import read_cnt
from antio.parser import read_info

from engine.readers.magic import is_ant
from engine.readers.mne_raw import annotation, prefilter_of, read_blocks, reading, refuse_pointer, start_extra
from engine.readers.timeline import exact_rate, to_micro
from engine.recording import Channel, Recording, Segment
from manifests.errors import RecordingError

_SCALED = frozenset({"uv", "µv"})  # the units that MNE turns into V, compared as written


def read_header(path: Path, layout: Mapping[str, object]) -> Recording:
    """Channels in V (units other than µV as stored), one segment, and triggers as annotations; no sample is read.

    Raises:
        RecordingError: `NOT_A_RECORDING`, `HEADER_INVALID` or `TRUNCATED`.
    """
    repairs: list[str] = []
    raw, labels, units = _open(path, repairs)
    rate, total = exact_rate(raw.info["sfreq"]), int(raw.n_times)
    if total <= 0:
        raise RecordingError("TRUNCATED", f"{path}: not one sample in it")
    prefilter = prefilter_of(raw)
    return Recording(
        path=path,
        channels=tuple(
            Channel(
                index=index,
                label=label,
                rate=rate,
                unit="V" if unit in _SCALED else unit,
                prefilter=prefilter,
                num_samples=total,
            )
            for index, (label, unit) in enumerate(zip(labels, units, strict=True))
        ),
        segments=(Segment(start=to_micro(0), duration=total / rate),),
        annotations=tuple(
            annotation(to_micro(onset), to_micro(duration), text)
            for onset, duration, text in zip(
                raw.annotations.onset - (raw.first_time if raw.annotations.orig_time is not None else 0.0),
                raw.annotations.duration,
                raw.annotations.description,
                strict=True,
            )
        ),
        repairs=tuple(repairs),
        extra={"format": "ANT CNT", **start_extra(raw)},
        layout=dict(layout),
    )


def read_signals(recording: Recording, indices: Sequence[int]) -> list[np.ndarray]:
    """Channels as float32 (num_samples,), in V where the file has µV, else as stored.

    Raises:
        RecordingError: `SIGNAL_INVALID` or `TRUNCATED`.
    """
    raw, _, _ = _open(recording.path, [])
    return read_blocks(raw, indices, [(0, recording.channels[0].num_samples)], recording.path)


def _open(path: Path, repairs: list[str]) -> tuple[Any, list[str], list[str]]:
    """MNE's raw object, labels and units as in the file."""
    with path.open("rb") as stream:
        start = stream.read(64)
    refuse_pointer(path, start)
    if not is_ant(start):
        raise RecordingError("NOT_A_RECORDING", f"{path}: does not begin as an ANT file does")
    with reading(path, what="header", repairs=repairs):
        labels, units, _, _, _ = read_info(read_cnt(str(path)), encoding="latin-1")
        return mne.io.read_raw_ant(path, preload=False, verbose="ERROR"), list(labels), list(units)
