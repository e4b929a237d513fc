"""Recorded hours converted per CPU-second: kymo beside a plain mne + h5py script on the same synthetic night.

Both read the same EDF (8 h: 6 EEG/EOG and 2 EMG at 256 Hz, ECG at 512 Hz, 4 respiration at 32 Hz), apply the band
and notch of recipe sleep128, resample to 128 Hz, cut 30-s windows and write them. The script does what scripts of
this field do: one mne Raw per rate (a single one would upsample every channel to 512 Hz and take minutes), FIR
filters with mne's defaults, one HDF5 data set per kind and gzip level 4.

Run: python benchmarks/convert.py [--hours 8] [--runs 3]. Takes about a minute on one core.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import edfio
import h5py
import mne
import numpy as np

from engine.config import ConvertConfig, Source
from engine.convert import convert_all
from engine.sandbox import Sandbox
from manifests.config import dump_yaml
from manifests.recipes import load_recipe

SIGNALS = {
    **dict.fromkeys(("EEG F3-M2", "EEG C3-M2", "EEG O1-M2", "EEG C4-M1"), ("eeg", 256, "uV", 40.0)),
    **dict.fromkeys(("EOG E1-M2", "EOG E2-M2"), ("eog", 256, "uV", 80.0)),
    **dict.fromkeys(("EMG chin", "EMG leg left"), ("emg", 256, "uV", 20.0)),
    "ECG II": ("ecg", 512, "mV", 0.4),
    **dict.fromkeys(("Flow", "Nasal Pressure", "Thorax", "Abdomen"), ("resp", 32, "", 100.0)),
}
MAINS_HZ = 50


def write_night(path: Path, hours: float) -> None:
    """Coloured noise with mains hum as one EDF."""
    rng = np.random.default_rng(0)
    signals = []
    for label, (_, rate, unit, sd) in SIGNALS.items():
        num_samples = int(hours * 3600) * rate
        noise = rng.standard_normal(num_samples, dtype=np.float32)
        noise = np.convolve(noise, np.ones(8, dtype=np.float32) / 3, mode="same")
        hum = np.sin(np.arange(num_samples, dtype=np.float32) * (2 * np.pi * MAINS_HZ / rate)) if rate > 100 else 0.0
        limit = 20 * sd
        signals.append(
            edfio.EdfSignal(
                sd * (noise + 0.3 * hum), rate, label=label, physical_dimension=unit, physical_range=(-limit, limit)
            )
        )
    path.parent.mkdir(parents=True)
    edfio.Edf(signals).write(path)


def convert_with_kymo(folder: Path, output: Path) -> None:
    """Scan, plan, convert and finalise, every check switched on, in this process and its sandbox."""
    corpus = folder / "bench.yaml"
    corpus.write_text(
        dump_yaml(
            {
                "id": "bench",
                "title": "bench",
                "licence": "none",
                "access": "none",
                "reader": "edf",
                "files": ["*/*.edf"],
                "subject": {"pattern": r"^(?P<subject>\w+)/"},
                "channels": {"Flow": "resp:flow"},
                "mains_hz": MAINS_HZ,
            }
        ),
        encoding="utf-8",
    )
    config = ConvertConfig(output=output, recipe="sleep128", sources=[Source(corpus=str(corpus), root=folder)])
    result = convert_all(config)
    if result.snapshot is None:
        raise SystemExit(f"kymo rejected the night: {result.quarantine}")


def convert_with_mne(path: Path, output: Path) -> None:
    """The plain script."""
    recipe = load_recipe("sleep128")
    by_kind: dict[str, list[str]] = defaultdict(list)
    for label, (kind, *_) in SIGNALS.items():
        by_kind[kind].append(label)
    with h5py.File(output, "w") as file:
        for kind, labels in by_kind.items():
            rule = recipe.kinds[kind]
            raw = mne.io.read_raw_edf(path, include=labels, preload=True, verbose="error")
            nyquist = raw.info["sfreq"] / 2
            if rule.notch:
                raw.notch_filter(np.arange(MAINS_HZ, nyquist, MAINS_HZ), picks="all", verbose="error")
            high_hz = rule.high_hz if rule.high_hz and rule.high_hz < nyquist else None
            raw.filter(rule.low_hz, high_hz, picks="all", verbose="error")
            raw.resample(rule.rate_hz, verbose="error")
            data = raw.get_data()
            length = rule.rate_hz * recipe.window_s
            windows = data[:, : data.shape[1] // length * length].reshape(len(labels), -1, length)
            file.create_dataset(
                kind,
                data=windows.transpose(1, 0, 2).astype(np.float32),
                chunks=(1, len(labels), length),
                compression="gzip",
                compression_opts=4,
            )


def cpu_seconds() -> float:
    """CPU time of this process and the children that it has waited for, in seconds."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def measure(way: str, folder: Path, scratch: Path) -> None:
    """One run in a process of its own: prints CPU-seconds without imports, and peak memory in MB."""
    began = cpu_seconds()
    if way == "start":
        with Sandbox(time_limit_s=60, memory_limit_gb=4) as sandbox:
            sandbox.start()
    elif way == "kymo":
        convert_with_kymo(folder, scratch / "shards")
    else:
        convert_with_mne(next(folder.glob("*/*.edf")), scratch / "windows.h5")
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    size = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
    print(cpu_seconds() - began, max(peaks) / 1e3, size / 1e6)


def main() -> None:
    """Alternate both, print medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--hours", type=float, default=8.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.measure:
            measure(arguments.measure[0], Path(arguments.measure[1]), Path(scratch))
            return
        folder = Path(scratch) / "recordings"
        write_night(folder / "s1" / "night.edf", arguments.hours)
        began = time.monotonic()
        one_core = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        found: dict[str, list[list[float]]] = {"kymo": [], "mne + h5py": [], "start": []}
        for _ in range(arguments.runs):
            for way, rows in found.items():
                command = [sys.executable, __file__, "--measure", way.split()[0], str(folder)]
                output = subprocess.run(command, check=True, capture_output=True, text=True, env=one_core).stdout
                rows.append([float(word) for word in output.split()])
    print(f"{arguments.hours:g} h night, {len(SIGNALS)} signals, median of {arguments.runs} alternating runs")
    print(f"{'':12}{'CPU s':>8}{'h / CPU s':>12}{'peak MB':>10}{'output MB':>11}")
    medians = {way: [statistics.median(column) for column in zip(*rows, strict=True)] for way, rows in found.items()}
    start_s = medians.pop("start")[0]
    for way, (seconds, peak, size) in medians.items():
        print(f"{way:12}{seconds:8.2f}{arguments.hours / seconds:12.2f}{peak:10.0f}{size:11.0f}")
    ratio = medians["mne + h5py"][0] / medians["kymo"][0]
    steady = arguments.hours / (medians["kymo"][0] - start_s)
    print(f"kymo takes {ratio:.1f} times less CPU time; {time.monotonic() - began:.0f} s in all")
    print(f"{start_s:.2f} CPU s of kymo's start its sandbox, once per actor; without it {steady:.2f} h / CPU s")


if __name__ == "__main__":
    main()
