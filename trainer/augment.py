"""Augmentations of one single-channel window, seeded by a counter-based generator.

Sign flip, amplitude, noise and surrogate follow the definitions of braindecode (SignFlip, AmplitudeScale,
GaussianNoise and FTSurrogate in `braindecode/augmentation`, BSD-3), which has no random resized crop. Its
SmoothTimeMask fades at the edges; here the mask is hard and its length a share of the window.
"""

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
    # Off: it keeps a rhythm's power and loses its shape, so it suits EEG and would make an ECG unreadable.
    surrogate_probability: float = Field(default=0.0, ge=0, le=1)
    surrogate: Range = (0.0, 0.9)  # largest turn of a phase, in whole turns


def augment(signal_T: np.ndarray, rng: np.random.Generator, config: AugmentConfig) -> np.ndarray:
    """Another float32 window of the same length (T,): cropped, turned in phase, scaled, noisy, masked and flipped.

    A fixed number of draws in a fixed order, so a change of one range does not reshuffle the others. Those of the
    surrogate come last: a window without one is what it was before there were any.
    """
    crop, start, amplitude, noise, mask, mask_start, is_masked, is_flipped = rng.random(8)
    length = len(signal_T)
    noise_T = rng.standard_normal(length, dtype=np.float32)
    out = resized_crop(signal_T, share=_between(config.crop, crop), start=start)
    if config.surrogate_probability > 0:
        is_surrogate, largest, *turns = rng.random(2 + length // 2 + 1)
        if is_surrogate < config.surrogate_probability:
            out = phase_surrogate(out, turns=_between(config.surrogate, largest) * np.array(turns))
    out *= np.exp(_between((np.log(config.amplitude[0]), np.log(config.amplitude[1])), amplitude))
    sd = _between(config.noise, noise) * float(out.std())
    out += np.float32(sd) * noise_T
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


def phase_surrogate(signal_T: np.ndarray, *, turns: np.ndarray) -> np.ndarray:
    """The window with the phase of each frequency turned by so many whole turns, float32 (T,).

    A Fourier transform surrogate (Schwabedal et al. 2018, arXiv:1806.08675): the amplitude spectrum, and with it
    power and autocorrelation, stays as it is. `turns` has one number per frequency from 0 to half the rate,
    (T // 2 + 1,); those of the mean and, for an even T, of half the rate are not used: these two are real.
    """
    turned = np.fft.rfft(signal_T.astype(np.float64))
    last = (len(signal_T) + 1) // 2
    turned[1:last] *= np.exp(2j * np.pi * turns[1:last])
    return np.fft.irfft(turned, n=len(signal_T)).astype(np.float32)


def _between(bounds: Range, fraction: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * float(fraction)
