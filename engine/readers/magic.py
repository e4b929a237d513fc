"""Which reader a file belongs to, by what its first bytes say."""

import re
from collections.abc import Callable
from pathlib import Path

from engine.readers import brainvision, fif
from engine.readers.edf_header import is_edf

MAGIC_BYTES = 512
_EDF_SUFFIXES = frozenset({".edf", ".bdf"})
_WFDB_RECORD_LINE = re.compile(rb"\s*(?:#[^\n]*\n\s*)*[-\w./]+[ \t]+\d+(?:[ \t]+[\d.][^\n]*)?\r?\n")


def _edf(path: Path, start: bytes) -> bool:
    """A file that only calls itself EDF is one too, so that it is reported and not passed over."""
    return is_edf(start) or path.suffix.lower() in _EDF_SUFFIXES


def _wfdb(path: Path, start: bytes) -> bool:
    return path.suffix == ".hea" and _WFDB_RECORD_LINE.match(start) is not None


def _brainvision(_: Path, start: bytes) -> bool:
    return brainvision.is_header(start)


def _fif(path: Path, start: bytes) -> bool:
    return start.startswith(fif.MAGIC) and not fif.is_later_part(path)


def _xdf(_: Path, start: bytes) -> bool:
    return start.startswith(b"XDF:")


def _dicom(_: Path, start: bytes) -> bool:
    return start[128:132] == b"DICM"


# Name of a reader and whether a file with these first bytes is its; the first that says yes has it.
SIGNATURES: tuple[tuple[str, Callable[[Path, bytes], bool]], ...] = (
    ("edf", _edf),
    ("wfdb", _wfdb),
    ("brainvision", _brainvision),
    ("fif", _fif),
    ("xdf", _xdf),
    ("dicom", _dicom),
)
