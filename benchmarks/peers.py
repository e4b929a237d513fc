"""What others do with an EDF, restated with public library calls: each function reads one file and writes one output.

The steps follow the named files; options that they leave at a default stay there. MNE's own notes are switched off.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import h5py
import mne
import numpy as np
import pyedflib
from inputs import MAINS_HZ
from scipy import signal

BAND_HZ = (0.1, 75.0)
EEG_HZ = 200
SLEEP_HZ = 128


def labram(path: Path, output: Path) -> None:
    """HDF5 maker of LaBraM.

    Source: 935963004/LaBraM, dataset_maker/make_h5dataset_for_pretrain.py and dataset_maker/shock/utils/eegUtils.py
    (band-pass, 50 Hz notch, resample to 200 Hz, microvolts, chunks of one second).
    """
    raw = mne.io.read_raw_edf(path, preload=True, verbose="error")
    raw.filter(*BAND_HZ, picks="all", verbose="error")
    raw.notch_filter(float(MAINS_HZ), picks="all", verbose="error")
    raw.resample(EEG_HZ, verbose="error")
    data = raw.get_data(units="uV")[:, : -10 * EEG_HZ]
    with h5py.File(output / "dataset.hdf5", "w") as file:
        dataset = file.create_group(path.stem).create_dataset("eeg", data=data, chunks=(len(data), EEG_HZ))
        dataset.attrs["chOrder"] = [name.upper() for name in raw.ch_names]


def sleepfm(path: Path, output: Path) -> None:
    """Preprocessing of SleepFM.

    Source: zou-group/sleepfm-clinical, sleepfm/preprocessing/preprocessing.py (MNE brings every channel to the highest
    rate, Butterworth low-pass of order 4 both ways, linear interpolation to 128 Hz, z-score, gzip and float16 in
    chunks of 5 minutes).
    """
    raw = mne.io.read_raw_edf(path, preload=True, verbose="error")
    rate = raw.info["sfreq"]
    with h5py.File(output / f"{path.stem}.hdf5", "w") as file:
        for name in raw.ch_names:
            resampled = butterworth_and_linear(raw.get_data(picks=[name])[0], rate, SLEEP_HZ)
            spread = resampled.std()
            scored = (resampled - resampled.mean()) / (spread if spread else 1.0)
            file.create_dataset(name, data=scored, dtype="float16", chunks=(300 * SLEEP_HZ,), compression="gzip")


def butterworth_and_linear(values: np.ndarray, rate: float, target_hz: int) -> np.ndarray:
    """SleepFM's change of rate for one channel, see `sleepfm`."""
    if rate > target_hz:
        values = signal.filtfilt(*signal.butter(4, target_hz / rate, btype="low"), values)
    duration = len(values) / rate
    new_times = np.linspace(0, duration, num=int(duration * target_hz), endpoint=False)
    return np.interp(new_times, np.linspace(0, duration, num=len(values), endpoint=False), values)


def braindecode_windows(path: Path, output: Path) -> None:
    """Fixed-length windows of braindecode after its usual preprocessing, saved as it saves them.

    Source: braindecode documentation, `preprocess`, `create_fixed_length_windows`, `BaseConcatDataset.save`.
    """
    datasets, preprocessing = _braindecode()
    raw = mne.io.read_raw_edf(path, preload=True, verbose="error")
    recordings = datasets.BaseConcatDataset([datasets.RawDataset(raw, description={"subject": path.stem})])
    steps = [
        preprocessing.Preprocessor("filter", l_freq=BAND_HZ[0], h_freq=BAND_HZ[1], verbose="error"),
        preprocessing.Preprocessor("notch_filter", freqs=float(MAINS_HZ), verbose="error"),
        preprocessing.Preprocessor("resample", sfreq=EEG_HZ, verbose="error"),
    ]
    preprocessing.preprocess(recordings, steps)
    windows = preprocessing.create_fixed_length_windows(
        recordings, 0, None, 4 * EEG_HZ, 4 * EEG_HZ, drop_last_window=True, preload=True
    )
    windows.save(str(output), overwrite=True)


def luna(path: Path, output: Path) -> None:
    """Band-pass of EEG and EOG, every channel to 128 Hz, a new EDF, by Luna (C++) through lunapi.

    Source: Luna's reference manual, commands FILTER, RESAMPLE and WRITE. The Butterworth filter is the cheapest one it
    has: with its FIR filter of 0.5 Hz transition width the same night takes 2.5 times as long.
    """
    project = import_module("lunapi").proj()
    project.silence(b=True)
    recording = project.inst(path.stem)
    recording.attach_edf(str(path))
    picked = ",".join(name for name in recording.channels()["Channels"] if name.startswith(("EEG", "EOG")))
    recording.eval(f"FILTER sig={picked} butterworth=4 bandpass=0.3,35")
    recording.eval(f"RESAMPLE sr={SLEEP_HZ}")
    recording.eval(f"WRITE edf-dir={output} edf-tag=luna")


def _braindecode() -> tuple[ModuleType, ModuleType]:
    return import_module("braindecode.datasets"), import_module("braindecode.preprocessing")


def plain_scipy(path: Path, output: Path, *, target_hz: int, low_hz: float) -> None:
    """What one writes by hand: pyedflib, Butterworth band-pass and notch both ways, `resample_poly`, float32 HDF5."""
    with pyedflib.EdfReader(str(path)) as edf, h5py.File(output / "plain.hdf5", "w") as file:
        for index in range(edf.signals_in_file):
            rate = int(edf.getSampleFrequency(index))
            values = edf.readSignal(index)
            if rate > 2 * MAINS_HZ:
                high_hz = min(BAND_HZ[1], 0.45 * min(rate, target_hz))
                band = signal.butter(4, (low_hz, high_hz), btype="band", fs=rate, output="sos")
                values = signal.sosfiltfilt(band, values)
                values = signal.filtfilt(*signal.iirnotch(MAINS_HZ, 30, fs=rate), values)
            if rate != target_hz:
                values = signal.resample_poly(values, target_hz, rate)
            file.create_dataset(f"{index}", data=values.astype(np.float32))


def plain_psg(path: Path, output: Path) -> None:
    """`plain_scipy` for the night."""
    plain_scipy(path, output, target_hz=SLEEP_HZ, low_hz=0.3)


def plain_eeg(path: Path, output: Path) -> None:
    """`plain_scipy` for the clinical EEG."""
    plain_scipy(path, output, target_hz=EEG_HZ, low_hz=BAND_HZ[0])


PEERS: dict[str, Callable[[Path, Path], None]] = {
    "sleepfm": sleepfm,
    "luna": luna,
    "labram": labram,
    "braindecode": braindecode_windows,
    "pyedflib+scipy psg": plain_psg,
    "pyedflib+scipy": plain_eeg,
}


def warm_up() -> None:
    """Load what the libraries load late, so that imports are not measured."""
    data = np.random.default_rng(0).standard_normal((1, 4000))
    raw = mne.io.RawArray(data, mne.create_info(1, 250.0, "eeg", verbose="error"), verbose="error")
    raw.filter(1.0, 40.0, picks="all", verbose="error").resample(EEG_HZ, verbose="error")
    if is_at_hand("braindecode"):
        _braindecode()


def is_at_hand(way: str) -> bool:
    """Whether the library of a peer is installed: braindecode and Luna are no part of kymo's own environment."""
    module = {"braindecode": "braindecode", "luna": "lunapi"}.get(way)
    return module is None or find_spec(module) is not None
