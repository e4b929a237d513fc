"""How true the signal path is: kymo beside MNE (LaBraM's recipe), scipy's resample_poly and SleepFM's interpolation.

* ripple: largest deviation of a sine's amplitude inside the pass-band that the recipe promises, in dB
* alias: largest trace, in dB, that a sine above half the new rate leaves in the output
* SNR: an exact sum of sines inside the pass-band against the output, in dB; for kymo after int16 too, per 30-s window
* drift: how far the end of 24 hours at 1000/3 Hz lies from where it should, in microseconds

    python benchmarks/signal_path.py [--memory] [--out FOLDER]

`--memory` also converts a 24-h night of 40 channels at 256 Hz and tells the peak memory (4 GB of disk, a minute).
"""

import argparse
import json
import resource
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import inputs
import mne
import numpy as np
import peers
from convert import config_of
from scipy import signal

from engine.convert import convert_all
from engine.dsp import harmonise
from engine.quality import quantise, statistics

SECONDS = 300
EDGE_S = 30  # left out at both ends: filters of the peers ring there
PAIRS = ((256, 200), (256, 128), (512, 128))
DRIFT_HZ = 10.0

Change = Callable[[np.ndarray, Fraction, int], np.ndarray]


def kymo(values: np.ndarray, rate: Fraction, target_hz: int) -> np.ndarray:
    """Resampling with kymo's own anti-alias filter, no further band."""
    out = harmonise(
        values.astype(np.float32),
        rate=rate,
        target_hz=target_hz,
        low_hz=None,
        high_hz=None,
        notch_hz=None,
        segments_samples=[len(values)],
    )
    return out.astype(np.float64)


def kymo_int16(values: np.ndarray, rate: Fraction, target_hz: int) -> np.ndarray:
    """The same, stored as int16 and read back."""
    out = kymo(values, rate, target_hz).astype(np.float32)
    found = statistics(out)
    samples, scale, _ = quantise(out, found.sd, found.peak)
    return samples * scale


def mne_fft(values: np.ndarray, rate: Fraction, target_hz: int) -> np.ndarray:
    """`raw.resample`, as LaBraM's maker calls it."""
    return mne.filter.resample(values, up=target_hz, down=float(rate), verbose="error")


def mne_polyphase(values: np.ndarray, rate: Fraction, target_hz: int) -> np.ndarray:
    """`raw.resample(method="polyphase")`."""
    ratio = target_hz / rate
    return mne.filter.resample(
        values, up=float(ratio.numerator), down=float(ratio.denominator), method="polyphase", verbose="error"
    )


def scipy_poly(values: np.ndarray, rate: Fraction, target_hz: int) -> np.ndarray:
    """`scipy.signal.resample_poly` with its own filter."""
    ratio = target_hz / rate
    return signal.resample_poly(values, ratio.numerator, ratio.denominator)


def sleepfm(values: np.ndarray, rate: Fraction, target_hz: int) -> np.ndarray:
    """Butterworth and linear interpolation."""
    return peers.butterworth_and_linear(values, float(rate), target_hz)


WAYS: dict[str, Change] = {
    "kymo float32": kymo,
    "kymo int16": kymo_int16,
    "mne resample (LaBraM)": mne_fft,
    "mne polyphase": mne_polyphase,
    "scipy resample_poly": scipy_poly,
    "SleepFM": sleepfm,
}


def sine(freq_hz: float, rate: Fraction | int, num_samples: int, phase: float = 0.3) -> np.ndarray:
    """Sine that begins at time 0."""
    return np.sin(2 * np.pi * freq_hz * np.arange(num_samples) / float(rate) + phase)


def inside(values: np.ndarray, rate: float) -> np.ndarray:
    """Values without the edges."""
    return values[int(EDGE_S * rate) : -int(EDGE_S * rate)]


def decibel(ratio: float) -> float:
    """Amplitude ratio in dB."""
    return float(20 * np.log10(max(ratio, 1e-12)))


def amplitude(values: np.ndarray, freq_hz: float, rate: int) -> float:
    """Amplitude of a sine within a signal, by projection."""
    return float(2 * abs(np.mean(values * np.exp(-2j * np.pi * freq_hz * np.arange(len(values)) / rate))))


def ripple(change: Change, rate: int, target_hz: int) -> float:
    """Largest deviation of the amplitude up to 90 % of half the lower rate, in dB."""
    edge = 0.45 * min(rate, target_hz)
    found = [
        amplitude(
            inside(change(sine(freq, rate, SECONDS * rate), Fraction(rate), target_hz), target_hz), freq, target_hz
        )
        for freq in np.round(np.linspace(1, edge, 8), 1)
    ]
    return max(abs(decibel(value)) for value in found)


