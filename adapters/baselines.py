"""What per-task adapters are held against: the same batches, steps and scores, other things trained.

The forward rules are those of the papers, as LibMTL has them too. Experts are whole encoders, as where MTEEG compares
with them, but for the temporal encoder: it is one for all, and gates read its tokens. The published gates read the
raw input, flattened, whose size would have to be the same for all tasks.
"""

import copy
from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from adapters.model import SHARED, TaskModel, build_head, check_head_name, encoder_width
from trainer.batches import ChannelBatch
from trainer.models.attention import masked_mean
from trainer.models.build import Encoder
from trainer.models.sleep import with_one_real


class SharedModel(TaskModel):
    """One encoder for all tasks and one head per task.

    Trained it is hard parameter sharing (Caruana, 1997) or, with one task, full fine-tuning; frozen it is a linear
    probe, whose encoder stays in evaluation mode.
    """

    def __init__(self, encoder: nn.Module, outputs: Mapping[str, int], *, is_frozen: bool, seed: int = 0) -> None:
        super().__init__()
        self.tasks = tuple(outputs)
        self.is_frozen = is_frozen
        self.encoder = encoder.requires_grad_(requires_grad=not is_frozen)
        self.heads = _heads(encoder_width(encoder), outputs, seed=seed)

    def forward(self, task: str, batch: ChannelBatch) -> torch.Tensor:
        """Logits (B, K) of a task."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            pooled_BD = self.encoder(batch).pooled_BD
        return self.heads[task](pooled_BD)

    def train(self, mode: bool = True) -> "SharedModel":  # noqa: FBT001, FBT002 (torch's signature)
        """As torch's; a frozen encoder keeps its dropout off."""
        super().train(mode)
        self.encoder.train(mode and not self.is_frozen)
        return self

    def group(self, name: str) -> str:
        """`head`, `temporal` or `encoder`."""
        return _group(name)


class ExpertModel(TaskModel):
    """Encoders as experts; each task weights their vectors by a gate of its own and has its own head.

    With `task_experts` 0 it is MMoE (Ma et al., KDD 2018): all tasks see all experts. Otherwise it is CGC (Tang et
    al., RecSys 2020): a task sees the shared experts and its own.

    All experts start as the pretrained encoder. What tells them apart is the gates: they weigh each window anew, so
    that experts get different gradients from the first step on.

    Args:
        encoder: The pretrained one, which becomes the first expert; needs `temporal_tokens`.
        outputs: Task id to its number of logits.
        experts: Number that all tasks share.
        task_experts: Further ones of each task.
        seed: Of heads and gates.
    """

    def __init__(
        self, encoder: nn.Module, outputs: Mapping[str, int], *, experts: int, task_experts: int, seed: int = 0
    ) -> None:
        super().__init__()
        self.tasks = tuple(outputs)
        width = encoder_width(encoder)
        encoder.requires_grad_(requires_grad=True)
        self.experts = nn.ModuleList([encoder, *(_expert(encoder) for _ in range(experts - 1))])
        self.heads = _heads(width, outputs, seed=seed)
        self.own = nn.ModuleDict(
            {task: nn.ModuleList(_expert(encoder) for _ in range(task_experts)) for task in self.tasks}
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.gates = nn.ModuleDict({task: nn.Linear(width, experts + task_experts) for task in self.tasks})

    def forward(self, task: str, batch: ChannelBatch) -> torch.Tensor:
        """Logits (B, K) of a task."""
        tokens_NPD = cast("Encoder", self.experts[0]).temporal_tokens(batch)
        features_BED = torch.stack(
            [
                expert(batch, tokens_NPD=tokens_NPD).pooled_BD
                for expert in (*self.experts, *cast("nn.ModuleList", self.own[task]))
            ],
            dim=1,
        )
        weight_BE = self.gates[task](pooled_tokens(tokens_NPD, batch.mask_BC)).softmax(dim=1)
        return self.heads[task]((weight_BE[..., None] * features_BED).sum(dim=1))

    def group(self, name: str) -> str:
        """`head` (gates too), `temporal` or `encoder`."""
        return _group(name)


def pooled_tokens(tokens_NPD: torch.Tensor, mask_BC: torch.Tensor) -> torch.Tensor:
    """Mean (B, D) over patches and channels of what the temporal encoder says of the real channels."""
    tokens_BCD = tokens_NPD.new_zeros(*mask_BC.shape, tokens_NPD.shape[2])
    tokens_BCD[with_one_real(mask_BC)] = tokens_NPD.mean(dim=1)
    return masked_mean(tokens_BCD, mask_BC)


def _expert(encoder: nn.Module) -> nn.Module:
    """A copy of the encoder with the same temporal encoder, not one like it."""
    shared = encoder.get_submodule(SHARED)
    return copy.deepcopy(encoder, {id(shared): shared})


def _heads(width: int, outputs: Mapping[str, int], *, seed: int) -> nn.ModuleDict:
    for task in outputs:
        check_head_name(task)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.ModuleDict({task: build_head(width, outputs[task]) for task in outputs})


def _group(name: str) -> str:
    if name.startswith(("heads.", "gates.")):
        return "head"
    return "temporal" if f".{SHARED}." in name else "encoder"
