"""Leave-one-out contrast: each modality of a window against the mean of its other modalities.

SleepFM's loss, with availability masks in place of dropping every recording that lacks a modality. For anchor
modality i the set S_i holds the windows that have i and at least one other; the target of window n is the mean of
its other modalities' unit vectors; the loss is the cross-entropy of anchors against targets, both ways, over S_i:
loss = 1 / sum_i |S_i| x sum_i 1/2 (CE rows + CE columns). `pairwise` takes each pair of modalities i < j in place of
an anchor and its target, and S_ij the windows that have both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn.functional import normalize

from trainer.collectives import (
    all_gather_rows,
    all_gather_with_grad,
    exact,
    gather_sizes,
    rank,
    sum_over_ranks,
    world_size,
)
from trainer.models.build import Encoder
from trainer.objectives.modalities import ModalityBatch, ModalityConfig, collate_modalities, merge_groups
from trainer.read import Window


class LeaveOneOutConfig(ModalityConfig):
    """What is contrasted with what, and how sharply.

    Attributes:
        contrast: Each modality against the mean of the others, or each pair of modalities.
        temperature: At the start; it is learnt. SleepFM starts at 1.0.
        max_scale: Largest 1 / temperature, as in CLIP; the least is 1. null: no limit, as in SleepFM.
        detach_target: No gradient through the mean of the other modalities.
        normalize_target: That mean made a unit vector; as it is, it is shorter where the others disagree.
        mask_same_recording: Other windows of the same recording are no negatives.
    """

    kind: Literal["leave_one_out"] = "leave_one_out"
    contrast: Literal["leave_one_out", "pairwise"] = "leave_one_out"
    temperature: float = Field(default=0.07, gt=0)
    max_scale: float | None = Field(default=100.0, gt=1)
    detach_target: bool = False
    normalize_target: bool = False
    mask_same_recording: bool = False

    @model_validator(mode="after")
    def _pairs_have_no_target(self) -> LeaveOneOutConfig:
        if self.contrast == "pairwise" and (self.detach_target or self.normalize_target):
            raise ValueError("contrast: pairwise has no mean target to detach or normalise; unset both options")
        return self


class LeaveOneOut(nn.Module):
    """The objective around a shared encoder."""

    loss_parameters: tuple[str, ...] = ("log_scale",)

    def __init__(self, encoder: Encoder, config: LeaveOneOutConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = config
        # Shape (1,): DeepSpeed 0.19.8 crashes on parameters without dimensions.
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1.0 / config.temperature)))

    def collate(self, windows: Sequence[Window], *, seed: int) -> ModalityBatch:
        """Windows as a batch (`collate_modalities`)."""
        return collate_modalities(windows, self.config, seed=seed)

    def forward(self, batch: ModalityBatch, finish: Callable[..., Any] | None = None) -> Any:
        """Loss of the local windows against those of all ranks, and metrics; or what `finish` makes of `embed`.

        The mean over ranks of the gradients of this loss is the gradient of the loss of the global batch.
        """
        return (finish or self.loss)(self.embed(batch) | {"log_scale": self.log_scale})

    def embed(self, batch: ModalityBatch) -> dict[str, torch.Tensor]:
        """Unit vectors `embedding_NMD` (zeros where absent), `available_NM`, `recording_N`."""
        return {
            "embedding_NMD": self._encode(batch),
            "available_NM": batch.available_NM,
            "recording_N": batch.recording_N,
        }

    def loss(self, embedded: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and metrics of what `embed` gave and of `log_scale`, never in bf16 as the encoder may be."""
        unit_NMD = exact(embedded["embedding_NMD"])
        high = math.inf if self.config.max_scale is None else math.log(self.config.max_scale)
        log_scale = bounded(embedded["log_scale"].to(unit_NMD.dtype), low=0.0, high=high)
        with torch.autocast(unit_NMD.device.type, enabled=False):
            return leave_one_out_loss(
                unit_NMD,
                embedded["available_NM"],
                embedded["recording_N"],
                scale=log_scale.exp(),
                config=self.config,
            )

    def _encode(self, batch: ModalityBatch) -> torch.Tensor:
        """Unit vectors (N, M, D), exactly zero and without gradient where a modality is absent.

        Every modality runs on every rank, also when no window has it: ZeRO-3 needs one sequence of modules. In one
        call its weights are gathered once and the kernels of small encoders are launched once.
        """
        if self.config.one_pass:
            pooled = self.encoder(merge_groups(batch.groups)).pooled_BD
            pooled = pooled.unflatten(0, (len(batch.groups), -1)).transpose(0, 1)
        else:
            pooled = torch.stack([self.encoder(group).pooled_BD for group in batch.groups], dim=1)
        unit = normalize(pooled.to(torch.promote_types(pooled.dtype, torch.float32)), dim=-1)
        return torch.where(batch.available_NM[..., None], unit, torch.zeros_like(unit))


