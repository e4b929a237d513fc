"""Labelled windows of a task: which samples of its snapshots carry one of its labels, and their signals."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from upath import UPath

from manifests.errors import ConfigError, ContractError
from manifests.shards import SAMPLES_FILE, Snapshot, array_from_npy, load_snapshot, parse_sample
from manifests.tasks import Task, check_place, chosen_symbols, lacking, window_labels
from trainer.evaluation.config import TaskEvaluation
from trainer.read import Window

# A pandas DataFrame, one row a window. Its stubs take an entry for a Series, hence Any.
Rows = Any

COLUMNS = ["key", "shard", "offset", "num_bytes", "corpus", "subject", "recording", "split", "symbols", "stage"]
TIME_COLUMNS = ["classes", "start", "rate_num", "rate_den"]


def load_labelled(task: Task, settings: TaskEvaluation) -> tuple[Rows, dict[str, int], list[Snapshot]]:
    """Windows that have exactly one answer of the task, what was left out by reason, and the snapshots.

    The table has, per window, `key`, `path`, `offset` and `num_bytes` of its shard, `corpus`, `subject`, `recording`,
    `split`, `symbols` that the task sees, `start_s` and `target`, the index in `task.answers`. It is sorted by place.

    Raises:
        ConfigError: A task of several yes/no labels or of windows at events that a snapshot has not, or nothing to
            train or test on.
        ContractError: A snapshot breaks its contract.
    """
    if not task.is_exclusive:
        raise ConfigError(
            f"task {task.id}: several yes/no labels; an evaluation compares tasks of exclusive classes. Train heads on "
            "the frozen encoder with kymo adapt method=linear_probe: it scores every label, with intervals"
        )
    left_out: Counter[str] = Counter()
    parts, snapshots = [], []
    for folder in settings.snapshots:
        snapshots.append(load_snapshot(folder))
        check_place(task, snapshots[-1].recipe.get("place", "grid"))
        table = pq.read_table(UPath(folder) / SAMPLES_FILE, columns=[*COLUMNS, *TIME_COLUMNS]).to_pandas()
        if settings.corpora is not None:
            table = table[table["corpus"].isin(settings.corpora)]
        parts.append(_labelled(task, table, left_out).assign(folder=folder))
    rows = _thin(pd.concat(parts), settings.max_windows)
    rows = rows.sort_values(["folder", "shard", "offset"]).reset_index(drop=True)
    _check(task, settings, rows, left_out)
    return rows, dict(left_out), snapshots


def _labelled(task: Task, table: Rows, left_out: Counter[str]) -> Rows:
    """Rows of one snapshot with a label; the others are counted."""
    targets, chosen = [], []
    for stage, classes, symbols in zip(table["stage"], table["classes"], table["symbols"], strict=True):
        seen = chosen_symbols(task, list(symbols))
        labels = window_labels(
            task, stage=stage if isinstance(stage, str) else None, classes=() if classes is None else list(classes)
        )
        reason = "no label of the task" if labels is None else "two labels of the task" if len(labels) > 1 else ""
        reason = reason or ("channels missing" if lacking(task, seen) else "")
        left_out.update([reason] if reason else [])
        targets.append(-1 if reason else task.answers.index(next(iter(labels or ()), task.answers[0])))
        chosen.append(tuple(symbol for group in seen.values() for symbol in group))
    rows = table.assign(
        target=np.array(targets, dtype=int),
        symbols=pd.Series(chosen, index=table.index, dtype=object),
        start_s=table["start"] * table["rate_den"] / table["rate_num"],
    )
    return rows[rows["target"] >= 0]


def _thin(rows: Rows, limit: int) -> Rows:
    """At most about `limit` windows, evenly spread over each recording, at least one of each."""
    if len(rows) <= limit:
        return rows
    share = limit / len(rows)
    ordered = rows.sort_values(["recording", "start_s"])
    places = [
        group.index[np.unique(np.linspace(0, len(group) - 1, max(1, round(share * len(group)))).round().astype(int))]
        for _, group in ordered.reset_index(drop=True).groupby("recording", sort=True)
    ]
    return ordered.reset_index(drop=True).loc[np.concatenate(places)]


def _check(task: Task, settings: TaskEvaluation, rows: Rows, left_out: Counter[str]) -> None:
    parts = {"all splits": rows}
    if settings.folds == "split":
        parts = {"train": rows[rows["split"].isin(["train", "val"])], "test": rows[rows["split"] == "test"]}
    for name, part in parts.items():
        if part["target"].nunique() < 2:
            counts = {label: int((part["target"] == k).sum()) for k, label in enumerate(task.answers)}
            raise ConfigError(
                f"task {task.id}: {name} of {', '.join(settings.snapshots)} has windows {counts} (left out: "
                f"{dict(left_out)}), two labels are needed; add recordings, or set folds: subjects to use all splits"
            )
    if rows["subject"].nunique() < 2:
        raise ConfigError(f"task {task.id}: one subject only; nobody is left to test on")


def read_windows(rows: Rows, *, batch: int) -> Iterator[list[Window]]:
    """Windows of the table's rows in batches, in their order.

    Raises:
        ContractError: A sample that cannot be read, or is another one than the table says.
    """
    for first in range(0, len(rows), batch):
        yield [_read_one(row) for row in rows.iloc[first : first + batch].itertuples(index=False)]


def _read_one(row: Any) -> Window:
    path = UPath(row.folder) / row.shard
    with path.open("rb") as shard:
        shard.seek(row.offset)
        content = shard.read(row.num_bytes)
    key, members = parse_sample(content)
    if key != row.key:
        raise ContractError(f"{path}: sample {key!r} stands at the offset of {row.key!r}; run kymo verify")
    meta = json.loads(bytes(members.pop("json")))
    arrays: dict[str, Any] = {name.removesuffix(".npy"): array_from_npy(member) for name, member in members.items()}
    return Window(key=key, position=0, epoch=0, corpus=row.corpus, recording=row.recording, meta=meta, arrays=arrays)


def spread(rows: Rows, limit: int) -> Rows:
    """At most about `limit` of the windows, in the order of the table."""
    return _thin(rows, limit).sort_values(["folder", "shard", "offset"]).reset_index(drop=True)


def describe(rows: Rows, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Windows per label, subjects and recordings of each corpus and split, as plain data."""
    return [
        {
            "corpus": str(corpus),
            "split": str(split),
            "subjects": int(part["subject"].nunique()),
            "recordings": int(part["recording"].nunique()),
            "labels": {label: int((part["target"] == k).sum()) for k, label in enumerate(labels)},
        }
        for (corpus, split), part in rows.groupby(["corpus", "split"], sort=True)
    ]


def folder_name(path: str) -> str:
    """Last part of a path, to name a snapshot without telling where it lies."""
    return Path(path).name
