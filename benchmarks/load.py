"""Loader: CPU microseconds per sample and MB/s of int16, beside peers that read the same samples.

Samples of 10 channels at 128 Hz in a warm page cache: 30 s (85 KB) and 300 s (0.8 MB). All in one process with one
reading thread, in the same shuffled order, except webdataset, which reads in file order (its best case). Peers are
restated with public library calls: webdataset `.decode()` and a batch; one HDF5 file per night as SleepFM's
preprocessing writes it (float16, gzip, chunks of 5 min, a dataset per channel) and its dataset reads it (the file
opened for each item); LMDB with a pickled dictionary per sample (torcheeg). CPU time is the process's, of all threads;
medians of runs that take turns. About two minutes on a quiet machine.

    python benchmarks/load.py
"""

import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import h5py
import lmdb
import numpy as np
import torch
import webdataset

from trainer.batches import StoredBatch, collate_channels
from trainer.data import Order
from trainer.filters import SampleFilter
from trainer.objectives.crops import CropConfig, draw_crops
from trainer.read import SnapshotReader, Window, read_rows
from trainer.samples import SnapshotSource, load_streams
from trainer.tiny import write_tiny_snapshot

CHANNELS = {
    "eeg": ("eeg:C3-M2", "eeg:C4-M1", "eeg:O1-M2", "eeg:O2-M1"),
    "eog": ("eog:E1-M2", "eog:E2-M2"),
    "emg": ("emg:chin",),
    "ecg": ("ecg:II",),
    "resp": ("resp:thorax", "resp:abdomen"),
}
KINDS = tuple(CHANNELS)
NUM_CHANNELS = sum(map(len, CHANNELS.values()))
RATE_HZ = 128
CROP_S = 4
ROUNDS = 3
PASSES = 4  # of the limit and of kymo, which has one more batch in its hands when the last one is taken
HDF5_SAMPLES = 32  # it unpacks five minutes of ten channels for each


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The same samples in every format, and how many of them a run reads."""

    folder: Path
    order: Order
    num_batches: int
    length: int

    @property
    def batch(self) -> int:
        """Samples of a batch."""
        return self.order.global_batch

    @property
    def num_samples(self) -> int:
        """Samples of a run."""
        return self.num_batches * self.batch


def limit(data: Data) -> None:
    """`pread` of every sample into the same batch's memory: what any reader must do."""
    stream = data.order.streams[0]
    files = [os.open(path, os.O_RDONLY) for path in stream.shards]
    memory = memoryview(bytearray(int(stream.num_bytes.max()) * data.batch))
    for index in range(PASSES * data.num_batches):
        begin = 0
        for address in data.order.batch(index):
            end = begin + int(stream.num_bytes[address.row])
            os.preadv(files[stream.shard[address.row]], [memory[begin:end]], int(stream.offset[address.row]))
            begin = end
    for file in files:
        os.close(file)


