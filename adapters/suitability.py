"""Whether a recording suits a task: the channels it has, those it lacks, and what the task was trained with."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from adapters.layout import TaskRecord
from manifests.tasks import chosen_symbols, lacking

COMMON_SHARE = 0.5  # of the training windows had a channel that counts as one of training


@dataclass(frozen=True, slots=True, kw_only=True)
class Suitability:
    """How the channels of a recording meet a task.

    Attributes:
        refusal: Empty when the recording suits the task; else what the task needs, what it has, what to do.
        used: Channels that the model sees.
        missing: Channels that most training windows had and the recording lacks; they are masked.
        unseen: Channels that the model sees here and has never seen in training.
    """

    refusal: str
    used: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()


def suitability(record: TaskRecord, available: Mapping[str, Fraction | float]) -> Suitability:
    """How a recording meets a task of a bundle.

    A task that was trained with channel dropout does with the `min_channels` that it declares: what is missing is
    masked, as it was in training. One without needs every channel that each of its training windows had.

    Args:
        record: The task, from a bundle.
        available: UCS symbol of each usable channel to its native rate in Hz.
    """
    task, kinds = record.task, record.recipe.kinds
    chosen = chosen_symbols(task, list(available))
    slow = {
        symbol: f"{symbol} ({float(available[symbol]):g} Hz, {kinds[kind].least_recorded_hz:g} needed)"
        for kind, symbols in chosen.items()
        if kind in kinds
        for symbol in symbols
        if available[symbol] < kinds[kind].least_recorded_hz
    }
    fast_enough = {kind: [symbol for symbol in symbols if symbol not in slow] for kind, symbols in chosen.items()}
    if short := lacking(task, fast_enough):
        needs = " and ".join(f"{least} {kind}" for kind, least in short.items())
        return Suitability(refusal=_too_few(record, needs, available=available, slow=slow))
    used = [symbol for kind, symbols in chosen.items() if kind in kinds for symbol in symbols]
    shares = training_shares(record)
    if not task.channel_dropout and (absent := [s for s, share in shares.items() if share == 1 and s not in used]):
        return Suitability(
            refusal=f"task {task.id} was trained without channel dropout and cannot do without {', '.join(absent)}, "
            f"which each of its training windows had; the recording has {', '.join(available)}. Give a recording with "
            "these channels, name them with --channel if their labels are not known, or train the task with "
            "channel_dropout"
        )
    return Suitability(
        refusal="",
        used=tuple(used),
        missing=tuple(s for s, share in shares.items() if share >= COMMON_SHARE and s not in used),
        unseen=tuple(s for s in used if s not in shares) if shares else (),
    )


def check_channels(record: TaskRecord, available: Mapping[str, Fraction | float]) -> str:
    """`suitability(...).refusal`: empty when a recording suits a task."""
    return suitability(record, available).refusal


def training_shares(record: TaskRecord) -> dict[str, float]:
    """Share of the training windows that had each channel, the most common first; empty when the bundle is silent."""
    train: Mapping[str, Any] = record.data.get("splits", {}).get("train", {})
    windows = train.get("windows") or 0
    return {symbol: count / windows for symbol, count in train.get("symbols", {}).items()} if windows else {}


def training_mains(record: TaskRecord) -> dict[str, int | None]:
    """Corpus to the line frequency in Hz that its recordings were rid of in training; None = none."""
    return {name: facts.get("mains_hz") for name, facts in record.data.get("corpora", {}).items()}


def _too_few(
    record: TaskRecord, needs: str, *, available: Mapping[str, Fraction | float], slow: Mapping[str, str]
) -> str:
    task = record.task
    only = f" out of {', '.join(task.channels)}" if task.channels is not None else ""
    rated = f", of which too slow: {', '.join(slow.values())}" if slow else ""
    return (
        f"task {task.id} needs at least {needs} channel(s){only}; the recording has "
        f"{', '.join(available) or 'no channel that is known'}{rated}. Give a recording with such channels, name "
        "them with --channel or in a corpus file if their labels are not known, or choose another task of the bundle"
    )
