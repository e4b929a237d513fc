"""Loader speed: our reader against a plain webdataset pipeline, plain h5py, and plain read() as the limit.

All four give the same windows (30 s, 10 channels at 128 Hz, about 83 KB) from a warm page cache; the first three as
float32 batches of 64 in microvolts, in one process. Ours and h5py in shuffled order, webdataset in file order (its
best case). Medians of runs that take turns. Under a minute.

    python benchmarks/load.py
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import h5py
import numpy as np
import webdataset

from trainer.data import Order
from trainer.filters import SampleFilter
from trainer.read import SnapshotReader, Window
from trainer.samples import SnapshotSource, load_streams
from trainer.tiny import write_tiny_snapshot

CHANNELS = {
    "eeg": ("eeg:C3-M2", "eeg:C4-M1", "eeg:O1-M2", "eeg:O2-M1"),
    "eog": ("eog:E1-M2", "eog:E2-M2"),
    "emg": ("emg:chin",),
    "ecg": ("ecg:II",),
    "resp": ("resp:thorax", "resp:abdomen"),
}
BATCH = 64
NUM_RECORDINGS = 16
WINDOWS_PER_RECORDING = 80
ROUNDS = 3

Tagged = tuple[Mapping[str, np.ndarray], Mapping[str, Sequence[Mapping[str, Any]]]]


def batched(items: Iterator[Any]) -> Iterator[list[Any]]:
    """Lists of `BATCH` items; `itertools.batched` needs Python 3.12."""
    while group := list(islice(items, BATCH)):
        yield group


def to_batch(samples: Sequence[Tagged]) -> np.ndarray:
    """float32 (B, C, T) in the unit of each channel; missing channels stay zero."""
    rows = sum(len(names) for names in CHANNELS.values())
    batch = np.zeros((len(samples), rows, 3840), dtype=np.float32)
    for place, (arrays, tags) in enumerate(samples):
        row = 0
        for kind, names in CHANNELS.items():
            if kind in arrays:
                scale = np.array([tag["scale"] for tag in tags[kind]], dtype=np.float32)
                np.multiply(arrays[kind], scale[:, None], out=batch[place, row : row + len(scale)])
            row += len(names)
    return batch


def read_whole(folder: Path) -> Iterator[int]:
    """Bytes of each tar, read in pieces of a megabyte and thrown away."""
    buffer = bytearray(2**20)
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
        yield 0


def ours(order: Order, num_batches: int, *, num_threads: int) -> Iterator[np.ndarray]:
    """Batches through `SnapshotReader.stream`, converted in its threads as training does."""
    reader = SnapshotReader(order.streams, num_threads=num_threads)

    def convert(_: int, windows: list[Window]) -> np.ndarray:
        return to_batch([(window.arrays, window.meta["ucs"]) for window in windows])

    batches = reader.stream(order, convert)
    yield from islice(batches, num_batches)
    batches.close()
    reader.close()


def plain_webdataset(folder: Path) -> Iterator[np.ndarray]:
    """Batches through `WebDataset(…).decode()`."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode()
    for group in batched(iter(samples)):
        yield to_batch([({name[:-4]: s[name] for name in s if name.endswith(".npy")}, s["json"]["ucs"]) for s in group])


def plain_h5py(folder: Path, index: Sequence[tuple[str, int]]) -> Iterator[np.ndarray]:
    """Batches of windows cut from one HDF5 file per recording, opened for each window."""
    for group in batched(iter(index)):
        samples: list[Tagged] = []
        for name, window in group:
            with h5py.File(folder / name) as file:
                cut = slice(window * 3840, (window + 1) * 3840)
                arrays = {kind: file[kind][:, cut] for kind in file}
                tags = {kind: json.loads(file[kind].attrs["tags"]) for kind in file}
            samples.append((arrays, tags))
        yield to_batch(samples)


def write_h5(order: Order, folder: Path) -> list[tuple[str, int]]:
    """The same windows as one chunked, uncompressed HDF5 file per recording; returns a shuffled index."""
    folder.mkdir()
    reader = SnapshotReader(order.streams)
    addresses = [order.address(0, position) for position in range(len(order.streams[0]))]
    by_recording: dict[str, list[Window]] = {}
    for address in addresses:
        (window,) = reader.read([address], order=order)
        by_recording.setdefault(window.recording, []).append(window)
    index: list[tuple[str, int]] = []
    for recording, windows in by_recording.items():
        windows.sort(key=lambda window: window.meta["start"])
        with h5py.File(folder / f"{recording}.h5", "w") as file:
            for kind in windows[0].arrays:
                data = np.concatenate([window.arrays[kind] for window in windows], axis=1)
                dataset = file.create_dataset(kind, data=data, chunks=True)
                dataset.attrs["tags"] = json.dumps(windows[0].meta["ucs"][kind])
        index += [(f"{recording}.h5", number) for number in range(len(windows))]
    reader.close()
    return [index[place] for place in np.random.default_rng(0).permutation(len(index))]


def seconds_of(make: Callable[[], Iterator[Any]]) -> tuple[float, float]:
    """Wall and CPU seconds (of all threads) to exhaust an iterator."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in make():
        pass
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "snapshot")
        write_tiny_snapshot(
            folder,
            channels=CHANNELS,
            num_subjects=NUM_RECORDINGS,
            windows_per_subject=WINDOWS_PER_RECORDING,
            rate_hz=128,
            seconds=30,
            num_shards=8,
            num_held_out=0,
        )
        streams = load_streams([SnapshotSource(path=str(folder))], split="train", keep=SampleFilter())
        order = Order(streams, seed=0, global_batch=BATCH)
        index = write_h5(order, Path(root, "h5"))
        num_windows = len(streams[0])
        num_bytes = int(streams[0].num_bytes.sum())
        num_batches = num_windows // BATCH
        contenders: dict[str, Callable[[], Iterator[Any]]] = {
            "read() of the tars, the limit": lambda: read_whole(folder),
            "kymo, 1 thread": lambda: ours(order, num_batches, num_threads=1),
            "kymo, 2 threads": lambda: ours(order, num_batches, num_threads=2),
            "webdataset .decode()": lambda: plain_webdataset(folder),
            "h5py, a file per recording": lambda: plain_h5py(Path(root, "h5"), index),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        for _ in range(ROUNDS):
            for name, make in contenders.items():
                times[name].append(seconds_of(make))
    print(f"{num_windows} windows, {num_bytes / num_windows / 1e3:.0f} KB each, medians of {ROUNDS} runs")
    print(f"{'':32}{'windows/s':>12}{'MB/s':>10}{'CPU us/window':>16}")
    for name, values in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*values, strict=True))
        per_window = 1e6 * cpu / num_windows
        print(f"{name:32}{num_windows / wall:12,.0f}{num_bytes / wall / 1e6:10,.0f}{per_window:16.0f}")


if __name__ == "__main__":
    main()
