"""Physiology of the synthetic corpus: latent state of a night, and the signals that follow from it.

One slowly varying state (stage, arousal, breathing, heart, movement) drives every modality, as in a sleeper: the
breathing phase modulates heart rate, ECG amplitude and belts; arousal raises muscle tone, heart rate and alpha and
lowers slow waves; sigma power and heart rate swing against each other every 50 s (Lecci et al., Science Advances
2017); movements appear everywhere. ECG: Gaussians per wave (McSharry et al., IEEE TBME 2003) carried by a dipole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import signal

Array = NDArray[np.float64]

STAGES: tuple[str, ...] = ("W", "N1", "N2", "N3", "R")
EPOCH_S = 30
LATENT_HZ = 8
MIN_EPOCHS = 20

# Next stage after W, N1, N2, N3, R (rows), a stage's dwell being drawn apart; nights are compressed to under an hour.
TRANSITIONS = np.array(
    [
        [0.00, 0.90, 0.10, 0.00, 0.00],
        [0.15, 0.00, 0.80, 0.00, 0.05],
        [0.08, 0.07, 0.00, 0.50, 0.35],
        [0.05, 0.05, 0.80, 0.00, 0.10],
        [0.40, 0.35, 0.25, 0.00, 0.00],
    ]
)
# Mean dwell as a share of the night.
DWELL = np.array([0.08, 0.03, 0.09, 0.12, 0.11])

# Value per stage W, N1, N2, N3, R.
AROUSAL = np.array([1.4, 0.4, -0.3, -1.2, 0.3])
BREATH_RATE = np.array([1.08, 1.02, 1.0, 0.96, 1.05])
BREATH_IRREGULARITY = np.array([0.08, 0.06, 0.04, 0.02, 0.16])
SINUS_ARRHYTHMIA = np.array([0.7, 0.9, 1.1, 1.3, 0.6])
MOVES_PER_MIN = np.array([1.33, 0.67, 0.4, 0.25, 0.5])
CHIN_TONE_UV = np.array([18.0, 10.0, 7.0, 5.0, 1.8])

# Lead = row · dipole (x left, y foot, z back); the inverse Dower matrix (Dower, Clinical Cardiology 1980).
_I = np.array([0.632, -0.235, 0.059])
_II = np.array([0.235, 1.066, -0.132])
LEADS: dict[str, Array] = {
    "I": _I,
    "II": _II,
    "III": _II - _I,
    "aVR": -(_I + _II) / 2,
    "aVL": _I - _II / 2,
    "aVF": _II - _I / 2,
    "V1": np.array([-0.515, 0.157, -0.917]),
    "V2": np.array([0.044, 0.164, -1.387]),
    "V3": np.array([0.882, 0.098, -1.277]),
    "V4": np.array([1.213, 0.127, -0.601]),
    "V5": np.array([1.125, 0.127, -0.086]),
    "V6": np.array([0.831, 0.076, 0.230]),
}
# Wave -> (dipole in mV, centre in s from the R peak, width in s).
WAVES: dict[str, tuple[tuple[float, float, float], float, float]] = {
    "P": ((0.07, 0.11, -0.02), -0.16, 0.022),
    "Q": ((-0.10, -0.06, -0.20), -0.030, 0.010),
    "R": ((1.00, 0.80, 0.20), 0.0, 0.012),
    "S": ((-0.20, -0.18, 0.40), 0.032, 0.012),
    "T": ((0.25, 0.24, -0.14), 0.27, 0.055),
}

ECG_RATE_HZ = 500
ECG_SECONDS = 10
# SNOMED CT code -> (mean heart rate in bpm: low, high).
RHYTHMS: dict[str, tuple[float, float]] = {
    "426783006": (62, 96),  # sinus rhythm
    "164889003": (65, 130),  # atrial fibrillation
    "426177001": (38, 56),  # sinus bradycardia
    "427084000": (106, 150),  # sinus tachycardia
}
ATRIAL_FIBRILLATION = "164889003"


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What stays the same in a subject: rates per minute, alpha and spindle frequency in Hz, scale factors."""

    alpha_hz: float
    spindle_hz: float
    heart_bpm: float
    sinus_arrhythmia_bpm: float
    breaths_per_min: float
    amplitude: float
    slope: float
    wave_scale: Array  # (5 waves, 3 axes): the shape of this subject's heart beat


