"""Labelled windows of a task: which samples of its snapshots carry one of its labels, and in what order they come.

A class is a stream of the trainer's order, so that balancing classes is a mixture: reproducible by position, and no
window is read that has no label.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from adapters.config import TaskRun
from manifests.config import digest
from manifests.errors import ConfigError
from manifests.recipes import Recipe
from manifests.shards import SAMPLES_FILE, Snapshot
from manifests.tasks import Task, check_place, chosen_symbols, lacking, window_labels
from trainer.cache import ShardCache
from trainer.data import Address, Order
from trainer.filters import SampleFilter
from trainer.read import SnapshotReader, Window
from trainer.samples import SnapshotSource, Stream, load_streams, open_snapshot, verified_table
from trainer.storage import location

logger = logging.getLogger(__name__)

pc: Any = pyarrow.compute  # its functions are made at run time

# What a bundle tells about a corpus. Split tables and file names may name persons; they stay at home.
CORPUS_FACTS = ("title", "licence", "access", "citation", "mains_hz", "split_name")
COLUMNS = ["key", "split", "subject", "symbols", "stage", "classes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """Windows of one split that carry a label of the task.

    Attributes:
        streams: One per answer and corpus where a window has exactly one, else one per corpus; empty = no window.
        targets: Key to class indices: one under cross_entropy, any number under bce.
        subjects: Key to hashed subject.
        counts: Windows per label, and of a single yes or no the others as `not LABEL`.
        symbols: Windows per channel that the task sees.
        left_out: Reason to number of windows left out.
        locate: Local file of a shard; None: a shard is a local file itself.
    """

    streams: tuple[Stream, ...]
    targets: dict[str, tuple[int, ...]]
    subjects: dict[str, str]
    counts: dict[str, int]
    symbols: dict[str, int]
    left_out: dict[str, int]
    locate: Callable[[Path], Path] | None = None

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskData:
    """What a task learns from: its snapshots, whose recipe they share, and its windows by split.

    `cache` keeps shards of snapshots in an object store; None where all are on a disk.
    """

    task: Task
    batch: int
    snapshots: tuple[Snapshot, ...]
    recipe: dict[str, Any]
    splits: dict[str, Labelled]
    cache: ShardCache | None = None


def load_task_data(task: Task, run: TaskRun, *, cache: ShardCache | None = None) -> TaskData:
    """Labelled windows of a task in every split.

    Raises:
        ConfigError: Snapshots of different recipes, a kind that the recipe lacks, kinds of different rates, other
            windows or another split than the task's, a person on two sides of a strict split, or a label without a
            window in `train`.
    """
    snapshots = tuple(open_snapshot(path) for path in run.snapshots)
    if len({snapshot.recipe_digest for snapshot in snapshots}) > 1:
        found = ", ".join(f"{path}: {s.recipe['id']}" for path, s in zip(run.snapshots, snapshots, strict=True))
        raise ConfigError(f"task {task.id}: snapshots of different recipes ({found}); use one recipe per task")
    _check_recipe(task, snapshots[0].recipe)
    for snapshot in snapshots:
        _check_splits(task, snapshot)
    tables = [_read_table(path, snapshot) for path, snapshot in zip(run.snapshots, snapshots, strict=True)]
    splits = {split: _labelled(task, run, tables, split=split) for split in ("train", "val", "test")}
    if cache is not None:
        splits = {split: replace(labelled, locate=cache.locate) for split, labelled in splits.items()}
    _check_persons(task, splits, snapshots)
    train = splits["train"]
    if missing := [label for label, count in train.counts.items() if not count]:
        raise ConfigError(
            f"task {task.id}: no training window for {', '.join(missing)} in {', '.join(run.snapshots)} "
            f"(windows per label: {train.counts}, left out: {train.left_out}); "
            "add recordings or take the label out of the task's YAML"
        )
    for split, labelled in splits.items():
        if not len(labelled):
            logger.warning("task %s: no labelled window in split %s; it is not scored there", task.id, split)
    return TaskData(
        task=task, batch=run.batch, snapshots=snapshots, recipe=snapshots[0].recipe, splits=splits, cache=cache
    )


def _read_table(path: str, snapshot: Snapshot) -> pa.Table:
    with verified_table(location(path) / SAMPLES_FILE, snapshot.samples_sha256) as file:
        return file.read(columns=COLUMNS)


def _check_recipe(task: Task, recipe: dict[str, Any]) -> None:
    loaded = Recipe.model_validate(recipe)
    if loaded.is_native:
        raise ConfigError(
            f"task {task.id}: recipe {loaded.id} keeps recorded rates, a task's model reads one; "
            "convert with a recipe that sets the rate"
        )
    kinds = loaded.kinds
    if absent := [kind for kind in task.min_channels if kind not in kinds]:
        raise ConfigError(
            f"task {task.id}: needs {', '.join(absent)}, recipe {recipe['id']} has {', '.join(kinds)}; "
            "convert with another recipe"
        )
    check_place(task, loaded.place)
    if task.window_s not in (None, loaded.window_s):
        raise ConfigError(
            f"task {task.id}: wants windows of {task.window_s} s, recipe {loaded.id} has {loaded.window_s} s; "
            f"convert with {task.recipe or 'a recipe of that window'}, or set window_s in a task file of your own"
        )
    if len({kinds[kind].rate_hz for kind in task.kinds if kind in kinds}) > 1:
        rates = {kind: kinds[kind].rate_hz for kind in task.kinds if kind in kinds}
        raise ConfigError(f"task {task.id}: kinds of different rates {rates} in recipe {recipe['id']}")


def _check_splits(task: Task, snapshot: Snapshot) -> None:
    for corpus, wanted in task.corpora.items():
        found = snapshot.corpora.get(corpus, {}).get("split_name")
        if wanted is None or found is None or found == wanted:
            continue
        raise ConfigError(
            f"task {task.id}: corpus {corpus} was converted with the split {found!r}, the task's is {wanted!r}; "
            f"convert with `split: {wanted}` in its source, or set corpora in a task file of your own"
        )


def _check_persons(task: Task, splits: Mapping[str, Labelled], snapshots: Sequence[Snapshot]) -> None:
    """Refuse a person on two sides, unless a published split puts persons there by design: then warn."""
    facts = [(name, entry.get("split_name")) for snapshot in snapshots for name, entry in snapshot.corpora.items()]
    published = sorted({f"{name} ({split})" for name, split in facts if split not in (None, "strict")})
    for one, other in combinations(splits, 2):
        both = set(splits[one].subjects.values()) & set(splits[other].subjects.values())
        if both and not published:
            raise ConfigError(
                f"task {task.id}: {len(both)} person(s) stand in {one} and in {other} (e.g. {min(both)}); "
                "use snapshots of one split, or convert them again together"
            )
        if both:
            logger.warning(
                "task %s: %d person(s) stand in %s and in %s, as the split of %s has it; scores are too good for "
                "persons never seen", task.id, len(both), one, other, ", ".join(published),
            )  # fmt: skip


def _labelled(task: Task, run: TaskRun, tables: Sequence[pa.Table], *, split: str) -> Labelled:
    targets: dict[str, tuple[int, ...]] = {}
    subjects: dict[str, str] = {}
    symbols: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    for table in tables:
        for row in table.filter(pc.field("split") == split).to_pylist():
            labels = window_labels(task, stage=row["stage"], classes=row["classes"] or ())
            reason = _unusable(task, labels, row["symbols"])
            if reason or labels is None:
                left_out[reason] += 1
                continue
            targets[row["key"]] = tuple(sorted(task.labels.index(label) for label in labels))
            subjects[row["key"]] = row["subject"]
            symbols.update(symbol for group in chosen_symbols(task, row["symbols"]).values() for symbol in group)
    counts = Counter(task.labels[index] for indices in targets.values() for index in indices)
    names = task.answers if task.is_exclusive else task.labels
    if names != task.labels:
        counts[names[0]] = sum(not indices for indices in targets.values())
    return Labelled(
        streams=_streams(task, run, split=split, targets=targets) if targets else (),
        targets=targets,
        subjects=subjects,
        counts={name: counts[name] for name in names},
        symbols=dict(sorted(symbols.items(), key=lambda item: (-item[1], item[0]))),
        left_out=dict(left_out),
    )


def _unusable(task: Task, labels: frozenset[str] | None, symbols: Sequence[str]) -> str:
    """Why a window cannot be used; empty = it can."""
    if labels is None:
        return "no label of the task"
    if len(labels) > 1 and task.loss == "cross_entropy":
        return "two labels of the task"
    return "channels missing" if lacking(task, chosen_symbols(task, symbols)) else ""


def _streams(task: Task, run: TaskRun, *, split: str, targets: dict[str, tuple[int, ...]]) -> tuple[Stream, ...]:
    """Streams cut by answer, each weighted by n^balance of its answer, shared among corpora as they come."""
    sources = [SnapshotSource(path=path) for path in run.snapshots]
    streams: list[Stream] = []
    sizes = Counter(indices for indices in targets.values())
    for stream in load_streams(sources, split=split, keep=SampleFilter()):
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, key in enumerate(stream.keys):
            if key in targets:
                groups.setdefault(targets[key] if task.is_exclusive else (), []).append(row)
        for group in sorted(groups):
            rows = np.asarray(groups[group])
            total = sizes[group] if task.is_exclusive else len(targets)
            weight = total ** (task.balance if task.is_exclusive else 1.0) * len(rows) / total
            streams.append(stream.take(rows, weight=weight))
    return tuple(streams)


def spread_addresses(labelled: Labelled, *, limit: int) -> list[Address]:
    """At most `limit` windows of a split, evenly spread over each stream, always the same ones."""
    addresses: list[Address] = []
    for index, stream in enumerate(labelled.streams):
        share = max(1, round(limit * len(stream) / len(labelled))) if len(labelled) > limit else len(stream)
        rows = np.unique(np.linspace(0, len(stream) - 1, num=min(share, len(stream))).round().astype(int))
        addresses += [Address(stream=index, position=int(row), epoch=0, row=int(row)) for row in rows]
    return addresses


def read_spread(labelled: Labelled, *, limit: int, batch: int, part: int = 0, parts: int = 1) -> Iterator[list[Window]]:
    """Batches `part`, `part + parts`, … of the windows of `spread_addresses`; a batch is the same for any `parts`."""
    addresses = spread_addresses(labelled, limit=limit)
    order = Order(labelled.streams, seed=0, global_batch=batch)
    reader = SnapshotReader(labelled.streams, locate=labelled.locate)
    try:
        for first in range(part * batch, len(addresses), parts * batch):
            yield reader.read(addresses[first : first + batch], order=order)
    finally:
        reader.close()


def describe_data(data: TaskData) -> dict[str, Any]:
    """Where a task's windows come from, as plain data: recipe, corpora, digests of snapshots and splits, counts."""
    corpora: dict[str, dict[str, Any]] = {}
    for snapshot in data.snapshots:
        for name, facts in snapshot.corpora.items():
            corpora[name] = {key: facts[key] for key in CORPUS_FACTS if facts.get(key)}
    return {
        "recipe": data.recipe,
        "corpora": corpora,
        "snapshots": [snapshot.digest for snapshot in data.snapshots],
        "ucs_version": data.snapshots[0].ucs_version,
        "ucs_digest": data.snapshots[0].ucs_digest,
        "splits": {
            split: {
                "digest": digest(sorted(labelled.targets)),
                "windows": len(labelled),
                "subjects": len(set(labelled.subjects.values())),
                "counts": labelled.counts,
                "corpora": _by_corpus(labelled),
                "symbols": labelled.symbols,
                "left_out": labelled.left_out,
            }
            for split, labelled in data.splits.items()
        },
    }


def _by_corpus(labelled: Labelled) -> dict[str, dict[str, int]]:
    """Windows and subjects of each corpus."""
    keys: dict[str, list[str]] = {}
    for stream in labelled.streams:
        keys.setdefault(stream.corpus, []).extend(stream.keys)
    return {
        corpus: {"windows": len(found), "subjects": len({labelled.subjects[key] for key in found})}
        for corpus, found in sorted(keys.items())
    }
