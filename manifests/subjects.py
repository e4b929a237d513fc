"""Whose a recording is and which split it falls into: rules of a corpus file, and the tables beside the recordings."""

import csv
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from manifests.errors import ConfigError

Split = Literal["train", "val", "test", "unused"]
SPLITS = ("train", "val", "test")
UNUSED = "unused"
"""Split of a recording that a published split leaves out."""

_GROUPS = {"subject", "session", "run"}
_NUMBER = re.compile(r"0*(\d+)(?:\.0+)?")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Who:
    """Whose a recording is, unhashed.

    >>> who_of(load_corpus("cfs"), "cfs-visit5-800002.edf", root)
    Who(subject='800002', session='', family='1')

    Attributes:
        subject: The person, the same over nights, visits and records.
        session: Session of the path, empty for none.
        family: Family of the person where the corpus records families; a family stays in one split.
    """

    subject: str
    session: str = ""
    family: str = ""


class _Lookup(_Strict):
    """A row of a CSV file of the corpus.

    Attributes:
        file: Path or glob of one file relative to the corpus root; tab-separated where it ends in `.tsv`.
        key: Column that names the recording. Numbers compare by value: `00012` and `12.0` are one key.
        match: What is looked up in it, from the groups of `subject.pattern`.
    """

    file: str
    key: str
    match: str = "{subject}"

    @field_validator("match")
    @classmethod
    def _names_groups(cls, value: str) -> str:
        try:
            value.format_map(dict.fromkeys(_GROUPS, ""))
        except (KeyError, ValueError, IndexError) as error:
            raise ValueError(f"{value!r}: {error}; known: {', '.join(sorted(_GROUPS))}") from None
        return value


class PersonTable(_Lookup):
    """Who is who, where paths name records or exams.

    Attributes:
        person: Column with the person; null = the subject of the path is the person.
        family: Column with the family; blank cells are persons without one.
    """

    person: str | None = None
    family: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "PersonTable":
        if self.person is None and self.family is None:
            raise ValueError("names neither a column person nor a column family")
        return self


class SubjectRule(_Strict):
    """How a recording's subject is found.

    Attributes:
        pattern: Regular expression for the path relative to the corpus root, with `/`. The group `subject` is
            required; `session` and `run` are the other names allowed.
        persons: Subject of the path to person, where one person has several (`chb21: chb01`).
        table: File of the corpus that says who is who.
    """

    pattern: str
    persons: dict[str, str] = {}
    table: PersonTable | None = None

    @field_validator("pattern")
    @classmethod
    def _has_subject(cls, value: str) -> str:
        groups = _compiled_groups(value)
        if "subject" not in groups or not groups <= _GROUPS:
            raise ValueError("needs a named group (?P<subject>…); session and run are the other names allowed")
        return value

    @field_validator("persons")
    @classmethod
    def _one_step(cls, value: dict[str, str]) -> dict[str, str]:
        chains = sorted(person for person in value.values() if person in value)
        if chains:
            raise ValueError(f"{', '.join(chains)} is a person and is mapped to another one; name the last person")
        return value


class SplitColumn(_Lookup):
    """`column` of a split: the cell's column beside the row's address."""

    column: str


class SplitRule(_Strict):
    """Which split a recording falls into.

    Attributes:
        rule: `hash` (of family or person, into `fractions`); `table` (person by person); `path` (the group `split`
            of `pattern`, translated by `map`); `column` (a cell of a CSV file of the corpus, translated by `map`);
            `trials` (by the place of a trial among the events of its recording; for splits that put every person
            on all sides by design).
        fractions: Shares of train, val and test.
        table: Split of every person.
        pattern: Regular expression with the group `split`, for the path relative to the corpus root.
        column: Where the cell stands.
        map: Text to split; `hash` = by the hash of the person; null = the published split leaves these recordings out.
        trials: Split of the first, second, … trial of a recording; a window between or across trials is unused.
        runs: Runs, as paths write them, that a published split takes; the others are unused. Empty = all.
        val_share: Share of the persons in train that become val, by hash; for splits published without a val.
        source: Where the split comes from.
    """

    rule: Literal["hash", "table", "path", "column", "trials"] = "hash"
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
    table: dict[str, Split] = {}
    pattern: str | None = None
    column: SplitColumn | None = None
    map: dict[str, Split | Literal["hash"] | None] = {}
    trials: tuple[Split, ...] = ()
    runs: tuple[str, ...] = ()
    val_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    source: str = ""

    @field_validator("pattern")
    @classmethod
    def _has_split(cls, value: str | None) -> str | None:
        if value is not None and _compiled_groups(value) != {"split"}:
            raise ValueError("needs the named group (?P<split>…) and no other")
        return value

    @model_validator(mode="after")
    def _is_complete(self) -> "SplitRule":
        if abs(sum(self.fractions) - 1) > 1e-9 or min(self.fractions) < 0:
            raise ValueError(f"fractions {self.fractions}: three shares that add up to 1 are expected")
        if self.rule == "table" and not self.table:
            raise ValueError("rule table needs a table of subject: split")
        if self.rule == "path" and not (self.pattern and self.map):
            raise ValueError("rule path needs a pattern with the group split, and a map")
        if (self.rule == "trials") != bool(self.trials):
            raise ValueError("rule trials and the list trials go together")
        if self.rule == "column" and not (self.column and self.map):
            raise ValueError("rule column needs column (file, key, column) and a map")
        return self


