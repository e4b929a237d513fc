"""What a corpus is: files, subjects, channels, units, annotations, splits. One YAML each in `corpora/`."""

import hashlib
import hmac
import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from manifests.annotations import AnnotationRule, check_rules, rules_of
from manifests.channels import Unresolved, resolve
from manifests.config import load_shipped
from manifests.errors import ConfigError
from manifests.subjects import UNUSED, SplitRule, SubjectRule, Who, find_who, look_up, path_groups

CORPORA_DIR = Path(__file__).resolve().parent / "corpora"

ReaderName = Literal[
    "edf",
    "wfdb",
    "text",
    "brainvision",
    "eeglab",
    "fif",
    "gdf",
    "egi",
    "cnt",
    "ant",
    "nihon",
    "persyst",
    "xdf",
    "arrays",
    "dicom",
]


# A change of these converts nothing again. Which recordings there are, and which are known bad, a plan knows by itself.
_NOT_DECISIVE = {
    *("title", "licence", "access", "access_kind", "homepage", "fetch", "citation", "files", "exclude", "overlaps"),
    *("inherit", "published", "known_bad", "expected"),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Expected(_Strict):
    """Totals that `kymo scan` checks against."""

    subjects: int | None = None
    recordings: int | None = None
    hours: float | None = None


class FetchRule(_Strict):
    """Where an openly licensed corpus is downloaded from.

    Attributes:
        base_url: Folder on the server, ending in `/`.
        checksums: File below it with a line `sha256  path` for every file; null = `files` lists them.
        files: Path to `sha256:…` or `md5:…`, where the server has no list.
    """

    base_url: Annotated[str, Field(pattern=r"^https?://.+/$")]
    checksums: str | None = "SHA256SUMS.txt"
    files: dict[str, Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64}|md5:[0-9a-f]{32})$")]] = {}

    @model_validator(mode="after")
    def _names_files(self) -> "FetchRule":
        if self.checksums is None and not self.files:
            raise ValueError("names neither checksums nor files; nothing could be checked")
        return self


class Overlap(_Strict):
    """What a corpus has in common with another one.

    Attributes:
        relation: This corpus is a `subset` or `superset` of the other, holds the `same` recordings, or `shares` some.
        persons: `linked` where both name a person alike and share `subject_group`, so that hash and split agree;
            `unlinked` where the same persons have names that nobody can join. Such corpora do not go into one snapshot.
        note: What is shared.
    """

    relation: Literal["subset", "superset", "same", "shares"]
    persons: Literal["linked", "unlinked"]
    note: str = ""


