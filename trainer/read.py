"""Windows read from shards: `preadv` at indexed offsets by a few threads into reused buffers.

A small sample is read whole. Of a large one only the tags and the shapes are read at first; its signal stays in the
shard until a batch asks for the rows and the stretch that it needs, and then goes straight into the batch's memory.

Reading ahead never counts: where the data stand is the trainer's number of optimizer steps, not what was read.
A sample whose read fails is replaced by the next position of its stream and reported, never skipped, so that the
order of all others stays the same.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import orjson

from manifests.errors import ContractError
from trainer.data import Address, Order, Stream
from trainer.memory import Buffers
from trainer.stored import ArrayReadError, Layout, Shards, StoredArray, parse_layout, read_stored

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

# The headers of a sample are read one by one where it is not read whole: six calls of the system cost as much as
# 128 KiB from the page cache.
WHOLE_BYTES = 128 << 10
MAX_TAGS = 1024  # texts of tags whose parsed form is kept, about 40 KB each
MAX_LAYOUTS = 1024  # one for each size of a sample in a shard, about 10 KB each
UCS_MARK = b',"ucs":'


class Tags(dict[str, list[dict[str, Any]]]):
    """Kind to channel tags, shared by all windows whose tags have the same text: never changed.

    `derived` keeps what was computed from them.
    """

    def __init__(self, tags: dict[str, list[dict[str, Any]]]) -> None:
        super().__init__(tags)
        self.derived: dict[Any, Any] = {}


@dataclass(slots=True, kw_only=True)
class Window:
    """One sample of a snapshot at one position of the training order.

    `arrays` maps a kind to int16 of shape (C, T), read-only, or under `work_on` to a `StoredArray`; `meta` is
    the sample's JSON (manifests/shards.py).
    """

    key: str
    position: int
    epoch: int
    corpus: str
    recording: str
    meta: dict[str, Any]
    arrays: dict[str, Any]


def read_rows(array: np.ndarray | StoredArray, rows: Sequence[int], out_CT: np.ndarray, *, start: int = 0) -> None:
    """`array[rows, start : start + T]` into `out_CT`, which is contiguous; no other bytes are read.

    The rows are ascending, without repeats.

    Raises:
        ArrayReadError: The shard ends before, or cannot be read.
    """
    width = out_CT.shape[1]
    if isinstance(array, StoredArray):
        read_stored([(array, rows, out_CT)], start=start)
    elif len(rows) == len(array):
        out_CT[:] = array[:, start : start + width]
    else:
        np.take(array[:, start : start + width], rows, axis=0, out=out_CT, mode="clip")  # "raise" copies twice


class SnapshotReader:
    """Windows at given addresses of the streams.

    Args:
        streams: What an `Address` counts in.
        max_replaced: Samples that may fail their read in the life of this reader.
        num_threads: Batches that `stream` reads at the same time.
        prefetch: Batches that `stream` reads ahead.
        locate: Local file of a shard of the streams, asked for in the thread that reads, before each read; None: a
            shard is a local file itself.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        *,
        max_replaced: int = 100,
        num_threads: int = 2,
        prefetch: int = 4,
        locate: Callable[[Path], Path] | None = None,
    ) -> None:
        self._streams = tuple(streams)
        self._shards = Shards(locate)
        self._layouts: dict[tuple[int, int, int], Layout] = {}
        self._buffers = Buffers(limit=prefetch + num_threads + 1)
        self._num_threads = num_threads
        self._prefetch = prefetch
        self._max_replaced = max_replaced
        self._lock = threading.Lock()
        self.replaced: list[str] = []  # keys of the samples that failed, in the order of their failure

    @property
    def num_bytes(self) -> int:
        """Bytes read so far."""
        return self._shards.num_bytes

    def read(self, addresses: Sequence[Address], *, order: Order) -> list[Window]:
        """Windows of the addresses, in their order. Their arrays are views of one buffer that they keep alive.

        Raises:
            ContractError: More samples failed than `max_replaced`.
        """
        return self._open(addresses, order, whole_bytes=math.inf)[0]

    def work_on(
        self, addresses: Sequence[Address], work: Callable[[list[Window]], ResultT], *, order: Order
    ) -> ResultT:
        """`work(windows)`, which reads of large samples what it needs (`read_rows`); again if that fails for one.

        Raises:
            ContractError: More samples failed than `max_replaced`.
        """
        windows, sources = self._open(addresses, order, whole_bytes=WHOLE_BYTES)
        while True:
            try:
                return work(windows)
            except ArrayReadError as error:
                place = next(i for i, window in enumerate(windows) if window.key == error.key)
                self._report(sources[place], error)
                following = order.address(sources[place].stream, sources[place].position + 1)
                windows[place], sources[place] = self._open_or_replace(
                    addresses[place], following, None, order, whole_bytes=WHOLE_BYTES
                )

    def _open(
        self, addresses: Sequence[Address], order: Order, *, whole_bytes: float
    ) -> tuple[list[Window], list[Address]]:
        """Windows, samples of at most `whole_bytes` read whole, and the addresses that they come from."""
        places = [self._place(item) for item in addresses]
        begins = [0, *accumulate(size if size <= whole_bytes else 0 for *_, size in places)]
        buffer = self._buffers.take(begins[-1])
        opened: dict[int, tuple[Window, Address]] = {}
        # Ascending offsets: the disk and the page cache read ahead.
        for number in sorted(range(len(addresses)), key=places.__getitem__):
            into = buffer[begins[number] : begins[number + 1]] if places[number][-1] <= whole_bytes else None
            wanted = addresses[number]
            opened[number] = self._open_or_replace(wanted, wanted, into, order, whole_bytes=whole_bytes)
        ordered = [opened[number] for number in range(len(addresses))]
        return [window for window, _ in ordered], [source for _, source in ordered]

    def _place(self, address: Address) -> tuple[int, int, int, int]:
        """Stream, shard, offset and size of a sample."""
        stream, row = self._streams[address.stream], address.row
        return address.stream, stream.shard.item(row), stream.offset.item(row), stream.num_bytes.item(row)

    def _open_or_replace(
        self, wanted: Address, source: Address, into: memoryview | None, order: Order, *, whole_bytes: float
    ) -> tuple[Window, Address]:
        """The sample at `source`, or the first after it that can be read, in the place of `wanted`."""
        while True:
            size = self._streams[source.stream].num_bytes.item(source.row)
            if size <= whole_bytes and into is None:
                into = memoryview(bytearray(size))
            try:
                key, meta, arrays = self._parse(source, into)
                corpus, recording = meta["corpus"], meta["recording"]
            except (OSError, ContractError, ValueError, KeyError) as error:
                self._report(source, error)
                source, into = order.address(source.stream, source.position + 1), None
                continue
            # The place in the order stays that of the sample which failed; only the content is another's.
            window = Window(
                key=key,
                position=wanted.position,
                epoch=wanted.epoch,
                corpus=corpus,
                recording=recording,
                meta=meta,
                arrays=arrays,
            )
            return window, source

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

    def _parse(self, address: Address, into: memoryview | None) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """Key, JSON and arrays of a sample: read whole into `into`, or all but the signal if there is no `into`."""
        number, shard_number, offset, size = self._place(address)
        shard = self._streams[number].shards[shard_number]
        key = self._streams[number].keys[address.row]
        if into is not None:
            self._shards.read(shard, [into], offset)

        def content(begin: int, length: int) -> bytes:
            if into is not None:
                return bytes(into[begin : begin + length])
            return self._shards.read_spans(shard, [(begin, length)], offset)

        mark = number, shard_number, size
        layout, text = self._layouts.get(mark), None
        if layout is not None:
            seen = into or self._shards.read_spans(shard, layout.headers, offset)
            text = layout.text_of(key.encode(), seen, is_whole=into is not None)
        if layout is None or text is None:
            found, text, layout = parse_layout(content, size)
            if found != key:
                raise ContractError(f"sample {found!r} stands at its offset")
            if len(self._layouts) >= MAX_LAYOUTS:
                self._layouts.clear()
            self._layouts[mark] = layout
        if into is None:
            return key, parse_meta(text), _in_shard(key, layout, shards=self._shards, shard=shard, offset=offset)
        return key, parse_meta(text), _in_memory(layout, into)

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

        `work` runs in a thread too (collation belongs there) and reads arrays by `read_rows` only; results come in
        the order of the batches, so the number of threads changes nothing but the speed.
        """
        upcoming = order.batches(start_batch, rank=rank, world=world, num_parts=num_parts)

        def one(index: int, addresses: list[Address]) -> ResultT:
            return self.work_on(addresses, lambda windows: work(index, windows), order=order)

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
    """Endless batches of this rank's windows from `start_batch` on, their arrays in memory."""
    reader = SnapshotReader(order.streams)
    try:
        yield from reader.stream(
            order, lambda _, windows: loaded(windows), start_batch=start_batch, rank=rank, world=world
        )
    finally:
        reader.close()