def alias(change: Change, rate: int, target_hz: int) -> float:
    """Largest amplitude that is left of a sine between half the new rate and half the old one, in dB."""
    found = []
    for freq in np.linspace(target_hz / 2 * 1.02, rate / 2 * 0.98, 8):
        out = inside(change(sine(freq, rate, SECONDS * rate), Fraction(rate), target_hz), target_hz)
        found.append(float(np.sqrt(2 * np.mean(out**2))))
    return decibel(max(found))


def snr(change: Change, rate: int, target_hz: int) -> float:
    """Least SNR of a 30-s window of a sum of sines with falling amplitudes, in dB."""
    edge = 0.45 * min(rate, target_hz)
    rng = np.random.default_rng(0)
    parts = [
        (freq, 1 / freq, phase) for freq, phase in zip(rng.uniform(0.5, edge, 60), rng.uniform(0, 6, 60), strict=True)
    ]
    source = sum(size * sine(freq, rate, SECONDS * rate, phase) for freq, size, phase in parts)
    truth = sum(size * sine(freq, target_hz, SECONDS * target_hz, phase) for freq, size, phase in parts)
    out = change(np.asarray(source), Fraction(rate), target_hz)[: len(truth)]
    windows = np.asarray(truth)[: len(out)].reshape(-1, 30 * target_hz)[1:-1]
    noise = windows - out.reshape(-1, 30 * target_hz)[1:-1]
    return min(decibel(float(np.sqrt(np.mean(w**2) / np.mean(n**2)))) for w, n in zip(windows, noise, strict=True))


def drift_us(change: Change, hours: float = 24.0) -> float:
    """Shift of a 10 Hz sine in the last minutes of a recording at 1000/3 Hz, in microseconds."""
    rate, target_hz = Fraction(1000, 3), 128
    num_samples = int(hours * 3600 * rate)
    out = change(sine(DRIFT_HZ, rate, num_samples, 0.0), rate, target_hz)
    first = len(out) - 180 * target_hz
    tail = out[first : first + 120 * target_hz]
    angle = np.angle(np.mean(tail * np.exp(-2j * np.pi * DRIFT_HZ * np.arange(first, first + len(tail)) / target_hz)))
    return float((angle + np.pi / 2) / (2 * np.pi * DRIFT_HZ) * 1e6)


def peak_memory(scratch: Path, hours: float = 24.0, num_channels: int = 40) -> dict[str, float]:
    """Peak memory in MB of both processes that convert a night of 40 channels at 256 Hz to sleep128."""
    names = [f"{site}-{reference}" for reference in ("M1", "M2") for site in inputs.SITES[:-2]][: num_channels - 2]
    signals = tuple(inputs.Signal(label=f"EEG {name}", rate=256, unit="uV", sd=40.0) for name in names)
    signals += tuple(inputs.Signal(label=name, rate=256, unit="uV", sd=20.0) for name in ("EMG chin", "EMG leg left"))
    folder = scratch / "night"
    inputs.write_edf_in_pieces(folder / "s1" / "night.edf", signals, hours)
    result = convert_all(config_of(folder, scratch / "shards", "sleep128"))
    if result.snapshot is None or result.quarantine:
        raise SystemExit(f"kymo rejected the night: {result.quarantine}")
    own, child = (resource.getrusage(who).ru_maxrss / 1e3 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"channels": len(signals), "hours": hours, "parent_mb": own, "child_mb": child}


def table(report: dict[str, dict[str, float]]) -> str:
    """The numbers as markdown."""
    columns = list(next(iter(report.values())))
    lines = [f"| | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 1)}"]
    lines += [f"| {way} | {' | '.join(f'{row[name]:.4g}' for name in columns)} |" for way, row in report.items()]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for signal_path.json and signal_path.md")
    arguments = parser.parse_args()
    memory = {}
    if arguments.memory:  # first: what the comparison holds would count as the parent's
        with tempfile.TemporaryDirectory() as name:
            memory = peak_memory(Path(name))
        print(memory, flush=True)
    report: dict[str, dict[str, float]] = {}
    for way, change in WAYS.items():
        row: dict[str, float] = {}
        for rate, target_hz in PAIRS:
            row[f"{rate} to {target_hz}: ripple dB"] = ripple(change, rate, target_hz)
            row["alias dB"] = max(alias(change, rate, target_hz), row.get("alias dB", -1e9))
            row["SNR dB"] = min(snr(change, rate, target_hz), row.get("SNR dB", 1e9))
        row["drift us in 24 h"] = drift_us(change)
        report[way] = row
        print(way, {name: round(value, 4) for name, value in row.items()}, flush=True)
    print(table(report))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        content = {"signal": report, "memory": memory}
        (arguments.out / "signal_path.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (arguments.out / "signal_path.md").write_text(table(report) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
