"""NT-Xent over single channels (SimCLR on univariate windows, One Model for All).

A window gives one random channel, one random crop of it and two augmentations of that crop. Two shortcuts are
closed. A view's channel and rate codes equal its partner's and differ from other channels', so the loss could fall
without looking at the signal: `id_leak_guard` says how that is prevented. And other channels or neighbours of the
same stretch of recording are not negatives: pairs of one recording nearer than `near_s` are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.nn.functional import gelu, normalize

from manifests.errors import ConfigError
from trainer.augment import AugmentConfig, augment
from trainer.batches import ChannelBatch, channel_ids, generator, move, row_rate_hz, signal_rows, stable_hash
from trainer.collectives import all_gather_rows, all_gather_with_grad, gather_sizes, rank, sum_over_ranks, world_size
from trainer.models.build import Encoder
from trainer.models.univariate import UnivariateEncoder
from trainer.read import Window
from trainer.views import find_view

NUM_VIEWS = 2


class NtXentConfig(BaseModel):
    """What is drawn from a window and which pairs are negatives.

    `id_leak_guard`: `drop` hides channel and rate codes in pretraining; `homogeneous` keeps them and takes negatives
    of the same channel and rate only; `dropout` hides them in half of the views.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["nt_xent"] = "nt_xent"
    kinds: tuple[str, ...] = ("eeg", "eog", "ecg", "emg", "resp")
    channels: tuple[str, ...] | None = None
    rates_hz: tuple[float, ...] = Field(default=(128.0,), min_length=1)
    crop_s: float = Field(default=4.0, gt=0)
    view: str = "robust"
    augment: AugmentConfig = AugmentConfig()
    temperature: float = Field(default=0.1, gt=0)
    projection: int = Field(default=64, ge=2)
    id_leak_guard: Literal["drop", "homogeneous", "dropout"] = "drop"
    near_s: float = Field(default=60.0, ge=0)


@dataclass(slots=True, kw_only=True)
class NtXentBatch:
    """N crops in two views each, grouped by rate in the order of `rates_hz`.

    `groups[r]` holds first the first views of its `counts[r]` crops, then their second views, as windows of one
    channel; a rate without a crop holds a placeholder. `keeps[r]` is the factor (B, 1) on the codes. The other
    tensors follow the crops of all groups: channel and rate, recording, and start in ms.
    """

    groups: tuple[ChannelBatch, ...]
    keeps: tuple[torch.Tensor, ...]
    counts: tuple[int, ...]
    channel_N: torch.Tensor
    recording_N: torch.Tensor
    start_ms_N: torch.Tensor

    def to(self, device: torch.device | str) -> NtXentBatch:
        """The same batch on `device`."""
        return move(self, device)


@dataclass(slots=True, kw_only=True)
class Crop:
    """One crop of one channel in two views (2, T), with what the loss must know of it."""

    views_2T: np.ndarray
    keep_2: np.ndarray
    rate_hz: float
    ids: tuple[int, int, int]
    recording: int
    start_ms: int


