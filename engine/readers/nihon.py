"""Nihon Kohden recordings (`.EEG` with `.21E`, `.PNT`, `.LOG` beside it), decoded by MNE.

Every block of samples is a segment that starts when the block's own clock says; MNE joins the blocks. Values come in
V: the device stores EEG in microvolts and its DC inputs in millivolts. Source of the block's clock: BioSig.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import mne
import numpy as np
from mne.io.nihon.nihon import _read_nihon_annotations

from engine.readers.magic import is_nihon
from engine.readers.mne_raw import annotation, prefilter_of, read_blocks, reading, refuse_pointer, start_extra
from engine.readers.timeline import timeline, to_micro
from engine.recording import Annotation, Channel, Recording
from manifests.errors import RecordingError

_COMPANIONS = (".21E", ".PNT", ".LOG", ".CMT", ".CN2")
_CLOCK_OFFSET = 0x14  # of a block: year, month, day, hour, minute, second in binary-coded decimals
_COUNT_OFFSET = 0x26


def companions(path: Path) -> list[Path]:
    """Files of the same stem that hold labels, events and the rest of a recording, in either case."""
    names = (path.with_suffix(form) for suffix in _COMPANIONS for form in (suffix, suffix.lower()))
    return [name for name in names if name != path and name.is_file()]


def read_header(path: Path, layout: Mapping[str, object]) -> Recording:
    """Channels in V, a segment per block, and the log's events; no sample is read.

    Raises:
        RecordingError: `NOT_A_RECORDING`, `HEADER_INVALID`, `TRUNCATED` or `FORMAT_UNSUPPORTED` (several control
            blocks, blocks with other channels).
    """
    repairs: list[str] = []
    raw = _open(path, repairs)
    blocks = vars(raw)["_raw_extras"][0]["header"]["controlblocks"][0]["datablocks"]
    lengths = [int(block["n_samples"]) for block in blocks]
    rate = Fraction(int(blocks[0]["sfreq"]))
    labels = [str(label) for label in blocks[0]["channels"]]
    clocks = _clocks(path, [int(block["address"]) for block in blocks])
    kept = _held(path, blocks, repairs)
    breaks: list[tuple[int, Fraction | None]] = []
    position = 0
    for length, clock in zip(lengths[:-1], clocks[1:], strict=True):
        position += length
        begun = clocks[0]
        elapsed = int((clock - begun).total_seconds()) if clock and begun else None
        breaks.append((position, Fraction(elapsed) if elapsed is not None else None))
    times = timeline(rate, kept, breaks, repairs)
    return Recording(
        path=path,
        channels=tuple(
            Channel(index=index, label=label, rate=rate, unit="V", prefilter=prefilter_of(raw), num_samples=kept)
            for index, label in enumerate(labels)
        ),
        segments=times.segments,
        annotations=_log(path, repairs),
        repairs=tuple(dict.fromkeys(repairs)),
        extra={"format": "Nihon Kohden", **_started(raw, clocks[0])},
        layout=dict(layout),
    )


def read_signals(recording: Recording, indices: Sequence[int]) -> list[np.ndarray]:
    """Channels as float32 (num_samples,) in V, blocks one after another.

    Raises:
        RecordingError: `SIGNAL_INVALID` or `TRUNCATED`.
    """
    raw = _open(recording.path, [])
    lengths = [
        int(block["n_samples"]) for block in vars(raw)["_raw_extras"][0]["header"]["controlblocks"][0]["datablocks"]
    ]
    total = recording.channels[0].num_samples
    ends = np.minimum(np.cumsum(lengths), total).tolist()
    spans = [(start, stop) for start, stop in zip([0, *ends], ends, strict=False) if stop > start]
    return read_blocks(raw, indices, spans, recording.path)


def _open(path: Path, repairs: list[str]) -> Any:
    with path.open("rb") as stream:
        start = stream.read(256)
    refuse_pointer(path, start)
    if not is_nihon(start):
        raise RecordingError("NOT_A_RECORDING", f"{path}: does not begin as a Nihon Kohden file does")
    with reading(path, what="header", repairs=repairs):
        return mne.io.read_raw_nihon(path, preload=False, encoding="latin-1", verbose="WARNING")


def _clocks(path: Path, addresses: Sequence[int]) -> list[datetime | None]:
    """When each block was begun, None where its clock is none."""
    found: list[datetime | None] = []
    with path.open("rb") as stream:
        for address in addresses:
            stream.seek(address + _CLOCK_OFFSET)
            digits = stream.read(6).hex()
            try:
                found.append(datetime.strptime(digits, "%y%m%d%H%M%S"))
            except ValueError:
                found.append(None)
    return found


def _log(path: Path, repairs: list[str]) -> tuple[Annotation, ...]:
    """Events of the `.LOG` by the time since the start; raw annotations lack those that a gap pushes out."""
    with reading(path, what="header", repairs=repairs):
        found = _read_nihon_annotations(path, encoding="latin-1")
    events = zip(found["onset"], found["description"], strict=True)
    return tuple(annotation(to_micro(float(onset)), Fraction(0), text) for onset, text in events)


def _started(raw: Any, clock: datetime | None) -> dict[str, str]:
    return {"start_time": f"{clock:%H:%M:%S}", "start_subsecond": "0"} if clock else start_extra(raw)


def _held(path: Path, blocks: Sequence[Mapping[str, Any]], repairs: list[str]) -> int:
    """Samples per channel that are there, counted until the first block that ends early."""
    size = path.stat().st_size
    total = promised = 0
    whole = True
    for block in blocks:
        channels = int(block["n_channels"])
        begin = int(block["address"]) + _COUNT_OFFSET + 1 + 10 * channels
        held = max(0, size - begin) // (2 * (channels + 1))
        promised += int(block["n_samples"])
        if whole:
            total += min(held, int(block["n_samples"]))
            whole = held >= int(block["n_samples"])
    if total < promised:
        repairs.append(f"truncated: {total} of {promised} samples per channel are there")
    if total <= 0:
        raise RecordingError("TRUNCATED", f"{path}: not one whole sample; fetch the file again")
    return total
