"""Augmentations of one single-channel window, seeded by a counter-based generator."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

Range = tuple[float, float]


class AugmentConfig(BaseModel):
    """Ranges from which each view of a window draws; every pair is (lowest, highest)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    crop: Range = (0.5, 1.0)  # share of the window that is cut out and stretched back
    amplitude: Range = (0.5, 2.0)  # factor, drawn evenly in its logarithm
    noise: Range = (0.0, 0.2)  # sd of white noise over the sd of the window
    time_mask: Range = (0.1, 0.4)  # share of the window set to zero
    time_mask_probability: float = Field(default=0.5, ge=0, le=1)
    # The sign of a bipolar channel is a convention of the lab.
    sign_flip_probability: float = Field(default=0.5, ge=0, le=1)


def augment(signal_T: np.ndarray, rng: np.random.Generator, config: AugmentConfig) -> np.ndarray:
    """Another float32 window of the same length (T,): cropped, scaled, noisy, masked and flipped.

    A fixed number of draws in a fixed order, so a change of one range does not reshuffle the others.
    """
    crop, start, amplitude, noise, mask, mask_start, is_masked, is_flipped = rng.random(8)
    length = len(signal_T)
    out = resized_crop(signal_T, share=_between(config.crop, crop), start=start)
    out *= np.exp(_between((np.log(config.amplitude[0]), np.log(config.amplitude[1])), amplitude))
    sd = _between(config.noise, noise) * float(out.std())
    out += np.float32(sd) * rng.standard_normal(length, dtype=np.float32)
    if is_masked < config.time_mask_probability:
        width = round(_between(config.time_mask, mask) * length)
        first = round(mask_start * (length - width))
        out[first : first + width] = 0.0
    if is_flipped < config.sign_flip_probability:
        np.negative(out, out=out)
    return out


def resized_crop(signal_T: np.ndarray, *, share: float, start: float) -> np.ndarray:
    """A stretch of `share` of the window, linearly resampled to its full length: float32 (T,).

    `start` in [0, 1] places the stretch from the earliest to the latest possible position.
    """
    length = len(signal_T)
    span = share * (length - 1)
    at = start * (length - 1 - span) + np.linspace(0.0, span, length)
    left = np.minimum(at.astype(np.int64), length - 2) if length > 1 else np.zeros(length, dtype=np.int64)
    weight = (at - left).astype(np.float32)
    right = np.minimum(left + 1, length - 1)
    return signal_T[left] * (1 - weight) + signal_T[right] * weight


def _between(bounds: Range, fraction: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * float(fraction)
