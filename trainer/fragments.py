"""Where the pieces of each named parameter and of its Adam moments lie on this rank, under every ZeRO stage.

A fragment is a contiguous range of one flattened parameter. Saving writes the ranges that this rank owns; loading
fills the ranges that it holds from whatever files cover them, so a checkpoint is free of the world size. This
module alone touches private attributes of DeepSpeed (0.19.8, without offload or tensor parallelism); the round
trip in tests/trainer/test_checkpoint.py is the alarm for upgrades.

DeepSpeed's public `safe_get/set_*` do not suffice: the local ones exist for ZeRO-3 only and give padding too; the full
ones (ZeRO-1 and 2) all-reduce every whole parameter three times, and none reads or writes Adam's step or works before
the first one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer.collectives import rank, world_size
from trainer.zero import gathered

STATES = ("fp32", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """A range of one flattened parameter on this rank.

    Attributes:
        name: Of the parameter in the objective.
        start: First element in the flattened parameter.
        tensors: 1-D fp32 views of the master weights and of both moments: writing them writes the optimizer.
        adam: The optimizer's state dict that holds `step`.
    """

    name: str
    start: int
    tensors: dict[str, torch.Tensor]
    adam: dict[str, Any]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.tensors["fp32"].numel()

    def owned(self, *, stage: int) -> "Fragment":
        """The part that this rank saves: all of it, or its share where every rank holds the whole (stage 0)."""
        if stage > 0:
            return self
        begin, end = (r * self.numel // world_size() for r in (rank(), rank() + 1))
        tensors = {state: tensor[begin:end] for state, tensor in self.tensors.items()}
        return Fragment(name=self.name, start=begin, tensors=tensors, adam=self.adam)


def held_fragments(model: Any) -> list[Fragment]:
    """Every fragment that this rank holds. Moments are made (zeros) where no step was taken yet."""
    stage = model.zero_optimization_stage()
    find = {0: _whole, 1: _partition, 2: _partition, 3: _shard}[stage]
    return [
        fragment
        for name, parameter in model.module.named_parameters()
        if parameter.requires_grad
        for fragment in find(model, name, parameter)
    ]


def _adam_state(optimizer: torch.optim.Optimizer, flat: torch.Tensor) -> dict[str, Any]:
    state = optimizer.state[flat]
    if "exp_avg" not in state:
        # A `step` of its own for each tensor: a shared one would advance once per tensor and step.
        state["step"] = torch.tensor(0.0, dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(flat.data)
        state["exp_avg_sq"] = torch.zeros_like(flat.data)
    return state


def _views(flat: torch.Tensor, adam: dict[str, Any], *, begin: int, numel: int) -> dict[str, torch.Tensor]:
    whole = {"fp32": flat.data, "exp_avg": adam["exp_avg"], "exp_avg_sq": adam["exp_avg_sq"]}
    return {state: tensor.view(-1).narrow(0, begin, numel) for state, tensor in whole.items()}


def _whole(model: Any, name: str, parameter: nn.Parameter) -> Iterator[Fragment]:
    adam = _adam_state(model.optimizer, parameter)
    tensors = _views(parameter, adam, begin=0, numel=parameter.numel())
    yield Fragment(name=name, start=0, tensors=tensors, adam=adam)


def _partition(model: Any, name: str, parameter: Any) -> Iterator[Fragment]:
    mapping = parameter._hp_mapping  # noqa: SLF001 (see the module's docstring)
    if mapping is not None:
        zero = model.optimizer
        flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
        adam = _adam_state(zero.optimizer, flat)
        address = mapping.hp_fragment_address
        tensors = _views(flat, adam, begin=address.start, numel=address.numel)
        yield Fragment(name=name, start=mapping.lp_fragment_address.start, tensors=tensors, adam=adam)


def _shard(model: Any, name: str, parameter: Any) -> Iterator[Fragment]:
    zero = model.optimizer
    group, begin, partition = zero.grad_position[zero.get_param_id(parameter)]
    start = rank() * partition
    numel = min(partition, parameter.ds_numel - start)  # the last partitions are padded
    if numel > 0:
        flat = zero.fp32_partitioned_groups_flat[group]
        adam = _adam_state(zero.optimizer, flat)
        yield Fragment(name=name, start=start, tensors=_views(flat, adam, begin=begin, numel=numel), adam=adam)


def begin_load(model: Any) -> None:
    """Bring the model into the state in which fragments may be written."""
    if model.zero_optimization_stage() == 3:
        model.optimizer.checkpoint_event_prologue()


def end_load(model: Any) -> None:
    """Carry the written master weights over into the weights that the forward pass uses."""
    stage = model.zero_optimization_stage()
    if stage in (1, 2):
        model.optimizer.update_lp_params()
    elif stage == 3:
        zero = model.optimizer
        for used, master in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
            used.data.copy_(master.data)
        zero.checkpoint_event_epilogue()


def parameter_shapes(model: Any) -> dict[str, list[int]]:
    """Full shape of every trained parameter; under ZeRO-3 the tensors themselves are empty."""
    return {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in model.module.named_parameters()
        if parameter.requires_grad
    }


def untrained_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Frozen parameters and persistent buffers by name, whole, on this rank. A collective under ZeRO-3."""
    frozen = {name: p for name, p in model.module.named_parameters() if not p.requires_grad}
    trained = {name for name, p in model.module.named_parameters() if p.requires_grad}
    with gathered(model, list(frozen.values())):
        tensors = {name: parameter.detach().clone() for name, parameter in frozen.items()}
    state = model.module.state_dict()
    return tensors | {name: t for name, t in state.items() if name not in trained and name not in frozen}
