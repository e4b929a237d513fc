"""Recordings in plain text whose columns a corpus file declares, such as DREAMS excerpts or OpenBCI exports."""

import gzip
import io
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.recording import Channel, Recording, Segment
from manifests.errors import ConfigError, RecordingError

_SEPARATORS = {"whitespace": None, "comma": ",", "tab": "\t", "semicolon": ";"}
_HEAD_BYTES = 1 << 16
_RATE_TOLERANCE = 1e-3
_BOMB_BYTES, _BOMB_RATIO = 64 << 20, 100

LayoutT = TypeVar("LayoutT", bound=BaseModel)


class _Place(BaseModel):
    """A column by its number from 0, or by its name in the last header line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    column: Annotated[int, Field(ge=0)] | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "_Place":
        if (self.column is None) == (self.name is None):
            raise ValueError("give either column or name")
        return self


class Column(_Place):
    """One channel: `{column: 3, label: C3, unit: uV}` or `{name: PLETH}`, which is its label as well.

    A null label of a numbered column is read from the file by `label_pattern`.
    """

    label: str | None = None
    unit: str = ""


class Counter(_Place):
    """A column that counts samples and starts again at `modulus`; a jump in it is a gap."""

    modulus: Annotated[int, Field(gt=1)]


class Times(_Place):
    """A column of time stamps, `{name: timestamps, unit_s: 1, gap_s: 1}`; a longer pause than `gap_s` is a gap.

    Between gaps they must agree with the rate: to two samples, or to 0.1 % of the time since the last gap.
    """

    unit_s: Annotated[float, Field(gt=0)] = 1.0
    gap_s: Annotated[float, Field(gt=0)] = 1.0


class TextLayout(BaseModel):
    r"""`layout` of a corpus with `reader: text`.

    Attributes:
        columns: The channels; other columns are not read. Columns by name need a header line.
        separator: What stands between columns.
        header_lines: Lines before the first sample, comment lines not counted.
        comment: Start of lines to pass over; null: none.
        rate_hz: Sampling rate in Hz, `250` or `"1000/3"`.
        rate_by_file: Rates of files that differ, by file name.
        rate_pattern: Regular expression whose first group is the rate in the file's head; it must agree.
        label_pattern: Regular expression whose first group is the label of columns without one.
        counter: A sample counter, where the device writes one.
        times: Time stamps, where the device writes these.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    columns: Annotated[tuple[Column, ...], Field(min_length=1)]
    separator: Literal["whitespace", "comma", "tab", "semicolon"] = "whitespace"
    header_lines: Annotated[int, Field(ge=0)] = 0
    comment: str | None = None
    rate_hz: int | float | str | None = None
    rate_by_file: dict[str, int | float | str] = {}
    rate_pattern: str | None = None
    label_pattern: str | None = None
    counter: Counter | None = None
    times: Times | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> "TextLayout":
        if self.counter and self.times:
            raise ValueError("give either counter or times")
        places: list[_Place | None] = [*self.columns, self.counter, self.times]
        if not self.header_lines and any(place and place.name is not None for place in places):
            raise ValueError("columns by name need header_lines of 1 or more")
        return self


def read_header(path: Path, layout: Mapping[str, object]) -> Recording:
    """Declared channels and the length of a text file, which may be gzipped; the numbers themselves are not read.

    With a `counter` or `times` that column is read, and each jump in it ends a segment.

    Raises:
        ConfigError: The layout breaks its schema, or gives no rate for this file.
        RecordingError: `NOT_A_RECORDING`, `HEADER_INVALID`, `TRUNCATED` or `SIGNAL_INVALID`.
    """
    rules = parse_layout(TextLayout, layout, "text")
    data = _content(path)
    head = data[:_HEAD_BYTES].decode("latin-1")
    if "\0" in head or not head.strip() or "git-lfs" in head[:200]:
        raise RecordingError("NOT_A_RECORDING", f"{path}: {len(data)} bytes that are no text table")
    rate = _rate(rules, path, head)
    num_samples = sum(1 for _ in _lines(data, rules))
    if not num_samples:
        raise RecordingError("TRUNCATED", f"{path}: no line with samples")
    names = _names(data, rules)
    for column in rules.columns:
        _number(column, names, path)
    starts, lost = _gaps(data, rules, rate, path)
    stops = [*starts[1:], num_samples]
    return Recording(
        path=path,
        channels=tuple(
            Channel(
                index=index,
                label=_label(column, rules, path, head) if column.name is None else column.label or column.name,
                rate=rate,
                unit=column.unit,
                prefilter="",
                num_samples=num_samples,
            )
            for index, column in enumerate(rules.columns)
        ),
        segments=tuple(
            Segment(start=(start + skipped) / rate, duration=(stop - start) / rate)
            for start, stop, skipped in zip(starts, stops, lost, strict=True)
        ),
        layout=dict(layout),
    )


def read_signals(recording: Recording, indices: Sequence[int]) -> list[np.ndarray]:
    """Whole columns as float32 (num_samples,), in the declared unit.

    Raises:
        RecordingError: `SIGNAL_INVALID` for a line without a number where one belongs.
    """
    rules = parse_layout(TextLayout, recording.layout, "text")
    data = _content(recording.path)
    names = _names(data, rules)
    columns = [_number(rules.columns[i], names, recording.path) for i in indices]
    table = _table(data, rules, columns, recording.path)
    return [np.ascontiguousarray(column, dtype=np.float32) for column in table.T]


def parse_layout(model: type[LayoutT], layout: Mapping[str, object], reader: str) -> LayoutT:
    """Layout as its model; the error names the key, the value and the rule."""
    try:
        return model.model_validate(dict(layout))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "(the whole)"
        known = ", ".join(model.model_fields)
        raise ConfigError(
            f"layout.{where} of reader {reader!r}: {first['msg']}, got {first['input']!r}; keys: {known}"
        ) from None


