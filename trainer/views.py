"""Views: the normalisations that turn a stored int16 window into what an encoder reads.

Shards hold physical units (value = int16 x scale). A view is chosen in the training config and applied when a
batch is built, so one snapshot serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from manifests.errors import ConfigError

View = Callable[[np.ndarray, Sequence[Mapping[str, Any]]], np.ndarray]

# The clip keeps an electrode pop from owning a batch's gradient. A QRS complex reaches 20 x MAD, a slow wave 8 sd.
ZSCORE_LIMIT = 8.0
ROBUST_LIMIT = 20.0
CLAMP_LIMIT_UV = 50.0
MAD_TO_SD = 1.4826  # of a normal distribution
MICROVOLTS = {"uV": 1.0, "mV": 1e3, "V": 1e6}


def zscore_view(stored_CT: np.ndarray, tags: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Window in standard deviations of its recording, clipped to +-8: float32 (C, T).

    Mean and sd are the recording's, from the tag, so the level of a window against its night survives (SleepFM's
    whole-night z-score). A channel whose sd is 0 or unknown becomes zeros.
    """
    scale, mean, sd = (_column(tags, name) for name in ("scale", "mean", "sd"))
    gain = _divide(scale, sd)
    shift = -_divide(mean, sd)
    return _bounded(_affine(stored_CT, gain, shift), ZSCORE_LIMIT)


def robust_view(stored_CT: np.ndarray, tags: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Window minus its median over 1.4826 x its MAD, clipped to +-20: float32 (C, T).

    Needs nothing but the window. Where more than half of the samples are equal the MAD is 0 and the window's sd
    takes its place; a flat channel becomes zeros.
    """
    del tags  # medians and deviations scale with the data: the unit cancels
    centred = np.asarray(stored_CT, dtype=np.float32)
    centred = centred - np.median(centred, axis=1, keepdims=True)
    spread = MAD_TO_SD * np.median(np.abs(centred), axis=1)
    spread = np.where(spread > 0, spread, centred.std(axis=1))
    return _bounded(_affine(centred, _divide(np.ones_like(spread), spread), np.zeros_like(spread)), ROBUST_LIMIT)


def labram_view(stored_CT: np.ndarray, tags: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Window in units of 100 uV: float32 (C, T) (LaBraM).

    Raises:
        ConfigError: A channel is not a voltage.
    """
    gain = _column(tags, "scale") * _to_microvolts(tags, "labram") / 100.0
    return _bounded(_affine(stored_CT, gain, np.zeros_like(gain)), float(np.finfo(np.float32).max))


def clamp_view(stored_CT: np.ndarray, tags: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Window clamped to +-50 uV, in units of 10 uV: float32 (C, T) (SleepFM's transfer to wake EEG).

    Raises:
        ConfigError: A channel is not a voltage.
    """
    gain = _column(tags, "scale") * _to_microvolts(tags, "clamp") / 10.0
    return _bounded(_affine(stored_CT, gain, np.zeros_like(gain)), CLAMP_LIMIT_UV / 10.0)


VIEWS: dict[str, View] = {
    "zscore": zscore_view,
    "robust": robust_view,
    "labram": labram_view,
    "clamp": clamp_view,
}


def find_view(name: str) -> View:
    """The view of that name.

    Raises:
        ConfigError: There is none.
    """
    if name not in VIEWS:
        raise ConfigError(f"view: {name!r} does not exist; choose one of {', '.join(VIEWS)}")
    return VIEWS[name]


def _column(tags: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.array([np.nan if tag[name] is None else tag[name] for tag in tags], dtype=np.float64)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Numerator over denominator; 0 where the denominator is not a positive number or the result not finite."""
    usable = np.isfinite(denominator) & (denominator > 0) & np.isfinite(numerator)
    with np.errstate(over="ignore"):
        ratio = np.divide(numerator, denominator, out=np.zeros(len(numerator)), where=usable)
    return np.where(np.isfinite(ratio), ratio, 0.0)


def _affine(stored_CT: np.ndarray, gain: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Stored x gain + shift as float32. What overflows becomes infinite here and is bounded by the caller."""
    with np.errstate(over="ignore", invalid="ignore"):
        gain32, shift32 = gain.astype(np.float32)[:, None], shift.astype(np.float32)[:, None]
        out = np.multiply(stored_CT, gain32, dtype=np.float32)
        out += shift32
    return out


def _bounded(view_CT: np.ndarray, limit: float) -> np.ndarray:
    """The same values within +-limit; what is not a number (an array that did not come from int16) becomes 0."""
    np.nan_to_num(view_CT, copy=False, nan=0.0, posinf=limit, neginf=-limit)
    return np.clip(view_CT, -limit, limit, out=view_CT)


def _to_microvolts(tags: Sequence[Mapping[str, Any]], view: str) -> np.ndarray:
    for tag in tags:
        if tag["unit"] not in MICROVOLTS:
            raise ConfigError(
                f"view: {view!r} is for voltages, but {tag.get('symbol', '?')} is in {tag['unit']!r}; "
                "choose zscore or robust, or leave its kind out of the batch"
            )
    return np.array([MICROVOLTS[tag["unit"]] for tag in tags], dtype=np.float64)
