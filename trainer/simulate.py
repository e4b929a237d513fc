"""What a run will read, from the index alone: who is how often in the mixture, what is read, what a cache must hold.

No shard is opened. The order of samples is a function of position, so the shards that a run touches at any step are
known before it starts.
"""

import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from trainer.config import PretrainConfig
from trainer.data import Order, mixed_order
from trainer.mixture import stream_positions
from trainer.samples import load_streams, open_snapshot

POINTS = 16  # steps of the run at which the working set is looked at
_READ_BYTES = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class MixRow:
    """One corpus in one stretch of steps.

    Attributes:
        from_step: First step of the stretch.
        to_step: The step after its last.
        corpus: Name, all snapshots that hold it together.
        samples: Samples of the split that pass the filter: its epoch.
        hours: Length of the epoch, h.
        weight: As it was given; the number of samples where no weight is.
        share: Part of the batches' samples.
        quota: Samples in a global batch on average.
        repeats: How often each sample is seen in the stretch.
        total_repeats: How often from the first step to the end of the stretch.
    """

    from_step: int
    to_step: int
    corpus: str
    samples: int
    hours: float
    weight: float
    share: float
    quota: float
    repeats: float
    total_repeats: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRow:
    """What a cache of some size does over the simulated steps.

    Attributes:
        cache_bytes: Size.
        hit_rate: Part of the samples whose shard was there.
        downloads_per_shard: Downloads per shard that was needed; 1 is the least, more is thrashing.
        download_mb_s: What the store must deliver, MB/s.
        fits: Whether the working set is never larger.
    """

    cache_bytes: int
    hit_rate: float
    downloads_per_shard: float
    download_mb_s: float
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What a run will ask of disk, network and cache.

    Attributes:
        epoch_samples: Samples of all corpora.
        epoch_hours: Their length, h.
        bytes_per_step: Tar blocks of the windows of a global batch, mean of the first mixture; crops read less.
        windows_per_s: Speed it is computed for.
        step_s: Time of a step at that speed, s.
        read_mb_s: What all readers together take from the disk or page cache, MB/s.
        hot_shards: Shards that a stretch of the order keeps coming back to, at most over the run.
        hot_bytes: Their size.
        needed_bytes: Cache that downloads every shard once an epoch: the hot ones and those fetched ahead.
        disk_mb_s: Speed of the disk, MB/s, None = not known.
        steps: Steps that the caches were simulated over.
        caches: One per cache size.
    """

    epoch_samples: int
    epoch_hours: float
    bytes_per_step: float
    windows_per_s: float
    step_s: float
    read_mb_s: float
    hot_shards: int
    hot_bytes: int
    needed_bytes: int
    disk_mb_s: float | None
    steps: int
    caches: tuple[CacheRow, ...]


def order_of(config: PretrainConfig) -> Order:
    """Order of a run's samples.

    Raises:
        ConfigError: The mixture cannot be made of the snapshots.
        ContractError: A snapshot breaks its contract.
    """
    return mixed_order(
        load_streams(config.snapshots, split=config.split, keep=config.filter, bucket_by=config.bucket_by),
        seed=config.seed,
        global_batch=config.global_batch,
        weights=config.weights,
        curriculum=config.curriculum,
        block_samples=config.block_samples,
    )


def mix_rows(config: PretrainConfig, order: Order) -> list[MixRow]:
    """Rows by stretch of steps and by corpus."""
    streams = order.streams
    corpora = list(dict.fromkeys(stream.corpus for stream in streams))
    given = [config.weights, *(item.weights for item in config.curriculum)]
    segments = [segment for segment in order.segments if segment.from_batch < config.steps]
    ends = [*(segment.from_batch for segment in segments[1:]), config.steps]
    rows: list[MixRow] = []
    for segment, end, weights in zip(segments, ends, given, strict=False):
        before, after = (stream_positions(segments, step) for step in (segment.from_batch, end))
        for corpus in corpora:
            own = [number for number, stream in enumerate(streams) if stream.corpus == corpus]
            samples = sum(len(streams[s]) for s in own)
            share = sum(segment.share(s) for s in own)
            rows.append(
                MixRow(
                    from_step=segment.from_batch,
                    to_step=end,
                    corpus=corpus,
                    samples=samples,
                    hours=sum(float(streams[s].seconds.sum(dtype=np.float64)) for s in own) / 3600,
                    weight=sum(streams[s].weight for s in own) if weights is None else weights[corpus],
                    share=share,
                    quota=share * order.global_batch,
                    repeats=float((after - before)[own].sum()) / samples,
                    total_repeats=float(after[own].sum()) / samples,
                )
            )
    return rows


def simulate(
    config: PretrainConfig,
    order: Order,
    *,
    windows_per_s: float,
    cache_bytes: Sequence[int] = (),
    steps: int = 1000,
    disk_mb_s: float | None = None,
) -> Simulation:
    """Play the shards that a run touches against caches of some sizes.

    Args:
        config: The run.
        order: Its order.
        windows_per_s: Speed of the training, windows of all workers of a node.
        cache_bytes: Sizes to try; without any, half, one and two times what is needed.
        steps: Steps to play, from the beginning.
        disk_mb_s: Speed of the disk, for the report.
    """
    sizes = _shard_sizes(config, order)
    hot_shards, hot_bytes = _working_set(config, order, sizes)
    ahead = 0 if config.cache is None else config.cache.prefetch_shards
    needed = hot_bytes + ahead * max(int(size.max(initial=0)) for size in sizes)
    steps = min(steps, config.steps)
    share = [order.segments[0].share(s) for s in range(len(order.streams))]
    per_window = sum(part * float(stream.num_bytes.mean()) for part, stream in zip(share, order.streams, strict=True))
    step_s = order.global_batch / windows_per_s
    caches = [_Cache(size) for size in cache_bytes or (needed // 2, needed, 2 * needed)]
    return Simulation(
        epoch_samples=sum(map(len, order.streams)),
        epoch_hours=sum(float(stream.seconds.sum(dtype=np.float64)) for stream in order.streams) / 3600,
        bytes_per_step=per_window * order.global_batch,
        windows_per_s=windows_per_s,
        step_s=step_s,
        read_mb_s=per_window * windows_per_s / 1e6,
        hot_shards=hot_shards,
        hot_bytes=hot_bytes,
        needed_bytes=needed,
        disk_mb_s=disk_mb_s,
        steps=steps,
        caches=tuple(_play(order, sizes, caches, steps=steps, seconds=steps * step_s, hot_bytes=hot_bytes)),
    )


def windows_per_s(order: Order, *, hours_per_hour: float) -> float:
    """Speed of a training that takes so many hours of signal in an hour."""
    share = [order.segments[0].share(s) for s in range(len(order.streams))]
    seconds = sum(part * float(stream.seconds.mean()) for part, stream in zip(share, order.streams, strict=True))
    return hours_per_hour / seconds


def measure_disk(order: Order, *, max_bytes: int = 1 << 30) -> float | None:
    """Speed at which shards are read that the page cache does not hold, MB/s; None for those in an object store."""
    read, spent = 0, 0.0
    for shard in dict.fromkeys(shard for stream in order.streams for shard in stream.shards):
        if not isinstance(shard, Path):
            return None
        descriptor = os.open(shard, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            while read < max_bytes and (piece := os.read(descriptor, _READ_BYTES)):
                read += len(piece)
            spent += time.perf_counter() - began
        finally:
            os.close(descriptor)
        if read >= max_bytes:
            break
    return read / 1e6 / max(spent, 1e-9)


def _shard_sizes(config: PretrainConfig, order: Order) -> list[np.ndarray]:
    """Bytes of every shard of each stream's snapshot."""
    by_digest = {
        snapshot.digest: np.array([entry.num_bytes for entry in snapshot.shards], dtype=np.int64)
        for snapshot in (open_snapshot(source.path) for source in config.snapshots)
    }
    return [by_digest[stream.snapshot] for stream in order.streams]


