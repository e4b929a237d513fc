"""Label files that are tables: delimited text by declared columns, and BIDS events.

Times come as seconds, samples, epochs or times of day. Messages tell the line of a file and never what stands there:
a technician's note may name a person.
"""

import csv
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from engine.label_files import read_text
from engine.recording import Annotation, Recording
from manifests.annotations import AnnotationRule, Column, TableRule
from manifests.errors import ConfigError, RecordingError

_DAY_S = 86400
_NUMBER = re.compile(r"[+-]?(?:\d{1,15}(?:\.\d{0,20})?|\.\d{1,20})(?:[eE][+-]?\d{1,2})?")
_CLOCK = re.compile(r"(\d{1,2})[:.](\d{2})[:.](\d{2}(?:[.,]\d{1,9})?)\s*([AaPp][Mm])?$")


def table(recording: Recording, path: Path, rule: AnnotationRule) -> list[Annotation]:
    """Rows of a delimited text by the columns that the rule declares; equal rows once.

    Raises:
        RecordingError: `ANNOTATION_INVALID` for a row without a time, or clock times beside an unknown start time.
    """
    columns = rule.table
    if columns is None:
        raise ConfigError("annotations: source table has no block table")
    rows = _rows(path, columns)
    found: list[Annotation] = []
    previous = start_clock(recording) if columns.unit == "clock" else Fraction(0)
    if previous is None:
        raise RecordingError(
            "ANNOTATION_INVALID", f"{path}: times of day, but {recording.path.name} does not say when it began"
        )
    start = previous
    times = _Times(
        path=path, rule=rule, table=columns, rate=recording.channels[0].rate if recording.channels else Fraction(1)
    )
    for number, cells in rows:
        onset = previous = times.at(cells["onset"], previous, number)
        duration = Fraction(0)
        if "end" in cells:
            duration = times.at(cells["end"], onset, number) - onset
        elif "duration" in cells:
            duration = times.length(cells["duration"], number)
        if duration < 0:
            raise RecordingError("ANNOTATION_INVALID", f"{path}: line {number} ends before it begins")
        found.append(Annotation(onset=onset - start, duration=duration, text=cells["text"]))
    return list(dict.fromkeys(found))


