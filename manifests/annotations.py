"""Where a corpus keeps its labels and what they mean: sources, columns of tables, the map to canonical words."""

import codecs
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

STAGES = ("W", "N1", "N2", "N3", "R", "?")
"""Sleep stages of AASM, and `?` for unscored. Scorings by R&K map their stages 3 and 4 to N3, movement time to `?`."""

SourceName = Literal[
    "none",
    "in_file",
    "edf",
    "edf_file",
    "wfdb",
    "header_dx",
    "text_codes",
    "filename",
    "nsrr_xml",
    "table",
    "bids_events",
    "table_file",
    "intervals",
]
FILE_SOURCES = ("edf_file", "wfdb", "text_codes", "nsrr_xml", "table", "bids_events")
"""Sources that are a file of their own beside the recording."""

_NEED_PATTERN = ("edf_file", "wfdb", "text_codes", "nsrr_xml", "table", "filename")
_PLACES: tuple[str, ...] = ("stem", "name", "member", "subject", "session", "run")

Column = str | Annotated[int, Field(gt=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TableRule(_Strict):
    """Columns of a delimited text file, one label a row.

    A column is its name in the header line, the beginning of that name (`Time` for `Time [hh:mm:ss]`), or its
    number from 1. Rows that say the same interval and text for several channels count once.

    Attributes:
        onset: Column with the beginning.
        text: Column with the label.
        duration: Column with the length; in seconds, but in samples or epochs where `unit` says so.
        end: Column with the end, in place of a duration. With neither, `lasts` of the rule decides.
        unit: Of onset and end: `seconds` from the recording's start; `samples` of its first channel; `clock`
            (`22:31:05`, a date before it is not read; the nearest to the row before, so that midnight is passed);
            `epochs` of `epoch_s` seconds.
        first_epoch: Number of the first epoch.
        keep: Column to the cells that are kept, for a file with several scorers or kinds of rows.
        separator: One character, or null for any run of blanks.
        header: Whether the first line names the columns, or how the line begins that does and has a preamble before it.
        skip_lines: Lines before anything else.
        comment: How lines begin that are left out.
        decimal: Sign before the fraction.
        encoding: As Python names it.
    """

    onset: Column
    text: Column
    duration: Column | None = None
    end: Column | None = None
    unit: Literal["seconds", "samples", "clock", "epochs"] = "seconds"
    first_epoch: int = 1
    keep: dict[str, list[str]] = {}
    separator: Annotated[str, Field(min_length=1, max_length=1)] | None = ","
    header: bool | str = True
    skip_lines: Annotated[int, Field(ge=0)] = 0
    comment: str | None = None
    decimal: Literal[".", ","] = "."
    encoding: str = "utf-8-sig"

    @field_validator("encoding")
    @classmethod
    def _is_known(cls, value: str) -> str:
        try:
            codecs.lookup(value)
        except LookupError:
            raise ValueError(f"{value!r} is no encoding that Python knows") from None
        return value

    @model_validator(mode="after")
    def _is_consistent(self) -> "TableRule":
        if self.duration is not None and self.end is not None:
            raise ValueError("duration and end are both given; keep one")
        named = [column for column in (self.onset, self.text, self.duration, self.end) if isinstance(column, str)]
        if self.header is False and (named or self.keep):
            raise ValueError(f"columns {', '.join([*named, *self.keep])} by name, but header is false; give numbers")
        if self.decimal == self.separator:
            raise ValueError(f"separator and decimal are both {self.decimal!r}")
        return self


class LabelTable(_Strict):
    """A CSV of the whole corpus with one row per recording.

    Attributes:
        file: Path or glob, relative to the recording's folder or to any folder above it; tab-separated for `.tsv`.
        key: Column that names the recording. Whole numbers compare by value: `00012` and `12.0` are one key.
        match: What is looked up in it: `{stem}`, `{name}`, `{member}` (of a file with several recordings), and the
            groups of `subject.pattern`.
        columns: Columns that hold labels.
        form: `text` (a cell is a label; blank for none); `dict` (a Python dict of label to likelihood, as PTB-XL's
            `scp_codes`); `flags` (a column is a label, its cell true or false).
        threshold: Least likelihood of form `dict`. PTB-XL writes 0 for "not known", so 0 keeps all.
    """

    file: str
    key: str
    match: str = "{stem}"
    columns: Annotated[list[str], Field(min_length=1)]
    form: Literal["text", "dict", "flags"] = "text"
    threshold: float = 0.0

    @field_validator("match")
    @classmethod
    def _names_places(cls, value: str) -> str:
        return _with_places(value)


class AnnotationRule(_Strict):
    """Where labels stand and what they mean.

    Attributes:
        source: `none`; `in_file` (what the recording's own file holds; `edf` is its older name); `edf_file` (a second
            EDF+ file); `wfdb` (an annotation file); `header_dx` (the `Dx` comment of a WFDB header); `text_codes`
            (one code per epoch); `filename` (a named group `label` in `pattern`); `nsrr_xml` (an XML scoring of
            Compumedics Profusion or of NSRR); `table` (a delimited text file); `bids_events` (`*_events.tsv`);
            `table_file` (one row per recording in a table of the corpus); `intervals` (they stand in the corpus file,
            because no file of the corpus has them).
        pattern: For sources that are a file: its path or glob relative to the recording's folder, `{stem}` for the
            recording's stem, `{subject}`, `{session}` and `{run}` for the groups of `subject.pattern` as the path
            writes them. `bids_events` finds its file by the BIDS name where there is no pattern. For `filename`: a
            regular expression with the group `label`, for the path; its last match counts.
        map: Raw text to canonical label; null = known and left out. A key that ends in `*` stands for every text
            that begins so; an exact key goes first. Texts that are not listed are counted.
        epoch_s: Length in seconds of an epoch of the scoring.
        lasts: How long a label lasts that states no duration: `epoch` (a stage; an event is an instant), or `next`
            (up to the next text that the map lists, be it to leave it out; the last to the end of the recording).
        target: `stage` (canonical stages), `classes` (labels of the whole recording), `events` (intervals; a
            window is labelled with the class of the event that covers its anchor, see `Recipe`).
        otherwise: Canonical label of the recorded time that no event covers, for corpora whose scorers marked all that
            there was; null = nobody looked, such time has no label.
        required: False = a recording that has no label file, or no row, is converted without labels.
        table: Columns of source `table`.
        labels: Table of source `table_file`.
        intervals: For source `intervals`: (onset, end, text) in seconds, by the session of the path.
    """

    source: SourceName = "none"
    pattern: str | None = None
    map: dict[str, str | None] = {}
    epoch_s: Annotated[int, Field(gt=0)] = 30
    lasts: Literal["epoch", "next"] = "epoch"
    target: Literal["stage", "classes", "events"] = "stage"
    otherwise: Annotated[str, Field(min_length=1)] | None = None
    required: bool = True
    table: TableRule | None = None
    labels: LabelTable | None = None
    intervals: dict[str, list[tuple[float, float, str]]] = {}

    @model_validator(mode="after")
    def _is_complete(self) -> "AnnotationRule":
        if self.source in _NEED_PATTERN and not self.pattern:
            raise ValueError(f"source {self.source!r} needs a pattern")
        if self.source in FILE_SOURCES and self.pattern:
            _with_places(self.pattern)
        for name, source, block in (("table", "table", self.table), ("labels", "table_file", self.labels)):
            if (self.source == source) != (block is not None):
                raise ValueError(f"block {name!r} and source {source!r} go together; source is {self.source!r}")
        if (self.source == "intervals") != bool(self.intervals):
            raise ValueError(f"block 'intervals' and source 'intervals' go together; source is {self.source!r}")
        if any(end <= onset for listed in self.intervals.values() for onset, end, _ in listed):
            raise ValueError("intervals: an end does not lie behind its onset")
        if self.source == "table_file" and self.target == "events":
            raise ValueError("source 'table_file' has labels of whole recordings; target 'events' needs their times")
        if self.otherwise is not None and self.target != "events":
            raise ValueError(f"otherwise is the label of time without events; target is {self.target!r}")
        if self.target == "stage":
            unknown = sorted({value for value in self.map.values() if value} - set(STAGES))
            if unknown:
                raise ValueError(f"map: {', '.join(unknown)} not among the stages {', '.join(STAGES)}")
        return self

    def lists(self, text: str) -> bool:
        """Whether the map knows a text, be it to leave it out."""
        return self._key(text) is not None

    def canonical(self, text: str) -> str | None:
        """Canonical label of a raw text; None for one that is left out or not listed."""
        key = self._key(text)
        return None if key is None else self.map[key]

    def _key(self, text: str) -> str | None:
        if text in self.map:
            return text
        prefixes = [key for key in self.map if key.endswith("*") and text.startswith(key[:-1])]
        return max(prefixes, key=len, default=None)


def _with_places(template: str) -> str:
    try:
        template.format_map(dict.fromkeys(_PLACES, ""))
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"{template!r}: {error}; known: {', '.join(_PLACES)}") from None
    return template


def rules_of(annotations: AnnotationRule | tuple[AnnotationRule, ...]) -> tuple[AnnotationRule, ...]:
    """Rules of a corpus file, which writes one rule or a list of them."""
    return annotations if isinstance(annotations, tuple) else (annotations,)


def check_rules(
    annotations: AnnotationRule | tuple[AnnotationRule, ...],
) -> AnnotationRule | tuple[AnnotationRule, ...]:
    """The same rules.

    Raises:
        ValueError: Two rules for stages, whose scorings would contradict each other.
    """
    if sum(rule.target == "stage" and rule.source != "none" for rule in rules_of(annotations)) > 1:
        raise ValueError("two rules with target stage; a recording has one hypnogram: choose the scorer")
    return annotations
