"""Predictions of a bundle on windows, and the check whether a recording suits a task."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch

from adapters.bundle import Bundle
from adapters.evaluate import collate_task, task_probabilities
from adapters.layout import TaskRecord
from manifests.annotations import STAGES
from manifests.config import write_atomically
from manifests.errors import ContractError, RecordingError
from manifests.tasks import chosen_symbols, lacking
from trainer.read import Window

BATCH = 32
CSV_COLUMNS = ("recording", "task", "onset_s", "duration_s", "start", "length", "rate", "label", "probabilities")

ItemT = TypeVar("ItemT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a task says about one window.

    Attributes:
        start: First sample of the window, counted at `rate` from the recording's start.
        length: Samples of the window.
        rate: Samples per second, exact.
        label: The most probable class; for yes/no labels those above 0.5 joined by `+`, empty = none.
        probabilities: Per label, in the task's order.
    """

    task: str
    recording: str
    start: int
    length: int
    rate: Fraction
    label: str
    probabilities: dict[str, float]


def check_channels(record: TaskRecord, available: Mapping[str, Fraction | float]) -> str:
    """Empty when a recording suits a task; else what the task needs, what the recording has, what to do.

    Args:
        record: The task, from a bundle.
        available: UCS symbol of each usable channel to its native rate in Hz.
    """
    task, recipe = record.task, record.recipe
    chosen = chosen_symbols(task, list(available))
    slow = {
        symbol: f"{symbol} ({float(available[symbol]):g} Hz, {recipe.kinds[kind].least_recorded_hz:g} needed)"
        for kind, symbols in chosen.items()
        if kind in recipe.kinds
        for symbol in symbols
        if available[symbol] < recipe.kinds[kind].least_recorded_hz
    }
    fast_enough = {kind: [symbol for symbol in symbols if symbol not in slow] for kind, symbols in chosen.items()}
    if not (missing := lacking(task, fast_enough)):
        return ""
    needs = " and ".join(f"{least} {kind}" for kind, least in missing.items())
    only = f" out of {', '.join(task.channels)}" if task.channels is not None else ""
    rated = f", of which too slow: {', '.join(slow.values())}" if slow else ""
    return (
        f"task {task.id} needs at least {needs} channel(s){only}; the recording has "
        f"{', '.join(available) or 'no channel that is known'}{rated}. Give a recording with such channels, name "
        "them in a corpus file if their labels are not known, or choose another task of the bundle"
    )


def predict(
    bundle: Bundle, windows: Iterable[Window], *, tasks: Sequence[str] | None = None, batch: int = BATCH
) -> list[Prediction]:
    """Predictions in the order of the windows, for each window those of the tasks that read its recipe.

    Args:
        bundle: From `load_bundle`.
        windows: Made with a recipe of `bundle.by_recipe()`; any number, read as they are needed.
        tasks: Only these; None = all of the bundle.
        batch: Windows that are computed together.

    Raises:
        RecordingError: A window lacks channels that a task needs (`check_channels` tells before).
        ContractError: A window that no task of the bundle reads, or that does not fit its recipe.
    """
    wanted = [name for name in bundle.records if tasks is None or name in tasks]
    predictions: list[Prediction] = []
    for group in _batched(windows, batch):
        by_recipe: dict[str, list[Window]] = {}
        for window in group:
            by_recipe.setdefault(window.meta["recipe"], []).append(window)
        for recipe, same in by_recipe.items():
            readers = [name for name in wanted if bundle.records[name].recipe.id == recipe]
            if not readers:
                raise ContractError(f"window {same[0].key}: made with recipe {recipe!r}, which no task here reads")
            for name in readers:
                predictions += _predict_task(bundle, name, same)
    return predictions


def _predict_task(bundle: Bundle, name: str, windows: list[Window]) -> list[Prediction]:
    record = bundle.records[name]
    for window in windows:
        _check_window(record, window)
    with torch.no_grad():
        logits = bundle.model(name, collate_task(record.task, windows))
        rows = task_probabilities(record.task, logits).tolist()
    return [
        Prediction(
            task=name,
            recording=window.recording,
            start=window.meta["start"],
            length=window.meta["length"],
            rate=Fraction(*window.meta["rate"]),
            label=_label(record, row),
            probabilities=dict(zip(record.task.labels, row, strict=True)),
        )
        for window, row in zip(windows, rows, strict=True)
    ]


def _label(record: TaskRecord, row: Sequence[float]) -> str:
    labels = record.task.labels
    if record.task.loss == "cross_entropy":
        return labels[max(range(len(labels)), key=row.__getitem__)]
    return "+".join(label for label, probability in zip(labels, row, strict=True) if probability > 0.5)


def _check_window(record: TaskRecord, window: Window) -> None:
    rates: dict[str, Fraction] = {}
    for kind in record.task.kinds:
        for tag in window.meta["ucs"].get(kind, ()):
            if tag["role"] == "signal":
                rates[tag["symbol"]] = Fraction(*tag["native_rate"])
            expected = record.recipe.kinds[kind].stored_rate(Fraction(*tag["native_rate"]))
            if Fraction(*tag["rate"]) != expected:
                raise ContractError(
                    f"window {window.key}: {tag['symbol']} at {Fraction(*tag['rate'])} Hz, recipe "
                    f"{record.recipe.id} of the bundle says {expected} Hz; cut windows with the bundle's own recipe"
                )
    if message := check_channels(record, rates):
        raise RecordingError("NO_CHANNELS", f"window {window.key}: {message}")


def write_csv(path: Path | str, predictions: Iterable[Prediction]) -> None:
    """Write predictions as CSV: one row each, times in seconds and in samples, `label=probability` pairs."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for item in predictions:
        pairs = ";".join(f"{label}={probability:.4f}" for label, probability in item.probabilities.items())
        onset_s, duration_s = (f"{float(samples / item.rate):.10g}" for samples in (item.start, item.length))
        writer.writerow(
            [item.recording, item.task, onset_s, duration_s, item.start, item.length, item.rate, item.label, pairs]
        )
    write_atomically(Path(path), text.getvalue())


def annotation_rows(predictions: Iterable[Prediction]) -> list[tuple[Fraction, Fraction, str]]:
    """(onset, duration, text) in seconds for `engine.annotate`, by onset; stages in the words of the EDF+ standard."""
    rows = [(item.start / item.rate, item.length / item.rate, annotation_text(item)) for item in predictions]
    return sorted(rows)


def annotation_text(prediction: Prediction) -> str:
    """`Sleep stage N2` for a stage, which every hypnogram reader knows, else `task: label`."""
    if set(prediction.probabilities) <= set(STAGES):
        return f"Sleep stage {prediction.label}"
    return f"{prediction.task}: {prediction.label or 'none'}"


def _batched(items: Iterable[ItemT], size: int) -> Iterator[list[ItemT]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
