"""Synthetic recordings for the benchmarks: coloured noise with mains hum, as EDF."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import edfio
import numpy as np

MAINS_HZ = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """One signal of a synthetic recording: rate in Hz, unit, standard deviation and level in that unit."""

    label: str
    rate: int
    unit: str
    sd: float
    level: float = 0.0


# 8 h of this is the night of the issue: 6 EEG/EOG and 2 EMG at 256 Hz, ECG at 512, 4 respiration at 32, SpO2 at 1.
NIGHT = (
    *(Signal(label=f"EEG {name}", rate=256, unit="uV", sd=40.0) for name in ("F3-M2", "C3-M2", "O1-M2", "C4-M1")),
    *(Signal(label=f"EOG {name}", rate=256, unit="uV", sd=80.0) for name in ("E1-M2", "E2-M2")),
    *(Signal(label=f"EMG {name}", rate=256, unit="uV", sd=20.0) for name in ("chin", "leg left")),
    Signal(label="ECG II", rate=512, unit="mV", sd=0.4),
    *(Signal(label=name, rate=32, unit="", sd=100.0) for name in ("Flow", "Nasal Pressure", "Thorax", "Abdomen")),
    Signal(label="SpO2", rate=1, unit="%", sd=1.0, level=95.0),
)
_ROWS = (("Fp1", "Fp2"), ("F7", "F3", "Fz", "F4", "F8"), ("T3", "C3", "Cz", "C4", "T4"), ("T5", "P3", "Pz", "P4", "T6"))
SITES = [site for row in (*_ROWS, ("O1", "O2"), ("A1", "A2")) for site in row]


def clinical_eeg(rate: int) -> tuple[Signal, ...]:
    """21 channels of the 10-20 system against a common reference."""
    return tuple(Signal(label=f"EEG {site}-REF", rate=rate, unit="uV", sd=30.0) for site in SITES)


def wave(signal: Signal, hours: float, seed: int) -> np.ndarray:
    """Noise that falls off with frequency, and mains hum where the rate can carry it: float32, in the unit."""
    num_samples = int(hours * 3600 * signal.rate)
    noise = np.random.default_rng(seed).standard_normal(num_samples, dtype=np.float32)
    if signal.rate > 1:
        noise = np.convolve(noise, np.ones(8, dtype=np.float32) / 3, mode="same")
    if signal.rate > 2 * MAINS_HZ:
        noise += 0.3 * np.sin(np.arange(num_samples, dtype=np.float64) * (2 * np.pi * MAINS_HZ / signal.rate))
    return signal.level + signal.sd * noise


def write_edf(path: Path, signals: tuple[Signal, ...], hours: float) -> Path:
    """One EDF; limits 20 standard deviations around the level."""
    path.parent.mkdir(parents=True, exist_ok=True)
    edfio.Edf(list(_edf_signals(signals, hours))).write(path)
    return path


def _edf_signals(signals: tuple[Signal, ...], hours: float) -> Iterator[edfio.EdfSignal]:
    for seed, signal in enumerate(signals):
        limits = (signal.level - 20 * signal.sd, signal.level + 20 * signal.sd)
        yield edfio.EdfSignal(
            np.clip(wave(signal, hours, seed), *limits),
            signal.rate,
            label=signal.label,
            physical_dimension=signal.unit,
            physical_range=limits,
        )


def write_edf_in_pieces(path: Path, signals: tuple[Signal, ...], hours: float) -> Path:
    """One EDF that need not fit the memory: the same minute of each signal again and again."""
    minute = write_edf(path.with_name("minute"), signals, 1 / 60)
    content = minute.read_bytes()
    minute.unlink()
    size = 256 * (len(signals) + 1)
    header = bytearray(content[:size])
    header[236:244] = f"{int(hours * 60) * int(header[236:244]):<8d}".encode("ascii")
    with path.open("wb") as file:
        file.write(header)
        for _ in range(int(hours * 60)):
            file.write(content[size:])
    return path


def corpus_of(name: str) -> dict[str, object]:
    """Corpus file for such recordings."""
    return {
        "id": name,
        "title": name,
        "licence": "none",
        "access": "none",
        "reader": "edf",
        "files": ["*/*.edf"],
        "subject": {"pattern": r"^(?P<subject>\w+)/"},
        "channels": {"Flow": "resp:flow"},
        "mains_hz": MAINS_HZ,
    }
