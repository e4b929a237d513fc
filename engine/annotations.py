"""Labels of a recording in canonical words, from wherever its corpus keeps them."""

import logging
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import groupby
from pathlib import Path

import wfdb

from engine.readers import edf
from engine.recording import Annotation, Recording
from manifests.corpora import Corpus
from manifests.errors import ConfigError, RecordingError

logger = logging.getLogger(__name__)

_DAY_S = 86400


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """Labels of a recording, in the one of three forms that its corpus file calls the target.

    >>> read_labels(recording, corpus, subject="00")
    Labels(annotations=(Annotation(onset=Fraction(0, 1), duration=Fraction(30630, 1), text='W'), ...), ...)

    Attributes:
        annotations: Intervals in time order, texts as the corpus file maps them.
        target: What they are: `stage`, `events`, or `classes` of the recording as a whole.
        unmapped: How often each text came up that the corpus file does not list.
    """

    annotations: tuple[Annotation, ...] = ()
    target: str = "events"
    unmapped: dict[str, int] = field(default_factory=dict)
    _longest: Fraction = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Keep the longest interval's duration, which bounds how far a look-up by time goes back."""
        longest = max((found.duration for found in self.annotations), default=Fraction(0))
        object.__setattr__(self, "_longest", longest)

    @property
    def stages(self) -> tuple[Annotation, ...]:
        """Intervals of sleep stages `W N1 N2 N3 R ?`, empty where the target is another one."""
        return self.annotations if self.target == "stage" else ()

    @property
    def events(self) -> tuple[Annotation, ...]:
        """Intervals of events, empty where the target is another one."""
        return self.annotations if self.target == "events" else ()

    @property
    def classes(self) -> tuple[str, ...]:
        """Labels of the recording as a whole, each once, empty where the target is another one."""
        return tuple(dict.fromkeys(a.text for a in self.annotations)) if self.target == "classes" else ()

    def stage_at(self, start: Fraction, epoch_s: int) -> str:
        """Stage that fills most of an epoch, the earlier of equals; `?` where none fills half of it."""
        shares: dict[str, Fraction] = {}
        for found in self._overlapping(self.stages, start, start + epoch_s):
            inside = min(start + epoch_s, found.onset + found.duration) - max(start, found.onset)
            shares[found.text] = shares.get(found.text, Fraction(0)) + inside
        best = max(shares, key=lambda text: shares[text], default="?")
        return best if shares and 2 * shares[best] >= epoch_s else "?"

    def events_in(self, start: Fraction, window_s: int) -> tuple[list[tuple[Fraction, Fraction, str]], list[str]]:
        """Events of a window as (onset from its start, duration, text) in seconds, cut at its edges.

        The second item has the texts of the events that cover the window's start.
        """
        found = self._overlapping(self.events, start, start + window_s)
        inside = [
            (
                max(event.onset - start, Fraction(0)),
                min(event.onset + event.duration, start + window_s) - max(event.onset, start),
                event.text,
            )
            for event in found
        ]
        covering = [event.text for event in found if event.onset <= start < event.onset + event.duration]
        return inside, covering

    def _overlapping(self, intervals: Sequence[Annotation], start: Fraction, stop: Fraction) -> list[Annotation]:
        """Those that reach into [start, stop); an instant counts where it lies inside."""
        first = bisect_left(intervals, start - self._longest, key=lambda found: found.onset)
        last = bisect_left(intervals, stop, key=lambda found: found.onset)
        return [
            found for found in intervals[first:last] if found.onset + found.duration > start or found.onset >= start
        ]


def read_labels(recording: Recording, corpus: Corpus, *, subject: str = "") -> Labels:
    """Labels with onset and duration in seconds from the recording's start, texts as in the rule's `map`.

    Labels of a whole recording (`header_dx`, `filename`) span it. Texts mapped to null are left out.

    Args:
        recording: What `read_header` gave.
        corpus: Its `annotations` say where labels stand and what they mean.
        subject: Subject of the recording, for `{subject}` in the rule's pattern; `{session}` and `{run}` are
            read from the path by the corpus' own pattern.

    Raises:
        RecordingError: `ANNOTATION_INVALID` if the corpus promises labels that cannot be found or read.
    """
    rule = corpus.annotations
    raw = _raw(recording, corpus, subject)
    unmapped = Counter(annotation.text for annotation in raw if annotation.text not in rule.map)
    if unmapped:
        logger.info("%s: texts not in the corpus file: %s", recording.path, dict(unmapped))
    mapped = tuple(
        Annotation(onset=annotation.onset, duration=annotation.duration, text=canonical)
        for annotation in sorted(raw, key=lambda annotation: annotation.onset)
        if (canonical := rule.map.get(annotation.text)) is not None
    )
    return Labels(annotations=mapped, target=rule.target, unmapped=dict(unmapped))


def _raw(recording: Recording, corpus: Corpus, subject: str) -> Sequence[Annotation]:
    rule = corpus.annotations
    match rule.source:
        case "none":
            found: Sequence[Annotation] = ()
        case "edf":
            found = recording.annotations
        case "header_dx":
            found = _header_codes(recording)
        case "filename":
            found = _file_name(recording, rule.pattern or "")
        case "edf_file":
            found = _second_edf(recording, _second_file(recording, corpus, subject))
        case "wfdb":
            epoch_s = rule.epoch_s if rule.target == "stage" else 0
            found = _wfdb_file(recording, _second_file(recording, corpus, subject), epoch_s=epoch_s)
        case "text_codes":
            found = _text_codes(_second_file(recording, corpus, subject), rule.epoch_s)
    return found


