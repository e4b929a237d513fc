"""Samples of one recording: its channels (`engine.rows`) cut into windows, tagged, labelled.

Pure and without Ray: conversion and prediction on a stranger's file both come through here, so both see the same
signal.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from engine.annotations import Labels, read_labels
from engine.files import is_unlisted
from engine.read import read_header
from engine.recording import Recording
from engine.rows import JSON, Losses, Row, by_rate_and_kind, rows_of
from engine.scan import session_hash, subject_of
from manifests.channels import UCS_VERSION
from manifests.corpora import Corpus, pseudonym, recording_split, subject_hash
from manifests.errors import RecordingError
from manifests.recipes import NATIVE, Recipe
from manifests.subjects import UNUSED

_STAGE_EPOCH_S = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One window: int16 arrays (C, T) by kind and the JSON of ARCHITECTURE §4; `tags` has its `ucs` as JSON text."""

    key: str
    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]
    tags: str

    def to_json(self) -> bytes:
        """`meta` as JSON. The tags, nine tenths of it and mostly the same in every window, are not encoded again."""
        head = json.dumps({name: value for name, value in self.meta.items() if name != "ucs"}, **JSON)
        return f'{head[:-1]},"ucs":{self.tags}}}'.encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """A window's place: seconds from the recording's start, its segment, and seconds from that segment's start."""

    start: Fraction
    segment: int
    within: Fraction


def recording_id(corpus: Corpus, path: str) -> str:
    """12 hex digits that stand for a recording: a hash of corpus and path, unequal for two recordings."""
    return pseudonym(corpus, f"{corpus.id}/{path}")


def _places(recording: Recording, recipe: Recipe, losses: Losses) -> list[_Place]:
    """Windows of the recording: on the recipe's grid, which begins with the recording, inside one segment each."""
    places: list[_Place] = []
    for number, segment in enumerate(recording.segments):
        first = math.ceil(segment.start / recipe.hop_s)
        end = segment.start + segment.duration
        count = max(0, math.floor((end - recipe.window_s) / recipe.hop_s) - first + 1)
        places += [
            _Place(start=Fraction(start), segment=number, within=start - segment.start)
            for start in range(first * recipe.hop_s, (first + count) * recipe.hop_s, recipe.hop_s)
        ]
        covered = (first + count - 1) * recipe.hop_s + recipe.window_s if count else segment.start
        losses.dropped["partial"] += int(end - covered >= 1)
    return places


def _event_places(recording: Recording, recipe: Recipe, losses: Losses, *, labels: Labels) -> list[_Place]:
    """One window per event of some length, moved back to a whole sample; events at one instant share one window."""
    rate = _highest_rate(recipe)
    starts = {
        Fraction(math.floor((event.onset + _anchor_of(event.duration, recipe) - recipe.anchor_s) * rate)) / rate
        for event in labels.events
        if event.duration
    }
    places: list[_Place] = []
    for start in sorted(starts):
        for number, segment in enumerate(recording.segments):
            if segment.start <= start and start + recipe.window_s <= segment.start + segment.duration:
                places.append(_Place(start=start, segment=number, within=start - segment.start))
                break
        else:
            losses.dropped["partial"] += 1
    return places


def _anchor_of(duration: Fraction, recipe: Recipe) -> Fraction:
    """Seconds from an event's onset to the point that a window's anchor stands on."""
    return duration / 2 if recipe.anchor == "centre" else Fraction(0)


def count_windows(recording: Recording, recipe: Recipe) -> int:
    """Windows that a recording has room for, before any is left out."""
    return len(_places(recording, recipe, Losses()))


def _index(seconds: Fraction, rate: Fraction, *, down: bool) -> int:
    """Sample at a time, rounded down or to the nearest; integers, since a product of fractions costs far more."""
    whole, rest = divmod(seconds.numerator * rate.numerator, seconds.denominator * rate.denominator)
    return whole if down or not rest else round(seconds * rate)


