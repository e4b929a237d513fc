"""How many windows of a step each task of a run gives, and what they weigh in the loss.

Without sampling every step takes every task's own batch, and tasks count the same. Sampling in proportion to n^alpha
does not draw a task per step, it *shares* each step: with p_t = w_t n_t^alpha / sum, task t gives about p_t of the
step's windows, in every step the same number, and its mean loss is weighted with p_t. In expectation that is the
gradient of drawing one task per step with p_t, and each task sees as many windows; what differs is

* less noise: no step is all of one task;
* the stream stays a pure function of (configuration, seed, step), since a constant batch per task keeps each task's
  order what it is: the state of a run remains one number;
* no task is ever absent from a step. Where DeepSpeed splits the optimizer, an absent task would be moved by momentum
  and decay alone, ranks with different tasks would wait for each other for ever, and ZeRO-3 would apply the last
  gradient again.

A cap of c per epoch is a length: the order of a task is a permutation of its windows, over and over, so that an epoch
of c n windows is the next c n of it. It is a new random part each time, none comes twice before all have come, and n_t
above is the length of an epoch. With alpha = 1 and a cap of 0.1 on TUAB that is the sampling of MTEEG.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from manifests.errors import ConfigError
from manifests.tasks import Task


class Sampling(BaseModel):
    """Sharing of a step's windows among tasks.

    Attributes:
        alpha: 0 = all tasks alike, 1 = in proportion to their windows; MTEEG's remark is that it should be open.
        batch: Windows of a step over all tasks; null = the sum of the tasks' own batches.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    batch: Annotated[int, Field(ge=1)] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A task's part of every step.

    Attributes:
        epoch: Windows of an epoch.
        batch: Windows of a step, over all ranks.
        weight: Of the task's mean loss; 1 on average over tasks.
    """

    epoch: int
    batch: int
    weight: float


def shares(
    tasks: Mapping[str, Task], *, windows: Mapping[str, int], batches: Mapping[str, int], sampling: Sampling | None
) -> dict[str, Share]:
    """Each task's part of a step.

    Args:
        tasks: By id, in the order of the run.
        windows: Training windows of each.
        batches: Own batch of each; without `sampling` that is what it gives.
        sampling: null = own batches, equal weights.

    Raises:
        ConfigError: Fewer windows in a step than tasks.
    """
    epochs = {name: epoch_windows(task, windows[name]) for name, task in tasks.items()}
    if sampling is None:
        return {name: Share(epoch=epochs[name], batch=batches[name], weight=1.0) for name in tasks}
    total = sampling.batch or sum(batches.values())
    if total < len(tasks):
        raise ConfigError(
            f"sampling.batch: {total} windows are fewer than the {len(tasks)} tasks, and each stands in every step; "
            f"give {len(tasks)} or more"
        )
    wanted = {name: task.weight * epochs[name] ** sampling.alpha for name, task in tasks.items()}
    part = {name: value / sum(wanted.values()) for name, value in wanted.items()}
    counts = _counts(part, total)
    return {name: Share(epoch=epochs[name], batch=counts[name], weight=len(tasks) * part[name]) for name in tasks}


def epoch_windows(task: Task, windows: int) -> int:
    """Windows of an epoch: all of them, or the share that the task's cap allows, and one at least."""
    return windows if task.cap_per_epoch is None else max(1, math.ceil(task.cap_per_epoch * windows))


def _counts(part: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers that add up to `total`, one at least for each, as near to the parts as that allows."""
    counts = dict.fromkeys(part, 1)
    for _ in range(total - len(part)):
        counts[max(part, key=lambda name: part[name] * total - counts[name])] += 1
    return counts