class NtXent(nn.Module):
    """The objective around a univariate encoder; the projection head is left behind after pretraining."""

    def __init__(self, encoder: Encoder, config: NtXentConfig) -> None:
        super().__init__()
        if not isinstance(encoder, UnivariateEncoder):
            raise ConfigError(
                f"objective: nt_xent with encoder kind {encoder.config.kind!r}; its guard against the channel "
                "shortcut needs an encoder that can hide its codes: set encoder.kind to univariate"
            )
        if list(config.rates_hz) != sorted(set(config.rates_hz)):
            raise ConfigError(f"objective.rates_hz: {list(config.rates_hz)} is not sorted without repeats; sort it")
        self.encoder = encoder
        self.config = config
        self.fc1 = nn.Linear(encoder.width, encoder.width)
        self.fc2 = nn.Linear(encoder.width, config.projection)

    def collate(self, windows: Sequence[Window], *, seed: int) -> NtXentBatch:
        """One crop in two views per window; a window without any such channel gives none.

        Every draw is a function of (seed, epoch, key) and, for augmentations, the view.
        """
        drawn = [crop for window in windows if (crop := draw_crop(window, self.config, seed=seed)) is not None]
        by_rate: dict[float, list[Crop]] = {rate: [] for rate in self.config.rates_hz}
        for crop in drawn:
            by_rate[crop.rate_hz].append(crop)
        ordered = [crop for crops in by_rate.values() for crop in crops]
        channels = [stable_hash(*crop.ids, crop.rate_hz) for crop in ordered]
        return NtXentBatch(
            groups=tuple(_pack(crops, rate, crop_s=self.config.crop_s) for rate, crops in by_rate.items()),
            keeps=tuple(_pack_keeps(crops) for crops in by_rate.values()),
            counts=tuple(len(crops) for crops in by_rate.values()),
            channel_N=torch.tensor(channels, dtype=torch.int64),
            recording_N=torch.tensor([crop.recording for crop in ordered], dtype=torch.int64),
            start_ms_N=torch.tensor([crop.start_ms for crop in ordered], dtype=torch.int64),
        )

    def forward(self, batch: NtXentBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of the local views against those of all ranks, and metrics.

        The mean over ranks of the gradients of this loss is the gradient of the loss of the global batch.
        """
        unit_NVD, _ = self._encode(batch)
        return nt_xent_loss(
            unit_NVD,
            channel_N=batch.channel_N,
            recording_N=batch.recording_N,
            start_ms_N=batch.start_ms_N,
            config=self.config,
        )

    def embed(self, batch: NtXentBatch) -> dict[str, torch.Tensor]:
        """Projected unit vectors `embedding_NVD`, encoder's `feature_ND` of the first view, and the crops' ids."""
        unit_NVD, feature_NVD = self._encode(batch)
        return {
            "embedding_NVD": unit_NVD,
            "feature_ND": feature_NVD[:, 0],
            "channel_N": batch.channel_N,
            "recording_N": batch.recording_N,
        }

    def _encode(self, batch: NtXentBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit vectors and features (N, 2, D). Every rate runs on every rank: ZeRO-3 needs one module sequence."""
        features = []
        for group, keep_BC, count in zip(batch.groups, batch.keeps, batch.counts, strict=True):
            pooled_BD = self.encoder(group, code_keep_BC=keep_BC).pooled_BD
            features.append(pooled_BD.unflatten(0, (NUM_VIEWS, -1))[:, :count].transpose(0, 1))
        feature_NVD = torch.cat(features)
        projected = self.fc2(gelu(self.fc1(feature_NVD)))
        return normalize(projected.to(torch.promote_types(projected.dtype, torch.float32)), dim=-1), feature_NVD


def draw_crop(window: Window, config: NtXentConfig, *, seed: int) -> Crop | None:
    """A random crop of a random channel in two views, None if the window has no such channel.

    Raises:
        ConfigError: A rate that `rates_hz` does not list, or a window shorter than the crop.
    """
    rows = signal_rows(window, kinds=config.kinds, channels=config.channels)
    if not rows:
        return None
    rng = generator(seed, window.epoch, window.key, "crop")
    kind, row = rows[int(rng.integers(len(rows)))]
    tag = window.meta["ucs"][kind][row]
    rate_hz = row_rate_hz(tag)
    stored_T = window.arrays[kind][row]
    start = _crop_start(window, stored_T, rate_hz, config, rng)
    stored_T = stored_T[start : start + round(config.crop_s * rate_hz)]
    signal_T = find_view(config.view)(stored_T[None, :], [tag])[0]
    numerator, denominator = window.meta["rate"]
    return Crop(
        views_2T=np.stack(
            [
                augment(signal_T, generator(seed, window.epoch, window.key, view), config.augment)
                for view in range(NUM_VIEWS)
            ]
        ),
        keep_2=_code_keep(config.id_leak_guard, rng),
        rate_hz=rate_hz,
        ids=channel_ids(tag),
        recording=stable_hash(window.corpus, window.recording),
        start_ms=round(1000 * window.meta["start"] * denominator / numerator + 1000 * start / rate_hz),
    )


def nt_xent_loss(
    unit_NVD: torch.Tensor,
    *,
    channel_N: torch.Tensor,
    recording_N: torch.Tensor,
    start_ms_N: torch.Tensor,
    config: NtXentConfig,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """NT-Xent of the local rows (scalar) and metrics; K is the number of crops of all ranks, V and W are views."""
    sizes = gather_sizes(len(unit_NVD), device=unit_NVD.device)
    unit_KWD = all_gather_with_grad(unit_NVD, sizes)
    channel_K, recording_K, start_ms_K = (all_gather_rows(x, sizes) for x in (channel_N, recording_N, start_ms_N))
    own = slice(start := sum(sizes[: rank()]), start + len(unit_NVD))
    device = unit_NVD.device
    itself_NK = torch.arange(own.start, own.stop, device=device)[:, None] == torch.arange(sum(sizes), device=device)
    is_near_NK = (recording_N[:, None] == recording_K) & (
        (start_ms_N[:, None] - start_ms_K).abs() < 1000 * config.near_s
    )
    negative_NK = ~itself_NK & ~is_near_NK
    if config.id_leak_guard == "homogeneous":
        negative_NK &= channel_N[:, None] == channel_K
    other_VW = ~torch.eye(NUM_VIEWS, dtype=torch.bool, device=device)
    positive_NVKW = itself_NK[:, None, :, None] & other_VW[:, None, :]
    allowed_NVKW = negative_NK[:, None, :, None] | positive_NVKW
    logits_NVKW = torch.einsum("nvd,kwd->nvkw", unit_KWD[own], unit_KWD) / config.temperature
    logits_NVC = logits_NVKW.masked_fill(~allowed_NVKW, float("-inf")).flatten(2)
    # The other view is always allowed, so no row is empty.
    positive_NV = torch.where(positive_NVKW, logits_NVKW, torch.zeros_like(logits_NVKW)).sum(dim=(2, 3))
    local = (logits_NVC.logsumexp(dim=-1) - positive_NV).sum()
    count = NUM_VIEWS * sum(sizes)
    loss = local * (world_size() / max(1, count))
    with torch.no_grad():
        hits = (positive_NV >= logits_NVC.max(dim=-1).values).sum() if len(unit_NVD) else local.new_zeros(())
        sums = torch.stack(
            [
                local.double(),
                hits.double(),
                config.temperature * positive_NV.sum().double(),
                NUM_VIEWS * NUM_VIEWS * negative_NK.sum().double(),
            ]
        )
        total, hits, cosine, negatives = (sum_over_ranks(sums) / max(1, count)).unbind()
    return loss, {
        "loss": total,
        "top1": hits,
        "alignment": cosine,
        "negatives": negatives,
        "anchors": torch.tensor(count, device=device),
    }


def _crop_start(
    window: Window, stored_T: np.ndarray, rate_hz: float, config: NtXentConfig, rng: np.random.Generator
) -> int:
    if rate_hz not in config.rates_hz:
        raise ConfigError(
            f"objective.rates_hz: {window.key} has a channel at {rate_hz:g} Hz, listed are "
            f"{', '.join(f'{rate:g}' for rate in config.rates_hz)}; add the rate or leave its kind out of `kinds`"
        )
    spare = len(stored_T) - round(config.crop_s * rate_hz)
    if spare < 0:
        raise ConfigError(
            f"objective.crop_s: {config.crop_s:g} s, but {window.key} has {len(stored_T) / rate_hz:g} s; "
            "shorten the crop or choose a recipe with longer windows"
        )
    return int(rng.integers(spare + 1))


def _code_keep(guard: str, rng: np.random.Generator) -> np.ndarray:
    kept = {"drop": np.zeros(NUM_VIEWS), "homogeneous": np.ones(NUM_VIEWS)}
    return kept[guard] if guard in kept else (rng.random(NUM_VIEWS) < 0.5).astype(np.float64)


def _pack(crops: list[Crop], rate_hz: float, *, crop_s: float) -> ChannelBatch:
    """Both views of the crops as windows of one channel; two empty windows if there is no crop."""
    ids = torch.tensor([crop.ids for crop in crops] or [(0, 0, 0)], dtype=torch.int64).repeat(NUM_VIEWS, 1)
    length = round(crop_s * rate_hz)
    views_NVT: Any = np.stack([crop.views_2T for crop in crops]) if crops else np.zeros((1, NUM_VIEWS, length))
    signal_VNT = np.ascontiguousarray(views_NVT.transpose(1, 0, 2), dtype=np.float32)
    return ChannelBatch(
        signal_BCT=torch.from_numpy(signal_VNT.reshape(-1, 1, length)),
        mask_BC=torch.full((len(ids), 1), bool(crops)),
        anode_BC=ids[:, 0:1].clone(),
        cathode_BC=ids[:, 1:2].clone(),
        kind_BC=ids[:, 2:3].clone(),
        rate_hz=rate_hz,
    )


def _pack_keeps(crops: list[Crop]) -> torch.Tensor:
    keep_VN = np.stack([crop.keep_2 for crop in crops], axis=1) if crops else np.zeros((NUM_VIEWS, 1))
    return torch.from_numpy(keep_VN.reshape(-1, 1).astype(np.float32))
