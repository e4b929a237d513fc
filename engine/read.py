"""Readers by the name that a corpus file gives; each decides by a file's content, never by its suffix."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np

from engine.readers.magic import MAGIC_BYTES, SIGNATURES, is_mff
from engine.recording import Recording
from manifests.errors import ConfigError, RecordingError


def alone(path: Path) -> list[Path]:  # noqa: ARG001 - the signature of Reader.companions
    """Companions of a recording that is one file: none."""
    return []


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A file format: headers and annotations cheaply, signals on demand.

    `companions` names the other files that a recording consists of; some of them may be missing. `members` names the
    recordings in a file by path and layout, none where the file is one recording; each is read as `file#member`.
    """

    read_header: Callable[[Path, Mapping[str, object]], Recording]
    read_signals: Callable[[Recording, Sequence[int]], list[np.ndarray]]
    companions: Callable[[Path], list[Path]] = alone
    members: Callable[[Path, Mapping[str, object]], list[str]] | None = None


# Name in a corpus file -> module of engine.readers, with `read_header`, `read_signals` and, where needed,
# `companions` and `members`.
_MODULES = {
    "edf": "edf",
    "wfdb": "physionet",
    "text": "text",
    "arrays": "arrays",
    "xdf": "xdf",
    "dicom": "dicom",
    "brainvision": "brainvision",
    "fif": "fif",
    "eeglab": "eeglab",
    "gdf": "gdf",
    "egi": "egi",
    "cnt": "neuroscan",
    "ant": "ant",
    "nihon": "nihon",
    "persyst": "persyst",
}


# Readers whose libraries may crash, hang or eat memory on a damaged header: compiled decoders of nested structures
# (SciPy, HDF5, antio), and those that read a whole file to tell about it. `engine.probe` asks them in a child process.
FRAGILE = frozenset({"ant", "arrays", "dicom", "eeglab", "fif", "nihon", "xdf"})

Guard = Callable[[str, Reader], Reader]


class _Readers(Mapping[str, Reader]):
    """Readers by name. A module is loaded when it is first asked for: all their libraries cost more than a night.

    While `guard` is set, fragile readers come as what it makes of them.
    """

    guard: Guard | None = None

    def __getitem__(self, name: str) -> Reader:
        reader = _load(_MODULES[name])
        return reader if self.guard is None or name not in FRAGILE else self.guard(name, reader)

    def __iter__(self) -> Iterator[str]:
        return iter(_MODULES)

    def __len__(self) -> int:
        return len(_MODULES)


@cache
def _load(module: str) -> Reader:
    loaded = import_module(f"engine.readers.{module}")
    optional = {name: getattr(loaded, name) for name in ("companions", "members") if hasattr(loaded, name)}
    return Reader(read_header=loaded.read_header, read_signals=loaded.read_signals, **optional)


READERS = _Readers()


def sniff(path: Path) -> str | None:
    """Reader for a file or folder by its content, None where none knows it; declared layouts are never guessed."""
    if path.is_dir():
        return "egi" if is_mff(path) else None
    with path.open("rb") as stream:
        start = stream.read(MAGIC_BYTES)
    return next((name for name, is_its in SIGNATURES if is_its(path, start)), None)


def read_header(path: Path, reader: str, layout: Mapping[str, object] | None = None) -> Recording:
    """Channels, segments and annotations of a file; no signal is read.

    Args:
        path: The recording, for WFDB its `.hea`.
        reader: A key of `READERS`.
        layout: Options of a reader for files that do not describe themselves (`text`, `arrays`).

    Raises:
        ConfigError: No such reader, or a layout that breaks its schema.
        RecordingError: The file cannot be used.
    """
    if reader not in READERS:
        raise ConfigError(f"reader {reader!r}: expected one of {', '.join(READERS)}")
    try:
        recording = READERS[reader].read_header(path, layout or {})
    except OSError as error:
        raise RecordingError("NOT_A_RECORDING", f"{path}: {error.strerror or error}") from error
    return replace(recording, extra={**recording.extra, "reader": reader})


def read_signals(recording: Recording, indices: Sequence[int]) -> list[np.ndarray]:
    """Channels by `Channel.index`: float32 (num_samples,) in the header's unit, NaN where a sample is missing.

    Segments stand one after another. An uncalibrated channel comes as digital values.

    Raises:
        RecordingError: The signals cannot be decoded.
        ValueError: An index that is no channel of the recording.
    """
    known = {channel.index for channel in recording.channels}
    if not known.issuperset(indices):
        raise ValueError(f"{recording.path}: no channels {sorted(set(indices) - known)}; it has {sorted(known)}")
    return READERS[recording.extra["reader"]].read_signals(recording, indices)
