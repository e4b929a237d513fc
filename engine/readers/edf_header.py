"""The header of EDF, EDF+, BDF and BDF+ files, declared as a field table that code walks.

Source: Kemp et al. 1992 (EDF), Kemp and Olivan 2003 (EDF+, https://www.edfplus.info/specs), BioSemi (BDF).
"""

import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from engine.readers.edf_tals import decode_text
from manifests.errors import RecordingError

FILE_FIELDS = (
    ("version", 8),
    ("patient", 80),
    ("recording", 80),
    ("start_date", 8),
    ("start_time", 8),
    ("header_bytes", 8),
    ("reserved", 44),
    ("num_records", 8),
    ("record_duration", 8),
    ("num_signals", 4),
)
SIGNAL_FIELDS = (
    ("label", 16),
    ("transducer", 80),
    ("unit", 8),
    ("physical_min", 8),
    ("physical_max", 8),
    ("digital_min", 8),
    ("digital_max", 8),
    ("prefilter", 80),
    ("num_samples", 8),
    ("reserved", 32),
)
ANNOTATION_LABELS = ("edf annotations", "bdf annotations")
GZIP_MAGIC = b"\x1f\x8b"

_FILE_BYTES = _SIGNAL_BYTES = 256
_UNUSED = ("version", "patient", "recording", "transducer")  # not decoded: words about persons and devices
_WHOLE_NUMBER = re.compile(r"[-+]?\d+", re.ASCII)
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,2})?", re.ASCII)
_MIN_DURATION_S, _MAX_DURATION_S = Fraction(1, 1_000_000), 1_000_000  # of a record; 86,400 s exist (ResMed STR)
_MAX_GAIN = 10**30