@dataclass(frozen=True, slots=True, kw_only=True)
class Night:
    """Latent state of one night; arrays are on a grid of `LATENT_HZ`, times in seconds from the start."""

    stages: tuple[str, ...]
    weights: Array  # (5 stages, grid): smoothed one-hot
    arousal: Array
    infraslow: Array
    movement: Array
    breath_phase: Array  # radians
    breath_depth: Array
    heart_bpm: Array
    beats_s: Array

    def at(self, values: Array, rate: int) -> Array:
        """A latent series resampled to a channel's rate (Hz)."""
        num_samples = len(self.stages) * EPOCH_S * rate
        grid = np.arange(len(values)) / LATENT_HZ
        return np.interp(np.arange(num_samples) / rate, grid, values)

    def by_stage(self, values: Sequence[float] | Array) -> Array:
        """One value per stage, spread over the night and smoothed where stages meet."""
        return np.asarray(values, dtype=float) @ self.weights


def draw_traits(rng: np.random.Generator) -> Traits:
    """Traits of a subject; a fast heart goes with fast breathing (about four beats a breath)."""
    heart_bpm = rng.uniform(50, 78)
    return Traits(
        alpha_hz=rng.uniform(8.6, 11.2),
        spindle_hz=rng.uniform(12.4, 14.2),
        heart_bpm=heart_bpm,
        sinus_arrhythmia_bpm=rng.uniform(2.5, 5.5),
        breaths_per_min=heart_bpm / 4.3 * rng.uniform(0.95, 1.05),
        amplitude=float(np.exp(rng.normal(0, 0.2))),
        slope=rng.uniform(1.2, 1.8),
        wave_scale=np.exp(rng.normal(0, 0.15, (len(WAVES), 3))),
    )


def draw_hypnogram(num_epochs: int, rng: np.random.Generator) -> tuple[str, ...]:
    """Stages of 30-s epochs from a semi-Markov chain, drawn again until each stage fills 5 % of the night.

    Raises:
        ValueError: Fewer than `MIN_EPOCHS` epochs.
    """
    if num_epochs < MIN_EPOCHS:
        raise ValueError(f"num_epochs {num_epochs}: at least {MIN_EPOCHS} (10 minutes) are needed for five stages")
    while True:
        epochs: list[int] = []
        stage = 0
        while len(epochs) < num_epochs:
            dwell = max(1, round(DWELL[stage] * num_epochs * rng.gamma(4, 0.25)))
            epochs += [stage] * dwell
            stage = int(rng.choice(len(STAGES), p=TRANSITIONS[stage]))
        counts = np.bincount(epochs[:num_epochs], minlength=len(STAGES))
        if counts.min() >= 0.05 * num_epochs:
            return tuple(STAGES[stage] for stage in epochs[:num_epochs])


def band_noise(num_samples: int, rate: float, low_hz: float, high_hz: float, rng: np.random.Generator) -> Array:
    """Noise of unit variance between two frequencies."""
    frequencies = np.fft.rfftfreq(num_samples, 1 / rate)
    inside = (frequencies >= low_hz) & (frequencies <= high_hz)
    spectrum = np.zeros(len(frequencies), dtype=complex)
    spectrum[inside] = rng.standard_normal((int(inside.sum()), 2)).view(complex)[:, 0]
    # Parseval: each of the n two-sided bins has variance 2 and counts twice.
    return np.fft.irfft(spectrum, num_samples) * num_samples / np.sqrt(4 * max(1, int(inside.sum())))


def pink_noise(num_samples: int, rate: float, slope: float, rng: np.random.Generator) -> Array:
    """Noise of unit variance whose power falls with frequency as f^-slope, flat below 0.5 Hz."""
    gain = np.maximum(np.fft.rfftfreq(num_samples, 1 / rate), 0.5) ** (-slope / 2)
    gain[0] = 0
    spectrum = rng.standard_normal((len(gain), 2)).view(complex)[:, 0] * gain
    return np.fft.irfft(spectrum, num_samples) * num_samples / np.sqrt(4 * float(np.sum(gain**2)))


