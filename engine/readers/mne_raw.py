"""What kymo asks of MNE: open a file in silence, name its errors, and hand out samples in blocks.

MNE gives every channel that a format measures in volts in V and leaves other units as they are.
"""

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import mne
import numpy as np

from engine.recording import Annotation
from manifests.errors import RecordingError

_BLOCK_BYTES = 32 << 20  # of float64 samples over all channels: MNE decodes every channel of a block
_LOCK = threading.RLock()  # log levels and caught warnings belong to the process; a scan reads headers in threads
_LFS = b"version https://git-lfs"
# FIFF's codes of units, as an EDF header spells them.
_UNITS = {101: "Hz", 102: "N", 103: "Pa", 107: "V", 109: "ohm", 110: "S", 112: "T", 114: "degC", 201: "T/m", 202: "Am"}

_BENIGN = ("outside of the data range", "outside data range", "No coordinate", "channel locations", "montage", "naming")
_WARNINGS = {
    "Could not parse meas date": "start time unreadable: left out",
    "Limited": "annotations reach beyond the end: shortened",
    "No LOG file": "no .LOG file: no annotations",
    "Could not find": "no .21E file: standard labels of the device",
    "Could not decode": "labels or texts in an unknown encoding: left out",
    "record length": "no record length in the header: one second taken",
    "Unit": "a unit that MNE does not know: values as stored",
    "Highpass cutoff frequency": "filter settings unreadable: left out",
    "Lowpass cutoff frequency": "filter settings unreadable: left out",
}


@contextlib.contextmanager
def reading(path: Path, *, what: str, repairs: list[str] | None = None) -> Iterator[None]:
    """Run MNE in silence; what it warns of becomes a repair in words of ours, what it raises a `RecordingError`.

    Args:
        path: The file, for messages.
        what: `header` or `signals`.
        repairs: Takes the sentences; None drops them.

    Raises:
        RecordingError: `FORMAT_UNSUPPORTED`, `TRUNCATED` (a file of the recording is missing), `HEADER_INVALID` or,
            for signals, `SIGNAL_INVALID`.
    """
    try:
        # Below the level WARNING MNE does not even warn; the filter keeps its logger from printing the same again.
        with _LOCK, mne.utils.use_log_level("WARNING"), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mne.utils.logger.addFilter(_nothing)
            try:
                yield
            finally:
                mne.utils.logger.removeFilter(_nothing)
    except (RecordingError, MemoryError):
        raise
    except NotImplementedError as error:
        raise RecordingError("FORMAT_UNSUPPORTED", f"{path}: {error or 'MNE does not read this kind'}") from error
    except FileNotFoundError as error:
        missing = Path(str(error.filename)).name if error.filename else str(error)
        raise RecordingError("TRUNCATED", f"{path}: a file of the recording is missing: {missing}") from error
    except OSError as error:
        if error.errno is not None:  # the disk or the rights, not the content
            raise
        raise RecordingError("HEADER_INVALID", f"{path}: {error}") from error
    except Exception as error:
        code = "HEADER_INVALID" if what == "header" else "SIGNAL_INVALID"
        raise RecordingError(code, f"{path}: {what}: {type(error).__name__}: {error}") from error
    if repairs is not None:
        repairs += dict.fromkeys(filter(None, (_sentence(str(item.message)) for item in caught)))


def _nothing(_: logging.LogRecord) -> bool:
    return False


def _sentence(warning: str) -> str:
    """Repair that a warning tells of; never its own words, which may quote the header."""
    if any(start in warning for start in _BENIGN):
        return ""
    known = [sentence for mark, sentence in _WARNINGS.items() if mark in warning]
    return known[0] if known else ""


def refuse_pointer(path: Path, start: bytes) -> None:
    """Refuse a file that git-lfs left in place of a recording, and an empty one.

    Raises:
        RecordingError: `NOT_A_RECORDING`.
    """
    if start.startswith(_LFS):
        raise RecordingError("NOT_A_RECORDING", f"{path}: a git-lfs pointer; fetch the file itself")
    if not start.strip(b"\0 \r\n"):
        raise RecordingError("NOT_A_RECORDING", f"{path}: empty or zeros only")


def unit_of(raw: Any, index: int, written: str = "") -> str:
    """Unit of the values that MNE gives; where MNE scales nothing, the one written in the file."""
    return _UNITS.get(int(raw.info["chs"][index]["unit"]), written)


def prefilter_of(raw: Any) -> str:
    """Corner frequencies that a header states for all channels, in the words of an EDF header."""
    high, low, nyquist = raw.info["highpass"], raw.info["lowpass"], raw.info["sfreq"] / 2
    parts = [f"HP:{high:g}Hz"] if high else []
    return " ".join([*parts, *([f"LP:{low:g}Hz"] if low and low < nyquist else [])])


def start_extra(raw: Any, first: int = 0) -> dict[str, str]:
    """`start_time` (HH:MM:SS, empty if unknown) and seconds from it to sample `first`, as the EDF reader has them."""
    date = raw.info["meas_date"]
    if date is None:
        return {"start_time": "", "start_subsecond": "0"}
    date += timedelta(seconds=(raw.first_samp + first) / raw.info["sfreq"])
    return {"start_time": f"{date:%H:%M:%S}", "start_subsecond": str(Fraction(date.microsecond, 1_000_000))}


def annotation(onset: Fraction, duration: Fraction, text: object) -> Annotation:
    """An annotation; a time that lies before the recording's start keeps its sign."""
    return Annotation(onset=onset, duration=max(Fraction(0), duration), text=str(text).strip())


def read_blocks(raw: Any, indices: Sequence[int], spans: Sequence[tuple[int, int]], path: Path) -> list[np.ndarray]:
    """Channels of an MNE raw object as float32, the spans one after another; memory does not grow with the file.

    Args:
        raw: Opened with `preload=False`.
        indices: Channels in any order.
        spans: First sample and the one after the last of each stretch to read.
        path: The file, for messages.

    Raises:
        RecordingError: `SIGNAL_INVALID` or `TRUNCATED`.
    """
    outputs = {index: np.empty(sum(stop - start for start, stop in spans), dtype=np.float32) for index in indices}
    picks = sorted(outputs)
    if not picks:
        return []
    step = max(1, _BLOCK_BYTES // (8 * len(raw.ch_names)))
    filled = 0
    with reading(path, what="signals"):
        for begin, end in spans:
            for start in range(begin, end, step):
                stop = min(end, start + step)
                block, _ = raw[picks, start:stop]
                for index, values in zip(picks, block, strict=True):
                    outputs[index][filled : filled + stop - start] = values
                filled += stop - start
    return [outputs[index] for index in indices]
