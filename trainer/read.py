"""Windows read from shards: `preadv` at indexed offsets by a few threads into reused buffers.

Reading ahead never counts: where the data stand is the trainer's number of optimizer steps, not what was read.
A sample whose read fails is replaced by the next position of its stream and reported, never skipped, so that the
order of all others stays the same.
"""

import json
import logging
import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from manifests.errors import ContractError
from manifests.shards import array_from_npy, parse_sample
from trainer.data import Address, Order, Stream

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

MAX_OPEN_SHARDS = 128


@dataclass(slots=True, kw_only=True)
class Window:
    """One sample of a snapshot at one position of the training order.

    `arrays` maps a kind to int16 of shape (C, T), read-only; `meta` is the sample's JSON (manifests/shards.py).
    """

    key: str
    position: int
    epoch: int
    corpus: str
    recording: str
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]


class _Buffers:
    """Byte buffers used again once nothing refers to what was lent; a fresh one costs a page fault every 4 KiB.

    What is lent is a view; every window's array keeps it alive through its memoryview. Once the view's weak
    reference is dead, the memory below it is free.
    """

    def __init__(self, limit: int) -> None:
        self._lent: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []
        self._limit = limit
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> np.ndarray:
        with self._lock:
            free = [n for n, (memory, view) in enumerate(self._lent) if view() is None and memory.nbytes >= num_bytes]
            memory = self._lent.pop(free[0])[0] if free else np.empty(num_bytes + num_bytes // 8, dtype=np.uint8)
            view = memory[:num_bytes]
            self._lent = [*self._lent, (memory, weakref.ref(view))][-self._limit :]
            return view


class _Shards:
    """Open file descriptors, the least recently used one closed beyond the limit."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path, into: memoryview, offset: int) -> int:
        """Bytes read; a lent descriptor is a duplicate, so closing the original cannot pull it away."""
        with self._lock:
            descriptor = self._open.pop(path, None)
            if descriptor is None:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                if len(self._open) >= MAX_OPEN_SHARDS:
                    os.close(self._open.popitem(last=False)[1])
            self._open[path] = descriptor
            lent = os.dup(descriptor)
        try:
            filled = 0
            while filled < len(into):
                count = os.preadv(lent, [into[filled:]], offset + filled)
                if count == 0:
                    break
                filled += count
            return filled
        finally:
            os.close(lent)

    def close(self) -> None:
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])


class SnapshotReader:
    """Windows at given addresses of the streams.

    Args:
        streams: What an `Address` counts in.
        max_replaced: Samples that may fail their read in the life of this reader.
        num_threads: Batches that `stream` reads at the same time.
        prefetch: Batches that `stream` reads ahead.
    """

    def __init__(
        self, streams: Sequence[Stream], *, max_replaced: int = 100, num_threads: int = 2, prefetch: int = 4
    ) -> None:
        self._streams = tuple(streams)
        self._shards = _Shards()
        self._buffers = _Buffers(limit=prefetch + num_threads + 1)
        self._num_threads = num_threads
        self._prefetch = prefetch
        self._max_replaced = max_replaced
        self._lock = threading.Lock()
        self.replaced: list[str] = []  # keys of the samples that failed, in the order of their failure

    def read(self, addresses: Sequence[Address], *, order: Order) -> list[Window]:
        """Windows of the addresses, in their order. Their arrays are views of one buffer that they keep alive.

        Raises:
            ContractError: More samples failed than `max_replaced`.
        """
        sizes = [int(self._streams[item.stream].num_bytes[item.row]) for item in addresses]
        begins = np.cumsum([0, *sizes])
        buffer = self._buffers.take(int(begins[-1])).data
        windows: list[Window | None] = [None] * len(addresses)
        # Ascending offsets: the disk and the page cache read ahead.
        for place in sorted(range(len(addresses)), key=lambda i: self._location(addresses[i])):
            into = buffer[int(begins[place]) : int(begins[place + 1])]
            windows[place] = self._read_or_replace(addresses[place], into, order)
        return [window for window in windows if window is not None]

    def _location(self, address: Address) -> tuple[int, int, int]:
        stream = self._streams[address.stream]
        return address.stream, int(stream.shard[address.row]), int(stream.offset[address.row])

    def _read_or_replace(self, wanted: Address, into: memoryview, order: Order) -> Window:
        source = wanted
        while True:
            try:
                window = self._read_one(source, into)
            except (OSError, ContractError, ValueError) as error:
                self._report(source, error)
            else:
                # The place in the order stays that of the sample which failed; only the content is another's.
                window.position, window.epoch = wanted.position, wanted.epoch
                return window
            source = order.address(source.stream, source.position + 1)
            into = memoryview(bytearray(int(self._streams[source.stream].num_bytes[source.row])))

    def _report(self, address: Address, error: Exception) -> None:
        stream = self._streams[address.stream]
        key = str(stream.keys[address.row])
        with self._lock:
            self.replaced.append(key)
            count = len(self.replaced)
        shard = stream.shards[stream.shard[address.row]]
        logger.warning("%s: sample %s cannot be read (%s); the next one takes its place", shard, key, error)
        if count > self._max_replaced:
            raise ContractError(
                f"{shard}: sample {key} is number {count} that cannot be read, {self._max_replaced} are allowed; "
                "run kymo verify on the snapshot"
            ) from error

    def _read_one(self, address: Address, into: memoryview) -> Window:
        stream = self._streams[address.stream]
        path = stream.shards[stream.shard[address.row]]
        count = self._shards.read(path, into, int(stream.offset[address.row]))
        if count < len(into):
            raise ContractError(f"the shard ends {len(into) - count} bytes before the sample does")
        key, members = parse_sample(into)
        if key != stream.keys[address.row]:
            raise ContractError(f"sample {key!r} stands at its offset")
        meta = json.loads(bytes(members.pop("json")))
        arrays = {name.removesuffix(".npy"): array_from_npy(member) for name, member in members.items()}
        for array in arrays.values():
            array.flags.writeable = False  # a view of the batch's buffer
        return Window(
            key=key,
            position=address.position,
            epoch=address.epoch,
            corpus=meta["corpus"],
            recording=meta["recording"],
            meta=meta,
            arrays=arrays,
        )

    def stream(
        self,
        order: Order,
        work: Callable[[int, list[Window]], ResultT],
        *,
        start_batch: int = 0,
        rank: int = 0,
        world: int = 1,
        num_parts: int = 1,
    ) -> Generator[ResultT, None, None]:
        """Endless `work(batch, windows)` of this rank's slices from `start_batch` on, done ahead in threads.

        `work` runs in a thread too (collation belongs there); results come in the order of the batches, so the
        number of threads changes nothing but the speed.
        """
        upcoming = order.batches(start_batch, rank=rank, world=world, num_parts=num_parts)

        def one(index: int, addresses: list[Address]) -> ResultT:
            return work(index, self.read(addresses, order=order))

        pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="read")
        pending: deque[Future[ResultT]] = deque()
        try:
            pending.extend(pool.submit(one, *item) for item in islice(upcoming, self._prefetch))
            while True:
                ready = pending.popleft().result()
                pending.append(pool.submit(one, *next(upcoming)))
                yield ready
        finally:
            for future in pending:
                future.cancel()
            pool.shutdown(wait=True)

    def close(self) -> None:
        """Close the shards."""
        self._shards.close()


def iterate(order: Order, *, rank: int = 0, world: int = 1, start_batch: int = 0) -> Iterator[list[Window]]:
    """Endless batches of this rank's windows from `start_batch` on."""
    reader = SnapshotReader(order.streams)
    try:
        yield from reader.stream(order, lambda _, windows: windows, start_batch=start_batch, rank=rank, world=world)
    finally:
        reader.close()