class _Kind:
    """Channels of one kind that share a rate, ready to be cut: what a window without faults says is made once."""

    def __init__(self, name: str, rows: Sequence[Row], recipe: Recipe) -> None:
        self.name = name
        self._rows = rows
        self._recipe = recipe
        self._length = recipe.window_samples(rows[0].rate)
        self._tags = [_with_faults(row, 0.0, 0.0, 0.0) for row in rows]
        self._doubtful = [number for number, row in enumerate(rows) if not row.bad.is_clean]

    def cut(self, place: _Place) -> "_Cut":
        """The channels within one window."""
        # Where a window is no whole number of samples, rounding up could lead one sample past the segment's end.
        is_odd = self._recipe.is_native or self._recipe.place == "events"
        offset = _index(place.within, self._rows[0].rate, down=is_odd)
        array = np.empty((len(self._rows), self._length), dtype=np.int16)
        for number, row in enumerate(self._rows):
            start = min(row.segments[place.segment] + offset, row.samples.size - self._length)
            array[number] = row.samples[start : start + self._length]
        tags, bad = self._tags, 0.0
        for number in self._doubtful:
            if any(shares := self._shares(self._rows[number], place, offset)):
                tags = tags.copy() if tags is self._tags else tags
                tags[number] = _with_faults(self._rows[number], *shares)
                bad += min(1.0, sum(shares))
        return _Cut(array=array, tags=[tag for tag, _ in tags], text=",".join(text for _, text in tags), bad=bad)

    def _shares(self, row: Row, place: _Place, offset: int) -> tuple[float, float, float]:
        native = row.native_segments[place.segment] + _index(place.within, row.native_rate, down=True)
        start = row.segments[place.segment] + offset
        return row.bad.shares(
            (native, native + self._recipe.window_samples(row.native_rate)), (start, start + self._length)
        )


def _with_faults(row: Row, flat: float, clipped: float, nan: float) -> tuple[dict[str, Any], str]:
    """Tag of a channel within a window, and the same as JSON."""
    text = f'{row.text},"flat":{flat},"clipped":{clipped},"nan":{nan}}}'
    return {**row.tag, "flat": flat, "clipped": clipped, "nan": nan}, text


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """One kind of a window: array (C, T), tags, the tags as JSON, and the sum of the channels' bad shares."""

    array: np.ndarray
    tags: list[dict[str, Any]]
    text: str
    bad: float


