"""Features of every channel by itself, pooled over the channels of a group: band powers, and univariate encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.signal import welch
from scipy.stats import kurtosis

from manifests.config import digest
from manifests.tasks import Task
from trainer.batches import collate_channels, row_rate_hz, signal_rows
from trainer.evaluation.features import EncoderFeatures, Extractor, Reading, cut
from trainer.models.build import Encoder
from trainer.models.univariate import UnivariateEncoder
from trainer.read import Window

BANDS_HZ = {"delta": (0.5, 4), "theta": (4, 8), "alpha": (8, 12), "beta": (12, 30), "gamma": (30, 45)}
NUM_FEATURES = len(BANDS_HZ) + 5
SEGMENT_S = 4.0  # of Welch's method: 0.25 Hz a bin
TINY = 1e-12  # below any power in any unit that kymo stores

# Kinds and (C, F) values of the channels of each window, by symbol.
PerChannel = Callable[[Sequence[Window]], list[dict[str, np.ndarray]]]


class ChannelwiseFeatures:
    """Per group of kinds the mean over channels, and their standard deviation where asked for; zeros where absent."""

    def __init__(
        self,
        per_channel: PerChannel,
        groups: Mapping[str, Sequence[str]],
        *,
        size: int,
        has_spread: bool,
        identity: str,
    ) -> None:
        self.identity = digest([identity, {**groups}, has_spread])
        self._per_channel = per_channel
        self._groups = groups
        self._size = size
        self._has_spread = has_spread
        self._known: dict[str, dict[str, np.ndarray]] = {}

    def __call__(self, windows: Sequence[Window], *, channels: Sequence[str] | None = None) -> np.ndarray:
        """(N, groups x features) float32. What is computed for a subset of channels serves all other subsets."""
        if channels is None:
            return np.stack([self._pool(found, None) for found in self._per_channel(windows)])
        fresh = [window for window in windows if window.key not in self._known]
        if fresh:
            self._known |= dict(zip((w.key for w in fresh), self._per_channel(fresh), strict=True))
        return np.stack([self._pool(self._known[window.key], frozenset(channels)) for window in windows])

    def _pool(self, found: Mapping[str, np.ndarray], channels: frozenset[str] | None) -> np.ndarray:
        blocks = []
        for kinds in self._groups.values():
            values = [
                value
                for symbol, value in found.items()
                if symbol.partition(":")[0] in kinds and (channels is None or symbol in channels)
            ]
            stacked = np.stack(values) if values else np.zeros((1, self._size))
            blocks += [stacked.mean(axis=0), *([stacked.std(axis=0)] if self._has_spread else [])]
        return np.concatenate(blocks).astype(np.float32)


def band_power(task: Task) -> Extractor:
    """Log powers of five bands (Welch), and amplitude, line length, zero crossings, mobility and kurtosis."""

    def per_channel(windows: Sequence[Window]) -> list[dict[str, np.ndarray]]:
        return [_band_power_of(window, task) for window in windows]

    groups = {kind: (kind,) for kind in task.kinds}
    return ChannelwiseFeatures(per_channel, groups, size=NUM_FEATURES, has_spread=True, identity="band power 1")


def _band_power_of(window: Window, task: Task) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for kind, row in signal_rows(window.meta["ucs"], kinds=task.kinds, channels=task.channels):
        tag = window.meta["ucs"][kind][row]
        stored_CT = np.asarray(window.arrays[kind])
        found[tag["symbol"]] = describe_signal(stored_CT[row] * tag["scale"], rate_hz=row_rate_hz(tag))
    return found


def describe_signal(signal_T: np.ndarray, *, rate_hz: float) -> np.ndarray:
    """(F,) features of one channel in physical units; finite for a flat one."""
    segment = min(len(signal_T), round(SEGMENT_S * rate_hz))
    frequency, power = welch(signal_T, fs=rate_hz, nperseg=segment)
    step = frequency[1] - frequency[0]
    bands = [power[(frequency >= low) & (frequency < high)].sum() * step for low, high in BANDS_HZ.values()]
    centred, slope = signal_T - signal_T.mean(), np.diff(signal_T)
    sd, slope_sd = centred.std(), slope.std()
    shape = kurtosis(centred) if sd > 0 else 0.0
    others = [
        np.log(sd + TINY),
        np.log(np.abs(slope).mean() * rate_hz + TINY),
        (np.diff(np.signbit(centred)) != 0).mean() * rate_hz,
        slope_sd / sd if sd > 0 else 0.0,
        np.log1p(max(shape, 0.0)),
    ]
    return np.array([*np.log(np.array(bands) + TINY), *others])


def extractor_of(encoder: Encoder, reading: Reading, *, identity: str, device: str = "cpu") -> Extractor:
    """Frozen features of an encoder; of a univariate one channel by channel, which makes ablations cheap."""
    if not isinstance(encoder, UnivariateEncoder):
        return EncoderFeatures(encoder, reading, identity=identity, device=device)
    encoder.eval().to(device)

    @torch.no_grad()
    def per_channel(windows: Sequence[Window]) -> list[dict[str, np.ndarray]]:
        found: list[dict[str, np.ndarray]] = [{} for _ in windows]
        for kinds in reading.groups.values():
            batch = collate_channels(windows, kinds=kinds, view=reading.view).to(device)
            batch, num_pieces = cut(batch, segment_s=reading.segment_s)
            shape = batch.mask_BC.shape
            single = {name: getattr(batch, name).reshape(-1, 1) for name in ("mask_BC", "anode_BC", "cathode_BC")}
            alone = replace(
                batch,
                signal_BCT=batch.signal_BCT.flatten(0, 1)[:, None],
                kind_BC=batch.kind_BC.reshape(-1, 1),
                **single,
            )
            pooled = encoder(alone).pooled_BD.reshape(-1, num_pieces, shape[1], encoder.width).mean(dim=1)
            values_BCD = pooled.float().cpu().numpy()
            for window, values_CD, own in zip(windows, values_BCD, found, strict=True):
                rows = signal_rows(window.meta["ucs"], kinds=kinds)
                symbols = [window.meta["ucs"][kind][row]["symbol"] for kind, row in rows]
                own.update(zip(symbols, values_CD, strict=False))
        return found

    return ChannelwiseFeatures(
        per_channel,
        reading.groups,
        size=encoder.width,
        has_spread=False,
        identity=digest([identity, reading.view, reading.segment_s]),
    )
