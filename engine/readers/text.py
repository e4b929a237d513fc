"""Recordings in plain text whose columns a corpus file declares, such as DREAMS excerpts or OpenBCI exports."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.recording import Channel, Recording, Segment
from manifests.errors import ConfigError, RecordingError

_SEPARATORS = {"whitespace": None, "comma": ",", "tab": "\t", "semicolon": ";"}
_HEAD_BYTES = 1 << 16

LayoutT = TypeVar("LayoutT", bound=BaseModel)


class Column(BaseModel):
    """One channel of a text file; a null label is read from the file by `label_pattern`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    column: Annotated[int, Field(ge=0)]
    label: str | None = None
    unit: str = ""


class Counter(BaseModel):
    """A column that counts samples and starts again at `modulus`; a jump in it is a gap."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    column: Annotated[int, Field(ge=0)]
    modulus: Annotated[int, Field(gt=1)]


class TextLayout(BaseModel):
    r"""`layout` of a corpus with `reader: text`.

    Attributes:
        columns: The channels; other columns are not read.
        separator: What stands between columns.
        header_lines: Lines before the first sample, comment lines not counted.
        comment: Start of lines to pass over; null: none.
        rate_hz: Sampling rate in Hz, `250` or `"1000/3"`.
        rate_by_file: Rates of files that differ, by file name.
        rate_pattern: Regular expression whose first group is the rate in the file's head; it must agree.
        label_pattern: Regular expression whose first group is the label of columns without one.
        counter: A sample counter, where the device writes one.
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


def read_header(path: Path, layout: Mapping[str, object]) -> Recording:
    """Declared channels and the length of a text file; the numbers themselves are not read.

    With a `counter` that column is read, and each jump in it ends a segment.

    Raises:
        ConfigError: The layout breaks its schema, or gives no rate for this file.
        RecordingError: `NOT_A_RECORDING`, `HEADER_INVALID`, `TRUNCATED` or `SIGNAL_INVALID`.
    """
    rules = parse_layout(TextLayout, layout, "text")
    data = path.read_bytes()
    head = data[:_HEAD_BYTES].decode("latin-1")
    if "\0" in head or not head.strip() or "git-lfs" in head[:200]:
        raise RecordingError("NOT_A_RECORDING", f"{path}: {len(data)} bytes that are no text table")
    rate = _rate(rules, path, head)
    num_samples = sum(1 for _ in _lines(data, rules))
    if not num_samples:
        raise RecordingError("TRUNCATED", f"{path}: no line with samples")
    starts, lost = _gaps(data, rules, path) if rules.counter else ([0], [0])
    stops = [*starts[1:], num_samples]
    return Recording(
        path=path,
        channels=tuple(
            Channel(
                index=index,
                label=_label(column, rules, path, head),
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
    table = _table(recording.path.read_bytes(), rules, [rules.columns[i].column for i in indices], recording.path)
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


def _lines(data: bytes, rules: TextLayout) -> Iterator[bytes]:
    """Lines with samples."""
    left = rules.header_lines
    comment = rules.comment.encode() if rules.comment else None
    for line in io.BytesIO(data):
        if not line.strip() or (comment and line.startswith(comment)):
            continue
        if left:
            left -= 1
            continue
        yield line


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


def _gaps(data: bytes, rules: TextLayout, path: Path) -> tuple[list[int], list[int]]:
    """First sample of each segment, and how many samples were lost before it in all."""
    if rules.counter is None:
        return [0], [0]
    counts = _table(data, rules, [rules.counter.column], path)[:, 0].astype(np.int64)
    lost = (np.diff(counts) - 1) % rules.counter.modulus
    jumps = np.flatnonzero(lost)
    return [0, *(jumps + 1).tolist()], [0, *np.cumsum(lost[jumps]).tolist()]
