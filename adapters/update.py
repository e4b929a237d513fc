"""What makes new weights of the losses of a step, in plain torch, in one process or in several.

Every rank computes its slice of every task's batch, and the loss of a task is divided by what all ranks have of it, so
that the sum over ranks is the loss of the whole batch: exact for slices of any size. The gradients of all ranks are
added up once, as one flat tensor, after the backward pass of the last task. torch's DistributedDataParallel would do
the same piece by piece, but it wraps one forward pass, and wants to be told which weights each of them leaves out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import distributed, nn
from torch.nn import functional

from adapters.config import AdaptConfig, FinetuneConfig
from adapters.model import TaskModel
from manifests.errors import ConfigError
from manifests.tasks import Task
from trainer.batches import ChannelBatch
from trainer.collectives import world_size

RunConfig = AdaptConfig | FinetuneConfig
Moments = dict[str, dict[str, torch.Tensor]]
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
FINAL_RATE = 0.05  # share of the peak learning rate at the last step


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledBatch:
    """What a rank takes of a task in one step.

    Attributes:
        target: Class indices (B,) int64 under cross_entropy, 0/1 (B, K) float32 under bce.
        is_counted: Whether it counts. A task with fewer windows in a step than there are ranks leaves some without
            any; they take one that does not count, since every rank has to take part in the gradients of every task.
    """

    task: Task
    batch: ChannelBatch
    target: torch.Tensor
    is_counted: bool = True


class Update:
    """AdamW on the trainable parameters; the gradients are those of all ranks.

    A step is `begin`, then for each task `forward` and `backward`, then `finish`.

    Args:
        config: The run.
        model: Its model, already on the device.
        num_tasks: Backward passes of a step.
    """

    stages: tuple[int, ...] = (0,)  # values of `zero_stage` that it carries out

    def __init__(self, config: RunConfig, model: TaskModel, *, num_tasks: int) -> None:
        if config.zero_stage not in self.stages:
            raise ConfigError(
                f"zero_stage: {config.zero_stage} is not what {type(self).__name__} does ({self.stages}); give "
                "update=adapters.zero.ZeroUpdate for 1 and 2, adapters.update.Update for 0, or use kymo adapt"
            )
        self.model = model
        self.num_tasks = num_tasks
        self.optimizer = build_optimizer(config, model)
        self._steps = config.steps
        self._warmup = math.ceil(config.optimizer.warmup_share * config.steps)
        self._clip_norm = config.optimizer.clip_norm
        self.is_bf16 = config.precision == "bf16"

    def begin(self, step: int) -> None:
        """Set the learning rates of a step, and forget the gradients of the last one."""
        factor = rate_factor(step, steps=self._steps, warmup=self._warmup)
        for group in self.groups():
            group["lr"] = group["peak_lr"] * factor
        self.optimizer.zero_grad(set_to_none=True)

    def groups(self) -> Sequence[dict]:
        """Groups of parameters, whose `lr` a step uses."""
        return self.optimizer.param_groups

    def forward(self, name: str, batch: ChannelBatch) -> torch.Tensor:
        """Logits (B, K) of a task in fp32."""
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.is_bf16):
            logits_BK = self.model(name, batch)
        return logits_BK.float()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a task's loss, of which this rank has its part."""
        loss.backward()

    def finish(self) -> float:
        """Change the weights; returns the norm of the gradient before clipping.

        A norm that is not finite changes nothing: neither weights nor moments.
        """
        self._add_up()
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.trainable().values(), self._clip_norm))
        if math.isfinite(norm):
            self.optimizer.step()
        return norm

    def _add_up(self) -> None:
        """Gradients summed over ranks. All ranks have run every task, so they have gradients of the same weights."""
        if world_size() == 1:
            return
        gradients = [p.grad for p in self.model.trainable().values() if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        distributed.all_reduce(flat)
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def moments(self) -> Moments:
        """Parameter to AdamW's moments, on the first rank; those that never had a gradient are absent. A collective."""
        found: Moments = {}
        for name, parameter in self.model.trainable().items():
            if state := self.optimizer.state.get(parameter):
                found[name] = {moment: state[moment].detach().cpu().clone() for moment in MOMENTS}
        return found

    def restore(self, moments: Moments) -> None:
        """Put moments in place; the weights are in place already."""
        for name, parameter in self.model.trainable().items():
            if name in moments:
                # AdamW counts its steps on the CPU, wherever the moments lie.
                self.optimizer.state[parameter] = {
                    moment: tensor.clone() if moment == "step" else tensor.to(parameter.device, copy=True)
                    for moment, tensor in moments[name].items()
                }


def build_optimizer(config: RunConfig, model: TaskModel) -> torch.optim.Optimizer:
    """AdamW with a learning rate per group of parameters; no decay on LoRA."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.trainable().items():
        groups.setdefault(model.group(name), []).append(parameter)
    rates, decay = config.optimizer.rates(), config.optimizer.weight_decay
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": rates[name],
                "peak_lr": rates[name],
                "weight_decay": 0.0 if name == "lora" else decay,
            }
            for name, parameters in groups.items()
        ]
    )


def rate_factor(step: int, *, steps: int, warmup: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to `FINAL_RATE`."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done))


def summed_loss(task: Task, logits_BK: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Scalar loss of a batch before it is divided by its `loss_weight`."""
    weight = None if task.class_weights is None else _class_weights(task).to(logits_BK.device)
    if task.loss == "cross_entropy":
        return functional.cross_entropy(logits_BK, target, weight=weight, reduction="sum")
    return functional.binary_cross_entropy_with_logits(logits_BK, target, weight=weight, reduction="sum")


def loss_weight(task: Task, target: torch.Tensor) -> float:
    """What a batch counts in the mean: under cross_entropy a window as its class does, under bce each answer one."""
    if task.loss == "cross_entropy" and task.class_weights is not None:
        return float(_class_weights(task)[target].double().sum())
    return float(target.numel())


def _class_weights(task: Task) -> torch.Tensor:
    weights = task.class_weights or {}
    return torch.tensor([weights[label] for label in task.labels])
