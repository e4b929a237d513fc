"""WFDB annotation files in MIT format, read word by word: a damaged one ends with a reason and never in a loop.

Source: https://wfdb.io/spec/annotation-files.html. The package `wfdb` reads the same files, and its reader goes round
for ever on some damaged ones (`interpret_defintion_annotations`, 4.3.1).
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from manifests.errors import RecordingError

_CODES = (*range(1, 15), 16, *range(18, 42))
_SYMBOLS: dict[int, str] = dict(zip(_CODES, 'NLRaVFJASEj/Q~|sT*D"=pB^t+u?![]en@xf()r', strict=True))
_NOTE, _SKIP, _NUM, _SUB, _CHN, _AUX = 22, 59, 60, 61, 62, 63
_UNDEFINED = "undefined"
_RESOLUTION = re.compile(r"## time resolution: (\d{1,9}(?:\.\d{1,9})?)$")
_DEFINITION = re.compile(r"(\d{1,2}) (\S{1,20})(?: .*)?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One annotation: its time in samples, the symbol of its code and its note, empty for none."""

    sample: int
    symbol: str
    note: str = ""


def read_marks(data: bytes, path: Path) -> tuple[list[Mark], Fraction | None]:
    """Annotations in the file's order, and the rate in Hz that its times count, if it states one.

    Notes that define the file's own codes or its rate are no annotations.

    Args:
        data: The whole file.
        path: Its name, for messages.

    Raises:
        RecordingError: `ANNOTATION_INVALID` for a file that ends early or states no possible rate.
    """
    symbols = dict(_SYMBOLS)
    rate: Fraction | None = None
    marks: list[Mark] = []
    is_defining = False
    for sample, code, note in _words(data, path):
        if code == _NOTE and note.startswith("## "):
            if match := _RESOLUTION.match(note):
                rate = Fraction(match[1])
            is_defining = note.startswith("## annotation type definitions")
        elif is_defining and code == _NOTE and (match := _DEFINITION.match(note)):
            symbols[int(match[1])] = match[2]
        elif code:  # 0 marks no event and only moves the time on
            marks.append(Mark(sample=sample, symbol=symbols.get(code, _UNDEFINED), note=note))
    if rate == 0:
        raise RecordingError("ANNOTATION_INVALID", f"{path}: states a time resolution of 0 Hz")
    return marks, rate


def _words(data: bytes, path: Path) -> list[tuple[int, int, str]]:
    """Time in samples, code and note of every annotation."""
    found: list[tuple[int, int, str]] = []
    place, time = 0, 0

    def take(count: int) -> bytes:
        nonlocal place
        taken = data[place : place + count]
        if len(taken) < count:
            raise RecordingError("ANNOTATION_INVALID", f"{path}: ends at byte {len(data)} without its end mark")
        place += count
        return taken

    while True:
        word = int.from_bytes(take(2), "little")
        code, value = word >> 10, word & 0x3FF
        if word == 0:
            return found
        if code == _SKIP:
            high, low = take(2), take(2)
            time += int.from_bytes(low + high, "little", signed=True)
        elif code == _AUX:
            text = take(value + value % 2)[:value].strip(b" \0").decode("latin-1")
            if found:
                found[-1] = (*found[-1][:2], text)
        elif code not in (_NUM, _SUB, _CHN):
            time += value
            found.append((time, code, ""))