class Readable(Protocol):
    """A file opened for reading bytes."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes from where it stands."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """One signal of the header. physical = digital * gain + offset; offset_samples counts from a record's start."""

    index: int
    label: str
    unit: str
    prefilter: str
    num_samples: int
    offset_samples: int
    gain: float
    offset: float
    calibrated: bool
    digital_limits: tuple[float, float]  # lower and upper; infinite where the header gives none

    @property
    def is_annotation(self) -> bool:
        """Whether it holds time-stamped lists instead of samples."""
        return self.label.lower() in ANNOTATION_LABELS


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What the fixed part of the file says, after repair; num_records is -1 where it says nothing."""

    kind: str
    sample_bytes: int
    data_start: int
    num_records: int
    record_duration: Fraction
    signals: tuple[Signal, ...]
    start_time: str

    @property
    def record_bytes(self) -> int:
        """Length of one data record in bytes."""
        return self.sample_bytes * sum(signal.num_samples for signal in self.signals)

    @property
    def annotation_signals(self) -> tuple[Signal, ...]:
        """Signals that hold annotations, in file order."""
        return tuple(signal for signal in self.signals if signal.is_annotation)


def parse_header(stream: Readable, where: str, repairs: list[str], *, encoding: str | None = None) -> Header:
    """Header at the start of a stream; what had to be repaired is appended to `repairs`, without the header's words.

    Args:
        stream: A file opened for reading, at its start.
        where: Name of the file for messages.
        repairs: Grows by one sentence for each repair.
        encoding: Of labels that are not UTF-8; Latin-1 where the corpus file declares none.

    Raises:
        RecordingError: `NOT_A_RECORDING`, `TRUNCATED` or `HEADER_INVALID`.
    """
    fixed = stream.read(_FILE_BYTES)
    sample_bytes = _sample_bytes(fixed, where)
    notes: Counter[str] = Counter()
    fields = dict(_walk(fixed, FILE_FIELDS, 1))
    text = {name: _text(values[0], notes) for name, values in fields.items() if name not in _UNUSED}
    num_signals = _integer(text["num_signals"], "number of signals", where)
    table = stream.read(num_signals * _SIGNAL_BYTES) if num_signals > 0 else b""
    if num_signals < 1 or len(table) < num_signals * _SIGNAL_BYTES:
        raise RecordingError(
            "TRUNCATED" if num_signals > 0 else "HEADER_INVALID",
            f"{where}: {num_signals} signals in the header, but {len(table)} bytes follow it; "
            f"each signal needs {_SIGNAL_BYTES}",
        )
    expected_bytes = _FILE_BYTES + num_signals * _SIGNAL_BYTES
    if text["header_bytes"] != str(expected_bytes):
        repairs.append(f"header byte count {shown(text['header_bytes'])} replaced by {expected_bytes}")
    duration = _number(text["record_duration"], notes)
    if duration is None or not (duration == 0 or _MIN_DURATION_S <= duration <= _MAX_DURATION_S):
        raise RecordingError(
            "HEADER_INVALID", f"{where}: record duration {shown(text['record_duration'])} is not a time in seconds"
        )
    num_records = _WHOLE_NUMBER.fullmatch(text["num_records"])
    columns = dict(_walk(table, SIGNAL_FIELDS, num_signals))
    rows = [{name: values[index] for name, values in columns.items()} for index in range(num_signals)]
    signals = tuple(_parse_signals(rows, where, notes, repairs, encoding))
    repairs.extend(note.format(count) for note, count in notes.items())
    _check_start_date(text["start_date"], repairs)
    return Header(
        kind=("EDF", "BDF")[sample_bytes - 2] + _plus(text["reserved"]),
        sample_bytes=sample_bytes,
        data_start=expected_bytes,
        num_records=int(num_records.group()) if num_records else -1,
        record_duration=duration,
        signals=signals,
        start_time=_start_time(text["start_time"], repairs),
    )


def is_edf(start: bytes) -> bool:
    """Whether a file that begins with these bytes calls itself EDF or BDF, gzip-compressed or not."""
    if start[:2] == GZIP_MAGIC:
        try:
            start = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(start, _FILE_BYTES)
        except zlib.error:
            return False
    return _is_magic(start)


def _is_magic(start: bytes) -> bool:
    return start[:8].strip(b" \0") == b"0" or (start[:1] == b"\xff" and start[1:8].upper() == b"BIOSEMI")


def shown(text: str) -> str:
    """A header's number as a message may show it: words are left out, as they may belong to a person's name."""
    return repr(text) if re.fullmatch(r"[-+.,:eE\d ]{0,8}", text) else "(no number)"


def _sample_bytes(fixed: bytes, where: str) -> int:
    """2 for EDF, 3 for BDF, by the first eight bytes; the suffix of a file is not asked."""
    if not _is_magic(fixed):
        what = "a git-lfs pointer; fetch the file itself" if b"git-lfs" in fixed else "neither EDF nor BDF"
        raise RecordingError(
            "NOT_A_RECORDING", f"{where}: {what}; EDF begins with '0' and blanks, BDF with 0xFF BIOSEMI"
        )
    if len(fixed) < _FILE_BYTES:
        raise RecordingError("TRUNCATED", f"{where}: {len(fixed)} bytes; a header has at least {_FILE_BYTES}")
    return 3 if fixed[0] == 0xFF else 2


def _walk(data: bytes, fields: Sequence[tuple[str, int]], count: int) -> Iterator[tuple[str, list[bytes]]]:
    """Each field's name and its `count` values, which stand one after another in an EDF header."""
    position = 0
    for name, width in fields:
        yield name, [data[position + i * width : position + (i + 1) * width] for i in range(count)]
        position += width * count