def bids_events(path: Path) -> list[Annotation]:
    """Rows of an `events.tsv`: the text is `trial_type`, `value` or `stage`, the first of them that is not `n/a`.

    Source: https://bids-specification.readthedocs.io, task events.
    """
    rows = list(csv.reader(read_text(path).splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    names = [cell.strip() for cell in rows[0]] if rows else []
    texts = [name for name in ("trial_type", "value", "stage") if name in names]
    if "onset" not in names or not texts:
        raise RecordingError(
            "ANNOTATION_INVALID", f"{path}: an events.tsv has columns onset and trial_type, value or stage"
        )
    found: list[Annotation] = []
    for number, row in enumerate(rows[1:], start=2):
        if not any(cell.strip() for cell in row):
            continue
        cells = {name: cell.strip() for name, cell in zip(names, row, strict=False)}
        words = [cells[name] for name in texts if cells.get(name, "n/a") not in {"", "n/a"}]
        duration = cells.get("duration", "n/a")
        found.append(
            Annotation(
                onset=number_of(cells["onset"], path, number, "onset"),
                duration=Fraction(0) if duration in {"", "n/a"} else duration_seconds(duration, path, number),
                text=words[0] if words else "n/a",
            )
        )
    return found


def clock_seconds(text: str) -> Fraction | None:
    """Seconds of the day of a time such as `22:31:05`, `22.31.05,5` or `10:31:05 PM`, which may end a date; or None."""
    match = _CLOCK.search(text.strip())
    if match is None:
        return None
    hours, minutes, seconds = int(match[1]), int(match[2]), Fraction(match[3].replace(",", "."))
    if match[4]:
        hours = hours % 12 + (12 if match[4].lower() == "pm" else 0)
    return hours * 3600 + minutes * 60 + seconds if hours < 24 and minutes < 60 and seconds < 61 else None


def start_clock(recording: Recording) -> Fraction | None:
    """Seconds of the day of a recording's first sample, or None where its file does not say when it began.

    A header's clock has whole seconds; what EDF+ and others state beyond them stands in `extra["start_subsecond"]`.
    """
    clock = clock_seconds(recording.extra.get("start_time", ""))
    return None if clock is None else clock + Fraction(recording.extra.get("start_subsecond") or 0)


def nearest_clock(seconds_of_day: Fraction, before: Fraction) -> Fraction:
    """The time of that clock reading that lies nearest to another time."""
    return before + (seconds_of_day - before + _DAY_S // 2) % _DAY_S - _DAY_S // 2


def number_of(text: str, path: Path, line: int | str, what: str) -> Fraction:
    """Exact number in a cell, which is never evaluated beyond what a time can be."""
    if not _NUMBER.fullmatch(text):
        where = f"line {line}" if isinstance(line, int) else line
        raise RecordingError("ANNOTATION_INVALID", f"{path}: {where}: {what} is no number")
    return Fraction(text)


def duration_seconds(text: str, path: Path, line: int | str) -> Fraction:
    """Number that is not negative."""
    length = number_of(text, path, line, "duration")
    if length < 0:
        where = f"line {line}" if isinstance(line, int) else line
        raise RecordingError("ANNOTATION_INVALID", f"{path}: {where}: duration {float(length):g} is negative")
    return length


class _Times:
    """Cells of a table as seconds; a clock time is the one nearest to the time before it."""

    def __init__(self, *, path: Path, rule: AnnotationRule, table: TableRule, rate: Fraction) -> None:
        self._path = path
        self._table = table
        units = {"samples": 1 / rate, "epochs": Fraction(rule.epoch_s)}
        self._unit_s = units.get(table.unit, Fraction(1))
        self._first = table.first_epoch if table.unit == "epochs" else 0

    def at(self, cell: str, before: Fraction, line: int) -> Fraction:
        """A point in time: seconds from the start, of the day for clock times, beyond a day after midnight."""
        if self._table.unit != "clock":
            return (number_of(self._plain(cell), self._path, line, "time") - self._first) * self._unit_s
        found = clock_seconds(cell)
        if found is None:
            raise RecordingError("ANNOTATION_INVALID", f"{self._path}: line {line} has no time of day as 22:31:05")
        return nearest_clock(found, before)

    def length(self, cell: str, line: int) -> Fraction:
        """A duration in seconds."""
        return duration_seconds(self._plain(cell), self._path, line) * self._unit_s

    def _plain(self, cell: str) -> str:
        return cell.replace(",", ".") if self._table.decimal == "," else cell


def _rows(path: Path, columns: TableRule) -> list[tuple[int, dict[str, str]]]:
    """Line number and cells by what they mean, of the rows that are kept."""
    lines = list(enumerate(read_text(path, columns.encoding).splitlines(), start=1))[columns.skip_lines :]
    lines = [
        (number, line)
        for number, line in lines
        if line.strip() and not (columns.comment and line.startswith(columns.comment))
    ]
    if isinstance(columns.header, str):
        begins = next((i for i, (_, line) in enumerate(lines) if line.startswith(columns.header)), None)
        if begins is None:
            raise RecordingError("ANNOTATION_INVALID", f"{path}: no line begins with {columns.header!r}")
        lines = lines[begins:]
    names = _cells(lines[0][1], columns.separator) if lines and columns.header is not False else []
    wanted: dict[str, Column | None] = {
        "onset": columns.onset,
        "text": columns.text,
        "duration": columns.duration,
        "end": columns.end,
    }
    places = {what: _place(column, names, path) for what, column in wanted.items() if column is not None}
    kept = {_place(column, names, path): frozenset(cells) for column, cells in columns.keep.items()}
    found: list[tuple[int, dict[str, str]]] = []
    for number, line in lines[1 if names else 0 :]:
        cells = _cells(line, columns.separator)
        if len(cells) <= max([*places.values(), *kept]):
            raise RecordingError("ANNOTATION_INVALID", f"{path}: line {number} has {len(cells)} columns, too few")
        if all(cells[place] in known for place, known in kept.items()):
            found.append((number, {what: cells[place] for what, place in places.items()}))
    return found


def _cells(line: str, separator: str | None) -> list[str]:
    if separator is None:
        return line.split()
    return [cell.strip() for cell in next(csv.reader([line], delimiter=separator, skipinitialspace=True))]


def _place(column: Column, names: Sequence[str], path: Path) -> int:
    """Place of a column from 0: by number, by name, or by the beginning of a name that no other shares."""
    if isinstance(column, int):
        return column - 1
    exact = [place for place, name in enumerate(names) if name == column]
    found = exact or [place for place, name in enumerate(names) if name.startswith(column)]
    if len(found) != 1:
        raise RecordingError(
            "ANNOTATION_INVALID", f"{path}: {len(found)} columns are called {column!r}; 1 expected in the header line"
        )
    return found[0]