def _compiled_groups(pattern: str) -> set[str]:
    try:
        return set(re.compile(pattern).groupindex)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None


def path_groups(rule: SubjectRule, path: str, *, where: str) -> dict[str, str]:
    """Subject, session and run as they stand in a path; groups that took no part are empty.

    Raises:
        ConfigError: The pattern does not match, so that the recording would belong to nobody.
    """
    match = re.search(rule.pattern, path)
    if match is None:
        raise ConfigError(
            f"{where}: subject.pattern '{rule.pattern}' does not match {path!r}; widen the pattern or exclude the file"
        )
    return match.groupdict("")


def is_somebodys(rule: SubjectRule, path: str) -> bool:
    """Whether the pattern finds a subject in a path relative to the corpus root."""
    return re.search(rule.pattern, path) is not None


def find_who(rule: SubjectRule, path: str, root: Path | None, *, where: str) -> Who:
    """Person, session and family of a path relative to the corpus root.

    Raises:
        ConfigError: No subject in the path, or a table that is missing or does not know it.
    """
    groups = path_groups(rule, path, where=where)
    subject = rule.persons.get(groups["subject"], groups["subject"])
    family = ""
    if rule.table is not None:
        table = rule.table
        columns = tuple(name for name in (table.person, table.family) if name is not None)
        row = look_up(table, groups, root, columns, where=f"{where}: subject.table")
        subject = row[table.person] if table.person is not None else subject
        family = row[table.family] if table.family is not None else ""
    if not subject:
        raise ConfigError(f"{where}: {path!r} has an empty subject; fix subject.pattern or its table")
    return Who(subject=subject, session=groups.get("session", ""), family=family)


def look_up(
    lookup: _Lookup, groups: Mapping[str, str], root: Path | None, columns: tuple[str, ...], *, where: str
) -> dict[str, str]:
    """Cells of the row that a recording belongs to, by column; whole numbers in their shortest form.

    Raises:
        ConfigError: No root, no file, no such column, or no row with that key.
    """
    if root is None:
        raise ConfigError(f"{where}: {lookup.file} lies under the corpus root; give the root")
    found = sorted(root.glob(lookup.file))
    if len(found) != 1:
        raise ConfigError(f"{where}: {len(found)} files match {lookup.file} under {root}; put the corpus' table there")
    key = _plain(lookup.match.format_map(groups))
    stat = found[0].stat()
    rows = _read_table(found[0], (stat.st_mtime_ns, stat.st_size), lookup.key, columns)
    if key not in rows:
        raise ConfigError(f"{where}: {found[0]}: no row with {lookup.key} {key!r}; complete the table")
    return dict(zip(columns, rows[key], strict=True))


@functools.lru_cache(maxsize=16)
def _read_table(path: Path, _stamp: tuple[int, int], key: str, columns: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    rows: dict[str, tuple[str, ...]] = {}
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
        missing = sorted({key, *columns} - set(reader.fieldnames or ()))
        if missing:
            raise ConfigError(f"{path}: no column {', '.join(missing)}; it has {', '.join(reader.fieldnames or ())}")
        for row in reader:
            name, cells = _plain(row[key] or ""), tuple(_plain(row[column] or "") for column in columns)
            if rows.setdefault(name, cells) != cells:
                raise ConfigError(f"{path}: {key} {name!r} stands twice with different {', '.join(columns)}; keep one")
    return rows


def _plain(text: str) -> str:
    """A cell without outer blanks; pandas writes whole numbers as `15709.0`, file names pad them as `00001`."""
    text = text.strip()
    match = _NUMBER.fullmatch(text)
    return match[1] if match else text