def _second_edf(recording: Recording, path: Path) -> Sequence[Annotation]:
    """Annotations of a second EDF+ file, moved by the difference of both start times."""
    second = edf.read_header(path, {})
    times = [_seconds_of_day(extra.get("start_time", "")) for extra in (recording.extra, second.extra)]
    here, there = times if None not in times else (0, 0)
    shift = ((there or 0) - (here or 0) + _DAY_S // 2) % _DAY_S - _DAY_S // 2
    return [
        Annotation(onset=found.onset + shift, duration=found.duration, text=found.text) for found in second.annotations
    ]


def _wfdb_file(recording: Recording, path: Path, *, epoch_s: int) -> Sequence[Annotation]:
    """Annotations of a WFDB file. A rhythm, `(AFIB`, lasts to the next one; a stage lasts `epoch_s`.

    Source: https://wfdb.io/spec/annotation-files.html.
    """
    try:
        found = wfdb.rdann(str(path.with_suffix("")), path.suffix[1:])
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise RecordingError("ANNOTATION_INVALID", f"{path}: not a WFDB annotation file: {error}") from error
    rate = Fraction(str(found.fs)).limit_denominator(1_000_000) if found.fs else recording.channels[0].rate
    notes = [(note or "").strip(" \0") for note in found.aux_note or []]
    # CPSC 2021 writes Python's None as the text of a beat without a note.
    texts = [symbol if note in {"", "None"} else note for note, symbol in zip(notes, found.symbol or [], strict=True)]
    onsets = [int(sample) / rate for sample in found.sample]
    rhythms = [onset for onset, text in zip(onsets, texts, strict=True) if text.startswith("(")]
    ends = dict(zip(rhythms, [*rhythms, _end(recording)][1:], strict=True))
    return [
        Annotation(onset=onset, duration=ends[onset] - onset if text.startswith("(") else Fraction(epoch_s), text=text)
        for onset, text in zip(onsets, texts, strict=True)
    ]


def _header_codes(recording: Recording) -> Sequence[Annotation]:
    """Comma-separated codes of the header comment `Dx`, double commas tolerated."""
    if "Dx" not in recording.extra:
        raise RecordingError("ANNOTATION_INVALID", f"{recording.path}: no comment '#Dx:' in the header")
    codes = [code.strip() for code in recording.extra["Dx"].split(",")]
    return [_whole(recording, code) for code in dict.fromkeys(codes) if code]


def _text_codes(path: Path, epoch_s: int) -> Sequence[Annotation]:
    """One code per line and `epoch_s` from the recording's start; runs of a code become one interval."""
    lines = [line.strip() for line in path.read_text(encoding="latin-1").splitlines()]
    codes = [line for line in lines if line and not line.startswith("[")]
    strange = [code for code in codes if len(code.split()) != 1]
    if not codes or strange:
        raise RecordingError(
            "ANNOTATION_INVALID", f"{path}: expected one code a line, got {strange[:1] or 'none at all'}"
        )
    found: list[Annotation] = []
    position = 0
    for code, run in groupby(codes):
        count = len(list(run))
        found.append(Annotation(onset=Fraction(position * epoch_s), duration=Fraction(count * epoch_s), text=code))
        position += count
    return found


def _file_name(recording: Recording, pattern: str) -> Sequence[Annotation]:
    match = re.search(pattern, recording.path.name)
    if not match:
        raise RecordingError("ANNOTATION_INVALID", f"{recording.path}: the name does not match {pattern!r}")
    return [_whole(recording, match["label"])]


def _second_file(recording: Recording, corpus: Corpus, subject: str) -> Path:
    """The one file that the rule's pattern names; it may be a glob, as where a scorer's letter is in the name."""
    match = re.search(corpus.subject.pattern, recording.path.as_posix())
    known = {**(match.groupdict("") if match else {}), "stem": recording.path.stem, "subject": subject}
    try:
        pattern = (corpus.annotations.pattern or "").format_map(known)
    except (KeyError, ValueError, IndexError) as error:
        raise ConfigError(
            f"{corpus.id}.yaml: annotations.pattern {corpus.annotations.pattern!r}: {error}; known: {', '.join(known)}"
        ) from None
    folder = recording.path.parent
    while pattern.startswith("../"):
        folder, pattern = folder.parent, pattern.removeprefix("../")
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise RecordingError(
            "ANNOTATION_INVALID", f"{recording.path}: {len(found)} label files match {folder / pattern}; 1 expected"
        )
    return found[0]


def _end(recording: Recording) -> Fraction:
    last = recording.segments[-1]
    return last.start + last.duration


def _whole(recording: Recording, text: str) -> Annotation:
    return Annotation(onset=Fraction(0), duration=_end(recording), text=text)


def _seconds_of_day(text: str) -> int | None:
    parts = text.split(":")
    return int(parts[0]) * 3600 + int(parts[1]) * 60 + int(parts[2]) if len(parts) == 3 else None
