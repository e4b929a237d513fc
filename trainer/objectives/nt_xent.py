"""NT-Xent over single channels (SimCLR on univariate windows, One Model for All).

A window gives one random channel, one random crop of it and two augmentations of that crop. Two shortcuts are
closed. A view's channel and rate codes equal its partner's and differ from other channels', so the loss could fall
without looking at the signal: `id_leak_guard` says how that is prevented. And other channels or neighbours of the
same stretch of recording are not negatives: pairs of one recording nearer than `near_s` are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import gelu, normalize

from manifests.errors import ConfigError
from trainer.batches import ChannelBatch
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
from trainer.models.univariate import UnivariateEncoder
from trainer.objectives.crops import NUM_VIEWS, CropConfig, NtXentBatch, draw_crops, pack_crops
from trainer.read import Window


class NtXentConfig(CropConfig):
    """What is drawn from a window, and which pairs are no negatives: those of one recording nearer than `near_s`.

    `mix_rates` resamples the second view of every crop to the next of `rates_hz`. Without it a crop of another rate is
    a negative that its rate alone tells apart, and the encoder learns to tell rates instead of to see past them.
    """

    kind: Literal["nt_xent"] = "nt_xent"
    temperature: float = Field(default=0.1, gt=0)
    projection: int = Field(default=64, ge=2)
    near_s: float = Field(default=60.0, ge=0)
    mix_rates: bool = False


class NtXent(nn.Module):
    """The objective around a univariate encoder; the projection head is left behind after pretraining."""

    loss_parameters: tuple[str, ...] = ()

    def __init__(self, encoder: Encoder, config: NtXentConfig) -> None:
        super().__init__()
        if not isinstance(encoder, UnivariateEncoder):
            raise ConfigError(
                f"objective: nt_xent with encoder kind {encoder.config.kind!r}; its guard against the channel "
                "shortcut needs an encoder that can hide its codes: set encoder.kind to univariate"
            )
        if list(config.rates_hz) != sorted(set(config.rates_hz)):
            raise ConfigError(f"objective.rates_hz: {list(config.rates_hz)} is not sorted without repeats; sort it")
        if config.mix_rates and len(config.rates_hz) < 2:
            raise ConfigError(
                f"objective.mix_rates: rates_hz is {list(config.rates_hz)}, two rates or more are needed; add one, it "
                "need not occur in the data"
            )
        self.encoder = encoder
        self.config = config
        self.fc1 = nn.Linear(encoder.width, encoder.width)
        self.fc2 = nn.Linear(encoder.width, config.projection)

    def collate(self, windows: Sequence[Window], *, seed: int) -> NtXentBatch:
        """`crops_per_window` crops in two views each; a window without any such channel gives none.

        Every draw is a function of (seed, epoch, key), the crop and, for augmentations, the view.
        """
        drawn = [crop for window in windows for crop in draw_crops(window, self.config, seed=seed)]
        return pack_crops(drawn, self.config)

    def forward(self, batch: NtXentBatch, finish: Callable[..., Any] | None = None) -> Any:
        """Loss of the local views against those of all ranks, and metrics; or what `finish` makes of `embed`.

        The mean over ranks of the gradients of this loss is the gradient of the loss of the global batch.
        """
        return (finish or self.loss)(self.embed(batch))

    def embed(self, batch: NtXentBatch) -> dict[str, torch.Tensor]:
        """Projected unit vectors `embedding_NVD`, encoder's `feature_ND` of the first view, and the crops' ids."""
        unit_NVD, feature_NVD = self._encode(batch)
        return {
            "embedding_NVD": unit_NVD,
            "feature_ND": feature_NVD[:, 0],
            "channel_N": batch.channel_N,
            "recording_N": batch.recording_N,
            "start_ms_N": batch.start_ms_N,
        }

    def loss(self, embedded: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and metrics of what `embed` gave, never in bf16 as the encoder may be."""
        with torch.autocast(embedded["embedding_NVD"].device.type, enabled=False):
            return nt_xent_loss(
                exact(embedded["embedding_NVD"]),
                channel_N=embedded["channel_N"],
                recording_N=embedded["recording_N"],
                start_ms_N=embedded["start_ms_N"],
                config=self.config,
            )

    def _encode(self, batch: NtXentBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit vectors and features (N, 2, D). Every rate runs on every rank: ZeRO-3 needs one module sequence."""
        features = []
        for number, (group, keep_BC, count) in enumerate(zip(batch.groups, batch.keeps, batch.counts, strict=True)):
            if self.config.mix_rates:
                other_hz = self.config.rates_hz[(number + 1) % len(self.config.rates_hz)]
                views = zip(_views(group, other_hz), keep_BC.chunk(NUM_VIEWS), strict=True)
                pooled_BD = torch.cat([self.encoder(view, code_keep_BC=keep).pooled_BD for view, keep in views])
            else:
                pooled_BD = self.encoder(group, code_keep_BC=keep_BC).pooled_BD
            features.append(pooled_BD.unflatten(0, (NUM_VIEWS, -1))[:, :count].transpose(0, 1))
        feature_NVD = torch.cat(features)
        projected = self.fc2(gelu(self.fc1(feature_NVD)))
        return normalize(projected.to(torch.promote_types(projected.dtype, torch.float32)), dim=-1), feature_NVD


def _views(group: ChannelBatch, other_hz: float) -> tuple[ChannelBatch, ChannelBatch]:
    """The first views as they are and the second ones at another rate."""
    columns = ("signal_BCT", "mask_BC", "anode_BC", "cathode_BC", "kind_BC")
    first, second = (
        replace(group, **{name: getattr(group, name).chunk(NUM_VIEWS)[view] for name in columns})
        for view in range(NUM_VIEWS)
    )
    length = round(second.signal_BCT.shape[-1] * other_hz / group.rate_hz)
    return first, replace(second, signal_BCT=resampled(second.signal_BCT, length), rate_hz=other_hz)


def resampled(signal_BCT: torch.Tensor, length: int) -> torch.Tensor:
    """The same stretch of time in `length` samples; what the lower of the two rates cannot hold is left out.

    By way of the Fourier transform, after a straight line through first and last sample is taken away: without that
    the jump from the end back to the start would ring.
    """
    old = signal_BCT.shape[-1]
    first, last = signal_BCT[..., :1], signal_BCT[..., -1:]
    at = torch.arange(old, device=signal_BCT.device) / (old - 1)
    at_new = torch.arange(length, device=signal_BCT.device) * (old / length) / (old - 1)
    spectrum = torch.fft.rfft(signal_BCT - (first + (last - first) * at))
    return torch.fft.irfft(spectrum, n=length) * (length / old) + first + (last - first) * at_new


def nt_xent_loss(
    unit_NVD: torch.Tensor,
    *,
    channel_N: torch.Tensor,
    recording_N: torch.Tensor,
    start_ms_N: torch.Tensor,
    config: NtXentConfig,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """NT-Xent of the local rows (scalar) and metrics; K is the number of crops of all ranks, V and W are views.

    Metrics over all ranks: `top1` (share of views whose nearest allowed neighbour is their other view), `alignment`
    (mean cosine of two views of a crop), `pair_distance` and `uniformity` (alignment and uniformity as Wang and Isola
    2020 define them: mean squared distance of two views; logarithm of the mean of exp(-2 |a - b|^2) over views of
    different crops; both the lower the better), `negatives` per anchor, number of `anchors`, and the `temperature`,
    which is not learnt here.
    """
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
        potential_NVKW = (4 * config.temperature * logits_NVKW - 4).exp() * ~itself_NK[:, None, :, None]
        sums = [
            local,
            hits,
            config.temperature * positive_NV.sum(),
            NUM_VIEWS * NUM_VIEWS * negative_NK.sum(),
            potential_NVKW.sum(),
            NUM_VIEWS * NUM_VIEWS * (~itself_NK).sum(),
        ]
        totals = sum_over_ranks(torch.stack([value.double() for value in sums]))
        total, hits, cosine, negatives = (totals[:4] / max(1, count)).unbind()
        potential = totals[4] / totals[5].clamp(min=1)
    return loss, {
        "loss": total,
        "top1": hits,
        "alignment": cosine,
        "pair_distance": 2 - 2 * cosine,
        "uniformity": potential.clamp(min=torch.finfo(potential.dtype).tiny).log(),
        "negatives": negatives,
        "anchors": torch.tensor(count, device=device),
        "temperature": torch.tensor(config.temperature, device=device),
    }