class Corpus(_Strict):
    """One corpus.

    Attributes:
        access: How to get it, with the terms in words.
        access_kind: `open` (download), `registered` (an account and a click), `agreement` (a signed form or DUA).
        readers: Readers by suffix, for a corpus of several formats; `reader` reads the rest.
        subject_group: Salt of the subject's hash; corpora that share persons share it.
        inherit: Keys taken from another corpus file, own entries on top; one fact then stands in one file.
        channels: Exact labels and their symbols; null = known and left out on purpose.
        mains_hz: Line frequency; null where it is not known or not the same everywhere.
        annotations: Where labels stand: one rule, or a list for stages from one file and events from another.
        split: Strict split: a person, and a family, is in one part only.
        published: Splits of the literature by name, the official one first. They may leak; the file says where.
        known_bad: Path, or its end with `*` for any text, and why the recording is left out.
        max_unresolved: Share of channels with unknown labels above which a recording is refused.
        salt: Secret of the lab, set from a conversion's `salt_file` and never in a corpus file; no dump shows it.
    """

    id: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{1,31}$")]
    title: str
    licence: str
    access: str
    access_kind: Literal["open", "registered", "agreement"] = "open"
    homepage: str = ""
    fetch: FetchRule | None = None
    citation: str = ""
    reader: ReaderName
    readers: dict[Annotated[str, Field(pattern=r"^\.[a-z0-9.]+$")], ReaderName] = {}
    files: list[str]
    exclude: list[str] = []
    subject: SubjectRule
    subject_group: str | None = None
    overlaps: dict[str, Overlap] = {}
    inherit: dict[Literal["channels", "polarity", "annotations", "published"], str] = {}
    channels: dict[str, str | None] = {}
    units: dict[str, str] = {}
    polarity: dict[str, Literal["as_recorded", "suspect", "flipped"]] = {}
    mains_hz: Literal[50, 60] | None = None
    annotations: AnnotationRule | tuple[AnnotationRule, ...] = AnnotationRule()
    layout: dict[str, Any] = {}
    split: SplitRule = SplitRule()
    published: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], SplitRule] = {}
    known_bad: dict[str, str] = {}
    expected: Expected = Expected()
    max_unresolved: Annotated[float, Field(ge=0, le=1)] = 1.0
    salt: Annotated[bytes, Field(exclude=True, repr=False)] = b""

    @field_validator("channels")
    @classmethod
    def _symbols(cls, value: dict[str, str | None]) -> dict[str, str | None]:
        for label, symbol in value.items():
            if symbol is None:
                continue
            tag = resolve(symbol)
            if isinstance(tag, Unresolved) or tag.rule != "parser:symbol":
                raise ValueError(
                    f"{label!r}: {symbol!r} is no UCS symbol; write kind:site or kind:anode-cathode with sites of "
                    "manifests/channels.yaml, e.g. eeg:C3-M2"
                )
        return value

    @field_validator("annotations")
    @classmethod
    def _one_hypnogram(
        cls, value: AnnotationRule | tuple[AnnotationRule, ...]
    ) -> AnnotationRule | tuple[AnnotationRule, ...]:
        return check_rules(value)

    @model_validator(mode="after")
    def _fits_together(self) -> "Corpus":
        if reserved := {"strict", "published"} & set(self.published):
            raise ValueError(f"published: {', '.join(reserved)} is the name of a choice; call the split by its source")
        if self.fetch and self.access_kind != "open":
            raise ValueError(f"fetch: access is {self.access_kind}; only an open corpus is downloaded")
        linked = sorted(other for other, overlap in self.overlaps.items() if overlap.persons == "linked")
        if linked and not self.subject_group:
            raise ValueError(f"overlaps: persons linked with {', '.join(linked)} need a subject_group")
        return self

    @property
    def annotation_rules(self) -> tuple[AnnotationRule, ...]:
        """Rules of `annotations`, one or several."""
        return rules_of(self.annotations)

    @property
    def side_files(self) -> tuple[str, ...]:
        """Globs under the root of the tables that persons, splits and labels are looked up in."""
        lookups = (self.subject.table, self.split.column, *(rule.labels for rule in self.annotation_rules))
        return tuple(sorted({lookup.file for lookup in lookups if lookup is not None}))

    def decisive(self) -> dict[str, Any]:
        """What of this file decides the samples of a recording, as plain data: not its terms, totals and globs."""
        return self.model_dump(mode="json", exclude=_NOT_DECISIVE)

    def reader_of(self, path: str | Path) -> ReaderName:
        """Reader of one recording, by the suffix of its file."""
        name = str(path).partition("#")[0].lower()
        suffixes = [suffix for suffix in self.readers if name.endswith(suffix)]
        return self.readers[max(suffixes, key=len)] if suffixes else self.reader

    def bad_reason(self, path: str) -> str | None:
        """Why a recording is left out, None for a good one; the path is relative to the root, with `/`."""
        return next((why for key, why in self.known_bad.items() if PurePosixPath(path).match(key)), None)

    def with_split(self, name: str) -> "Corpus":
        """This corpus under another split: `strict`, `published` (the official one), or a name of `published`.

        Raises:
            ConfigError: No published split of that name.
        """
        found = self.split_name(name)
        return self if found == "strict" else self.model_copy(update={"split": self.published[found]})

    def split_name(self, name: str) -> str:
        """Name of a split where `published` stands for the official one.

        Raises:
            ConfigError: No published split of that name.
        """
        found = next(iter(self.published), name) if name == "published" else name
        if found != "strict" and found not in self.published:
            known = ", ".join(["strict", *self.published])
            raise ConfigError(f"{self.id}: split {name!r}: not in its corpus file; known: {known}")
        return found