def _rate(rules: TextLayout, path: Path, head: str) -> Fraction:
    declared = rules.rate_by_file.get(path.name, rules.rate_hz)
    found = _first_group(rules.rate_pattern, head, path, "rate") if rules.rate_pattern else None
    try:
        rates = {Fraction(str(rate)) for rate in (declared, found) if rate is not None}
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"layout of {path}: rate {declared!r} / {found!r} is no number in Hz") from None
    if not rates or min(rates) <= 0:
        raise ConfigError(f"layout of {path}: no rate; give rate_hz, rate_by_file or rate_pattern")
    if len(rates) > 1:
        raise RecordingError("HEADER_INVALID", f"{path}: rate {found} Hz in the file, {declared} Hz in the layout")
    return rates.pop()


def _label(column: Column, rules: TextLayout, path: Path, head: str) -> str:
    if column.label is not None:
        return column.label
    if rules.label_pattern is None:
        raise ConfigError(f"layout of {path}: column {column.column} has no label; give it or a label_pattern")
    return _first_group(rules.label_pattern, head, path, "label").strip()


def _first_group(pattern: str, head: str, path: Path, what: str) -> str:
    match = re.search(pattern, head, flags=re.MULTILINE)
    if not match:
        raise RecordingError("HEADER_INVALID", f"{path}: no {what} in its head; expected {pattern!r}")
    return match[1]


def _content_lines(data: bytes, rules: TextLayout) -> Iterator[bytes]:
    """Lines that are neither blank nor a comment."""
    comment = rules.comment.encode() if rules.comment else None
    for line in io.BytesIO(data):
        if line.strip() and not (comment and line.startswith(comment)):
            yield line


def _lines(data: bytes, rules: TextLayout) -> Iterator[bytes]:
    """Lines with samples."""
    return islice(_content_lines(data, rules), rules.header_lines, None)


def _table(data: bytes, rules: TextLayout, columns: Sequence[int], path: Path) -> np.ndarray:
    try:
        return np.loadtxt(
            _lines(data, rules),
            delimiter=_SEPARATORS[rules.separator],
            usecols=columns,
            ndmin=2,
            comments=None,
            encoding="latin-1",
        )
    except ValueError as error:
        raise RecordingError("SIGNAL_INVALID", f"{path}: {error}; expected numbers in columns {columns}") from None


def _gaps(data: bytes, rules: TextLayout, rate: Fraction, path: Path) -> tuple[list[int], list[int]]:
    """First sample of each segment, and how many samples were lost before it in all."""
    if rules.counter is not None:
        column = _number(rules.counter, _names(data, rules), path)
        counts = _table(data, rules, [column], path)[:, 0].astype(np.int64)
        lost = (np.diff(counts) - 1) % rules.counter.modulus
        jumps = np.flatnonzero(lost)
        return [0, *(jumps + 1).tolist()], [0, *np.cumsum(lost[jumps]).tolist()]
    if rules.times is not None:
        column = _number(rules.times, _names(data, rules), path)
        times = _table(data, rules, [column], path)[:, 0] * rules.times.unit_s
        return _pauses(times - times[0], rules.times.gap_s, rate, path)
    return [0], [0]


def _pauses(times: np.ndarray, gap_s: float, rate: Fraction, path: Path) -> tuple[list[int], list[int]]:
    """As `_gaps`, from time stamps in seconds from the first."""
    hz = float(rate)
    starts = [0, *(1 + np.flatnonzero(np.diff(times) > max(gap_s, 2 / hz))).tolist()]
    lost: list[int] = []
    for start, stop in zip(starts, [*starts[1:], len(times)], strict=True):
        elapsed = times[start:stop] - times[start]
        error = np.abs(elapsed - np.arange(stop - start) / hz)
        wrong = np.flatnonzero(~(error <= np.maximum(2 / hz, _RATE_TOLERANCE * elapsed)))
        if wrong.size:
            raise RecordingError(
                "SIGNAL_INVALID",
                f"{path}: time stamp of sample {start + wrong[0]} is {float(error[wrong[0]]):.4g} s off {hz:g} Hz; "
                "the samples are not regular, or the rate is another one",
            )
        lost.append(max(lost[-1] if lost else 0, round(float(times[start]) * hz) - start))
    return starts, lost


def _content(path: Path) -> bytes:
    """Bytes of a file, unpacked where it is gzipped; text does not compress as far as a bomb."""
    data = path.read_bytes()
    if not data.startswith(b"\x1f\x8b"):
        return data
    limit = max(_BOMB_BYTES, _BOMB_RATIO * len(data))
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            text = stream.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise RecordingError("TRUNCATED", f"{path}: damaged gzip file: {error}") from error
    if len(text) > limit:
        raise RecordingError("HEADER_INVALID", f"{path}: {len(data)} bytes unpack to more than {limit}: a bomb")
    return text


def _names(data: bytes, rules: TextLayout) -> list[str]:
    """Names of the columns in the last header line."""
    line = b""
    for found, _ in zip(_content_lines(data, rules), range(rules.header_lines), strict=False):
        line = found
    separator = _SEPARATORS[rules.separator]
    return [name.strip().strip('"') for name in line.decode("utf-8", errors="replace").strip().split(separator)]


def _number(place: _Place, names: Sequence[str], path: Path) -> int:
    """Number of a column."""
    if place.column is not None:
        return place.column
    if names.count(place.name or "") != 1:
        raise RecordingError(
            "HEADER_INVALID", f"{path}: {names.count(place.name or '')} columns {place.name!r}; it has {names}"
        )
    return names.index(place.name or "")