def _parse_signals(
    rows: Sequence[Mapping[str, bytes]], where: str, notes: Counter[str], repairs: list[str], encoding: str | None
) -> Iterator[Signal]:
    offset_samples = 0
    for index, row in enumerate(rows):
        name = f"signal {index}"
        text = {
            key: _text(value, notes, encoding if key == "label" else None)
            for key, value in row.items()
            if key not in _UNUSED
        }
        num_samples = _integer(text["num_samples"], f"{name}: samples per record", where)
        if num_samples < 0:
            raise RecordingError("HEADER_INVALID", f"{where}: {name}: {num_samples} samples per record")
        limits = [_number(text[key], notes) for key in ("physical_min", "physical_max", "digital_min", "digital_max")]
        gain, offset, calibrated = _calibration(limits)
        signal = Signal(
            index=index,
            label=text["label"],
            unit=text["unit"],
            prefilter=text["prefilter"],
            num_samples=num_samples,
            offset_samples=offset_samples,
            gain=gain,
            offset=offset,
            calibrated=calibrated,
            digital_limits=_digital_limits(limits[2], limits[3]),
        )
        if not calibrated and not signal.is_annotation:
            repairs.append(f"{name} has no gain: digital values, uncalibrated")
        yield signal
        offset_samples += num_samples


def _calibration(limits: Sequence[Fraction | None]) -> tuple[float, float, bool]:
    """Gain, offset and whether they mean anything. A negative gain inverts, as the standard's formula says."""
    physical_min, physical_max, digital_min, digital_max = limits
    if physical_min is None or physical_max is None or digital_min is None or digital_max is None:
        return 1.0, 0.0, False
    if physical_min == physical_max or digital_min == digital_max:
        return 1.0, 0.0, False
    gain = (physical_max - physical_min) / (digital_max - digital_min)
    offset = physical_min - gain * digital_min
    if not 1 / _MAX_GAIN <= abs(gain) <= _MAX_GAIN or abs(offset) > _MAX_GAIN:
        return 1.0, 0.0, False  # float32 does not hold its products
    return float(gain), float(offset), True


def _digital_limits(first: Fraction | None, second: Fraction | None) -> tuple[float, float]:
    if first is None or second is None or first == second:
        return -math.inf, math.inf
    return float(min(first, second)), float(max(first, second))


def _text(raw: bytes, notes: Counter[str], encoding: str | None = None) -> str:
    if b"\0" in raw:
        notes["NUL bytes in {} header fields read as blanks"] += 1
        raw = raw.replace(b"\0", b" ")
    if raw.isascii():
        return raw.decode("ascii").strip()
    text, is_utf8 = decode_text(raw, encoding)
    notes[f"{{}} header fields are not ASCII: read as {'utf-8' if is_utf8 else encoding or 'latin-1'}"] += 1
    return text


def _integer(text: str, name: str, where: str) -> int:
    if not _WHOLE_NUMBER.fullmatch(text):
        raise RecordingError("HEADER_INVALID", f"{where}: {name} is {shown(text)}, not a whole number")
    return int(text)


def _number(text: str, notes: Counter[str]) -> Fraction | None:
    """Exact value, None where the field has none; exponents of more than two digits are nonsense."""
    if "," in text and "." not in text:
        notes["decimal comma in {} header numbers read as a point"] += 1
        text = text.replace(",", ".")
    return Fraction(text) if _NUMBER.fullmatch(text) else None


def _plus(reserved: str) -> str:
    return reserved[3:5] if reserved[:5] in {"EDF+C", "EDF+D", "BDF+C", "BDF+D"} else ""


def _start_time(text: str, repairs: list[str]) -> str:
    """HH:MM:SS, or empty where the header's time of day does not exist; hence clock times are then unusable."""
    match = re.fullmatch(r"(\d\d?)[.:](\d\d?)[.:](\d\d?)", text)
    if match and int(match[1]) < 24 and int(match[2]) < 60 and int(match[3]) < 60:
        return ":".join(part.zfill(2) for part in match.groups())
    repairs.append("start time does not exist: left empty")
    return ""


def _check_start_date(text: str, repairs: list[str]) -> None:
    """Only noted: the date of a recording is personal data and goes nowhere."""
    match = re.fullmatch(r"(\d\d?)[.:/-](\d\d?)[.:/-](\d\d)", text)
    if not (match and 1 <= int(match[1]) <= 31 and 1 <= int(match[2]) <= 12):
        repairs.append("start date does not exist")
