"""ANT Neuro recordings (`.cnt` in a RIFF container), decoded by antio.

MNE asks the same library for the patient too, which kills the process where a file has none; kymo does not ask.
Marks of the amplifier being disconnected become annotations (`BAD_disconnection`), as MNE words them.
"""

import json
import subprocess
import sys
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
_HEADER_TIMEOUT_S = 60


def read_header(path: Path, layout: Mapping[str, object]) -> Recording:
    """Channels in the units that the file states, one segment, and triggers as annotations; no sample is read.

    Raises:
        RecordingError: `NOT_A_RECORDING`, `HEADER_INVALID` or `TRUNCATED`.
    """
    _check_start(path)
    found = _asked(path)
    channels, total = found["channels"], found["total"]
    if total <= 0 or not channels or not found["rate"] > 0:
        raise RecordingError("TRUNCATED", f"{path}: {total} samples of {len(channels)} channels at {found['rate']} Hz")
    rate = exact_rate(found["rate"])
    return Recording(
        path=path,
        channels=tuple(
            Channel(index=index, label=label, rate=rate, unit=unit, prefilter="", num_samples=total)
            for index, (label, unit) in enumerate(channels)
        ),
        segments=(Segment(start=Fraction(0), duration=total / rate),),
        annotations=_annotations(found["marks"], found["gone"], rate, total),
        extra={"format": "ANT CNT", **_started(found["date"])},
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
    with reading(path, what="signals"):
        file = read_cnt(str(path))
        for first in range(0, total if outputs else 0, step):
            stop = min(total, first + step)
            block = file.get_samples_as_nparray(first, stop)
            for index, output in zip(indices, outputs, strict=True):
                output[first:stop] = block[index]
    return outputs


def _check_start(path: Path) -> None:
    with path.open("rb") as stream:
        start = stream.read(64)
    refuse_pointer(path, start)
    if not is_ant(start):
        raise RecordingError("NOT_A_RECORDING", f"{path}: does not begin as an ANT file does")
    promised = int.from_bytes(start[4:8], "little") + 8
    if start[:4] == b"RIFF" and path.stat().st_size < promised:  # its tables stand at the end
        raise RecordingError("TRUNCATED", f"{path}: {path.stat().st_size} of {promised} bytes; fetch it again")


def _asked(path: Path) -> dict[str, Any]:
    """What libeep tells of a file, asked in a process of its own: damaged tables crash it or keep it busy for ever."""
    command = [sys.executable, "-m", "engine.readers.ant", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_HEADER_TIMEOUT_S, check=False)
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        raise RecordingError("HEADER_INVALID", f"{path}: libeep did not come to an end with its header") from None
    except (IndexError, ValueError):
        raise RecordingError("HEADER_INVALID", f"{path}: libeep could not read its header; get a sound copy") from None


def describe(path: str) -> dict[str, Any]:
    """Channels as label and unit, rate in Hz, samples, date, triggers and losses of the amplifier, for JSON."""
    file = read_cnt(path)
    onsets, lengths, texts, _, gone = read_triggers(file)
    date = read_meas_date(file)
    channels = [file.get_channel(index, encoding="latin-1")[:2] for index in range(file.get_channel_count())]
    return {
        "channels": [[str(label), str(unit)] for label, unit in channels],
        "rate": float(file.get_sample_frequency()),
        "total": int(file.get_sample_count()),
        "date": date.isoformat() if date else "",
        "marks": [[int(a), int(b), str(text)] for a, b, text in zip(onsets, lengths, texts, strict=True)],
        "gone": [[int(sample) for sample in gone[key]] for key in ("start", "stop")],
    }


def _started(written: str) -> dict[str, str]:
    if not written:
        return {"start_time": "", "start_subsecond": "0"}
    date = datetime.fromisoformat(written)
    return {"start_time": f"{date:%H:%M:%S}", "start_subsecond": str(Fraction(date.microsecond, 1_000_000))}


def _annotations(
    triggers: Sequence[tuple[int, int, str]], gone: Sequence[Sequence[int]], rate: Fraction, total: int
) -> tuple[Annotation, ...]:
    """Triggers by code and condition, and stretches without amplifier."""
    marks = list(triggers)
    ends = iter(sorted(gone[1]))
    for start in sorted(gone[0]):
        end = next((stop for stop in ends if stop >= start), total)
        marks.append((start, end - start, "BAD_disconnection"))
    return tuple(
        annotation(onset / rate, length / rate, text)
        for onset, length, text in sorted(marks, key=lambda mark: mark[0])
        if 0 <= onset < total
    )


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(describe(sys.argv[1])) + "\n")