def _drift(num_samples: int, seconds: float, rng: np.random.Generator) -> Array:
    """A wandering series of unit variance on the latent grid that forgets itself within `seconds`."""
    memory = np.exp(-1 / (LATENT_HZ * seconds))
    steps = rng.standard_normal(num_samples) * np.sqrt(1 - memory**2)
    steps[0] = rng.standard_normal()
    return np.asarray(signal.lfilter([1], [1, -memory], steps))


def train(times_s: Array, weights: Array, kernel: Array, *, rate: float, num_samples: int) -> Array:
    """A weighted copy of the kernel starting at each time."""
    impulses = np.zeros(num_samples)
    positions = np.round(np.asarray(times_s) * rate).astype(int)
    inside = positions < num_samples
    np.add.at(impulses, positions[inside], np.asarray(weights)[inside])
    return signal.oaconvolve(impulses, kernel)[:num_samples]


def arrivals(per_minute: Array, rng: np.random.Generator) -> Array:
    """Times (s) of a Poisson process whose rate per minute is given on the latent grid."""
    hits = np.flatnonzero(rng.random(len(per_minute)) < per_minute / (60 * LATENT_HZ))
    return (hits + rng.random(len(hits))) / LATENT_HZ


def draw_night(traits: Traits, num_epochs: int, rng: np.random.Generator) -> Night:
    """Stages, arousal, movement, breathing and heart beats of one night."""
    stages = draw_hypnogram(num_epochs, rng)
    size = num_epochs * EPOCH_S * LATENT_HZ
    one_hot = np.array([[stage == name for stage in stages] for name in STAGES], dtype=float)
    weights = signal.oaconvolve(
        np.pad(np.repeat(one_hot, EPOCH_S * LATENT_HZ, axis=1), ((0, 0), (16, 16)), mode="edge"),
        np.full((1, 33), 1 / 33),
        mode="valid",
        axes=1,
    )
    moves_s = arrivals(weights.T @ MOVES_PER_MIN, rng)
    strength = rng.uniform(0.5, 1.2, len(moves_s))
    bump = np.sin(np.linspace(0, np.pi, 5 * LATENT_HZ)) ** 2
    movement = train(moves_s, strength, bump, rate=LATENT_HZ, num_samples=size)
    after = np.exp(-np.arange(30 * LATENT_HZ) / (10 * LATENT_HZ))
    startle = train(moves_s, strength, after, rate=LATENT_HZ, num_samples=size)
    infraslow = band_noise(size, LATENT_HZ, 1 / 70, 1 / 35, rng)
    arousal = weights.T @ AROUSAL + 0.45 * _drift(size, 60, rng) - 0.3 * infraslow + 0.8 * startle

    irregular = (weights.T @ BREATH_IRREGULARITY) * _drift(size, 4, rng)
    breath_hz = traits.breaths_per_min / 60 * (weights.T @ BREATH_RATE) * (1 + 0.06 * arousal + irregular)
    phase = 2 * np.pi * np.cumsum(np.clip(breath_hz, 0.1, 0.6)) / LATENT_HZ
    depth = np.exp(0.2 * _drift(size, 25, rng) + 0.12 * arousal)

    # Inspiration (rising belt) speeds the heart up.
    arrhythmia = traits.sinus_arrhythmia_bpm * (weights.T @ SINUS_ARRHYTHMIA) * np.sin(phase)
    heart = traits.heart_bpm * (1 + 0.07 * arousal) + arrhythmia + 1.0 * _drift(size, 15, rng)
    heart = np.clip(heart, 38, 150)
    return Night(
        stages=stages,
        weights=weights,
        arousal=arousal,
        infraslow=infraslow,
        movement=movement,
        breath_phase=phase,
        breath_depth=depth,
        heart_bpm=heart,
        beats_s=beat_times(heart, LATENT_HZ),
    )


