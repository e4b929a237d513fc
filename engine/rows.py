"""Channels of one recording: decoded a few at a time, filtered and resampled whole, as int16 with tag and faults."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate
from typing import Any

import numpy as np

from engine.dsp import fill_nan, harmonise, output_length, to_unit
from engine.quality import Extremes, Faults, clipped_samples, flat_samples, quantise, runs_of, statistics
from engine.read import read_signals
from engine.recording import Channel, Recording
from engine.scan import resolve_channels
from manifests.channels import ChannelTag
from manifests.corpora import Corpus
from manifests.errors import RecordingError
from manifests.plausible import is_suspect
from manifests.recipes import KindRule, Recipe

_GROUP_BYTES = 256 << 20  # float32 samples decoded at once
JSON: Mapping[str, Any] = {"separators": (",", ":"), "allow_nan": False}
"""How `json.dumps` writes what goes into a shard."""

_UNIT_WITH_FACTOR = re.compile(r"(\d+(?:\.\d+)?) +(\S+)")
_FILTER_TOKEN = re.compile(r"\b(HP|LP|BP|N|NOTCH|DC)\s*[:=]?\s*(\d+(?:\.\d+)?)\s*(k?Hz|s)?", re.IGNORECASE)


@dataclass(slots=True, kw_only=True)
class Losses:
    """What a recording's samples lack or make doubtful.

    Windows dropped by reason, labels nobody resolved, texts of annotations not mapped, channels by kind whose unit is
    suspect, and how much of the recording is scored (`Labels.record`).
    """

    dropped: Counter[str] = field(default_factory=Counter)
    unresolved: Counter[tuple[str, str]] = field(default_factory=Counter)
    unmapped: Counter[str] = field(default_factory=Counter)
    unit_suspect: Counter[str] = field(default_factory=Counter)
    labels: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One channel of the whole recording: int16 samples (T,), where its segments begin in them, its tag, its faults.

    Segments end on whole samples at either rate, so their beginnings are kept and not computed from time.
    """

    samples: np.ndarray
    segments: list[int]
    native_segments: list[int]
    native_rate: Fraction
    rate: Fraction
    kind: str
    tag: dict[str, Any]
    text: str  # the tag as JSON, without the last brace: a window adds its flags
    bad: Faults


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


def in_canonical_unit(signal: np.ndarray, raw_unit: str, canonical_unit: str) -> np.ndarray:
    """Signal in its canonical unit; a declared unit may carry a factor, as in `100 uV`."""
    match = _UNIT_WITH_FACTOR.fullmatch(raw_unit)
    if match is None:
        return to_unit(signal, raw_unit, canonical_unit)
    return to_unit(signal * np.float32(match[1]), match[2], canonical_unit)


def rows_of(recording: Recording, corpus: Corpus, recipe: Recipe, losses: Losses) -> list[Row]:
    """Every channel that the recipe keeps as int16 at its kind's rate, in file order.

    Raises:
        RecordingError: Nothing that the recipe keeps, or no channel that can be used.
    """
    kept = _select(recording, corpus, recipe, losses)
    rows: list[Row] = []
    failed: list[RecordingError] = []
    for group in _grouped(kept):
        signals = read_signals(recording, [channel.index for channel, _ in group])
        for (channel, tag), i in zip(group, range(len(signals)), strict=True):
            signal = signals[i]
            signals[i] = np.empty(0, dtype=np.float32)  # let go of it as soon as it is done
            try:
                row = _row(
                    channel,
                    tag,
                    signal,
                    rule=recipe.kinds[tag.kind],
                    segments=segment_samples(recording, channel.rate, channel.num_samples),
                    notch_hz=corpus.mains_hz,
                    raw_unit=corpus.units.get(channel.label, channel.unit),
                )
            except RecordingError as error:  # one channel's fault: the others stay
                failed.append(error)
                losses.unresolved[channel.label, error.reason] += 1
                continue
            losses.unit_suspect[row.kind] += row.tag["unit_suspect"]
            rows.append(row)
    if not rows:
        raise failed[0]
    return rows


