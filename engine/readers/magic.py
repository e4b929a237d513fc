"""Which reader a file belongs to, by what its first bytes say; nothing but the standard library is loaded for that."""

import re
import struct
from collections.abc import Callable
from pathlib import Path

from engine.readers.edf_header import is_edf

MAGIC_BYTES = 512
FIF_MAGIC = b"\x00\x00\x00\x64\x00\x00\x00\x1f\x00\x00\x00\x14"  # tag 100 (file id) of type 31, 20 bytes long
MAT5_MAGIC = b"MATLAB 5.0 MAT-file"
MAT73_MAGIC = b"MATLAB 7.3 MAT-file"
HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
MFF_FILES = ("info.xml", "signal1.bin")  # that a folder holds which is an EGI recording
FIF_SPLIT_NAME = re.compile(r"(?P<stem>.*)_split-(?P<number>\d+)(?P<rest>_\w+\.fif(?:\.gz)?)")
EGI_HEAD = struct.Struct(">i6hi5h")
_EDF_SUFFIXES = frozenset({".edf", ".bdf"})
_WFDB_RECORD_LINE = re.compile(rb"\s*(?:#[^\n]*\n\s*)*[-\w./]+[ \t]+\d+(?:[ \t]+[\d.][^\n]*)?\r?\n")
_BRAINVISION_LINE = re.compile(rb"(?:\xef\xbb\xbf)?\s*Brain ?Vision(?: Core| V-Amp)? Data")
_PERSYST_SECTION = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[FileInfo\]", re.IGNORECASE)
_FIF_PART_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d+)(?P<rest>\.fif(?:\.gz)?)")
_NIHON_DEVICES = (b"EEG-1100", b"EEG-1200", b"EEG-2100", b"QI-403A", b"DAE-2100D")


def _edf(path: Path, start: bytes) -> bool:
    """A file that only calls itself EDF is one too, so that it is reported and not passed over."""
    return is_edf(start) or path.suffix.lower() in _EDF_SUFFIXES


def _wfdb(path: Path, start: bytes) -> bool:
    return path.suffix == ".hea" and _WFDB_RECORD_LINE.match(start) is not None


def is_brainvision(start: bytes) -> bool:
    """Whether a file begins as a BrainVision header does."""
    return _BRAINVISION_LINE.match(start) is not None and b"Header" in start[:100]


def is_later_fif(path: Path) -> bool:
    """Whether a FIF file continues another one that lies beside it."""
    split = FIF_SPLIT_NAME.fullmatch(path.name)
    if split and int(split["number"]) > 1:
        first = f"{split['stem']}_split-{1:0{len(split['number'])}d}{split['rest']}"
        return (path.parent / first).is_file()
    part = _FIF_PART_NAME.fullmatch(path.name)
    return part is not None and int(part["number"]) > 0 and (path.parent / f"{part['stem']}{part['rest']}").is_file()


def _fif(path: Path, start: bytes) -> bool:
    return start.startswith(FIF_MAGIC) and not is_later_fif(path)


def _eeglab(path: Path, start: bytes) -> bool:
    """A MATLAB file that calls itself a set; other MATLAB files need a declared layout."""
    return path.suffix.lower() == ".set" and start.startswith((MAT5_MAGIC, MAT73_MAGIC, HDF5_MAGIC))


def is_gdf(start: bytes) -> bool:
    """Whether a file begins as a GDF one does."""
    return start[:4] == b"GDF " and start[4:8].replace(b".", b"").strip().isdigit()


def is_neuroscan(start: bytes) -> bool:
    """Whether a file begins as a Neuroscan one does."""
    return start.startswith(b"Version 3.0")


def is_ant(start: bytes) -> bool:
    """Whether a file is a RIFF (or 64-bit) container of EEG samples."""
    return start[:4] in {b"RIFF", b"RF64"} and start[8:12].upper() in {b"CNT ", b"RAW3"}


def is_nihon(start: bytes) -> bool:
    """Whether a file begins with the name of a Nihon Kohden device and repeats one in its control block."""
    return start.startswith(_NIHON_DEVICES) and start[0x81 : 0x81 + 16].startswith(_NIHON_DEVICES)


def is_persyst(start: bytes) -> bool:
    """Whether a file begins as a Persyst header does."""
    return _PERSYST_SECTION.match(start) is not None


def is_simple_binary(start: bytes) -> bool:
    """Whether a file begins with an EGI version from 2 to 7, a date, a rate and counts that can be true."""
    if len(start) < EGI_HEAD.size:
        return False
    version, year, month, day, hour, minute, second, _, rate, channels, *_ = EGI_HEAD.unpack_from(start)
    in_calendar = 1900 <= year < 2100 and 1 <= month <= 12 and 1 <= day <= 31
    in_day = 0 <= hour < 24 and 0 <= minute < 60 and 0 <= second < 61
    return 2 <= version <= 7 and in_calendar and in_day and rate > 0 and channels > 0


def is_mff(path: Path) -> bool:
    """Whether a folder is an EGI recording: it holds `info.xml` and a `signal1.bin`."""
    return path.is_dir() and all((path / name).is_file() for name in MFF_FILES)


def _by_start(is_its: Callable[[bytes], bool]) -> Callable[[Path, bytes], bool]:
    return lambda _, start: is_its(start)


# Name of a reader and whether a file with these first bytes is its; the first that says yes has it.
SIGNATURES: tuple[tuple[str, Callable[[Path, bytes], bool]], ...] = (
    ("edf", _edf),
    ("wfdb", _wfdb),
    ("brainvision", _by_start(is_brainvision)),
    ("fif", _fif),
    ("eeglab", _eeglab),
    ("gdf", _by_start(is_gdf)),
    ("cnt", _by_start(is_neuroscan)),
    ("ant", _by_start(is_ant)),
    ("nihon", _by_start(is_nihon)),
    ("persyst", _by_start(is_persyst)),
    ("xdf", _by_start(lambda start: start.startswith(b"XDF:"))),
    ("dicom", _by_start(lambda start: start[128:132] == b"DICM")),
    ("egi", _by_start(is_simple_binary)),
)