def window_labels(
    labels: Labels,
    start: Fraction,
    *,
    window_s: int,
    rate_hz: Fraction | int,
    anchor_s: Fraction = Fraction(0),
) -> dict[str, Any]:
    """Labels of a window that starts `start` seconds into the recording: stages per epoch, classes, events.

    Events are [start, length, text] in samples at `rate_hz` counted from the window's start, cut at its edges;
    an event that covers the window's anchor, `anchor_s` behind its start, is a class of the window.
    """
    result: dict[str, Any] = {}
    if labels.stages:
        epoch_s = min(_STAGE_EPOCH_S, window_s)
        result["stage"] = [labels.stage_at(start + i * epoch_s, epoch_s) for i in range(window_s // epoch_s)]
    inside, covering = labels.events_in(start, window_s, anchor_s)
    if inside:
        result["events"] = [
            [round(onset * rate_hz), round(duration * rate_hz), text] for onset, duration, text in inside
        ]
    classes = list(dict.fromkeys([*labels.classes, *covering]))
    if classes:
        result["classes"] = classes
    return result


def trial_split(labels: Labels, trials: Sequence[str], start: Fraction, *, window_s: int) -> str:
    """Split of a window by the place, among the recording's events, of the trial that it lies in wholly."""
    spans = sorted({(event.onset, event.onset + event.duration) for event in labels.events})
    inside = [
        split for (begin, end), split in zip(spans, trials, strict=False) if begin <= start and start + window_s <= end
    ]
    return inside[0] if inside else UNUSED


def _is_labelled(labels: Mapping[str, Any]) -> bool:
    return bool(labels.get("classes")) or any(stage != "?" for stage in labels.get("stage", []))


def _identity(corpus: Corpus, recipe: Recipe, relative: str, root: Path) -> dict[str, str]:
    """What every window of a recording says about where it comes from, hashed where it could name a person."""
    if why := corpus.bad_reason(relative):
        raise RecordingError("KNOWN_BAD", f"{relative}: {why}")
    subject, session = subject_of(corpus, relative, root)
    return {
        "corpus": corpus.id,
        "subject": subject_hash(corpus, subject),
        "recording": recording_id(corpus, relative),
        "session": session_hash(corpus, subject, session),
        "split": recording_split(corpus, relative, root),
        "recipe": recipe.id,
    }


def _highest_rate(recipe: Recipe) -> Fraction:
    return Fraction(max(rule.rate_hz for rule in recipe.kinds.values() if rule.rate_hz != NATIVE))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axis:
    """Time axis of a group of samples: its rate in Hz, samples of a window, and what their keys end with."""

    rate: Fraction
    length: int
    suffix: str

    @classmethod
    def of(cls, recipe: Recipe, rate: Fraction | None) -> "_Axis":
        """Axis of the channels stored at `rate`; None: of a recipe that sets the rates, which is its highest."""
        suffix = "" if rate is None else "-" + str(rate).replace("/", "_")
        rate = _highest_rate(recipe) if rate is None else rate
        return cls(rate=rate, length=recipe.window_samples(rate), suffix=suffix)


def window_recording(
    path: Path, *, corpus: Corpus, recipe: Recipe, root: Path, losses: Losses | None = None
) -> Iterator[Sample]:
    """Samples of one recording in time order.

    Args:
        path: The recording, under `root`.
        corpus: How to read it and what its labels mean.
        recipe: Rate and band per kind, window, what to keep.
        root: Folder of the corpus; the path relative to it tells the subject.
        losses: Counts what did not become a sample.

    Raises:
        RecordingError: The recording cannot be used.
        ConfigError: The corpus file does not fit it (its subject cannot be read from the path).
    """
    losses = losses if losses is not None else Losses()
    if is_unlisted(path, corpus):  # it has no subject; its header tells what is wrong
        read_header(path, corpus.reader_of(path), corpus.layout)
    identity = _identity(corpus, recipe, path.relative_to(root).as_posix(), root)
    recording = read_header(path, corpus.reader_of(path), corpus.layout)
    has_events = recipe.place == "events" and any(rule.source != "none" for rule in corpus.annotation_rules)
    places = [] if has_events else _places(recording, recipe, losses)
    if not places and not has_events:
        longest = max((float(segment.duration) for segment in recording.segments), default=0.0)
        raise RecordingError(
            "TOO_SHORT", f"longest stretch {longest:g} s; a window of recipe {recipe.id} takes {recipe.window_s} s"
        )
    labels = read_labels(recording, corpus)
    places = _event_places(recording, recipe, losses, labels=labels) if has_events else places
    losses.unmapped.update(labels.unmapped)
    losses.labels.update(labels.record())
    common = {
        **identity,
        "mains_hz": corpus.mains_hz,
        **({"repairs": list(recording.repairs)} if recording.repairs else {}),
        "ucs_version": UCS_VERSION,
    }
    groups = by_rate_and_kind(rows_of(recording, corpus, recipe, losses), recipe)
    axes = [
        (_Axis.of(recipe, rate), [_Kind(kind, members, recipe) for kind, members in rows.items()])
        for rate, rows in groups.items()
    ]
    for place in places:
        if trials := corpus.split.trials:
            common["split"] = trial_split(labels, trials, place.start, window_s=recipe.window_s)
        for axis, kinds in axes:
            sample = _sample(place, kinds, axis, labels, recipe=recipe, common=common)
            if sample.meta["quality"] < recipe.min_quality:
                losses.dropped["quality"] += 1
            elif recipe.keep == "labelled" and not _is_labelled(sample.meta["labels"]):
                losses.dropped["unlabelled"] += 1
            else:
                yield sample


def _sample(
    place: _Place,
    kinds: Sequence[_Kind],
    axis: _Axis,
    labels: Labels,
    *,
    recipe: Recipe,
    common: Mapping[str, Any],
) -> Sample:
    """One window of the channels of one time axis."""
    cuts = {kind.name: kind.cut(place) for kind in kinds}
    num_channels = sum(len(cut.tags) for cut in cuts.values())
    quality = round(1.0 - math.fsum(cut.bad for cut in cuts.values()) / num_channels, 4)
    tags = ",".join(f'"{kind}":[{cut.text}]' for kind, cut in cuts.items())
    start = _index(place.start, axis.rate, down=True)
    key = f"{common['corpus']}-{common['subject']}-{common['recording']}-{start:010d}{axis.suffix}"
    meta = {
        "key": key,
        **common,
        "start": start,
        "length": axis.length,
        "rate": list(axis.rate.as_integer_ratio()),
        "quality": quality,
        "ucs": {kind: cut.tags for kind, cut in cuts.items()},
        "labels": window_labels(
            labels, place.start, window_s=recipe.window_s, rate_hz=axis.rate, anchor_s=recipe.anchor_s
        ),
    }
    return Sample(key=key, arrays={kind: cut.array for kind, cut in cuts.items()}, meta=meta, tags=f"{{{tags}}}")
