"""Leave-one-out contrast: each modality of a window against the mean of its other modalities.

SleepFM's loss, with availability masks in place of dropping every recording that lacks a modality. For anchor
modality i the set S_i holds the windows that have i and at least one other; the target of window n is the mean of
its other modalities' unit vectors; the loss is the cross-entropy of anchors against targets, both ways, over S_i:
loss = 1 / sum_i |S_i| x sum_i 1/2 (CE rows + CE columns).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.nn.functional import normalize

from trainer.batches import ChannelBatch, collate_channels, generator, move, stable_hash
from trainer.collectives import all_gather_rows, all_gather_with_grad, gather_sizes, rank, sum_over_ranks, world_size
from trainer.models.build import Encoder
from trainer.read import Window

MAX_LOG_SCALE = math.log(100.0)


class LeaveOneOutConfig(BaseModel):
    """What is contrasted with what. `groups` maps a modality to the kinds of its channels."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["leave_one_out"] = "leave_one_out"
    groups: dict[str, tuple[str, ...]] = Field(
        default={"BAS": ("eeg", "eog"), "RESP": ("resp",), "EKG": ("ecg",), "EMG": ("emg",)}, min_length=2
    )
    view: str = "zscore"
    channels: tuple[str, ...] | None = None
    temperature: float = Field(default=0.07, gt=0)
    detach_target: bool = False
    normalize_target: bool = False
    mask_same_recording: bool = False
    channel_dropout: float = Field(default=0.0, ge=0, lt=1)


@dataclass(slots=True, kw_only=True)
class LeaveOneOutBatch:
    """One ChannelBatch per modality, all with the same N windows in the same order."""

    groups: tuple[ChannelBatch, ...]
    available_NM: torch.Tensor
    recording_N: torch.Tensor

    def to(self, device: torch.device | str) -> LeaveOneOutBatch:
        """The same batch on `device`."""
        return move(self, device)