def read_tars(data: Data) -> None:
    """The tars in pieces of a megabyte into one place, which stays in the processor's cache."""
    buffer = bytearray(1 << 20)
    for path in sorted((data.folder / "tar").glob("*.tar")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def ours(data: Data, work: Callable[[list[Window]], Any], finish: Callable[[Any], Any] = lambda batch: batch) -> None:
    """Batches through `SnapshotReader.stream`."""
    reader = SnapshotReader(data.order.streams, num_threads=1)
    stream = reader.stream(data.order, lambda _, windows: work(windows))
    for batch in islice(stream, PASSES * data.num_batches):
        finish(batch)
    stream.close()
    reader.close()


def to_int16(windows: list[Window]) -> StoredBatch:
    """A host batch of all channels."""
    return collate_channels(windows, kinds=KINDS, view="zscore")


def to_crop(windows: list[Window]) -> np.ndarray:
    """int16 (B, T): 4 s of one channel of each window."""
    crops = np.empty((len(windows), CROP_S * RATE_HZ), dtype=np.int16)
    for window, crop in zip(windows, crops, strict=True):
        read_rows(window.arrays["eeg"], [1], crop[None], start=1234)
    return crops


def to_views(windows: list[Window]) -> list[Any]:
    """What NT-Xent draws: a crop in two augmented views."""
    config = CropConfig(kinds=KINDS, rates_hz=(float(RATE_HZ),))
    return [draw_crops(window, config, seed=0) for window in windows]


def by_webdataset(data: Data) -> None:
    """`.decode()` and float32 batches."""
    urls = [str(path) for path in sorted((data.folder / "tar").glob("*.tar"))]
    wds: Any = webdataset
    pipeline = wds.WebDataset(urls, shardshuffle=False, empty_check=False)
    batch = np.zeros((data.batch, NUM_CHANNELS, data.length), dtype=np.float32)
    for place, sample in enumerate(pipeline.decode()):
        tags = sample["json"]["ucs"]
        row = 0
        for kind in KINDS:
            if (array := sample.get(f"{kind}.npy")) is not None:
                scale = np.array([tag["scale"] for tag in tags[kind]], dtype=np.float32)
                np.multiply(array, scale[:, None], out=batch[place % data.batch, row : row + len(array)])
                row += len(array)


def by_hdf5(data: Data, index: Sequence[tuple[str, int]], *, seconds: int | None = None) -> None:
    """SleepFM's `__getitem__`: open the night, slice each channel, stack; with `seconds` one channel of a stretch."""
    batch = np.zeros((data.batch, NUM_CHANNELS, data.length), dtype=np.float32)
    for place, (name, number) in enumerate(index):
        begin = number * data.length
        night: Any = h5py.File(data.folder / "h5" / name, "r")
        with night as file:
            if seconds is not None:
                file["eeg:C4-M1"][begin : begin + seconds * RATE_HZ]
                continue
            for row, channel in enumerate(file):
                batch[place % data.batch, row] = file[channel][begin : begin + data.length]


def by_lmdb(data: Data) -> None:
    """A pickled dictionary per sample, as torcheeg's LMDB reader, and float32 batches."""
    order, batch = data.order, np.zeros((data.batch, NUM_CHANNELS, data.length), dtype=np.float32)
    with lmdb.open(str(data.folder / "lmdb"), readonly=True, lock=False) as store, store.begin() as transaction:
        for index in range(data.num_batches):
            for place, address in enumerate(order.batch(index)):
                found: Any = transaction.get(str(order.streams[0].keys[address.row]).encode())
                sample = pickle.loads(found)  # written by this script
                np.multiply(sample["eeg"], np.float32(0.01), out=batch[place, : len(sample["eeg"])])


def prepare(folder: Path, *, seconds: int, nights: int, windows_per_night: int, batch: int) -> Data:
    """The samples as shards, and copies of them as HDF5 and LMDB."""
    write_tiny_snapshot(
        folder / "tar",
        channels=CHANNELS,
        num_subjects=nights,
        windows_per_subject=windows_per_night,
        rate_hz=RATE_HZ,
        seconds=seconds,
        num_shards=8,
        num_held_out=0,
    )
    streams = load_streams([SnapshotSource(path=str(folder / "tar"))], split="train", keep=SampleFilter())
    order = Order(streams, seed=0, global_batch=batch)
    return Data(folder=folder, order=order, num_batches=len(streams[0]) // batch, length=seconds * RATE_HZ)


def write_copies(data: Data) -> list[tuple[str, int]]:
    """HDF5 per night and LMDB of the same windows; returns a shuffled index of (file, window)."""
    (data.folder / "h5").mkdir()
    nights: dict[str, list[Window]] = {}
    reader = SnapshotReader(data.order.streams)
    for number in range(data.num_batches):
        for window in reader.read(data.order.batch(number), order=data.order):
            nights.setdefault(window.recording, []).append(window)
    index: list[tuple[str, int]] = []
    with lmdb.open(str(data.folder / "lmdb"), map_size=4 << 30) as store, store.begin(write=True) as transaction:
        for recording, windows in nights.items():
            windows.sort(key=lambda window: window.meta["start"])
            for window in windows:
                rows = np.concatenate([window.arrays[kind] for kind in KINDS if kind in window.arrays])
                transaction.put(window.key.encode(), pickle.dumps({"eeg": rows, "info": window.meta}))
            with h5py.File(data.folder / "h5" / f"{recording}.h5", "w") as file:
                for kind in windows[0].arrays:
                    signal = np.concatenate([window.arrays[kind] for window in windows], axis=1) * np.float16(0.01)
                    chunk = min(300 * RATE_HZ, signal.shape[1])
                    for tag, row in zip(windows[0].meta["ucs"][kind], signal.astype(np.float16), strict=True):
                        file.create_dataset(tag["symbol"], data=row, chunks=(chunk,), compression="gzip")
            index += [(f"{recording}.h5", number) for number in range(len(windows))]
    places = np.random.default_rng(0).permutation(len(index))[:HDF5_SAMPLES]
    return [index[place] for place in places]


def measure(data: Data, contenders: dict[str, Callable[[], None]]) -> dict[str, tuple[float, float]]:
    """CPU microseconds per sample and MB/s (of int16 and tags, by the clock) of each."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for number in range(ROUNDS + 1):
        for name, run in contenders.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if number:  # the first round warms memory and caches
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    num_bytes = float(data.order.streams[0].num_bytes.mean())
    found: dict[str, tuple[float, float]] = {}
    for name, values in times.items():
        passes = PASSES if name.startswith(("limit", "kymo")) else 1
        count = HDF5_SAMPLES if name.startswith("HDF5") else passes * data.num_samples
        wall, cpu = (statistics.median(column) / count for column in zip(*values, strict=True))
        found[name] = 1e6 * cpu, num_bytes / wall / 1e6
    return found


def contenders_of(data: Data, index: Sequence[tuple[str, int]]) -> dict[str, Callable[[], None]]:
    """Name to run."""
    return {
        "limit: pread into batch memory": lambda: limit(data),
        "read() of the tars into 1 MB": lambda: read_tars(data),
        "kymo, int16 batches": lambda: ours(data, to_int16),
        "kymo, float32 batches": lambda: ours(data, to_int16, lambda batch: batch.to("cpu")),
        "webdataset .decode()": lambda: by_webdataset(data),
        "HDF5 as SleepFM": lambda: by_hdf5(data, index),
        "LMDB + pickle": lambda: by_lmdb(data),
        "kymo, 4 s of one channel": lambda: ours(data, to_crop),
        "kymo, NT-Xent views of 4 s": lambda: ours(data, to_views),
        "HDF5, 4 s of one channel": lambda: by_hdf5(data, index, seconds=CROP_S),
    }


def print_table(title: str, data: Data, found: dict[str, tuple[float, float]]) -> None:
    """Rows and goals as Markdown."""
    print(f"\n{title}: {data.order.streams[0].num_bytes.mean() / 1e3:.0f} KB a sample, {data.num_samples} samples\n")
    print("| | CPU us per sample | MB/s |\n|---|---|---|")
    for name, (cpu, rate) in found.items():
        print(f"| {name} | {cpu:,.0f} | {'' if '4 s' in name else f'{rate:,.0f}'} |")
    cpu = {name: value[0] for name, value in found.items()}
    own = cpu["kymo, int16 batches"]
    per_core = float(data.order.streams[0].num_bytes.mean()) / own
    share = cpu["limit: pread into batch memory"] / own
    print(
        f"\nGoals: webdataset {cpu['webdataset .decode()'] / own:.1f} times our CPU (5), "
        f"HDF5 {cpu['HDF5 as SleepFM'] / own:.1f} (25), {share:.2f} of the limit's bandwidth per CPU second (0.5), "
        f"{per_core:,.0f} MB/s per core (150)",
        flush=True,
    )


def main() -> None:
    """Print a table for samples of 30 s and one for samples of 300 s."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        for seconds, nights, windows, batch in ((30, 16, 40, 64), (300, 8, 16, 16)):
            data = prepare(
                Path(root, str(seconds)), seconds=seconds, nights=nights, windows_per_night=windows, batch=batch
            )
            found = measure(data, contenders_of(data, write_copies(data)))
            print_table(f"Samples of {seconds} s", data, found)


if __name__ == "__main__":
    main()
