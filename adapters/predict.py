"""Predictions of a bundle on windows. Tasks that look at the same signal share one pass of the temporal encoder."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch

from adapters.bundle import Bundle
from adapters.evaluate import task_probabilities
from adapters.layout import TaskRecord
from adapters.suitability import check_channels
from manifests.errors import ContractError, RecordingError
from manifests.tasks import negative
from trainer.batches import ChannelBatch, collate_channels, signal_rows
from trainer.read import Window

BATCH = 32
BAD_SHARE = 0.5  # of a window; a channel that is flat, clipped or missing for longer shows nothing there

ItemT = TypeVar("ItemT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a task says about one window.

    Attributes:
        start: First sample of the window, counted at `rate` from the recording's start.
        length: Samples of the window.
        rate: Samples per second, exact.
        label: The most probable class; for yes/no labels those above 0.5 joined by `+`, empty = none; for a single
            one `LABEL` or `not LABEL`.
        probabilities: Per label, in the task's order.
    """

    task: str
    recording: str
    start: int
    length: int
    rate: Fraction
    label: str
    probabilities: dict[str, float]

    @property
    def onset(self) -> Fraction:
        """Seconds from the recording's start to the window."""
        return self.start / self.rate

    @property
    def duration(self) -> Fraction:
        """Seconds that the window lasts."""
        return self.length / self.rate


def predict(
    bundle: Bundle,
    windows: Iterable[Window],
    *,
    tasks: Sequence[str] | None = None,
    batch: int = BATCH,
    left_out: Counter[str] | None = None,
) -> Iterator[Prediction]:
    """Predictions as the windows come, for each window those of the tasks that read its recipe.

    Of each task they stand in the order of the windows. No more than `batch` windows are held at a time, and one pass
    of the temporal encoder serves all tasks that share recipe, view and rate.

    Args:
        bundle: From `load_bundle`.
        windows: Made with a recipe of `bundle.by_recipe()`; any number, read as they are needed.
        tasks: Only these; None = all of the bundle.
        batch: Windows that are computed together.
        left_out: Counts, by task, the windows whose channels are flat, clipped or missing for more than half of their
            time, so that too few are left; None raises for such a window.

    Raises:
        RecordingError: A window lacks channels that a task needs, and `left_out` is None.
        ContractError: A window that no task of the bundle reads, or that does not fit its recipe.
    """
    wanted = [record for name, record in bundle.records.items() if tasks is None or name in tasks]
    verdicts: dict[Any, str] = {}
    for group in _batched(windows, batch):
        by_recipe: dict[str, list[Window]] = {}
        for window in group:
            by_recipe.setdefault(window.meta["recipe"], []).append(window)
        for recipe, same in by_recipe.items():
            readers = [record for record in wanted if record.recipe.id == recipe]
            if not readers:
                raise ContractError(f"window {same[0].key}: made with recipe {recipe!r}, which no task here reads")
            usable = {record.task.id: _usable(record, same, verdicts, left_out) for record in readers}
            for sharing in _sharing(readers):
                yield from _predict_sharing(bundle, sharing, same, usable)


def _sharing(records: Iterable[TaskRecord]) -> list[list[TaskRecord]]:
    """Tasks of one recipe in groups whose signal looks the same to the temporal encoder."""
    groups: dict[Any, list[TaskRecord]] = {}
    for record in records:
        rates = {record.recipe.kinds[kind].rate_hz for kind in record.task.kinds if kind in record.recipe.kinds}
        groups.setdefault((record.task.view, frozenset(rates)), []).append(record)
    return list(groups.values())


def _predict_sharing(
    bundle: Bundle, records: Sequence[TaskRecord], windows: Sequence[Window], usable: Mapping[str, Sequence[bool]]
) -> list[Prediction]:
    """Predictions of tasks that share a pass of the temporal encoder over all the channels that any of them sees."""
    shown = [number for number in range(len(windows)) if any(usable[record.task.id][number] for record in records)]
    if not shown:
        return []
    seen = [windows[number] for number in shown]
    kinds = list(dict.fromkeys(kind for record in records for kind in record.task.kinds))
    symbols = {symbol for window in seen for record in records for _, symbol in _channels(record, window)}
    columns = [_symbols(window, kinds=kinds, channels=symbols) for window in seen]
    batch = collate_channels(seen, kinds=kinds, view=records[0].task.view, channels=sorted(symbols))
    on_device = batch.to(bundle.model.device)
    predictions: list[Prediction] = []
    with torch.no_grad():
        tokens_NPD = bundle.model.temporal_tokens(on_device)
        for record in records:
            keep_BC = np.zeros(batch.mask_BC.shape, dtype=bool)
            for place, (number, window) in enumerate(zip(shown, seen, strict=True)):
                if usable[record.task.id][number]:
                    own = set(_channels(record, window))
                    keep_BC[place, : len(columns[place])] = [channel in own for channel in columns[place]]
            narrow, own_tokens_NPD = _narrowed(on_device, tokens_NPD, torch.from_numpy(keep_BC).to(tokens_NPD.device))
            if not len(own_tokens_NPD):
                continue
            logits_BK = bundle.model(record.task.id, narrow, own_tokens_NPD)
            rows = task_probabilities(record.task, logits_BK).cpu().tolist()
            own_windows = [window for window, keep_C in zip(seen, keep_BC, strict=True) if keep_C.any()]
            predictions += [_prediction(record, window, row) for window, row in zip(own_windows, rows, strict=True)]
    return predictions


