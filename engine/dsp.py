"""Filter, notch and resampling as one overlap-save product of real spectra, units, and missing samples.

The filters are zero-phase FIRs (Kaiser windows). Their responses multiply each block's spectrum, which is then
cropped or padded to the target rate and transformed back: one forward and one inverse transform per block do
all the work. float32 throughout; one thread, so the same input always gives the same bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from scipy import fft

from manifests.errors import RecordingError

_PASS_SHARE = 0.9  # of the lower Nyquist frequency is passed when high_hz does not lower the edge
_ALIAS_DB = 100.0  # stop-band of the low-pass, which also keeps images and aliases out
_EDGE_DB = 66.0  # stop-band of high-pass and notch; their length grows with it
_NOTCH_HALF_HZ = 0.6  # half the notch between its -6 dB points; 1.1 Hz off the mains all passes
_NOTCH_TRANSITION_HZ = 1.0
_BLOCKS_PER_CALL = 4  # as many as the transform vectorises over; more leave the cache
_OFFSET_SAMPLES = 1 << 14
_MAX_BLOCK = 1 << 16  # samples; longer only where filters ask for it
_MAX_DENOMINATOR = 1 << 18

MICROVOLT = {"V": 1e6, "mV": 1e3, "uV": 1.0, "nV": 1e-3}
# Spellings of units, lower-cased and without blanks. `uV-mrs` (a rectified mean) is none of them on purpose.
_SPELLINGS = {
    "V": ("v", "volt", "volts"),
    "mV": ("mv", "millivolt", "millivolts", "mvolt"),
    "uV": ("uv", "µv", "μv", "microv", "uvolt", "uvolts", "microvolt", "microvolts", "âµv", "î¼v", "\x83êv", "\ufffdv"),
    "nV": ("nv", "nanovolt", "nanovolts"),
    "%": ("%", "percent", "%spo2", "%sat"),
    "degC": ("degc", "°c", "c", "celsius", "deg.c", "â°c", "degcelsius"),
    "bpm": ("bpm", "/min", "beats/min", "1/min", "min-1"),
    "au": ("au", "a.u.", "arb", "", "-", ".", "?", "n/a", "na", "#", "unitless", "none", "nd"),
}
_UNITS = {spelling: unit for unit, spellings in _SPELLINGS.items() for spelling in spellings}


def unit_factor(raw_unit: str, canonical_unit: str) -> float:
    """Factor that turns values in `raw_unit` into `canonical_unit`.

    `au` takes any unit as it is. A unit that is left blank passes for anything but volts.

    Raises:
        RecordingError: `UNIT_UNKNOWN`; a corpus may declare the unit of a label under `units`.
    """
    if canonical_unit in {"au", raw_unit}:
        return 1.0
    unit = _UNITS.get("".join(raw_unit.split()).lower())
    if unit == canonical_unit:
        return 1.0
    if unit in MICROVOLT and canonical_unit in MICROVOLT:
        return MICROVOLT[unit] / MICROVOLT[canonical_unit]
    if unit == "au" and canonical_unit not in MICROVOLT:
        return 1.0
    raise RecordingError(
        "UNIT_UNKNOWN", f"unit {raw_unit!r} cannot be turned into {canonical_unit}; declare it in the corpus' units"
    )


def to_unit(signal: np.ndarray, raw_unit: str, canonical_unit: str) -> np.ndarray:
    """Signal in `canonical_unit`, float32; the same array where the factor is 1. See `unit_factor`."""
    factor = unit_factor(raw_unit, canonical_unit)
    return signal if factor == 1.0 else signal * np.float32(factor)


def output_length(num_samples: int, rate: Fraction, target_hz: Fraction | int) -> int:
    """Samples of a stretch at the target rate: sample k lies at k / target_hz, inside the stretch."""
    return math.ceil(num_samples * target_hz / rate)


def nan_runs(signal: np.ndarray) -> np.ndarray:
    """Stretches without a finite value as int64 (R, 2): first sample and the one after the last."""
    missing = np.concatenate(([False], ~np.isfinite(signal), [False]))
    return np.flatnonzero(missing[1:] != missing[:-1]).reshape(-1, 2)


def nan_mask(
    signal: np.ndarray, *, rate: Fraction, target_hz: Fraction | int, segments_samples: Sequence[int]
) -> np.ndarray:
    """Where the output of `harmonise` was interpolated: bool, one per output sample.

    Args:
        signal: Raw signal, (N,).
        rate: Its sampling rate in Hz.
        target_hz: Rate of the mask in Hz.
        segments_samples: Samples of each contiguous segment; their sum is N.
    """
    parts = []
    for piece in _pieces(signal, segments_samples):
        mask = np.zeros(output_length(len(piece), rate, target_hz), dtype=bool)
        for start, stop in nan_runs(piece).tolist():
            mask[int(start * target_hz / rate) : math.ceil(stop * target_hz / rate)] = True
        parts.append(mask)
    return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)


def fill_nan(signal: np.ndarray) -> np.ndarray:
    """Signal with missing samples interpolated linearly, held at the ends, zero where nothing is finite."""
    if np.isfinite(np.dot(signal, signal)):  # one pass tells that no sample is missing
        return signal
    missing = ~np.isfinite(signal)
    if not missing.any():
        return signal
    if missing.all():
        return np.zeros_like(signal)
    filled = signal.copy()
    places = np.flatnonzero(~missing)
    filled[missing] = np.interp(np.flatnonzero(missing), places, signal[places])
    return filled


def harmonise(
    signal: np.ndarray,
    *,
    rate: Fraction,
    target_hz: Fraction | int,
    low_hz: float | None,
    high_hz: float | None,
    notch_hz: float | None,
    segments_samples: Sequence[int],
) -> np.ndarray:
    """Filtered signal at `target_hz`, zero-phase, in its own unit: float32.

    Each segment is treated by itself, with odd reflection at its ends, and gives `output_length` samples.
    Missing samples are interpolated before the filter (`fill_nan`); `nan_mask` tells where.
    Pass-band: from `low_hz` to `high_hz`, or to 90 % of the lower of both Nyquist frequencies.

    Args:
        signal: One channel, (N,) float32.
        rate: Its exact sampling rate in Hz.
        target_hz: Wanted sampling rate in Hz, higher or lower.
        low_hz: Lower edge of the pass-band; transition as in MNE, `min(max(low / 4, 2), low)` Hz. None: keeps DC.
        high_hz: Upper edge of the pass-band, transition `max(high / 4, 2)` Hz where the rates leave room.
        notch_hz: Mains frequency; it and its harmonics inside the band are removed.
        segments_samples: Samples of each contiguous segment; their sum is N.

    Raises:
        RecordingError: `SIGNAL_INVALID` if the rate cannot carry the band, or is no usable fraction.
        ValueError: The segments do not add up to the signal.
    """
    parts: list[np.ndarray] = []
    for piece in _pieces(signal, segments_samples):
        if not len(piece):
            continue
        plan = _plan(rate, target_hz, (low_hz, high_hz, notch_hz), len(piece))
        if plan.is_identity:
            parts.append(fill_nan(piece).astype(np.float32))
            continue
        parts.append(_apply(plan, fill_nan(piece), output_length(len(piece), rate, target_hz)))
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


def _pieces(signal: np.ndarray, segments_samples: Sequence[int]) -> list[np.ndarray]:
    if sum(segments_samples) != len(signal):
        raise ValueError(f"segments of {sum(segments_samples)} samples, but the signal has {len(signal)}")
    return np.split(signal, np.cumsum(segments_samples)[:-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """Lengths of one overlap-save pass; `pad` is what each block loses on either side, `_in` at the source rate."""

    length_in: int
    length_out: int
    pad_in: int
    pad_out: int
    response: np.ndarray  # float32 (bins,), zero-phase, scaled by length_out / length_in
    dc_gain: float
    is_identity: bool


@lru_cache(maxsize=128)
def _plan(
    rate: Fraction, target_hz: Fraction | int, band: tuple[float | None, float | None, float | None], num_samples: int
) -> _Plan:
    low_hz, high_hz, notch_hz = band
    ratio = target_hz / rate
    up, down = ratio.numerator, ratio.denominator
    if max(up, down) > _MAX_DENOMINATOR:
        raise RecordingError(
            "SIGNAL_INVALID", f"rate {rate} Hz: the ratio {up}/{down} to {target_hz} Hz has too large terms"
        )
    kernels = design(rate, target_hz, low_hz=low_hz, high_hz=high_hz, notch_hz=notch_hz)
    half = sum(len(kernel) // 2 for kernel in kernels)
    if ratio != 1:  # the ideal interpolator reaches over the edge of a block by about one low-pass
        half += len(kernels[-1]) // 2
    pad = -(-half // down) * down
    length = _block_length(num_samples, pad, down)
    response = np.ones(length // 2 + 1)
    for kernel in kernels:
        middle = len(kernel) // 2
        wrapped = np.zeros(length)
        wrapped[: middle + 1] = kernel[middle:]
        wrapped[length - middle :] = kernel[:middle]
        response *= np.fft.rfft(wrapped).real
    length_out = length // down * up
    bins = min(length, length_out) // 2 + 1
    return _Plan(
        length_in=length,
        length_out=length_out,
        pad_in=pad,
        pad_out=pad // down * up,
        response=(response[:bins] * (length_out / length)).astype(np.float32),
        dc_gain=0.0 if low_hz else 1.0,
        is_identity=not kernels,
    )


def _block_length(num_samples: int, pad: int, down: int) -> int:
    """Cheapest even block: down × (2, 3, 5-smooth), at least one step long beside its pads."""
    longest = max(_MAX_BLOCK, 8 * pad, 4 * down)
    smooth = [down * m for m in _even_smooth(longest // down + 2) if down * m >= 2 * pad + down]
    lengths = np.array([length for length in smooth if length <= longest] or smooth)  # longer ones leave the cache
    steps = np.ceil(num_samples / (lengths - 2 * pad))
    cost = steps * lengths * np.log2(lengths)
    return int(lengths[np.argmin(cost)])


@lru_cache(maxsize=64)
def _even_smooth(limit: int) -> tuple[int, ...]:
    """Even numbers with no prime factor above 5, sorted, up to twice the limit so that there always is one."""
    top = 2 * limit
    return tuple(
        sorted(
            two * three * five
            for two in (2**i for i in range(1, top.bit_length() + 1))
            for three in (3**i for i in range(top.bit_length()))
            for five in (5**i for i in range(top.bit_length()))
            if two * three * five <= top
        )
    )


def _apply(plan: _Plan, signal: np.ndarray, num_out: int) -> np.ndarray:
    hop_in = plan.length_in - 2 * plan.pad_in
    hop_out = plan.length_out - 2 * plan.pad_out
    num_blocks = -(-len(signal) // hop_in)
    signal = np.ascontiguousarray(signal, dtype=np.float32)
    offset = _offset(signal)
    output = np.empty((num_blocks, hop_out), dtype=np.float32)
    buffer = np.empty((min(_BLOCKS_PER_CALL, num_blocks), plan.length_in), dtype=np.float32)
    bins = len(plan.response)
    for first in range(0, num_blocks, _BLOCKS_PER_CALL):
        count = min(_BLOCKS_PER_CALL, num_blocks - first)
        # Few blocks at a time: what lies between signal and output then stays in the processor's cache.
        start = first * hop_in - plan.pad_in
        stretch = _stretch(signal, start, start + (count - 1) * hop_in + plan.length_in)
        step = stretch.itemsize
        blocks = np.ndarray((count, plan.length_in), np.float32, buffer=stretch, strides=(hop_in * step, step))
        np.subtract(blocks, offset, out=buffer[:count])
        spectrum = np.asarray(fft.rfft(buffer[:count], axis=-1, workers=1))
        product = spectrum[:, :bins]
        product *= plan.response
        result = np.asarray(fft.irfft(product, n=plan.length_out, axis=-1, workers=1, overwrite_x=True))
        output[first : first + count] = result[:, plan.pad_out : plan.pad_out + hop_out]
    flat = output.reshape(-1)[:num_out]
    if plan.dc_gain:
        flat += offset
    return flat


def _offset(signal: np.ndarray) -> np.float32:
    """About the mean, from every so many samples: a large offset would eat float32's digits in the transform."""
    return np.float32(signal[:: max(1, len(signal) // _OFFSET_SAMPLES)].mean(dtype=np.float64))


def _stretch(signal: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Samples start to stop, with odd reflection beyond both ends; where that is too short, its last value is held."""
    last = len(signal) - 1
    if start >= 0 and stop <= last + 1:
        return signal[start:stop]
    before = np.minimum(np.arange(-start, 0, -1), last)
    after = last - np.minimum(np.arange(1, stop - last), last)
    inside = signal[max(0, start) : max(0, stop)]
    return np.concatenate((2 * signal[0] - signal[before], inside, 2 * signal[-1] - signal[after]))


def design(
    rate: Fraction,
    target_hz: Fraction | int,
    *,
    low_hz: float | None,
    high_hz: float | None,
    notch_hz: float | None,
) -> list[np.ndarray]:
    """Zero-phase kernels at the source rate, float64, odd lengths: high-pass, notch, low-pass, as far as needed.

    The low-pass comes last and is there whenever the rate changes. See `harmonise` for the arguments.
    """
    rate_hz = float(rate)
    nyquist = min(rate_hz, float(target_hz)) / 2
    top = min(high_hz or math.inf, _PASS_SHARE * nyquist)
    stop = min(top + max(top / 4, 2.0), nyquist)
    if low_hz and low_hz >= top:
        raise RecordingError("SIGNAL_INVALID", f"rate {rate_hz:g} Hz cannot carry a band from {low_hz:g} Hz")
    kernels: list[np.ndarray] = []
    if low_hz:
        transition = min(max(low_hz / 4, 2.0), low_hz)
        kernels.append(_high_pass(low_hz - transition / 2, transition, rate_hz))
    has_low_pass = rate != target_hz or (high_hz is not None and high_hz <= top)
    limit = stop if has_low_pass else rate_hz / 2
    mains = [] if not notch_hz else [notch_hz * k for k in range(1, int(limit / notch_hz) + 1)]
    mains = [f for f in mains if f + _NOTCH_HALF_HZ + _NOTCH_TRANSITION_HZ / 2 < rate_hz / 2]
    if mains:
        kernels.append(_notches(mains, rate_hz))
    if has_low_pass:
        kernels.append(_low_pass((top + stop) / 2, stop - top, rate_hz, _ALIAS_DB))
    return kernels


def _low_pass(cut_hz: float, transition_hz: float, rate_hz: float, stop_db: float) -> np.ndarray:
    """Kaiser-windowed sinc with gain 1 at DC. Source: Oppenheim and Schafer, Discrete-Time Signal Processing, 7.5."""
    half = math.ceil((stop_db - 7.95) / (14.36 * transition_hz / rate_hz) / 2)
    beta = 0.1102 * (stop_db - 8.7)
    taps = np.sinc(2 * cut_hz / rate_hz * np.arange(-half, half + 1)) * np.kaiser(2 * half + 1, beta)
    return taps / taps.sum()


def _high_pass(cut_hz: float, transition_hz: float, rate_hz: float) -> np.ndarray:
    kernel = -_low_pass(cut_hz, transition_hz, rate_hz, _EDGE_DB)
    kernel[len(kernel) // 2] += 1
    return kernel


def _notches(mains: Sequence[float], rate_hz: float) -> np.ndarray:
    """One kernel for all harmonics: a narrow low-pass moved to each of them and taken away."""
    narrow = _low_pass(_NOTCH_HALF_HZ, _NOTCH_TRANSITION_HZ, rate_hz, _EDGE_DB)
    times = np.arange(len(narrow)) - len(narrow) // 2
    waves = np.cos(2 * np.pi / rate_hz * np.outer(mains, times))
    kernel = -2 * narrow * waves.sum(axis=0)
    kernel[len(kernel) // 2] += 1
    return kernel
