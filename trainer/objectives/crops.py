"""The data side of NT-Xent: crops of single channels of each window, in two augmented views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from manifests.errors import ConfigError
from trainer.augment import AugmentConfig, augment
from trainer.batches import ChannelBatch, channel_ids, generator, move, row_rate_hz, signal_rows, stable_hash
from trainer.read import Window, read_rows
from trainer.views import find_view

NUM_VIEWS = 2


class CropConfig(BaseModel):
    """What is drawn from a window.

    `id_leak_guard`: `drop` hides channel and rate codes in pretraining; `homogeneous` keeps them and takes negatives
    of the same channel and rate only; `dropout` hides them in half of the views.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kinds: tuple[str, ...] = ("eeg", "eog", "ecg", "emg", "resp")
    channels: tuple[str, ...] | None = None
    rates_hz: tuple[float, ...] = Field(default=(128.0,), min_length=1)
    crop_s: float = Field(default=4.0, gt=0)
    crops_per_window: int = Field(default=1, ge=1)
    view: str = "robust"
    augment: AugmentConfig = AugmentConfig()
    id_leak_guard: Literal["drop", "homogeneous", "dropout"] = "drop"


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


def draw_crops(window: Window, config: CropConfig, *, seed: int) -> list[Crop]:
    """Random crops of random channels in two views each; none if the window has no such channel.

    No other samples are read. Every draw is a function of (seed, epoch, key), the number of the crop in its window
    and, for augmentations, the view.

    Raises:
        ConfigError: A rate that `rates_hz` does not list, or a window shorter than the crop.
    """
    rows = signal_rows(window.meta["ucs"], kinds=config.kinds, channels=config.channels)
    return [
        _draw_crop(window, rows, number, config, seed=seed) for number in range(config.crops_per_window if rows else 0)
    ]


def _draw_crop(window: Window, rows: Sequence[tuple[str, int]], number: int, config: CropConfig, *, seed: int) -> Crop:
    # The first crop draws as it did when it was the only one.
    place = (seed, window.epoch, window.key, *([number] if number else []))
    rng = generator(*place, "crop")
    kind, row = rows[int(rng.integers(len(rows)))]
    tag = window.meta["ucs"][kind][row]
    rate_hz = row_rate_hz(tag)
    start = _crop_start(window, window.arrays[kind].shape[1], rate_hz, config, rng)
    stored_1T = np.empty((1, round(config.crop_s * rate_hz)), dtype=np.int16)
    read_rows(window.arrays[kind], [row], stored_1T, start=start)
    signal_T = find_view(config.view)(stored_1T, [tag])[0]
    numerator, denominator = window.meta["rate"]
    return Crop(
        views_2T=np.stack([augment(signal_T, generator(*place, view), config.augment) for view in range(NUM_VIEWS)]),
        keep_2=_code_keep(config.id_leak_guard, rng),
        rate_hz=rate_hz,
        ids=channel_ids(tag),
        recording=stable_hash(window.corpus, window.recording),
        start_ms=round(1000 * window.meta["start"] * denominator / numerator + 1000 * start / rate_hz),
    )


def pack_crops(crops: Sequence[Crop], config: CropConfig) -> NtXentBatch:
    """Crops as a batch, grouped by rate."""
    by_rate: dict[float, list[Crop]] = {rate: [] for rate in config.rates_hz}
    for crop in crops:
        by_rate[crop.rate_hz].append(crop)
    ordered = [crop for crops in by_rate.values() for crop in crops]
    channels = [stable_hash(*crop.ids, crop.rate_hz) for crop in ordered]
    return NtXentBatch(
        groups=tuple(_pack(crops, rate, crop_s=config.crop_s) for rate, crops in by_rate.items()),
        keeps=tuple(_pack_keeps(crops) for crops in by_rate.values()),
        counts=tuple(len(crops) for crops in by_rate.values()),
        channel_N=torch.tensor(channels, dtype=torch.int64),
        recording_N=torch.tensor([crop.recording for crop in ordered], dtype=torch.int64),
        start_ms_N=torch.tensor([crop.start_ms for crop in ordered], dtype=torch.int64),
    )


def _crop_start(window: Window, length: int, rate_hz: float, config: CropConfig, rng: np.random.Generator) -> int:
    if rate_hz not in config.rates_hz:
        raise ConfigError(
            f"objective.rates_hz: {window.key} has a channel at {rate_hz:g} Hz, listed are "
            f"{', '.join(f'{rate:g}' for rate in config.rates_hz)}; add the rate or leave its kind out of `kinds`"
        )
    spare = length - round(config.crop_s * rate_hz)
    if spare < 0:
        raise ConfigError(
            f"objective.crop_s: {config.crop_s:g} s, but {window.key} has {length / rate_hz:g} s; "
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
