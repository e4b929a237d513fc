"""One channel as int16: its scale, its statistics, and where it is flat, clipped, missing or saturated."""

import math
from array import array
from bisect import bisect_right
from collections.abc import Iterator
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
_BLOCK = 1 << 16  # samples worked on at once
_CLIP_RUN = 3  # equal samples in a row at the recording's extreme that count as clipped


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """Stretches of faulty samples among `size`: a running count of a day would take 177 MB a channel.

    Plain arrays and not NumPy's: every window of every channel asks for four places, and a place costs `bisect` a
    tenth of what it costs `searchsorted`.

    Attributes:
        starts: First sample of each stretch, ascending.
        before: Faulty samples before each stretch, and at the end all of them.
    """

    starts: "array[int]"
    before: "array[int]"
    size: int

    @property
    def total(self) -> int:
        """All faulty samples."""
        return self.before[-1]

    def between(self, first: int, last: int) -> int:
        """Faulty samples from `first` to before `last`."""
        return self._until(last) - self._until(first)

    def _until(self, place: int) -> int:
        run = bisect_right(self.starts, place) - 1
        if run < 0:
            return 0
        return min(self.before[run] + place - self.starts[run], self.before[run + 1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Faulty samples by kind, None for none: native ones, `saturated` in the output."""

    flat: Runs | None
    clipped: Runs | None
    nan: Runs | None
    saturated: Runs | None

    @property
    def is_clean(self) -> bool:
        """No faulty sample at all, as most channels of most recordings."""
        return self.flat is None and self.clipped is None and self.nan is None and self.saturated is None

    @property
    def is_mostly_flat(self) -> bool:
        """Whether more than half of the channel is constant, so that its amplitude says nothing about its unit."""
        return self.flat is not None and 2 * self.flat.total > self.flat.size

    def shares(self, native: tuple[int, int], output: tuple[int, int]) -> tuple[float, float, float]:
        """Flat, clipped and missing share of a stretch, given as first and last sample at either rate."""
        flat, clipped, nan = (_share(runs, *native) for runs in (self.flat, self.clipped, self.nan))
        return flat, max(clipped, _share(self.saturated, *output)), nan


def _share(runs: Runs | None, first: int, last: int) -> float:
    if runs is None:
        return 0.0
    last = min(last, runs.size)
    return round(runs.between(first, last) / max(1, last - first), 4)


def runs_of(flags: np.ndarray) -> Runs | None:
    """Stretches of the flags set, or None for none."""
    if not flags.any():
        return None
    edges = np.flatnonzero(flags[1:] != flags[:-1]) + 1
    starts, stops = np.concatenate(([0] * bool(flags[0]), edges, [flags.size] * bool(flags[-1]))).reshape(-1, 2).T
    before = np.concatenate(([0], np.cumsum(stops - starts)))
    starts, before = (array("q", part.astype(np.int64).tobytes()) for part in (starts, before))
    return Runs(starts=starts, before=before, size=flags.size)


def flat_samples(signal: np.ndarray, rate: Fraction, kind: str) -> Runs | None:
    """Samples that lie in a constant second."""
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
    return runs_of(flags)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extremes:
    """Least and largest value of each consecutive block of `_BLOCK` samples; NaN where one is missing."""

    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, signal: np.ndarray) -> "Extremes":
        """Extremes of a signal (T,)."""
        blocks = list(_blocks(signal))
        return cls(low=np.array([block.min() for block in blocks]), high=np.array([block.max() for block in blocks]))

    @property
    def is_finite(self) -> bool:
        """Whether every sample is a number."""
        return bool(np.isfinite(self.low).all() and np.isfinite(self.high).all())


def _blocks(signal: np.ndarray) -> Iterator[np.ndarray]:
    """Views of consecutive samples, few enough to stay in the processor's cache while they are worked on."""
    return (signal[first : first + _BLOCK] for first in range(0, signal.size, _BLOCK))


def clipped_samples(signal: np.ndarray, kind: str, extremes: Extremes | None = None) -> Runs | None:
    """Samples in runs of three and more at the recording's own extremes."""
    if kind not in ELECTRICAL or signal.size < _CLIP_RUN:
        return None
    found = extremes or Extremes.of(signal)
    low, high = found.low.min(), found.high.max()
    if low == high:
        return None
    starts = [_runs_at(signal, low, found.low), _runs_at(signal, high, found.high)]
    if not any(part.size for part in starts):
        return None
    flags = np.zeros(signal.size, dtype=bool)
    for shift in range(_CLIP_RUN):
        flags[np.concatenate(starts) + shift] = True
    return runs_of(flags)


def _runs_at(signal: np.ndarray, extreme: np.floating, of_blocks: np.ndarray) -> np.ndarray:
    """Where three samples in a row have the extreme value; only blocks that reach it are looked at."""
    parts = [
        np.flatnonzero(signal[block * _BLOCK : (block + 1) * _BLOCK] == extreme) + block * _BLOCK
        for block in np.flatnonzero(of_blocks == extreme).tolist()
    ]
    where = np.concatenate(parts)
    return where[:-2][(where[2:] - where[:-2]) == _CLIP_RUN - 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Mean, sd, median, MAD and largest magnitude of a filtered channel, in its physical unit."""

    mean: float
    sd: float
    median: float
    mad: float
    peak: float


def statistics(signal: np.ndarray) -> Statistics:
    """Statistics of a channel (T,), T > 0; median and MAD from an evenly spaced sub-sample."""
    part = signal[:: max(1, signal.size // _MAX_STATISTIC_SAMPLES)]
    median = np.median(part)
    sums, squares, peak = [], [], 0.0
    # Sums in blocks and about the median: a float32 sum over a night, or of a large offset, loses digits.
    centred = np.empty(min(_BLOCK, signal.size), dtype=np.float32)
    for block in _blocks(signal):
        around = np.subtract(block, median, out=centred[: block.size])
        sums.append(float(around.sum()))
        squares.append(float(np.dot(around, around)))
        peak = max(peak, float(block.max()), -float(block.min()))
    shift = math.fsum(sums) / signal.size
    return Statistics(
        mean=float(median) + shift,
        sd=math.sqrt(max(0.0, math.fsum(squares) / signal.size - shift * shift)),
        median=float(median),
        mad=float(np.median(np.abs(part - median))),
        peak=peak,
    )


def _sd_without_outliers(signal: np.ndarray, sd: float) -> float:
    """Standard deviation of the samples that an int16 at 70 dB can hold, in the signal's unit."""
    for _ in range(_OUTLIER_ROUNDS):
        kept = signal[np.abs(signal) <= sd * _STEP_PER_SD * INT16_MAX]
        smaller = float(kept.std(dtype=np.float64)) if kept.size else 0.0
        if not 0 < smaller < sd * (1 - 1e-3):
            break
        sd = smaller
    return sd


def quantise(signal: np.ndarray, sd: float, peak: float) -> tuple[np.ndarray, float, Runs | None]:
    """int16 samples (T,), their scale in physical units, and the saturated samples.

    The scale reaches the largest sample, `peak`, unless an outlier lies so far out that the quantisation noise would
    come within 70 dB of the rest of the signal; such outliers saturate, at 36 sd and beyond, and are flagged.
    """
    if peak == 0.0:
        return np.zeros(signal.size, dtype=np.int16), 1.0, None
    scale = peak / INT16_MAX
    if 0 < sd * _STEP_PER_SD < scale:
        scale = _sd_without_outliers(signal, sd) * _STEP_PER_SD
    saturates = peak > scale * (INT16_MAX + 0.25)
    samples = np.empty(signal.size, dtype=np.int16)
    flags = np.zeros(signal.size if saturates else 0, dtype=bool)
    steps = np.empty(min(_BLOCK, signal.size), dtype=np.float32)
    for number, block in enumerate(_blocks(signal)):
        place = slice(number * _BLOCK, number * _BLOCK + block.size)
        rounded = np.multiply(block, np.float32(1 / scale), out=steps[: block.size])
        np.rint(rounded, out=rounded)
        if saturates:
            flags[place] = np.abs(rounded) > INT16_MAX
            np.clip(rounded, -INT16_MAX, INT16_MAX, out=rounded)
        samples[place] = rounded
    return samples, scale, runs_of(flags)
