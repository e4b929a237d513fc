"""Labels of a recording in canonical words, from wherever its corpus keeps them."""

import ast
import logging
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

from engine import annotation_files, annotation_tables
from engine.label_files import label_file, label_row
from engine.recording import Annotation, Recording
from engine.scoring import Scoring, score
from manifests.annotations import AnnotationRule
from manifests.corpora import Corpus
from manifests.errors import RecordingError
from manifests.subjects import path_groups

logger = logging.getLogger(__name__)

_AT_START = Fraction(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """Labels of a recording.

    >>> read_labels(recording, corpus).stages
    (Annotation(onset=Fraction(0, 1), duration=Fraction(30630, 1), text='W'), ...)

    Attributes:
        stages: Sleep stages `W N1 N2 N3 R ?` in time order, whole epochs without overlap.
        events: Intervals of events in time order; an event without a duration is an instant.
        classes: Labels of the recording as a whole, each once.
        unmapped: How often each text came up that the corpus file does not list.
        missing: Sources that the recording has nothing of, where the corpus file does not require it.
        scoring: How much of the recording has a stage; None without a rule for stages.
    """

    stages: tuple[Annotation, ...] = ()
    events: tuple[Annotation, ...] = ()
    classes: tuple[str, ...] = ()
    unmapped: dict[str, int] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    scoring: Scoring | None = None
    _longest: dict[str, Fraction] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Keep the longest interval's duration, which bounds how far a look-up by time goes back."""
        longest = {
            name: max((found.duration for found in intervals), default=Fraction(0))
            for name, intervals in (("stages", self.stages), ("events", self.events))
        }
        object.__setattr__(self, "_longest", longest)

    def record(self) -> dict[str, float]:
        """What is scored and what is not in s, and the number of sources that a recording may lack and does."""
        scored = self.scoring.record() if self.scoring else {}
        return {**scored, "missing": len(self.missing)} if self.missing else scored

    def stage_at(self, start: Fraction, epoch_s: int) -> str:
        """Stage that fills most of an epoch, the earlier of equals; `?` where none fills half of it."""
        shares: dict[str, Fraction] = {}
        for found in self._overlapping("stages", start, start + epoch_s):
            inside = min(start + epoch_s, found.onset + found.duration) - max(start, found.onset)
            shares[found.text] = shares.get(found.text, Fraction(0)) + inside
        best = max(shares, key=lambda text: shares[text], default="?")
        return best if shares and 2 * shares[best] >= epoch_s else "?"

    def events_in(
        self, start: Fraction, window_s: int, anchor_s: Fraction = _AT_START
    ) -> tuple[list[tuple[Fraction, Fraction, str]], list[str]]:
        """Events of a window as (onset from its start, duration, text) in seconds, cut at its edges.

        The second item has the texts of the events that cover the window's anchor, `anchor_s` behind its start.
        """
        anchor = start + anchor_s
        found = self._overlapping("events", start, start + window_s)
        inside = [
            (
                max(event.onset - start, Fraction(0)),
                min(event.onset + event.duration, start + window_s) - max(event.onset, start),
                event.text,
            )
            for event in found
        ]
        covering = [event.text for event in found if event.onset <= anchor < event.onset + event.duration]
        return inside, covering

    def _overlapping(self, name: Literal["stages", "events"], start: Fraction, stop: Fraction) -> list[Annotation]:
        """Those that reach into [start, stop); an instant counts where it lies inside."""
        intervals = self.stages if name == "stages" else self.events
        first = bisect_left(intervals, start - self._longest[name], key=lambda found: found.onset)
        last = bisect_left(intervals, stop, key=lambda found: found.onset)
        return [
            found for found in intervals[first:last] if found.onset + found.duration > start or found.onset >= start
        ]


def read_labels(recording: Recording, corpus: Corpus) -> Labels:
    """Labels with onset and duration in seconds from the recording's start, texts as in the rules' maps.

    Labels of a whole recording (`header_dx`, `filename`, `table_file`) span it. Texts mapped to null are left out.
    Stages come as whole epochs, see `engine.scoring`.

    Args:
        recording: What `read_header` gave.
        corpus: Its `annotations` say where labels stand and what they mean.

    Raises:
        RecordingError: `ANNOTATION_INVALID` if the corpus promises labels that cannot be found or read.
    """
    return make_labels(recording, corpus, read_raw(recording, corpus))


def read_raw(recording: Recording, corpus: Corpus) -> list[Sequence[Annotation] | None]:
    """Labels as the source of each rule states them; None where there are none and none are required.

    Raises:
        RecordingError: `ANNOTATION_INVALID` for labels that cannot be found or read.
    """
    return [_raw(recording, corpus, rule) for rule in corpus.annotation_rules]


def unmapped_texts(corpus: Corpus, raws: Sequence[Sequence[Annotation] | None]) -> dict[str, int]:
    """How often each text of `read_raw` comes up that the corpus file does not list."""
    unmapped: Counter[str] = Counter()
    for rule, raw in zip(corpus.annotation_rules, raws, strict=True):
        siblings = [other for other in corpus.annotation_rules if _same_file(other, rule)]
        if raw is not None and siblings[0] is rule:
            unmapped.update(label.text for label in raw if not any(other.lists(label.text) for other in siblings))
    return dict(unmapped)


def make_labels(recording: Recording, corpus: Corpus, raws: Sequence[Sequence[Annotation] | None]) -> Labels:
    """`read_labels` from what `read_raw` gave.

    Raises:
        RecordingError: `ANNOTATION_INVALID` for a scoring that makes no sense.
    """
    by_target: dict[str, list[Annotation]] = {"stage": [], "events": [], "classes": []}
    missing: list[str] = []
    scoring = None
    unmapped = unmapped_texts(corpus, raws)
    for rule, raw in zip(corpus.annotation_rules, raws, strict=True):
        if raw is None:
            missing.append(rule.source)
            by_target[rule.target] += _uncovered((), recording, rule)
            continue
        found = _mapped(raw, rule, end=_end(recording))
        by_target[rule.target] += [*found, *_uncovered(found, recording, rule)]
        if rule.target == "stage" and rule.source != "none":
            scoring = score(found, recording.segments, rule.epoch_s, path=recording.path)
    if unmapped:
        logger.debug("%s: texts not in the corpus file: %s", recording.path, unmapped)
    if scoring and scoring.scored_s:
        logger.debug("%s: %s", recording.path, scoring.summary())
    return Labels(
        stages=scoring.stages if scoring else (),
        events=tuple(sorted(by_target["events"], key=lambda found: found.onset)),
        classes=tuple(dict.fromkeys(found.text for found in by_target["classes"])),
        unmapped=unmapped,
        missing=tuple(missing),
        scoring=scoring,
    )


def _raw(recording: Recording, corpus: Corpus, rule: AnnotationRule) -> Sequence[Annotation] | None:
    """Labels as the source states them; None where there are none and none are required."""
    match rule.source:
        case "none" | "edf" | "in_file":
            return () if rule.source == "none" else recording.annotations
        case "header_dx":
            return _header_codes(recording, rule)
        case "filename":
            return _path_label(recording, rule)
        case "intervals":
            return _declared(recording, corpus, rule)
        case "table_file":
            row = label_row(recording.path, rule, corpus)
            return None if row is None else [_whole(recording, text) for text in _row_labels(row, recording, rule)]
        case _:
            path = label_file(recording.path, rule, corpus)
            return None if path is None else _from_file(recording, path, rule)


def _from_file(recording: Recording, path: Path, rule: AnnotationRule) -> Sequence[Annotation]:
    match rule.source:
        case "edf_file":
            return annotation_files.second_edf(recording, path)
        case "wfdb":
            return annotation_files.wfdb_file(recording, path)
        case "text_codes":
            return annotation_files.text_codes(path, rule.epoch_s)
        case "nsrr_xml":
            return annotation_files.nsrr_xml(path, stages=rule.target == "stage")
        case "bids_events":
            return annotation_tables.bids_events(path)
        case _:
            return annotation_tables.table(recording, path, rule)


def _mapped(raw: Sequence[Annotation], rule: AnnotationRule, *, end: Fraction) -> list[Annotation]:
    """Labels in canonical words and time order; those that state no duration get the one of the rule."""
    ordered = sorted((label for label in raw if rule.lists(label.text)), key=lambda label: label.onset)
    onsets = [label.onset for label in ordered]  # a text that is left out ends the one before it all the same
    found = [replace(label, text=text) for label in ordered if (text := rule.canonical(label.text)) is not None]
    if rule.lasts == "next":
        stops = [onsets[i] if (i := bisect_right(onsets, label.onset)) < len(onsets) else end for label in found]
    else:
        epoch_s = rule.epoch_s if rule.target == "stage" else 0
        stops = [label.onset + epoch_s for label in found]
    return [
        label if label.duration else replace(label, duration=max(stop - label.onset, Fraction(0)))
        for label, stop in zip(found, stops, strict=True)
    ]


def _uncovered(found: Sequence[Annotation], recording: Recording, rule: AnnotationRule) -> list[Annotation]:
    """Recorded time without an event under the label that the rule gives it, one interval per gap of a segment."""
    if rule.otherwise is None:
        return []
    gaps: list[Annotation] = []
    for segment in recording.segments:
        free, end = segment.start, segment.start + segment.duration
        for event in [
            *sorted(found, key=lambda event: event.onset),
            Annotation(onset=end, duration=Fraction(0), text=""),
        ]:
            stop = min(event.onset, end)
            if stop > free:
                gaps.append(Annotation(onset=free, duration=stop - free, text=rule.otherwise))
            free = max(free, event.onset + event.duration)
    return gaps


def _same_file(one: AnnotationRule, other: AnnotationRule) -> bool:
    """Whether two rules read the same texts: an XML has stages and events apart."""
    is_split = one.source == "nsrr_xml" and one.target != other.target
    return not is_split and (one.source, one.pattern, one.table, one.labels) == (
        other.source,
        other.pattern,
        other.table,
        other.labels,
    )


def _header_codes(recording: Recording, rule: AnnotationRule) -> Sequence[Annotation] | None:
    """Comma-separated codes of the header comment `Dx`, double commas tolerated."""
    if "Dx" not in recording.extra:
        if not rule.required:
            return None
        raise RecordingError("ANNOTATION_INVALID", f"{recording.path}: no comment '#Dx:' in the header")
    codes = [code.strip() for code in recording.extra["Dx"].split(",")]
    return [_whole(recording, code) for code in dict.fromkeys(codes) if code]


def _declared(recording: Recording, corpus: Corpus, rule: AnnotationRule) -> Sequence[Annotation] | None:
    """Intervals that the corpus file itself lists for the session of the path."""
    groups = path_groups(corpus.subject, recording.path.as_posix(), where=f"{corpus.id}.yaml")
    session = groups.get("session", "")
    if session not in rule.intervals and rule.required:
        raise RecordingError(
            "ANNOTATION_INVALID", f"{recording.path}: {corpus.id}.yaml lists no intervals for session {session!r}"
        )
    return [
        Annotation(onset=Fraction(str(onset)), duration=Fraction(str(end)) - Fraction(str(onset)), text=text)
        for onset, end, text in rule.intervals.get(session, [])
    ]


def _path_label(recording: Recording, rule: AnnotationRule) -> Sequence[Annotation] | None:
    """The label in the path, the match nearest to the file's name."""
    matches = list(re.finditer(rule.pattern or "", recording.path.as_posix()))
    if matches:
        return [_whole(recording, matches[-1]["label"])]
    if not rule.required:
        return None
    raise RecordingError("ANNOTATION_INVALID", f"{recording.path}: the path does not match '{rule.pattern}'")


def _row_labels(row: Mapping[str, str], recording: Recording, rule: AnnotationRule) -> list[str]:
    """Labels in the cells of a recording's row."""
    table = rule.labels
    if table is None or table.form == "text":
        return [cell for cell in row.values() if cell]
    if table.form == "flags":
        return [column for column, cell in row.items() if _flag(cell, column, recording)]
    found: list[str] = []
    for column, cell in row.items():
        try:
            value = ast.literal_eval(cell) if cell else {}
            found += [str(code) for code, likelihood in value.items() if float(likelihood) >= table.threshold]
        except (ValueError, SyntaxError, AttributeError, TypeError, MemoryError, RecursionError) as error:
            raise RecordingError(
                "ANNOTATION_INVALID", f"{recording.path}: {column} of its row is no dict of label to likelihood"
            ) from error
    return found


def _flag(cell: str, column: str, recording: Recording) -> bool:
    word = cell.lower()
    if word in {"1", "1.0", "true", "yes"}:
        return True
    if word in {"", "0", "0.0", "false", "no"}:
        return False
    raise RecordingError("ANNOTATION_INVALID", f"{recording.path}: {column} of its row is neither true nor false")


def _end(recording: Recording) -> Fraction:
    last = recording.segments[-1]
    return last.start + last.duration


def _whole(recording: Recording, text: str) -> Annotation:
    return Annotation(onset=Fraction(0), duration=_end(recording), text=text)