class LeaveOneOut(nn.Module):
    """The objective around a shared encoder."""

    loss_parameters: tuple[str, ...] = ("log_scale",)

    def __init__(self, encoder: Encoder, config: LeaveOneOutConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = config
        # Shape (1,): DeepSpeed 0.19.8 crashes on parameters without dimensions.
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1.0 / config.temperature)))

    def collate(self, windows: Sequence[Window], *, seed: int) -> LeaveOneOutBatch:
        """Windows as a batch. Only `channel_dropout` draws, from (seed, epoch, key, modality)."""
        groups = []
        for name, kinds in self.config.groups.items():
            group = collate_channels(windows, kinds=kinds, view=self.config.view, channels=self.config.channels)
            if self.config.channel_dropout > 0:
                _drop_channels(group, windows, name, seed=seed, probability=self.config.channel_dropout)
            groups.append(group)
        recordings = [stable_hash(window.corpus, window.recording) for window in windows]
        return LeaveOneOutBatch(
            groups=tuple(groups),
            available_NM=torch.stack([group.mask_BC.any(dim=1) for group in groups], dim=1),
            recording_N=torch.tensor(recordings, dtype=torch.int64),
        )

    def forward(self, batch: LeaveOneOutBatch, finish: Callable[..., Any] | None = None) -> Any:
        """Loss of the local windows against those of all ranks, and metrics; or what `finish` makes of `embed`.

        The mean over ranks of the gradients of this loss is the gradient of the loss of the global batch.
        """
        return (finish or self.loss)(self.embed(batch) | {"log_scale": self.log_scale})

    def embed(self, batch: LeaveOneOutBatch) -> dict[str, torch.Tensor]:
        """Unit vectors `embedding_NMD` (zeros where absent), `available_NM`, `recording_N`."""
        return {
            "embedding_NMD": self._encode(batch),
            "available_NM": batch.available_NM,
            "recording_N": batch.recording_N,
        }

    def loss(self, embedded: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and metrics of what `embed` gave and of `log_scale`, in fp32 also where the encoder runs in bf16."""
        unit_NMD = embedded["embedding_NMD"]
        log_scale = embedded["log_scale"].to(unit_NMD.dtype).clamp(0.0, MAX_LOG_SCALE)
        with torch.autocast(unit_NMD.device.type, enabled=False):
            return leave_one_out_loss(
                unit_NMD,
                embedded["available_NM"],
                embedded["recording_N"],
                scale=log_scale.exp(),
                config=self.config,
            )

    def _encode(self, batch: LeaveOneOutBatch) -> torch.Tensor:
        """Unit vectors (N, M, D), exactly zero and without gradient where a modality is absent.

        Every group runs on every rank, also when no window has it: ZeRO-3 needs one sequence of modules.
        """
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
    """Loss (scalar) and metrics of the local rows; K is the number of windows of all ranks."""
    sizes = gather_sizes(len(unit_NMD), device=unit_NMD.device)
    unit_KMD = all_gather_with_grad(unit_NMD, sizes)
    available_KM = all_gather_rows(available_NM, sizes)
    recording_K = all_gather_rows(recording_N, sizes)
    target_KMD = leave_one_out_targets(unit_KMD, available_KM, is_normalized=config.normalize_target)
    if config.detach_target:
        target_KMD = target_KMD.detach()
    member_KM = available_KM & (available_KM.sum(dim=1, keepdim=True) >= 2)
    own = slice(start := sum(sizes[: rank()]), start + len(unit_NMD))
    itself_NK = torch.arange(start, start + len(unit_NMD), device=unit_NMD.device)[:, None] == torch.arange(
        len(unit_KMD), device=unit_NMD.device
    )
    same_NK = (recording_N[:, None] == recording_K) & ~itself_NK
    allowed_MNK = member_KM.T[:, None, :].expand(-1, len(unit_NMD), -1)
    if config.mask_same_recording:
        allowed_MNK = allowed_MNK & ~same_NK
    anchor_MND, all_anchors_MKD = unit_KMD[own].transpose(0, 1), unit_KMD.transpose(0, 1)
    target_MND, all_targets_MKD = target_KMD[own].transpose(0, 1), target_KMD.transpose(0, 1)
    rows_MN, is_hit_MN = _cross_entropy(anchor_MND, all_targets_MKD, allowed_MNK, itself_NK, scale)
    columns_MN, _ = _cross_entropy(target_MND, all_anchors_MKD, allowed_MNK, itself_NK, scale)
    member_MN = member_KM[own].T
    count = member_KM.sum().clamp(min=1)
    local = torch.where(member_MN, 0.5 * (rows_MN + columns_MN), torch.zeros_like(rows_MN)).sum()
    loss = local * world_size() / count
    with torch.no_grad():
        cosine_MN = torch.nn.functional.cosine_similarity(anchor_MND, target_MND, dim=-1)
        sums = torch.stack(
            [
                local.double(),
                (is_hit_MN & member_MN).sum().double(),
                (cosine_MN * member_MN).sum().double(),
                (same_NK & member_MN[:, :, None] & member_KM.T[:, None, :]).sum().double(),
                (~itself_NK & member_MN[:, :, None] & member_KM.T[:, None, :]).sum().double(),
            ]
        )
        total, hits, cosine, same, negatives = sum_over_ranks(sums).unbind()
    return loss, {
        "loss": total / count,
        "top1": hits / count,
        "alignment": cosine / count,
        "same_recording_negatives": same / negatives.clamp(min=1),
        "anchors": count.detach(),
        "scale": scale.detach()[0],
    }


def leave_one_out_targets(unit_KMD: torch.Tensor, available_KM: torch.Tensor, *, is_normalized: bool) -> torch.Tensor:
    """Mean of a window's other available modalities per modality, (K, M, D); zeros where there is none."""
    weight = available_KM.to(unit_KMD.dtype)
    present_KMD = unit_KMD * weight[..., None]
    others_KMD = present_KMD.sum(dim=1, keepdim=True) - present_KMD
    count_KM = weight.sum(dim=1, keepdim=True) - weight
    target_KMD = others_KMD / count_KM.clamp(min=1)[..., None]
    return normalize(target_KMD, dim=-1) if is_normalized else target_KMD


def _cross_entropy(
    query_MND: torch.Tensor,
    key_MKD: torch.Tensor,
    allowed_MNK: torch.Tensor,
    itself_NK: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of each query with its own key among the allowed keys, (M, N), and whether it ranks first.

    Rows that are no members give finite numbers which the caller leaves out.
    """
    logits_MNK = torch.einsum("mnd,mkd->mnk", query_MND, key_MKD) * scale
    # The lowest finite number, not -inf: a row without any allowed key must not turn the gradient into NaN.
    logits_MNK = logits_MNK.masked_fill(~(allowed_MNK | itself_NK), torch.finfo(logits_MNK.dtype).min)
    positive_MN = torch.where(itself_NK, logits_MNK, torch.zeros_like(logits_MNK)).sum(dim=-1)
    is_first_MN = logits_MNK.argmax(dim=-1) == itself_NK.to(torch.int64).argmax(dim=-1)
    return logits_MNK.logsumexp(dim=-1) - positive_MN, is_first_MN


def _drop_channels(group: ChannelBatch, windows: Sequence[Window], name: str, *, seed: int, probability: float) -> None:
    """Hides random channels of a group in place, always keeping one of those a window has."""
    for b, window in enumerate(windows):
        real = int(group.mask_BC[b].sum())
        if real > 1:
            draws = generator(seed, window.epoch, window.key, "channels", name).random(real)
            draws[draws.argmax()] = 1.0
            group.mask_BC[b, :real] = torch.from_numpy(draws >= probability)
