"""What a corpus is: files, subjects, channels, units, annotations, splits. One YAML each in `corpora/`."""

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from manifests.channels import Unresolved, resolve
from manifests.config import load_shipped
from manifests.errors import ConfigError

CORPORA_DIR = Path(__file__).resolve().parent / "corpora"

ReaderName = Literal[
    "edf",
    "wfdb",
    "text",
    "epochs_mat",
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
SPLITS = ("train", "val", "test")
STAGES = ("W", "N1", "N2", "N3", "R", "?")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SubjectRule(_Strict):
    """How subject, session and run are read from a path, relative to the corpus root, with `/`."""

    pattern: str

    @field_validator("pattern")
    @classmethod
    def _has_subject(cls, value: str) -> str:
        try:
            groups = re.compile(value).groupindex
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        if "subject" not in groups or not set(groups) <= {"subject", "session", "run"}:
            raise ValueError("needs a named group (?P<subject>…); session and run are the other names allowed")
        return value


class AnnotationRule(_Strict):
    """Where labels stand and what they mean.

    Attributes:
        source: `none`; `edf` (annotations in the file); `edf_file` (a second EDF+ file); `wfdb` (an annotation
            file); `header_dx` (the `Dx` comment of a WFDB header); `text_codes` (one code per epoch);
            `filename` (a named group `label` in `pattern`).
        pattern: For `edf_file`, `wfdb` and `text_codes`: path of the second file, relative to the recording's
            folder, with `{stem}` for the recording's stem and `{subject}` for its subject; for `filename`: a
            regular expression with the group `label`.
        map: Raw text to canonical label; null = known and left out. Texts that are not listed are counted.
        epoch_s: Length in seconds of one code of `text_codes`.
        target: `stage` (canonical stages), `classes` (labels of the whole recording), `events` (intervals; a
            window is labelled with the class of the event that covers its start).
    """

    source: Literal["none", "edf", "edf_file", "wfdb", "header_dx", "text_codes", "filename"] = "none"
    pattern: str | None = None
    map: dict[str, str | None] = {}
    epoch_s: Annotated[int, Field(gt=0)] = 30
    target: Literal["stage", "classes", "events"] = "stage"

    @model_validator(mode="after")
    def _is_complete(self) -> "AnnotationRule":
        if self.source in {"edf_file", "wfdb", "text_codes", "filename"} and not self.pattern:
            raise ValueError(f"source {self.source!r} needs a pattern")
        if self.target == "stage":
            unknown = sorted({value for value in self.map.values() if value} - set(STAGES))
            if unknown:
                raise ValueError(f"map: {', '.join(unknown)} not among the stages {', '.join(STAGES)}")
        return self


class SplitRule(_Strict):
    """`hash`: by the salted hash of the subject into fractions; `table`: as published, subject by subject."""

    rule: Literal["hash", "table"] = "hash"
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
    table: dict[str, Literal["train", "val", "test"]] = {}

    @model_validator(mode="after")
    def _adds_up(self) -> "SplitRule":
        if abs(sum(self.fractions) - 1) > 1e-9 or min(self.fractions) < 0:
            raise ValueError(f"fractions {self.fractions}: three shares that add up to 1 are expected")
        if self.rule == "table" and not self.table:
            raise ValueError("rule table needs a table of subject: split")
        return self


class Expected(_Strict):
    """Totals that `kymo scan` checks against."""

    subjects: int | None = None
    recordings: int | None = None
    hours: float | None = None


class Corpus(_Strict):
    """One corpus. `channels` holds exact labels; a null symbol means known and left out on purpose."""

    id: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{1,31}$")]
    title: str
    licence: str
    access: str
    citation: str = ""
    reader: ReaderName
    files: list[str]
    exclude: list[str] = []
    subject: SubjectRule
    subject_group: str | None = None
    channels: dict[str, str | None] = {}
    units: dict[str, str] = {}
    polarity: dict[str, Literal["as_recorded", "suspect", "flipped"]] = {}
    mains_hz: Literal[50, 60] | None = None
    annotations: AnnotationRule = AnnotationRule()
    layout: dict[str, Any] = {}
    split: SplitRule = SplitRule()
    known_bad: dict[str, str] = {}
    expected: Expected = Expected()
    max_unresolved: Annotated[float, Field(ge=0, le=1)] = 1.0

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


def load_corpus(name_or_path: str | Path) -> Corpus:
    """Corpus by the name of a shipped file, or by the path of one's own YAML.

    Raises:
        ConfigError: No such corpus, or a file that breaks the schema.
    """
    return load_shipped(Corpus, CORPORA_DIR, name_or_path, noun="corpus")


def subject_hash(corpus: Corpus, subject: str) -> str:
    """12 hex digits that stand for a subject wherever kymo writes; equal for corpora that share subjects."""
    group = corpus.subject_group or corpus.id
    return hashlib.sha256(f"kymo/1/{group}/{subject}".encode()).hexdigest()[:12]


def split_of(corpus: Corpus, subject: str) -> str:
    """Split of a subject: a pure function of the subject and the corpus rule."""
    if corpus.split.rule == "table":
        if subject not in corpus.split.table:
            raise ConfigError(f"{corpus.id}.yaml: split.table: subject {subject!r} is missing; add it")
        return corpus.split.table[subject]
    position = int(subject_hash(corpus, subject), 16) / 16**12
    train, val, _ = corpus.split.fractions
    return "train" if position < train else "val" if position < train + val else "test"