def load_corpus(name_or_path: str | Path) -> Corpus:
    """Corpus by the name of a shipped file, or by the path of one's own YAML.

    Raises:
        ConfigError: No such corpus, or a file that breaks the schema.
    """
    corpus = load_shipped(Corpus, CORPORA_DIR, name_or_path, noun="corpus")
    if corpus.salt:
        raise ConfigError(f"{corpus.id}.yaml: salt: a secret does not belong into a corpus file; use salt_file")
    inherited: dict[str, Any] = {}
    for key, name in corpus.inherit.items():
        theirs, ours = getattr(load_corpus(name), key), getattr(corpus, key)
        inherited[key] = {**theirs, **ours} if isinstance(theirs, dict) else theirs
    return corpus.model_copy(update=inherited)


def subject_hash(corpus: Corpus, subject: str) -> str:
    """12 hex digits that stand for a subject wherever kymo writes; equal for corpora that share subjects."""
    return pseudonym(corpus, f"{corpus.subject_group or corpus.id}/{subject}")


def pseudonym(corpus: Corpus, text: str) -> str:
    """12 hex digits that stand for a text: a hash that all the world can compute, or with `salt` an HMAC-SHA256.

    The public hash hides a name from reading and not from guessing: whoever knows the names can try them all.
    """
    content = f"kymo/1/{text}".encode()
    whole = hmac.digest(corpus.salt, content, "sha256") if corpus.salt else hashlib.sha256(content).digest()
    return whole.hex()[:12]


def who_of(corpus: Corpus, path: str, root: Path | None = None) -> Who:
    """Person, session and family of a recording by its path relative to the root, unhashed.

    Raises:
        ConfigError: A path that belongs to nobody, or a table that is missing or does not know it.
    """
    return find_who(corpus.subject, path, root, where=f"{corpus.id}.yaml")


def split_of(corpus: Corpus, subject: str, *, family: str = "") -> str:
    """Split of a person by the rules `hash` and `table`: a pure function of person, family and rule.

    Raises:
        ConfigError: A table without this person, or a rule that needs the recording (`recording_split`).
    """
    rule = corpus.split
    match rule.rule:
        case "hash":
            return _by_hash(corpus, subject, family)
        case "table":
            if subject not in rule.table:
                raise ConfigError(f"{corpus.id}.yaml: split.table: subject {subject!r} is missing; add it")
            return rule.table[subject]
        case _:
            raise ConfigError(f"{corpus.id}.yaml: split by {rule.rule} needs the path of a recording")


def recording_split(corpus: Corpus, path: str, root: Path | None = None) -> str:
    """Split of a recording (`train`, `val`, `test`, or `unused`) by its path relative to the root.

    `unused` where trials of the recording have splits of their own.

    Raises:
        ConfigError: The corpus' rules do not know the recording.
    """
    who = who_of(corpus, path, root)
    rule, where = corpus.split, f"{corpus.id}.yaml: split"
    if rule.runs and path_groups(corpus.subject, path, where=where).get("run") not in rule.runs:
        return UNUSED
    if rule.rule == "path":
        match = re.search(rule.pattern or "", path)
        text = match["split"] if match else None
    elif rule.rule == "column" and rule.column is not None:
        groups = path_groups(corpus.subject, path, where=f"{corpus.id}.yaml")
        text = look_up(rule.column, groups, root, (rule.column.column,), where=where)[rule.column.column]
    else:
        return UNUSED if rule.rule == "trials" else split_of(corpus, who.subject, family=who.family)
    if text is None or text not in rule.map:
        raise ConfigError(f"{where}: {text!r} of {path!r} is not in the map; add it, or null for unused")
    split = rule.map[text] or UNUSED
    if split == "hash":
        return _by_hash(corpus, who.subject, who.family)
    is_held_out = split == "train" and _position(corpus, who.subject) < rule.val_share
    return "val" if is_held_out else split


def _by_hash(corpus: Corpus, subject: str, family: str) -> str:
    train, val, _ = corpus.split.fractions
    position = _position(corpus, f"family/{family}" if family else subject)
    return "train" if position < train else "val" if position < train + val else "test"


def _position(corpus: Corpus, name: str) -> float:
    """Place of a person or family in [0, 1)."""
    return int(subject_hash(corpus, name), 16) / 16**12
