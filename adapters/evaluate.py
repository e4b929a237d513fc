"""A task's windows as batches, targets, probabilities and scores."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from adapters.data import Labelled, TaskData, read_spread, spread_addresses
from adapters.model import TaskModel
from manifests.tasks import Task
from trainer.batches import ChannelBatch, collate_channels
from trainer.collectives import rank, sum_over_ranks, world_size
from trainer.evaluation.scores import score_classes, score_yes_no
from trainer.read import Window

EVAL_BATCH = 64


def task_probabilities(task: Task, logits_BK: torch.Tensor) -> torch.Tensor:
    """Probabilities (B, K): a softmax over exclusive classes, a sigmoid per yes/no label."""
    return logits_BK.softmax(dim=1) if task.loss == "cross_entropy" else logits_BK.sigmoid()


def collate_task(task: Task, windows: list[Window]) -> ChannelBatch:
    """Windows as the task's model sees them."""
    return collate_channels(windows, kinds=task.kinds, view=task.view, channels=task.channels).to("cpu")


def targets_of(task: Task, labelled: Labelled, windows: Sequence[Window]) -> torch.Tensor:
    """Class indices (B,) int64 under cross_entropy, 0/1 (B, K) float32 under bce."""
    return _targets(task, labelled, [window.key for window in windows])


def _targets(task: Task, labelled: Labelled, keys: Sequence[str]) -> torch.Tensor:
    indices = [labelled.targets[key] for key in keys]
    if task.loss == "cross_entropy":
        return torch.tensor([index for (index,) in indices])
    target = torch.zeros(len(indices), len(task.labels))
    for row, present in enumerate(indices):
        target[row, list(present)] = 1.0
    return target


@torch.no_grad()
def evaluate(
    model: TaskModel, data: Mapping[str, TaskData], *, split: str, limit: int, has_intervals: bool = True
) -> dict[str, dict[str, Any]]:
    """Scores per task on at most `limit` windows of a split; a task without windows there is absent.

    Without intervals, which cost most of the time with small models, all windows count as one subject's.

    Every rank of a process group must call it with equal arguments. Each computes its share of the batches, and all
    get the scores of all windows: the same numbers for any number of ranks, since a batch is never divided.
    """
    model.eval()
    scores: dict[str, dict[str, Any]] = {}
    for name, item in data.items():
        labelled = item.splits[split]
        if not len(labelled):
            continue
        keys = [labelled.streams[place.stream].keys[place.row] for place in spread_addresses(labelled, limit=limit)]
        probabilities = _probabilities(model, item, labelled, limit=limit, num_windows=len(keys))
        score = score_classes if item.task.loss == "cross_entropy" else score_yes_no
        found = score(
            _targets(item.task, labelled, keys).numpy(),
            probabilities,
            labels=item.task.labels,
            subjects=[labelled.subjects[key] if has_intervals else "" for key in keys],
        )
        reported = {metric: found["metrics"][metric] for metric in item.task.metrics if metric in found["metrics"]}
        scores[name] = {**found, "metrics": reported}
    return scores


def _probabilities(model: TaskModel, item: TaskData, labelled: Labelled, *, limit: int, num_windows: int) -> np.ndarray:
    """Probabilities (N, K) of all windows, each batch computed by one rank."""
    mine = torch.zeros(num_windows, len(item.task.labels), dtype=torch.float32, device=model.device)
    first = rank() * EVAL_BATCH
    for windows in read_spread(labelled, limit=limit, batch=EVAL_BATCH, part=rank(), parts=world_size()):
        logits = model(item.task.id, collate_task(item.task, windows).to(model.device))
        mine[first : first + len(windows)] = task_probabilities(item.task, logits).float()
        first += world_size() * EVAL_BATCH
    return sum_over_ranks(mine).cpu().numpy()  # a row is zero on all ranks but one


def mean_primary(scores: Mapping[str, dict[str, Any]], data: Mapping[str, TaskData]) -> float | None:
    """Mean over tasks of each one's primary metric; None when no task has it."""
    found = [
        scores[name]["metrics"].get(item.task.primary, {}).get("value") for name, item in data.items() if name in scores
    ]
    values = [value for value in found if value is not None]
    return sum(values) / len(values) if values else None
