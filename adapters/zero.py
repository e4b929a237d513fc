"""New weights under DeepSpeed ZeRO-1 and 2: each rank keeps a part of AdamW's moments, under 2 of the gradients too.

A step of several tasks is a step of as many micro-batches. DeepSpeed averages over ranks and micro-batches, so what
stands here multiplies by both first. Every task is in every step, on every rank and in the same order: a weight that
had no gradient would be moved by momentum and decay alone, and ranks that differ would wait for each other.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed

from adapters.model import TaskModel
from adapters.update import MOMENTS, Moments, RunConfig, Update
from trainer.batches import ChannelBatch
from trainer.collectives import rank, world_size
from trainer.fragments import end_load, held_fragments
from trainer.zero import check_layers, join_processes, wrap, zero_settings


class ZeroUpdate(Update):
    """AdamW whose state is split among the ranks. Arguments, use and numbers are those of `Update`."""

    stages = (1, 2)

    def __init__(self, config: RunConfig, model: TaskModel, *, num_tasks: int) -> None:
        super().__init__(config, model, num_tasks=num_tasks)
        backend = "nccl" if model.device.type == "cuda" else "gloo"
        join_processes(backend, timeout_s=config.collective_timeout_s)
        check_layers(model)
        settings = zero_settings(
            stage=config.zero_stage,
            micro_batch=1,  # nominal: nothing is computed from it
            accumulation=num_tasks,
            clipping=config.optimizer.clip_norm,
            is_bf16=self.is_bf16,
        )
        self._engine = wrap(model, self.optimizer, settings=settings)

    def groups(self) -> Sequence[dict]:
        """Groups of parameters, whose `lr` a step uses."""
        return self._engine.optimizer.param_groups

    def forward(self, name: str, batch: ChannelBatch) -> torch.Tensor:
        """Logits (B, K) of a task in fp32."""
        return self._engine(name, batch).float()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a task's loss, of which this rank has its part; after the last one, step."""
        self._engine.backward(loss * (world_size() * self.num_tasks))
        self._engine.step()

    def finish(self) -> float:
        """Norm of the gradient before clipping; DeepSpeed has changed the weights with the last task."""
        return float(self._engine.get_global_grad_norm())

    def moments(self) -> Moments:
        """Parameter to AdamW's moments, whole, on the first rank; empty on the others. A collective."""
        own = [
            (f.name, f.start, {moment: _moment(f, moment) for moment in MOMENTS}) for f in held_fragments(self._engine)
        ]
        parts: list[Any] = [None] * world_size()
        distributed.gather_object(own, parts if rank() == 0 else None)
        if rank() != 0:
            return {}
        found: Moments = {}
        shapes = {name: parameter.shape for name, parameter in self.model.trainable().items()}
        for name, start, tensors in (piece for part in parts for piece in part):
            whole = found.setdefault(name, {m: torch.zeros(shapes[name]) for m in MOMENTS[:2]})
            whole["step"] = tensors["step"]
            for moment in MOMENTS[:2]:
                whole[moment].view(-1)[start : start + tensors[moment].numel()] = tensors[moment]
        return found

    def restore(self, moments: Moments) -> None:
        """Put moments in place; the weights are in place already, and carried over to DeepSpeed's own copy here."""
        weights = self.model.trainable()
        for fragment in held_fragments(self._engine):
            stored = moments.get(fragment.name)
            part = slice(fragment.start, fragment.start + fragment.numel)
            fragment.tensors["fp32"].copy_(weights[fragment.name].detach().reshape(-1)[part])
            if stored is not None:
                for moment in MOMENTS[:2]:
                    fragment.tensors[moment].copy_(stored[moment].reshape(-1)[part])
                fragment.adam["step"].fill_(float(stored["step"]))
        end_load(self._engine)


def _moment(fragment: Any, moment: str) -> torch.Tensor:
    """A moment of a fragment on the host, or a copy of its count of steps."""
    source = fragment.adam["step"] if moment == "step" else fragment.tensors[moment]
    return source.detach().cpu().clone()