def leave_one_out_loss(
    unit_NMD: torch.Tensor,
    available_NM: torch.Tensor,
    recording_N: torch.Tensor,
    *,
    scale: torch.Tensor,
    config: LeaveOneOutConfig,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss (scalar) and metrics of the local rows; K is the number of windows of all ranks, P of contrasts."""
    sizes = gather_sizes(len(unit_NMD), device=unit_NMD.device)
    unit_KMD = all_gather_with_grad(unit_NMD, sizes)
    available_KM = all_gather_rows(available_NM, sizes)
    recording_K = all_gather_rows(recording_N, sizes)
    anchor_PKD, target_PKD, member_PK = _contrasts(unit_KMD, available_KM, config)
    own = slice(start := sum(sizes[: rank()]), start + len(unit_NMD))
    device = unit_NMD.device
    itself_NK = torch.arange(own.start, own.stop, device=device)[:, None] == torch.arange(sum(sizes), device=device)
    same_NK = (recording_N[:, None] == recording_K) & ~itself_NK
    rival_PNK = (member_PK[:, own, None] & member_PK[:, None, :]) & ~itself_NK
    allowed_PNK = rival_PNK & ~same_NK if config.mask_same_recording else rival_PNK
    rows_PN, is_hit_PN = _cross_entropy(anchor_PKD[:, own], target_PKD, allowed_PNK, itself_NK, scale)
    columns_PN, _ = _cross_entropy(target_PKD[:, own], anchor_PKD, allowed_PNK, itself_NK, scale)
    member_PN = member_PK[:, own]
    count = member_PK.sum().clamp(min=1)
    local = torch.where(member_PN, 0.5 * (rows_PN + columns_PN), torch.zeros_like(rows_PN)).sum()
    loss = local * world_size() / count
    with torch.no_grad():
        cosine_PN = torch.nn.functional.cosine_similarity(anchor_PKD[:, own], target_PKD[:, own], dim=-1)
        sums = [
            local,
            (is_hit_PN & member_PN).sum(),
            (cosine_PN * member_PN).sum(),
            (same_NK & rival_PNK).sum(),
            rival_PNK.sum(),
            *_pair_distances(unit_NMD, available_NM),
            *_pair_potentials(unit_NMD, available_NM, unit_KMD, available_KM, itself_NK),
        ]
        total, hits, cosine, same, rivals, distance, pairs, potential, others = sum_over_ranks(
            torch.stack([value.double() for value in sums])
        ).unbind()
    return loss, {
        "loss": total / count,
        "top1": hits / count,
        "alignment": cosine / count,
        "pair_distance": distance / pairs.clamp(min=1),
        "uniformity": (potential / others.clamp(min=1)).clamp(min=torch.finfo(potential.dtype).tiny).log(),
        "same_recording_negatives": same / rivals.clamp(min=1),
        "anchors": count.detach(),
        "scale": scale.detach()[0],
        "temperature": 1 / scale.detach()[0],
    }


def _contrasts(
    unit_KMD: torch.Tensor, available_KM: torch.Tensor, config: LeaveOneOutConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Anchors and targets (P, K, D) of each contrast, and its members (P, K)."""
    if config.contrast == "pairwise":
        one, other = torch.triu_indices(unit_KMD.shape[1], unit_KMD.shape[1], offset=1, device=unit_KMD.device)
        unit_MKD, available_MK = unit_KMD.transpose(0, 1), available_KM.T
        return unit_MKD[one], unit_MKD[other], available_MK[one] & available_MK[other]
    target_KMD = leave_one_out_targets(unit_KMD, available_KM, is_normalized=config.normalize_target)
    if config.detach_target:
        target_KMD = target_KMD.detach()
    member_KM = available_KM & (available_KM.sum(dim=1, keepdim=True) >= 2)
    return unit_KMD.transpose(0, 1), target_KMD.transpose(0, 1), member_KM.T


def _pair_distances(unit_NMD: torch.Tensor, available_NM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the squared distances of all pairs of modalities of a window, and their number.

    Their mean is the alignment of Wang and Isola (2020). Of unit vectors, sum |a - b|^2 = 2 pairs - 2 sum a.b.
    """
    count_N = available_NM.sum(dim=1)
    pairs_N = count_N * (count_N - 1) / 2
    dots_N = (unit_NMD.sum(dim=1).square().sum(dim=-1) - count_N) / 2
    return 2 * (pairs_N - dots_N).sum(), pairs_N.sum()


def _pair_potentials(
    unit_NMD: torch.Tensor,
    available_NM: torch.Tensor,
    unit_KMD: torch.Tensor,
    available_KM: torch.Tensor,
    itself_NK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of exp(-2 |a - b|^2) over pairs of windows in the same modality, and their number.

    The logarithm of their mean is the uniformity of Wang and Isola (2020).
    """
    cosine_MNK = torch.einsum("nmd,kmd->mnk", unit_NMD, unit_KMD)
    both_MNK = available_NM.T[:, :, None] & available_KM.T[:, None, :] & ~itself_NK
    return torch.where(both_MNK, (4 * cosine_MNK - 4).exp(), torch.zeros_like(cosine_MNK)).sum(), both_MNK.sum()


def leave_one_out_targets(unit_KMD: torch.Tensor, available_KM: torch.Tensor, *, is_normalized: bool) -> torch.Tensor:
    """Mean of a window's other available modalities per modality, (K, M, D); zeros where there is none."""
    weight = available_KM.to(unit_KMD.dtype)
    present_KMD = unit_KMD * weight[..., None]
    others_KMD = present_KMD.sum(dim=1, keepdim=True) - present_KMD
    count_KM = weight.sum(dim=1, keepdim=True) - weight
    target_KMD = others_KMD / count_KM.clamp(min=1)[..., None]
    return normalize(target_KMD, dim=-1) if is_normalized else target_KMD


def _cross_entropy(
    query_PND: torch.Tensor,
    key_PKD: torch.Tensor,
    allowed_PNK: torch.Tensor,
    itself_NK: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of each query with its own key among the allowed keys, (P, N), and whether it ranks first.

    Rows that are no members give finite numbers which the caller leaves out.
    """
    logits_PNK = torch.einsum("pnd,pkd->pnk", query_PND, key_PKD) * scale
    # The lowest finite number, not -inf: a row without any allowed key must not turn the gradient into NaN.
    logits_PNK = logits_PNK.masked_fill(~(allowed_PNK | itself_NK), torch.finfo(logits_PNK.dtype).min)
    positive_PN = torch.where(itself_NK, logits_PNK, torch.zeros_like(logits_PNK)).sum(dim=-1)
    is_first_PN = logits_PNK.argmax(dim=-1) == itself_NK.to(torch.int64).argmax(dim=-1)
    return logits_PNK.logsumexp(dim=-1) - positive_PN, is_first_PN


class _Bounded(torch.autograd.Function):
    """Clamp whose gradient still leads back inside; that of torch.clamp is zero, and a value outside stays there."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, low: float, high: float) -> torch.Tensor:
        ctx.save_for_backward(value < low, value > high)
        return value.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        is_under, is_over = ctx.saved_tensors
        # Descent goes against the gradient. All ranks must agree on its sign, so it is that of their mean.
        mean = sum_over_ranks(gradients[0]) / world_size()
        leads_out = (is_under & (mean > 0)) | (is_over & (mean < 0))
        return torch.where(leads_out, torch.zeros_like(mean), mean), None, None


def bounded(value: torch.Tensor, *, low: float, high: float) -> torch.Tensor:
    """`value` within [low, high], with no gradient that would lead further outside.

    The same as setting a parameter back to its limit after each step, up to the length of one step, and it needs no
    access to the weights that an optimizer keeps.
    """
    return _Bounded.apply(value, low, high)  # pyright: ignore[reportReturnType]  # torch leaves apply untyped