def _working_set(config: PretrainConfig, order: Order, sizes: Sequence[np.ndarray]) -> tuple[int, int]:
    """Most shards, and most bytes of shards, that were needed before some step and are needed again after it."""
    most_shards, most_bytes = 0, 0
    spans: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for step in np.unique(np.linspace(0, config.steps - 1, POINTS).astype(int)).tolist():
        hot: dict[tuple[str, int], int] = {}
        for number, position in enumerate(stream_positions(order.segments, step).tolist()):
            stream = order.streams[number]
            epoch, place = divmod(position, len(stream))
            if (number, epoch) not in spans:
                spans[number, epoch] = _spans(stream.shard[order.rows(number, position - place, len(stream))])
            shards, first, last = spans[number, epoch]
            for shard in shards[(first <= place) & (place <= last)].tolist():
                hot[stream.snapshot, shard] = int(sizes[number][shard])
        most_shards, most_bytes = max(most_shards, len(hot)), max(most_bytes, sum(hot.values()))
    return most_shards, most_bytes


def _spans(shard: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shards in the order of an epoch, with the places of their first and last sample."""
    shards, first = np.unique(shard, return_index=True)
    _, from_end = np.unique(shard[::-1], return_index=True)
    return shards, first, len(shard) - 1 - from_end


class _Cache:
    """Least recently used shards go first, as in `trainer/cache.py`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.downloads = 0
        self.downloaded = 0
        self._used = 0
        self._held: OrderedDict[tuple[str, int], int] = OrderedDict()

    def use(self, shard: tuple[str, int], num_bytes: int) -> None:
        if shard in self._held:
            self._held.move_to_end(shard)
            return
        while self._held and self._used + num_bytes > self.max_bytes:
            self._used -= self._held.popitem(last=False)[1]
        self._held[shard] = num_bytes
        self._used += num_bytes
        self.downloads += 1
        self.downloaded += num_bytes


def _play(
    order: Order, sizes: Sequence[np.ndarray], caches: Sequence[_Cache], *, steps: int, seconds: float, hot_bytes: int
) -> list[CacheRow]:
    """Let the caches see every shard of every step, as the reader asks for them: by stream and shard."""
    seen: set[tuple[str, int]] = set()
    for before, after in pairwise(stream_positions(order.segments, step) for step in range(steps + 1)):
        for number in np.flatnonzero(after - before).tolist():
            stream, count = order.streams[number], int(after[number] - before[number])
            for shard in np.unique(stream.shard[order.rows(number, int(before[number]), count)]).tolist():
                key, size = (stream.snapshot, shard), int(sizes[number][shard])
                seen.add(key)
                for cache in caches:
                    cache.use(key, size)
    return [
        CacheRow(
            cache_bytes=cache.max_bytes,
            hit_rate=1 - cache.downloads / (steps * order.global_batch),
            downloads_per_shard=cache.downloads / len(seen),
            download_mb_s=cache.downloaded / 1e6 / seconds,
            fits=cache.max_bytes >= hot_bytes,
        )
        for cache in caches
    ]