def beat_times(heart_bpm: Array, rate: float) -> Array:
    """Times (s) at which the integrated heart rate passes a whole number."""
    beats = np.cumsum(heart_bpm) / (60 * rate)
    return np.interp(np.arange(1, int(beats[-1]) + 1), beats, np.arange(len(beats)) / rate)


def heart_dipole(
    beats_s: Array, num_samples: int, *, rate: int, wave_scale: Array, gains: Mapping[str, float] | None = None
) -> Array:
    """Heart dipole in mV, shape (3, num_samples): one Gaussian per wave and beat.

    Args:
        beats_s: R peaks in seconds, rising.
        num_samples: Samples to draw.
        rate: Sampling rate in Hz.
        wave_scale: Factors, shape (5, 3): the subject's own shape of a beat.
        gains: Factor per wave; `{"P": 0}` for atrial fibrillation.
    """
    time = np.arange(num_samples) / rate
    # A beat beyond each end, so that every sample has one before and one after it.
    first, last = 2 * beats_s[0] - beats_s[1], 2 * beats_s[-1] - beats_s[-2]
    beats = np.concatenate([[min(first, -0.5)], beats_s, [max(last, time[-1] + 0.5)]])
    following = np.clip(np.searchsorted(beats, time, side="right"), 1, len(beats) - 1)
    since, until = time - beats[following - 1], time - beats[following]
    nearest = np.where(since < -until, since, until)
    # QT shortens with the root of the RR interval (Bazett).
    stretch = np.sqrt(np.clip(since - until, 0.35, 1.5))
    dipole = np.zeros((3, num_samples))
    for row, (name, (moment, centre, width)) in enumerate(WAVES.items()):
        distance = {"P": until, "T": since / stretch}.get(name, nearest)
        shape = np.exp(-0.5 * ((distance - centre) / width) ** 2) * (gains or {}).get(name, 1.0)
        dipole += (np.asarray(moment) * wave_scale[row])[:, None] * shape
    return dipole


def _heart_beats(rhythm: str, rng: np.random.Generator) -> Array:
    """R peaks (s) of a 12-lead record: regular with sinus arrhythmia, or irregular in atrial fibrillation."""
    interval = 60 / rng.uniform(*RHYTHMS[rhythm])
    count = int(2 * ECG_SECONDS / interval) + 2
    if rhythm == ATRIAL_FIBRILLATION:
        intervals = interval * np.exp(rng.normal(0, 0.22, count))
    else:
        breath = np.sin(2 * np.pi * 0.25 * interval * np.arange(count) + rng.uniform(0, 6))
        intervals = interval * (1 + 0.03 * breath + rng.normal(0, 0.008, count))
    # From a beat before the record's start on, so that the first interval is not longer than the others.
    beats = np.cumsum(np.maximum(intervals, 0.3)) - intervals[0] - rng.uniform(0, interval)
    return beats[beats < ECG_SECONDS]


def twelve_lead_mv(rhythm: str, rng: np.random.Generator) -> Array:
    """A 10-s record in mV, shape (5000, 12): atrial fibrillation has no P waves but fibrillatory ones."""
    size = ECG_SECONDS * ECG_RATE_HZ
    is_fibrillating = rhythm == ATRIAL_FIBRILLATION
    dipole = heart_dipole(
        _heart_beats(rhythm, rng),
        size,
        rate=ECG_RATE_HZ,
        wave_scale=np.exp(rng.normal(0, 0.2, (5, 3))),
        gains={"P": 0.0} if is_fibrillating else None,
    )
    if is_fibrillating:
        dipole += np.array([[0.01], [0.04], [-0.04]]) * band_noise(size, ECG_RATE_HZ, 4, 8.5, rng)
    leads = (np.array(list(LEADS.values())) @ dipole).T
    wander = 0.04 * band_noise(size, ECG_RATE_HZ, 0.1, 0.5, rng)[:, None] * rng.uniform(0.3, 1, len(LEADS))
    return leads + wander + 0.012 * rng.standard_normal(leads.shape)
