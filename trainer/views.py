"""Views: the normalisations that turn a stored int16 window into what an encoder reads.

Shards hold physical units (value = int16 x scale). A view is chosen in the training config and applied when a
batch is built, so one snapshot serves all of them. A view is a gain and a shift per channel, from its tag, and a
limit, so that a batch travels as int16 and becomes float32 on the device (`dequantise`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from manifests.errors import ConfigError

Tag = Mapping[str, Any]
Affine = Callable[[Sequence[Tag]], tuple[np.ndarray, np.ndarray]]

# The clip keeps an electrode pop from owning a batch's gradient. A QRS complex reaches 20 x MAD, a slow wave 8 sd.
ZSCORE_LIMIT = 8.0
ROBUST_LIMIT = 20.0
CLAMP_LIMIT_UV = 50.0
MAD_TO_SD = 1.4826  # of a normal distribution
MICROVOLTS = {"uV": 1.0, "mV": 1e3, "V": 1e6}
BLOCK_SAMPLES = 1 << 17
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A normalisation: stored x gain + shift within +-limit.

    Attributes:
        affine: Gain and shift per channel, from the tags.
        limit: Largest magnitude of the result.
        is_robust: Gain and shift come from the window's median and MAD instead.
    """

    affine: Affine
    limit: float
    is_robust: bool = False

    def __call__(self, stored_CT: np.ndarray, tags: Sequence[Tag]) -> np.ndarray:
        """The view of a window: float32 (C, T)."""
        gain_C, shift_C = scaling(self, tags)
        stored = torch.from_numpy(stored_CT if stored_CT.flags.writeable else stored_CT.copy())
        return dequantise(stored, torch.from_numpy(gain_C), torch.from_numpy(shift_C), view=self).numpy()


def scaling(view: View, tags: Sequence[Tag]) -> tuple[np.ndarray, np.ndarray]:
    """Gain and shift per channel as finite float32: infinity x 0 is no number. A gain that is none becomes 0."""
    gain_C, shift_C = (
        np.nan_to_num(np.clip(values, -_LARGEST, _LARGEST)).astype(np.float32) for values in view.affine(tags)
    )
    return gain_C, shift_C


def dequantise(
    stored_RT: torch.Tensor,
    gain_R: torch.Tensor,
    shift_R: torch.Tensor,
    *,
    view: View,
    out_RT: torch.Tensor | None = None,
) -> torch.Tensor:
    """float32 (R, T) of int16 rows, on their device, in `out_RT` if given."""
    if out_RT is None:
        out_RT = torch.empty(stored_RT.shape, dtype=torch.float32, device=stored_RT.device)
    num_rows, length = stored_RT.shape
    # A CPU does all passes over a few rows while they are in its cache: twice as fast or better.
    step = max(1, BLOCK_SAMPLES // max(1, length)) if stored_RT.device.type == "cpu" else max(1, num_rows)
    for first in range(0, num_rows, step):
        rows = slice(first, first + step)
        _apply(stored_RT[rows], gain_R[rows, None], shift_R[rows, None], view, out_RT[rows])
    return out_RT


def _apply(
    stored_RT: torch.Tensor, gain_R1: torch.Tensor, shift_R1: torch.Tensor, view: View, out_RT: torch.Tensor
) -> None:
    out_RT.copy_(stored_RT)
    if view.is_robust:
        out_RT -= _median(stored_RT)[:, None]
        spread_R = MAD_TO_SD * _median(out_RT.abs())
        spread_R = torch.where(spread_R > 0, spread_R, out_RT.std(dim=1, correction=0))
        out_RT *= torch.where(spread_R > 0, 1 / spread_R, torch.zeros_like(spread_R))[:, None]
    else:
        out_RT *= gain_R1
        out_RT += shift_R1
    out_RT.clamp_(-view.limit, view.limit)


def _median(values_RT: torch.Tensor) -> torch.Tensor:
    """Median of each row as float32, the mean of the two middle values where their number is even."""
    length = values_RT.shape[1]
    place = (length + 1) // 2
    lower_R = values_RT.kthvalue(place, dim=1).values
    if length % 2:
        return lower_R.float()
    is_upper_RT = values_RT > lower_R[:, None]
    # The next value is the same one again if more than half of them are not above it.
    above_R = torch.where(is_upper_RT, values_RT, values_RT.amax(dim=1, keepdim=True)).amin(dim=1)
    upper_R = torch.where(is_upper_RT.sum(dim=1) < length - place, lower_R, above_R)
    return (lower_R.float() + upper_R.float()) / 2


def _zscore(tags: Sequence[Tag]) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviations of the recording, whose mean and sd stand in the tag.

    So the level of a window against its night survives (SleepFM's whole-night z-score). A channel whose sd is 0 or
    unknown becomes zeros.
    """
    scale, mean, sd = (_column(tags, name) for name in ("scale", "mean", "sd"))
    return _divide(scale, sd), -_divide(mean, sd)


def _robust(tags: Sequence[Tag]) -> tuple[np.ndarray, np.ndarray]:
    """Nothing of the tags: (window - median) / (1.4826 x MAD), in which the unit cancels.

    Where more than half of the samples are equal the MAD is 0 and the window's sd takes its place; a flat channel
    becomes zeros.
    """
    return np.ones(len(tags)), np.zeros(len(tags))


def _labram(tags: Sequence[Tag]) -> tuple[np.ndarray, np.ndarray]:
    """Units of 100 uV (LaBraM); ConfigError for a channel that is not a voltage."""
    return _column(tags, "scale") * _to_microvolts(tags, "labram") / 100.0, np.zeros(len(tags))


def _clamp(tags: Sequence[Tag]) -> tuple[np.ndarray, np.ndarray]:
    """Units of 10 uV (SleepFM's transfer to wake EEG); ConfigError for a channel that is not a voltage."""
    return _column(tags, "scale") * _to_microvolts(tags, "clamp") / 10.0, np.zeros(len(tags))


VIEWS: dict[str, View] = {
    "zscore": View(affine=_zscore, limit=ZSCORE_LIMIT),
    "robust": View(affine=_robust, limit=ROBUST_LIMIT, is_robust=True),
    "labram": View(affine=_labram, limit=_LARGEST),
    "clamp": View(affine=_clamp, limit=CLAMP_LIMIT_UV / 10.0),
}


def find_view(name: str) -> View:
    """The view of that name.

    Raises:
        ConfigError: There is none.
    """
    if name not in VIEWS:
        raise ConfigError(f"view: {name!r} does not exist; choose one of {', '.join(VIEWS)}")
    return VIEWS[name]


def _column(tags: Sequence[Tag], name: str) -> np.ndarray:
    return np.array([np.nan if tag[name] is None else tag[name] for tag in tags], dtype=np.float64)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Numerator over denominator; 0 where the denominator is not a positive number or the result not finite."""
    usable = np.isfinite(denominator) & (denominator > 0) & np.isfinite(numerator)
    with np.errstate(over="ignore"):
        ratio = np.divide(numerator, denominator, out=np.zeros(len(numerator)), where=usable)
    return np.where(np.isfinite(ratio), ratio, 0.0)


def _to_microvolts(tags: Sequence[Tag], view: str) -> np.ndarray:
    for tag in tags:
        if tag["unit"] not in MICROVOLTS:
            raise ConfigError(
                f"view: {view!r} is for voltages, but {tag.get('symbol', '?')} is in {tag['unit']!r}; "
                "choose zscore or robust, or leave its kind out of the batch"
            )
    return np.array([MICROVOLTS[tag["unit"]] for tag in tags], dtype=np.float64)
