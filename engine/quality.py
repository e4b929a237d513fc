"""One channel as int16: its scale, its statistics, and where it is flat, clipped, missing or saturated."""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

# Kinds whose sensor shows noise at any time, so that a constant second or a run at the extreme is a fault.
ELECTRICAL = frozenset({"eeg", "eog", "emg", "ecg"})

INT16_MAX = 32767
# Largest step for 70 dB, 0.1 dB in hand: noise is step / sqrt(12), so step = sd * sqrt(12) / 10**(dB / 20).
_STEP_PER_SD = math.sqrt(12) / 10 ** (70.1 / 20)
_OUTLIER_ROUNDS = 5
_MAX_STATISTIC_SAMPLES = 1 << 16  # median and MAD come from an evenly spaced sub-sample of this size
_CLIP_RUN = 3  # equal samples in a row at the recording's extreme that count as clipped


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Cumulated counts of faulty samples, (N + 1,) or None for none: native ones, `saturated` in the output."""

    flat: np.ndarray | None
    clipped: np.ndarray | None
    nan: np.ndarray | None
    saturated: np.ndarray | None

    @property
    def is_clean(self) -> bool:
        """No faulty sample at all, as most channels of most recordings."""
        return self.flat is None and self.clipped is None and self.nan is None and self.saturated is None

    @property
    def is_mostly_flat(self) -> bool:
        """Whether more than half of the channel is constant, so that its amplitude says nothing about its unit."""
        return self.flat is not None and 2 * int(self.flat[-1]) > self.flat.size - 1

    def shares(self, native: tuple[int, int], output: tuple[int, int]) -> tuple[float, float, float]:
        """Flat, clipped and missing share of a stretch, given as first and last sample at either rate."""
        flat, clipped, nan = (_share(sums, *native) for sums in (self.flat, self.clipped, self.nan))
        return flat, max(clipped, _share(self.saturated, *output)), nan


def _share(sums: np.ndarray | None, first: int, last: int) -> float:
    if sums is None:
        return 0.0
    last = min(last, sums.size - 1)
    return round(float(sums[last] - sums[first]) / max(1, last - first), 4)


def cumulated(flags: np.ndarray) -> np.ndarray | None:
    """Running count of the flags set, (N + 1,) int64, or None for none."""
    if not flags.any():
        return None
    return np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(flags, dtype=np.int64)))


def flat_samples(signal: np.ndarray, rate: Fraction, kind: str) -> np.ndarray | None:
    """Cumulated samples that lie in a constant second."""
    block = math.floor(rate)
    if kind not in ELECTRICAL or block < 2 or signal.size < block:
        return None
    whole = signal[: signal.size // block * block].reshape(-1, block)
    # Most seconds differ in their first two samples; only the rest is looked at closely.
    suspects = np.flatnonzero(whole[:, 0] == whole[:, 1])
    suspects = suspects[np.ptp(whole[suspects], axis=1) == 0] if suspects.size else suspects
    if not suspects.size:
        return None
    flags = np.zeros(signal.size, dtype=bool)
    flags[: whole.size].reshape(-1, block)[suspects] = True
    return cumulated(flags)


def clipped_samples(signal: np.ndarray, kind: str) -> np.ndarray | None:
    """Cumulated samples in runs of three and more at the recording's own extremes."""
    if kind not in ELECTRICAL or signal.size < _CLIP_RUN:
        return None
    low, high = signal.min(), signal.max()
    if low == high:
        return None
    flags = np.zeros(signal.size, dtype=bool)
    for extreme in (low, high):
        where = np.flatnonzero(signal == extreme)
        if where.size < _CLIP_RUN:
            continue
        starts = where[:-2][(where[2:] - where[:-2]) == _CLIP_RUN - 1]
        for shift in range(_CLIP_RUN):
            flags[starts + shift] = True
    return cumulated(flags)


def statistics(signal: np.ndarray) -> tuple[float, float, float, float]:
    """Mean, sd, median, MAD of a filtered channel (T,), in its physical unit."""
    mean = float(signal.mean(dtype=np.float64))
    squares = float(np.dot(signal, signal)) if signal.size < 1 << 16 else _sum_of_squares(signal)
    sd = math.sqrt(max(0.0, squares / signal.size - mean * mean))
    part = signal[:: max(1, signal.size // _MAX_STATISTIC_SAMPLES)]
    median = float(np.median(part))
    return mean, sd, median, float(np.median(np.abs(part - np.float32(median))))


def _sum_of_squares(signal: np.ndarray) -> float:
    # In blocks: a float32 dot product over a night loses digits.
    blocks = np.array_split(signal, math.ceil(signal.size / (1 << 16)))
    return math.fsum(float(np.dot(block, block)) for block in blocks)


def _sd_without_outliers(signal: np.ndarray, sd: float) -> float:
    """Standard deviation of the samples that an int16 at 70 dB can hold, in the signal's unit."""
    for _ in range(_OUTLIER_ROUNDS):
        kept = signal[np.abs(signal) <= sd * _STEP_PER_SD * INT16_MAX]
        smaller = float(kept.std(dtype=np.float64)) if kept.size else 0.0
        if not 0 < smaller < sd * (1 - 1e-3):
            break
        sd = smaller
    return sd


def quantise(signal: np.ndarray, sd: float) -> tuple[np.ndarray, float, np.ndarray | None]:
    """int16 samples (T,), their scale in physical units, and the cumulated saturated samples.

    The scale reaches the largest sample unless an outlier lies so far out that the quantisation noise would come
    within 70 dB of the rest of the signal; such outliers saturate, at 36 sd and beyond, and are flagged.
    """
    peak = float(max(signal.max(), -signal.min())) if signal.size else 0.0
    if peak == 0.0:
        return np.zeros(signal.size, dtype=np.int16), 1.0, None
    scale = peak / INT16_MAX
    if 0 < sd * _STEP_PER_SD < scale:
        scale = _sd_without_outliers(signal, sd) * _STEP_PER_SD
    steps = signal * np.float32(1 / scale)
    np.rint(steps, out=steps)
    saturated = cumulated(np.abs(steps) > INT16_MAX) if peak > scale * (INT16_MAX + 0.5) else None
    np.clip(steps, -INT16_MAX, INT16_MAX, out=steps)
    return steps.astype(np.int16), scale, saturated
