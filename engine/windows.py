"""Samples of one recording: channels filtered and resampled whole, quantised, cut, tagged, labelled.

Pure and without Ray: conversion and prediction on a stranger's file both come through here, so both see the same
signal. Channels are decoded a few at a time, and only the int16 result of the whole recording stays in memory.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from engine.annotations import Labels, read_labels
from engine.dsp import fill_nan, harmonise, to_unit
from engine.read import read_header, read_signals
from engine.recording import Channel, Recording
from engine.scan import resolve_channels, session_hash, subject_of
from manifests.channels import UCS_VERSION, ChannelTag
from manifests.corpora import Corpus, split_of, subject_hash
from manifests.errors import RecordingError
from manifests.recipes import KindRule, Recipe

# Kinds whose sensor shows noise at any time, so that a constant second or a run at the extreme is a fault.
ELECTRICAL = frozenset({"eeg", "eog", "emg", "ecg"})

INT16_MAX = 32767
# Largest step for 70 dB, 0.1 dB in hand: noise is step / sqrt(12), so step = sd * sqrt(12) / 10**(dB / 20).
_STEP_PER_SD = math.sqrt(12) / 10 ** (70.1 / 20)
_OUTLIER_ROUNDS = 5
_GROUP_BYTES = 256 << 20  # float32 samples decoded at once
_MAX_STATISTIC_SAMPLES = 200_000  # median and MAD come from an evenly spaced sub-sample of this size
_STAGE_EPOCH_S = 30
_CLIP_RUN = 3  # equal samples in a row at the recording's extreme that count as clipped
_UNIT_WITH_FACTOR = re.compile(r"(\d+(?:\.\d+)?) +(\S+)")
_FILTER_TOKEN = re.compile(r"\b(HP|LP|BP|N|NOTCH|DC)\s*[:=]?\s*(\d+(?:\.\d+)?)\s*(k?Hz|s)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One window: int16 arrays (C, T) by kind and the JSON of ARCHITECTURE §4."""

    key: str
    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Losses:
    """What did not become a sample: windows by reason, labels nobody resolved, texts of annotations not mapped."""

    dropped: Counter[str] = field(default_factory=Counter)
    unresolved: Counter[tuple[str, str]] = field(default_factory=Counter)
    unmapped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One channel of the whole recording: int16 samples (T,), its tag, faults per native second or window."""

    samples: np.ndarray
    rate_hz: int
    kind: str
    tag: dict[str, Any]
    bad: "_Faults"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Faults:
    """Cumulated counts of faulty native samples, (N + 1,) each or None where there are none at all."""

    rate: Fraction
    flat: np.ndarray | None
    clipped: np.ndarray | None
    nan: np.ndarray | None
    saturated: np.ndarray | None

    def shares(self, start: int, length: int, rate_hz: int) -> tuple[float, float, float]:
        """Flat, clipped and missing share of output samples [start, start + length) at `rate_hz`."""
        first, last = (int(x * self.rate / rate_hz) for x in (start, start + length))
        flat, clipped, nan = (_share(sums, first, last) for sums in (self.flat, self.clipped, self.nan))
        return flat, max(clipped, _share(self.saturated, start, start + length)), nan


def _share(sums: np.ndarray | None, first: int, last: int) -> float:
    if sums is None:
        return 0.0
    last = min(last, sums.size - 1)
    return round(float(sums[last] - sums[first]) / max(1, last - first), 4)


def _cumulated(flags: np.ndarray) -> np.ndarray | None:
    if not flags.any():
        return None
    return np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(flags, dtype=np.int64)))


def recording_id(corpus: Corpus, path: str) -> str:
    """12 hex digits that stand for a recording: a hash of corpus and path, unequal for two recordings."""
    return hashlib.sha256(f"kymo/1/{corpus.id}/{path}".encode()).hexdigest()[:12]


def clean_prefilter(text: str) -> str:
    """Filter history without free text: only the corner frequencies and time constants that it states."""
    tokens = [f"{name.upper()}:{value}{unit}" for name, value, unit in _FILTER_TOKEN.findall(text)]
    return " ".join(tokens)


def segment_samples(recording: Recording, rate: Fraction, num_samples: int) -> list[int]:
    """Samples of each contiguous segment at a native rate; they add up to `num_samples`."""
    ends: list[int] = []
    elapsed = Fraction(0)
    for segment in recording.segments:
        elapsed += segment.duration
        ends.append(min(num_samples, round(elapsed * rate)))
    ends[-1] = num_samples
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _flat(signal: np.ndarray, rate: Fraction, kind: str) -> np.ndarray | None:
    """Cumulated samples that lie in a constant second."""
    block = math.floor(rate)
    if kind not in ELECTRICAL or block < 2 or signal.size < block:
        return None
    whole = signal[: signal.size // block * block].reshape(-1, block)
    # Most seconds differ in their first two samples; only the rest is looked at closely.
    suspects = np.flatnonzero(whole[:, 0] == whole[:, 1])
    suspects = suspects[np.ptp(whole[suspects], axis=1) == 0] if suspects.size else suspects
    if not suspects.size:
        return None
    flags = np.zeros(signal.size, dtype=bool)
    flags[: whole.size].reshape(-1, block)[suspects] = True
    return _cumulated(flags)


def _clipped(signal: np.ndarray, kind: str) -> np.ndarray | None:
    """Cumulated samples in runs of three and more at the recording's own extremes."""
    if kind not in ELECTRICAL or signal.size < _CLIP_RUN:
        return None
    low, high = signal.min(), signal.max()
    if low == high:
        return None
    flags = np.zeros(signal.size, dtype=bool)
    for extreme in (low, high):
        where = np.flatnonzero(signal == extreme)
        if where.size < _CLIP_RUN:
            continue
        starts = where[:-2][(where[2:] - where[:-2]) == _CLIP_RUN - 1]
        for shift in range(_CLIP_RUN):
            flags[starts + shift] = True
    return _cumulated(flags)