def loaded(windows: Sequence[Window]) -> list[Window]:
    """The windows with all arrays in memory, read-only."""
    return [replace(window, arrays={kind: _load(array) for kind, array in window.arrays.items()}) for window in windows]


def _load(array: np.ndarray | StoredArray) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return array
    out_CT = np.empty(array.shape, dtype=np.int16)
    read_rows(array, range(len(out_CT)), out_CT)
    out_CT.flags.writeable = False
    return out_CT


def _in_memory(layout: Layout, content: memoryview) -> dict[str, np.ndarray]:
    """Arrays of a sample, read-only; they keep its memory."""
    flat = np.frombuffer(content.toreadonly(), dtype=np.int16)
    return {
        kind: flat[begin // 2 : begin // 2 + shape[0] * shape[1]].reshape(shape)
        for kind, (shape, begin) in layout.arrays.items()
    }


def _in_shard(key: str, layout: Layout, *, shards: Shards, shard: Path, offset: int) -> dict[str, StoredArray]:
    """Arrays of a sample that begins at `offset`."""
    return {
        kind: StoredArray(key=key, shape=shape, shards=shards, shard=shard, offset=offset + begin)
        for kind, (shape, begin) in layout.arrays.items()
    }


def parse_meta(text: bytes) -> dict[str, Any]:
    """JSON of a sample. Its tags, nine tenths of it, mostly repeat from window to window and are parsed once.

    They stand last where the engine wrote them. Where they do not, one of the two pieces is no JSON, and all is
    parsed together.
    """
    head, mark, tail = text.partition(UCS_MARK)
    if mark:
        try:
            return orjson.loads(head + b"}") | {"ucs": _parse_tags(tail[:-1])}
        except ValueError:
            pass
    meta = orjson.loads(text)
    meta["ucs"] = Tags(meta["ucs"])
    return meta


@lru_cache(maxsize=MAX_TAGS)
def _parse_tags(text: bytes) -> Tags:
    return Tags(orjson.loads(text))
