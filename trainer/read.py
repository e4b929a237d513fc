"""Windows read from shards: `preadv` at indexed offsets by a few threads into reused buffers.

A small sample is read whole. Of a large one only the tags and the shapes are read at first; its signal stays in the
shard until a batch asks for the rows and the stretch that it needs, and then goes straight into the batch's memory.

Reading ahead never counts: where the data stand is the trainer's number of optimizer steps, not what was read.
A sample whose read fails is replaced by the next position of its stream and reported, never skipped, so that the
order of all others stays the same.
"""

import logging
import math
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import orjson

from manifests.errors import ContractError
from manifests.shards import BLOCK, npy_layout, parse_member, parse_sample
from trainer.data import Address, Order, Stream
from trainer.memory import Buffers

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

MAX_OPEN_SHARDS = 128
# The headers of a sample are read one by one where it is not read whole: five calls of the system cost as much as
# 128 KiB from the page cache.
WHOLE_BYTES = 128 << 10
NPY_HEADER_BYTES = 128  # of every array that the engine writes (manifests/shards.py)
HEADER_BYTES = BLOCK + NPY_HEADER_BYTES
MAX_TAGS = 1024  # texts of tags whose parsed form is kept, about 40 KB each
UCS_MARK = b',"ucs":'


class ArrayReadError(ContractError):
    """The signal of an opened sample could not be read."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key = key


class Tags(dict[str, list[dict[str, Any]]]):
    """Kind to channel tags, shared by all windows whose tags have the same text: never changed.

    `derived` keeps what was computed from them.
    """

    def __init__(self, tags: dict[str, list[dict[str, Any]]]) -> None:
        super().__init__(tags)
        self.derived: dict[Any, Any] = {}


class _File:
    """A file descriptor that is closed when nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _Shards:
    """Open shards, the least recently used one let go beyond the limit."""

    def __init__(self, locate: Callable[[Path], Path] | None) -> None:
        self.num_bytes = 0
        self._locate = locate
        # A cache that evicts a shard wins its disk space only when the file is closed.
        self._limit = MAX_OPEN_SHARDS if locate is None else MAX_OPEN_SHARDS // 8
        self._open: OrderedDict[Path, _File] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: Path, into: memoryview, offset: int) -> None:
        """Fill `into` from a byte of the shard on.

        Raises:
            ContractError: The shard ends before.
        """
        path = shard if self._locate is None else self._locate(shard)
        with self._lock:
            file = self._open.pop(shard, None) or _File(path)
            self._open[shard] = file
            if len(self._open) > self._limit:
                self._open.popitem(last=False)
            self.num_bytes += len(into)
        filled = 0
        while filled < len(into):
            count = os.preadv(file.descriptor, [into[filled:]], offset + filled)
            if count == 0:
                raise ContractError(f"the shard ends {len(into) - filled} bytes before the sample does")
            filled += count

    def close(self) -> None:
        with self._lock:
            self._open.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredArray:
    """An array of a sample that still lies in its shard: int16 of shape (C, T)."""

    key: str
    shape: tuple[int, int]
    shards: _Shards
    shard: Path
    offset: int

    def read(self, row: int, start: int, out_T: np.ndarray) -> None:
        """Samples from `start` of `row` on, in the order of the shard: row after row."""
        try:
            into = memoryview(out_T).cast("B")  # pyright: ignore[reportArgumentType]  # a buffer from Python 3.12 on
            self.shards.read(self.shard, into, self.offset + 2 * (row * self.shape[1] + start))
        except (OSError, ContractError) as error:
            raise ArrayReadError(self.key, str(error)) from error


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
    if isinstance(array, np.ndarray):
        if len(rows) == len(array):
            out_CT[:] = array[:, start : start + width]
        else:
            np.take(array[:, start : start + width], rows, axis=0, out=out_CT, mode="clip")  # "raise" copies twice
    elif len(rows) == array.shape[0] and width == array.shape[1]:
        array.read(0, 0, out_CT.reshape(-1))
    else:
        for row, out_T in zip(rows, out_CT, strict=True):
            array.read(row, start, out_T)


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
        self._shards = _Shards(locate)
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
        sizes = [int(self._streams[item.stream].num_bytes[item.row]) for item in addresses]
        begins = np.cumsum([0, *(size if size <= whole_bytes else 0 for size in sizes)]).tolist()
        buffer = self._buffers.take(begins[-1])
        opened: dict[int, tuple[Window, Address]] = {}
        # Ascending offsets: the disk and the page cache read ahead.
        for place in sorted(range(len(addresses)), key=lambda i: self._location(addresses[i])):
            into = buffer[begins[place] : begins[place + 1]] if sizes[place] <= whole_bytes else None
            wanted = addresses[place]
            opened[place] = self._open_or_replace(wanted, wanted, into, order, whole_bytes=whole_bytes)
        ordered = [opened[place] for place in range(len(addresses))]
        return [window for window, _ in ordered], [source for _, source in ordered]

    def _location(self, address: Address) -> tuple[int, int, int]:
        stream = self._streams[address.stream]
        return address.stream, int(stream.shard[address.row]), int(stream.offset[address.row])

    def _open_or_replace(
        self, wanted: Address, source: Address, into: memoryview | None, order: Order, *, whole_bytes: float
    ) -> tuple[Window, Address]:
        """The sample at `source`, or the first after it that can be read, in the place of `wanted`."""
        while True:
            size = int(self._streams[source.stream].num_bytes[source.row])
            if size <= whole_bytes and into is None:
                into = memoryview(bytearray(size))
            try:
                key, meta, arrays = self._parse(source, into)
                names = {"key": key, "corpus": meta["corpus"], "recording": meta["recording"]}
            except (OSError, ContractError, ValueError, KeyError) as error:
                self._report(source, error)
                source, into = order.address(source.stream, source.position + 1), None
                continue
            # The place in the order stays that of the sample which failed; only the content is another's.
            return Window(position=wanted.position, epoch=wanted.epoch, meta=meta, arrays=arrays, **names), source

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

    def _parse(
        self, address: Address, into: memoryview | None
    ) -> tuple[str, dict[str, Any], dict[str, np.ndarray | StoredArray]]:
        """Key, JSON and arrays of a sample: read whole into `into`, or all but the signal if there is no `into`."""
        stream = self._streams[address.stream]
        shard, offset = stream.shards[stream.shard[address.row]], int(stream.offset[address.row])
        arrays: dict[str, Any]
        if into is None:
            key, text, arrays = self._parse_headers(shard, offset, int(stream.num_bytes[address.row]))
        else:
            self._shards.read(shard, into, offset)
            key, members = parse_sample(into)
            text = bytes(members.pop("json", b""))
            arrays = {name[:-4]: _in_memory(member) for name, member in members.items()}
        if key != stream.keys[address.row]:
            raise ContractError(f"sample {key!r} stands at its offset")
        return key, parse_meta(text), arrays

    def _parse_headers(
        self, shard: Path, offset: int, size: int
    ) -> tuple[str, bytes, dict[str, np.ndarray | StoredArray]]:
        """Key, text of the JSON and arrays of a sample whose signal stays in the shard."""
        arrays: dict[str, np.ndarray | StoredArray] = {}
        keys: set[str] = set()
        text = b""
        header = memoryview(bytearray(HEADER_BYTES))
        position = 0
        while position < size:
            part = header[: min(HEADER_BYTES, size - position)]
            self._shards.read(shard, part, offset + position)
            key, extension, length = parse_member(part[:BLOCK])
            keys.add(key)
            position += BLOCK
            if extension == "json":
                content = bytearray(length)
                self._shards.read(shard, memoryview(content), offset + position)
                text = bytes(content)
            else:
                shape, begin = _layout(bytes(part[BLOCK:]))
                arrays[extension[:-4]] = StoredArray(
                    key=key, shape=shape, shards=self._shards, shard=shard, offset=offset + position + begin
                )
            position += length + (-length % BLOCK)
        if len(keys) > 1:
            raise ContractError(f"members of {' and '.join(sorted(keys))} in one sample; the index is wrong")
        return keys.pop(), text, arrays

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


def _in_memory(member: memoryview) -> np.ndarray:
    shape, begin = _layout(bytes(member[:NPY_HEADER_BYTES]))
    array = np.frombuffer(member, dtype=np.int16, count=shape[0] * shape[1], offset=begin).reshape(shape)
    array.flags.writeable = False  # a view of the batch's buffer
    return array


@lru_cache(maxsize=MAX_TAGS)
def _layout(header: bytes) -> tuple[tuple[int, int], int]:
    """Shape of an array, and the byte of its `.npy` member where its data begin."""
    dtype, shape, begin = npy_layout(memoryview(header))
    if dtype != np.int16 or len(shape) != 2:
        raise ContractError(f"an array of {dtype} and shape {shape}; shards hold int16 of channels x samples")
    return (shape[0], shape[1]), begin


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