def _statistics(signal: np.ndarray) -> tuple[float, float, float, float]:
    """Mean, sd, median, MAD of a filtered channel (T,), in its physical unit."""
    mean = float(signal.mean(dtype=np.float64))
    squares = float(np.dot(signal, signal)) if signal.size < 1 << 16 else _sum_of_squares(signal)
    sd = math.sqrt(max(0.0, squares / signal.size - mean * mean))
    part = signal[:: max(1, signal.size // _MAX_STATISTIC_SAMPLES)]
    median = float(np.median(part))
    return mean, sd, median, float(np.median(np.abs(part - np.float32(median))))


def _sum_of_squares(signal: np.ndarray) -> float:
    # In blocks: a float32 dot product over a night loses digits.
    blocks = np.array_split(signal, math.ceil(signal.size / (1 << 16)))
    return math.fsum(float(np.dot(block, block)) for block in blocks)


def _sd_without_outliers(signal: np.ndarray, sd: float) -> float:
    """Standard deviation of the samples that an int16 at 70 dB can hold, in the signal's unit."""
    for _ in range(_OUTLIER_ROUNDS):
        kept = signal[np.abs(signal) <= sd * _STEP_PER_SD * INT16_MAX]
        smaller = float(kept.std(dtype=np.float64)) if kept.size else 0.0
        if not 0 < smaller < sd * (1 - 1e-3):
            break
        sd = smaller
    return sd


def quantise(signal: np.ndarray, sd: float) -> tuple[np.ndarray, float, np.ndarray | None]:
    """int16 samples (T,), their scale in physical units, and the cumulated saturated samples.

    The scale reaches the largest sample unless an outlier lies so far out that the quantisation noise would come
    within 70 dB of the rest of the signal; such outliers saturate, at 36 sd and beyond, and are flagged.
    """
    peak = float(max(signal.max(), -signal.min())) if signal.size else 0.0
    if peak == 0.0:
        return np.zeros(signal.size, dtype=np.int16), 1.0, None
    scale = peak / INT16_MAX
    if 0 < sd * _STEP_PER_SD < scale:
        scale = _sd_without_outliers(signal, sd) * _STEP_PER_SD
    steps = signal * np.float32(1 / scale)
    np.rint(steps, out=steps)
    saturated = _cumulated(np.abs(steps) > INT16_MAX) if peak > scale * (INT16_MAX + 0.5) else None
    np.clip(steps, -INT16_MAX, INT16_MAX, out=steps)
    return steps.astype(np.int16), scale, saturated


def in_canonical_unit(signal: np.ndarray, raw_unit: str, canonical_unit: str) -> np.ndarray:
    """Signal in its canonical unit; a declared unit may carry a factor, as in `100 uV`."""
    match = _UNIT_WITH_FACTOR.fullmatch(raw_unit)
    if match is None:
        return to_unit(signal, raw_unit, canonical_unit)
    return to_unit(signal * np.float32(match[1]), match[2], canonical_unit)


def _row(
    channel: Channel,
    tag: ChannelTag,
    signal: np.ndarray,
    *,
    rule: KindRule,
    segments: Sequence[int],
    notch_hz: float | None,
    raw_unit: str,
) -> _Row:
    """One channel, filtered and resampled per segment and quantised."""
    missing = ~np.isfinite(signal)
    nan = _cumulated(missing)
    if nan is not None:
        if missing.all():
            raise RecordingError("SIGNAL_INVALID", f"channel {channel.index}: every sample is missing")
        signal = fill_nan(signal)
    flat, clipped = _flat(signal, channel.rate, tag.kind), _clipped(signal, tag.kind)
    filtered = harmonise(
        in_canonical_unit(signal, raw_unit, tag.unit),
        rate=channel.rate,
        target_hz=rule.rate_hz,
        low_hz=rule.low_hz,
        high_hz=rule.high_hz,
        notch_hz=notch_hz if rule.notch else None,
        segments_samples=segments,
    )
    mean, sd, median, mad = _statistics(filtered)
    samples, scale, saturated = quantise(filtered, sd)
    rate = [channel.rate.numerator, channel.rate.denominator]
    return _Row(
        samples=samples,
        rate_hz=rule.rate_hz,
        kind=tag.kind,
        bad=_Faults(rate=channel.rate, flat=flat, clipped=clipped, nan=nan, saturated=saturated),
        tag={
            "symbol": tag.symbol,
            "kind": tag.kind,
            "anode": tag.anode,
            "cathode": tag.cathode,
            "anode_id": tag.anode_id,
            "cathode_id": tag.cathode_id,
            "side": tag.side,
            "role": tag.role,
            "unit": tag.unit,
            "scale": scale,
            "rate": [rule.rate_hz, 1],
            "native_rate": rate,
            "prefilter": clean_prefilter(channel.prefilter),
            "polarity": tag.polarity,
            "source_label": channel.label,
            "source_index": channel.index,
            "rule": tag.rule,
            "mean": mean,
            "sd": sd,
            "median": median,
            "mad": mad,
        },
    )


def _grouped(channels: Sequence[tuple[Channel, ChannelTag]]) -> Iterator[list[tuple[Channel, ChannelTag]]]:
    """Consecutive channels whose float32 samples fit the memory that one reading pass may take."""
    group: list[tuple[Channel, ChannelTag]] = []
    size = 0
    for item in channels:
        num_bytes = 4 * item[0].num_samples
        if group and size + num_bytes > _GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(item)
        size += num_bytes
    if group:
        yield group


def _select(recording: Recording, corpus: Corpus, recipe: Recipe, losses: Losses) -> list[tuple[Channel, ChannelTag]]:
    """Channels that the recipe keeps; what nobody resolved goes to the losses."""
    found, missed = resolve_channels(recording, corpus)
    losses.unresolved.update((item.label, item.reason) for item in missed)
    kept = [(channel, tag) for channel, tag in found if tag.kind in recipe.kinds]
    if not found:
        labels = ", ".join(repr(channel.label) for channel in recording.channels)
        raise RecordingError(
            "CHANNEL_UNRESOLVED", f"none of the labels {labels} is a known signal; add them to {corpus.id}.yaml"
        )
    if not kept:
        kinds = ", ".join(sorted({tag.kind for _, tag in found}))
        raise RecordingError(
            "NO_CHANNELS", f"recipe {recipe.id} keeps {', '.join(recipe.kinds)}; the recording has {kinds}"
        )
    return kept


def _rows(recording: Recording, corpus: Corpus, recipe: Recipe, losses: Losses) -> list[_Row]:
    """Every kept channel of the recording as int16 at its kind's rate, in file order."""
    kept = _select(recording, corpus, recipe, losses)
    rows: list[_Row] = []
    failed: list[RecordingError] = []
    for group in _grouped(kept):
        signals = read_signals(recording, [channel.index for channel, _ in group])
        for (channel, tag), i in zip(group, range(len(signals)), strict=True):
            signal = signals[i]
            signals[i] = np.empty(0, dtype=np.float32)  # let go of it as soon as it is done
            try:
                rows.append(
                    _row(
                        channel,
                        tag,
                        signal,
                        rule=recipe.kinds[tag.kind],
                        segments=segment_samples(recording, channel.rate, channel.num_samples),
                        notch_hz=corpus.mains_hz,
                        raw_unit=corpus.units.get(channel.label, channel.unit),
                    )
                )
            except RecordingError as error:  # one channel's fault: the others stay
                failed.append(error)
                losses.unresolved[channel.label, error.reason] += 1
    if not rows:
        raise failed[0]
    return rows


def _starts(recording: Recording, recipe: Recipe, losses: Losses) -> list[tuple[Fraction, Fraction]]:
    """Start of each window on the recipe's grid: seconds since the recording's start, and in the joined signal."""
    starts: list[tuple[Fraction, Fraction]] = []
    joined = Fraction(0)
    for segment in recording.segments:
        first = math.ceil(segment.start / recipe.hop_s)
        end = segment.start + segment.duration
        count = max(0, math.floor((end - recipe.window_s) / recipe.hop_s) - first + 1)
        starts += [
            (Fraction(k * recipe.hop_s), joined + k * recipe.hop_s - segment.start) for k in range(first, first + count)
        ]
        covered = (first + count - 1) * recipe.hop_s + recipe.window_s if count else segment.start
        losses.dropped["partial"] += int(end - covered >= 1)
        joined += segment.duration
    return starts


def _window(
    rows: Mapping[str, Sequence[_Row]], joined: Fraction, window_s: int
) -> tuple[dict[str, np.ndarray], dict[str, list[dict[str, Any]]], float]:
    """Arrays, tags and quality of one window that starts `joined` seconds into the joined signal."""
    arrays: dict[str, np.ndarray] = {}
    tags: dict[str, list[dict[str, Any]]] = {}
    bad: list[float] = []
    for kind, members in rows.items():
        length = members[0].rate_hz * window_s
        # A segment may begin between two samples; the last window may then reach half a sample too far.
        start = max(0, min(round(joined * members[0].rate_hz), min(row.samples.size for row in members) - length))
        arrays[kind] = np.stack([row.samples[start : start + length] for row in members])
        tags[kind] = []
        for row in members:
            flat, clipped, nan = row.bad.shares(start, length, row.rate_hz)
            tags[kind].append({**row.tag, "flat": flat, "clipped": clipped, "nan": nan})
            bad.append(min(1.0, flat + clipped + nan))
    return arrays, tags, round(1.0 - math.fsum(bad) / len(bad), 4)


def window_labels(labels: Labels, start: Fraction, *, window_s: int, rate_hz: int) -> dict[str, Any]:
    """Labels of a window that starts `start` seconds into the recording: stages per epoch, classes, events.

    Events are [start, length, text] in samples at `rate_hz` counted from the window's start, cut at its edges;
    an event that covers the window's start is a class of the window.
    """
    result: dict[str, Any] = {}
    if labels.stages:
        epoch_s = min(_STAGE_EPOCH_S, window_s)
        result["stage"] = [labels.stage_at(start + i * epoch_s, epoch_s) for i in range(window_s // epoch_s)]
    inside, covering = labels.events_in(start, window_s)
    if inside:
        result["events"] = [
            [round(onset * rate_hz), round(duration * rate_hz), text] for onset, duration, text in inside
        ]
    classes = list(dict.fromkeys([*labels.classes, *covering]))
    if classes:
        result["classes"] = classes
    return result


def _is_labelled(labels: Mapping[str, Any]) -> bool:
    return bool(labels.get("classes")) or any(stage != "?" for stage in labels.get("stage", []))


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
    relative = path.relative_to(root).as_posix()
    subject, session = subject_of(corpus, relative)
    if relative in corpus.known_bad:
        raise RecordingError("KNOWN_BAD", f"{relative}: {corpus.known_bad[relative]}")
    recording = read_header(path, corpus.reader, corpus.layout)
    starts = _starts(recording, recipe, losses)
    if not starts:
        longest = max((float(segment.duration) for segment in recording.segments), default=0.0)
        raise RecordingError(
            "TOO_SHORT", f"longest stretch {longest:g} s; a window of recipe {recipe.id} takes {recipe.window_s} s"
        )
    labels = read_labels(recording, corpus, subject=subject)
    losses.unmapped.update(labels.unmapped)
    by_kind: dict[str, list[_Row]] = {kind: [] for kind in recipe.kinds}
    for row in _rows(recording, corpus, recipe, losses):
        by_kind[row.kind].append(row)
    rows = {kind: members for kind, members in by_kind.items() if members}
    rate_hz = max(rule.rate_hz for rule in recipe.kinds.values())
    common = {
        "corpus": corpus.id,
        "subject": subject_hash(corpus, subject),
        "recording": recording_id(corpus, relative),
        "session": session_hash(corpus, subject, session),
        "split": split_of(corpus, subject),
        "recipe": recipe.id,
    }
    name = f"{corpus.id}-{common['subject']}-{common['recording']}"
    for start, joined in starts:
        arrays, tags, quality = _window(rows, joined, recipe.window_s)
        given = window_labels(labels, start, window_s=recipe.window_s, rate_hz=rate_hz)
        if quality < recipe.min_quality:
            losses.dropped["quality"] += 1
        elif recipe.keep == "labelled" and not _is_labelled(given):
            losses.dropped["unlabelled"] += 1
        else:
            first = int(start * rate_hz)
            yield Sample(
                key=f"{name}-{first:010d}",
                arrays=arrays,
                meta={
                    "key": f"{name}-{first:010d}",
                    **common,
                    "start": first,
                    "length": recipe.window_s * rate_hz,
                    "rate": [rate_hz, 1],
                    "quality": quality,
                    "ucs_version": UCS_VERSION,
                    "ucs": tags,
                    "labels": given,
                },
            )
