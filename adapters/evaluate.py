"""A task's windows as batches, targets, probabilities and scores."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from adapters.data import Labelled, TaskData, read_spread
from adapters.model import TaskModel
from manifests.tasks import Task
from trainer.batches import ChannelBatch, collate_channels
from trainer.evaluation.scores import score_classes, score_yes_no
from trainer.read import Window

EVAL_BATCH = 64


def task_probabilities(task: Task, logits_BK: torch.Tensor) -> torch.Tensor:
    """Probabilities (B, K): a softmax over exclusive classes, a sigmoid per yes/no label."""
    return logits_BK.softmax(dim=1) if task.loss == "cross_entropy" else logits_BK.sigmoid()


def collate_task(task: Task, windows: list[Window]) -> ChannelBatch:
    """Windows as the task's model sees them."""
    return collate_channels(windows, kinds=task.kinds, view=task.view, channels=task.channels).to("cpu")


def targets_of(task: Task, labelled: Labelled, windows: list[Window]) -> torch.Tensor:
    """Class indices (B,) int64 under cross_entropy, 0/1 (B, K) float32 under bce."""
    indices = [labelled.targets[window.key] for window in windows]
    if task.loss == "cross_entropy":
        return torch.tensor([index for (index,) in indices])
    target = torch.zeros(len(indices), len(task.labels))
    for row, present in enumerate(indices):
        target[row, list(present)] = 1.0
    return target


@torch.no_grad()
def evaluate(model: TaskModel, data: Mapping[str, TaskData], *, split: str, limit: int) -> dict[str, dict[str, Any]]:
    """Scores per task on at most `limit` windows of a split; a task without windows there is absent."""
    model.eval()
    scores: dict[str, dict[str, Any]] = {}
    for name, item in data.items():
        labelled = item.splits[split]
        if not len(labelled):
            continue
        probabilities, targets, subjects = [], [], []
        for windows in read_spread(labelled, limit=limit, batch=EVAL_BATCH):
            logits = model(name, collate_task(item.task, windows).to(model.device))
            probabilities.append(task_probabilities(item.task, logits).cpu().numpy())
            targets.append(targets_of(item.task, labelled, windows).numpy())
            subjects += [labelled.subjects[window.key] for window in windows]
        score = score_classes if item.task.loss == "cross_entropy" else score_yes_no
        scores[name] = score(
            np.concatenate(targets), np.concatenate(probabilities), labels=item.task.labels, subjects=subjects
        )
    return scores


def mean_primary(scores: Mapping[str, dict[str, Any]], data: Mapping[str, TaskData]) -> float | None:
    """Mean over tasks of each one's primary metric; None when no task has it."""
    found = [
        scores[name]["metrics"].get(item.task.primary, {}).get("value") for name, item in data.items() if name in scores
    ]
    values = [value for value in found if value is not None]
    return sum(values) / len(values) if values else None