def _channels(record: TaskRecord, window: Window) -> list[tuple[str, str]]:
    """(kind, symbol) of every channel of a window that a task's model sees."""
    return _symbols(window, kinds=record.task.kinds, channels=record.task.channels)


def _symbols(window: Window, *, kinds: Sequence[str], channels: Collection[str] | None) -> list[tuple[str, str]]:
    """(kind, symbol) of the channels of a window in the order of a batch's columns."""
    ucs = window.meta["ucs"]
    return [(kind, ucs[kind][row]["symbol"]) for kind, row in signal_rows(ucs, kinds=kinds, channels=channels)]


def _narrowed(
    batch: ChannelBatch, tokens_NPD: torch.Tensor, keep_BC: torch.Tensor
) -> tuple[ChannelBatch, torch.Tensor]:
    """The windows and channels of a batch that a task sees, with their tokens; each window keeps one or is left out."""
    if torch.equal(keep_BC, batch.mask_BC):
        return batch, tokens_NPD
    rows_B, columns_C = keep_BC.any(dim=1), keep_BC.any(dim=0)

    def cut(values_BC: torch.Tensor) -> torch.Tensor:
        return values_BC[rows_B][:, columns_C]

    mask_BC = cut(keep_BC)
    narrow = ChannelBatch(
        signal_BCT=cut(batch.signal_BCT) * mask_BC[..., None],
        mask_BC=mask_BC,
        anode_BC=cut(batch.anode_BC) * mask_BC,
        cathode_BC=cut(batch.cathode_BC) * mask_BC,
        kind_BC=cut(batch.kind_BC) * mask_BC,
        rate_hz=batch.rate_hz,
    )
    return narrow, tokens_NPD[keep_BC[batch.mask_BC]]


def _prediction(record: TaskRecord, window: Window, row: Sequence[float]) -> Prediction:
    return Prediction(
        task=record.task.id,
        recording=window.recording,
        start=window.meta["start"],
        length=window.meta["length"],
        rate=Fraction(*window.meta["rate"]),
        label=label_of(record, row),
        probabilities=dict(zip(record.task.labels, row, strict=True)),
    )


def label_of(record: TaskRecord, row: Sequence[float]) -> str:
    """The most probable class; of yes/no labels those above 0.5 joined by `+`, of a single one that or its no."""
    labels = record.task.labels
    if record.task.loss == "cross_entropy":
        return labels[max(range(len(labels)), key=row.__getitem__)]
    said = "+".join(label for label, probability in zip(labels, row, strict=True) if probability > 0.5)
    return said or (negative(labels[0]) if len(labels) == 1 else "")


def _usable(
    record: TaskRecord, windows: Sequence[Window], verdicts: dict[Any, str], left_out: Counter[str] | None
) -> list[bool]:
    """Whether a task can judge each window; what it said about the same channels before is in `verdicts`."""
    flags: list[bool] = []
    for window in windows:
        rates = _rates(record, window)
        key = (record.task.id, *rates.items())
        if key not in verdicts:
            verdicts[key] = check_channels(record, rates)
        if verdicts[key] and left_out is None:
            raise RecordingError("NO_CHANNELS", f"window {window.key}: {verdicts[key]}")
        if verdicts[key] and left_out is not None:
            left_out[record.task.id] += 1
        flags.append(not verdicts[key])
    return flags


def _rates(record: TaskRecord, window: Window) -> dict[str, Fraction]:
    """Native rate in Hz of each channel that shows a signal in the window; the stored one is held to the recipe."""
    rates: dict[str, Fraction] = {}
    for kind in record.task.kinds:
        for tag in window.meta["ucs"].get(kind, ()):
            native = Fraction(*tag["native_rate"])
            expected = record.recipe.kinds[kind].stored_rate(native)
            if Fraction(*tag["rate"]) != expected:
                raise ContractError(
                    f"window {window.key}: {tag['symbol']} at {Fraction(*tag['rate'])} Hz, recipe "
                    f"{record.recipe.id} of the bundle says {expected} Hz; cut windows with the bundle's own recipe"
                )
            if tag["role"] == "signal" and tag["flat"] + tag["clipped"] + tag["nan"] <= BAD_SHARE:
                rates[tag["symbol"]] = native
    return rates


def _batched(items: Iterable[ItemT], size: int) -> Iterator[list[ItemT]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