def _select(recording: Recording, corpus: Corpus, recipe: Recipe, losses: Losses) -> list[tuple[Channel, ChannelTag]]:
    """Channels that the recipe keeps; what nobody resolved goes to the losses."""
    found, missed = resolve_channels(recording, corpus)
    losses.unresolved.update((item.label, item.reason) for item in missed)
    kept = [(channel, tag) for channel, tag in found if tag.kind in recipe.kinds]
    slow = [channel for channel, _ in kept if recipe.is_native and channel.rate < recipe.lowest_rate]
    losses.unresolved.update((channel.label, "fewer than a sample per window") for channel in slow)
    kept = [(channel, tag) for channel, tag in kept if channel not in slow]
    if not found:
        labels = ", ".join(repr(channel.label) for channel in recording.channels)
        raise RecordingError(
            "CHANNEL_UNRESOLVED", f"none of the labels {labels} is a known signal; add them to {corpus.id}.yaml"
        )
    if slow and not kept:
        raise RecordingError("NO_CHANNELS", f"every channel has less than a sample per window of recipe {recipe.id}")
    if not kept:
        kinds = ", ".join(sorted({tag.kind for _, tag in found}))
        raise RecordingError(
            "NO_CHANNELS", f"recipe {recipe.id} keeps {', '.join(recipe.kinds)}; the recording has {kinds}"
        )
    return kept


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


def _row(
    channel: Channel,
    tag: ChannelTag,
    signal: np.ndarray,
    *,
    rule: KindRule,
    segments: Sequence[int],
    notch_hz: float | None,
    raw_unit: str,
) -> Row:
    """One channel, filtered and resampled per segment and quantised."""
    extremes = Extremes.of(signal)
    nan = None
    if not extremes.is_finite:
        missing = ~np.isfinite(signal)
        if missing.all():
            raise RecordingError("SIGNAL_INVALID", f"channel {channel.index}: every sample is missing")
        nan, signal = runs_of(missing), fill_nan(signal)
        extremes = Extremes.of(signal)
    flat, clipped = flat_samples(signal, channel.rate, tag.kind), clipped_samples(signal, tag.kind, extremes)
    rate = rule.stored_rate(channel.rate)
    filtered = harmonise(
        in_canonical_unit(signal, raw_unit, tag.unit),
        rate=channel.rate,
        target_hz=rate,
        low_hz=rule.low_hz,
        high_hz=rule.high_hz,
        notch_hz=notch_hz if rule.notch else None,
        segments_samples=segments,
    )
    found = statistics(filtered)
    samples, scale, saturated = quantise(filtered, found.sd, found.peak)
    bad = Faults(flat=flat, clipped=clipped, nan=nan, saturated=saturated)
    full_tag = {
        **tag.record(),
        "scale": scale,
        "rate": list(rate.as_integer_ratio()),
        "native_rate": list(channel.rate.as_integer_ratio()),
        "prefilter": clean_prefilter(channel.prefilter),
        "source_index": channel.index,
        "mean": found.mean,
        "sd": found.sd,
        "median": found.median,
        "mad": found.mad,
        "unit_suspect": not bad.is_mostly_flat and is_suspect(tag.kind, median=found.median, mad=found.mad),
    }
    return Row(
        samples=samples,
        rate=rate,
        kind=tag.kind,
        segments=_beginnings([output_length(count, channel.rate, rate) for count in segments]),
        native_segments=_beginnings(segments),
        native_rate=channel.rate,
        bad=bad,
        tag=full_tag,
        text=json.dumps(full_tag, **JSON)[:-1],
    )


def _beginnings(lengths: Sequence[int]) -> list[int]:
    return [0, *accumulate(lengths)][:-1]


def by_rate_and_kind(rows: Sequence[Row], recipe: Recipe) -> dict[Fraction | None, Mapping[str, list[Row]]]:
    """Rows that share a sample: by kind in the recipe's order, with native rates one group per rate, fastest first."""
    rates = sorted({row.rate for row in rows}, reverse=True) if recipe.is_native else [None]
    groups: dict[Fraction | None, Mapping[str, list[Row]]] = {}
    for rate in rates:
        found = {
            kind: [row for row in rows if row.kind == kind and (rate is None or row.rate == rate)]
            for kind in recipe.kinds
        }
        groups[rate] = {kind: members for kind, members in found.items() if members}
    return groups
