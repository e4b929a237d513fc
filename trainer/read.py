"""Windows read from shards: `preadv` at indexed offsets by a few threads into reused buffers.

A sample stays in its shard until a batch asks for rows of it, or somebody for a field of its window. The rows go
straight into the batch's memory, by the same call as the headers and the tags: what to ask for is taken from the last
sample of that corpus and size, and compared with what the sample itself says as soon as it is there.

Reading ahead never counts: where the data stand is the trainer's number of optimizer steps, not what was read.
A sample whose read fails is replaced by the next position of its stream and reported, never skipped, so that the
order of all others stays the same.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import orjson

from manifests.errors import ContractError
from trainer.data import Address, Order, Stream
from trainer.layout import Layout, Rows, parse_layout
from trainer.stored import SampleReadError, Shards, StoredArray

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

MAX_TAGS = 1024  # texts of tags whose parsed form is kept, about 40 KB each
MAX_OUTLINES = 1024  # one for each corpus and size of a sample, about 10 KB each
UCS_MARK = b',"ucs":'

_last_tags: dict[str, tuple[bytes, "Tags"]] = {}  # recording to text and tags of its last window that was read


class Tags(dict[str, list[dict[str, Any]]]):
    """Kind to channel tags, shared by all windows whose tags have the same text: never changed.

    `derived` keeps what was computed from them.
    """

    def __init__(self, tags: dict[str, list[dict[str, Any]]]) -> None:
        super().__init__(tags)
        self.derived: dict[Any, Any] = {}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outline:
    """What a sample holds: kind to channel tags, and kind to the shape (C, T) of its array."""

    tags: Mapping[str, Sequence[Mapping[str, Any]]]
    shapes: Mapping[str, tuple[int, int]]

    def fits(self, expected: "Outline") -> bool:
        """Whether a sample of this outline was read right when another one was expected."""
        return self.shapes == expected.shapes


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

    @property
    def place(self) -> tuple[int, ...]:
        """Where the sample stands among others that were not read yet."""
        return ()

    @property
    def is_open(self) -> bool:
        """Whether the outline is the sample's own."""
        return True

    def open(self) -> None:
        """Make the outline the sample's own."""

    def outline(self) -> Outline:
        """What the sample holds; before anything was read of it, what one of its corpus and size held."""
        return Outline(tags=self.meta["ucs"], shapes={kind: array.shape for kind, array in self.arrays.items()})

    def read(self, rows: Rows, into: memoryview, *, start: int, width: int) -> None:
        """`width` samples from `start` on of some rows, as int16 one after the other.

        They count once `outline` was asked for again and says what it said before.

        Raises:
            SampleReadError: The shard ends before, or cannot be read.
        """
        begin = 0
        for kind, chosen in rows:
            end = begin + 2 * width * len(chosen)
            out_CT = np.frombuffer(into[begin:end], dtype=np.int16).reshape(len(chosen), width)
            read_rows(self.arrays[kind], chosen, out_CT, start=start)
            begin = end


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredOutline(Outline):
    """The outline of a sample in its shard, with its layout there."""

    layout: Layout

    def fits(self, expected: Outline) -> bool:
        """Whether its members stand where those of the other do."""
        return isinstance(expected, StoredOutline) and self.layout is expected.layout


@dataclass(slots=True, kw_only=True)
class _Source:
    """Open shards, and the outline of the last sample of each stream and size."""

    shards: Shards
    outlines: dict[tuple[int, int], StoredOutline]


class StoredWindow(Window):
    """A window whose sample is still in its shard. Fields other than its key and place are read at their first use."""

    __slots__ = ("_frame", "_is_open", "_mark", "_offset", "_outline", "_place", "_shard", "_source")

    def __init__(self, source: _Source, address: Address, wanted: Address, stream: Stream) -> None:
        """The sample at `address`, a row of `stream`, in the place of `wanted`."""
        row = address.row
        self.key = stream.keys[row]
        self.position = wanted.position
        self.epoch = wanted.epoch
        self._source = source
        shard = stream.shard.item(row)
        self._shard = stream.shards[shard]
        self._offset = stream.offset.item(row)
        self._place = address.stream, shard, self._offset
        self._mark = address.stream, stream.num_bytes.item(row)
        self._is_open = False
        self._frame: bytearray | None = None  # headers and tags that were read and not yet checked
        self._outline: StoredOutline | None = None  # until it is open, what is expected

    def __getattr__(self, name: str) -> Any:
        """A field that was not read yet."""
        if name not in ("corpus", "recording", "meta", "arrays"):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        self.open()
        if name == "arrays":
            self.arrays = self._stored_arrays()
        return getattr(self, name)

    @property
    def place(self) -> tuple[int, ...]:
        """Stream, shard and offset."""
        return self._place

    @property
    def is_open(self) -> bool:
        """Whether the sample's headers and tags were read."""
        return self._is_open

    def open(self) -> None:
        """Check what `read` brought of the sample's headers and tags, or read them now.

        Raises:
            SampleReadError: The sample is damaged or cannot be read.
        """
        if self._is_open:
            return
        expected = self._expected()
        try:
            text = None
            if expected is not None:
                if self._frame is None:
                    self.read((), memoryview(b""), start=0, width=0)
                text = expected.layout.text_of(self.key.encode(), self._frame or b"")
            if expected is not None and text is not None:
                self._fill(text, expected.layout)
            else:
                self._parse()
        except (OSError, ContractError, ValueError, KeyError) as error:
            raise SampleReadError(self.key, str(error)) from error

    def outline(self) -> StoredOutline:
        """The sample's own outline if anything was read of it; before that, what is expected."""
        expected = self._outline if self._is_open or self._frame is not None else self._expected()
        if expected is None or self._frame is not None:
            self.open()
            expected = self._outline
        return cast("StoredOutline", expected)

    def read(self, rows: Rows, into: memoryview, *, start: int, width: int) -> None:
        """As of a window in memory, from the shard; until the sample is open its headers and tags come along."""
        layout = self.outline().layout
        calls = layout.plan(rows, start=start, width=width, is_framed=not self._is_open)
        frame = None if self._is_open else bytearray(layout.frame_bytes)
        try:
            self._source.shards.read(self._shard, calls, self._offset, rows=into, frame=memoryview(frame or b""))
        except (OSError, ContractError) as error:
            raise SampleReadError(self.key, str(error)) from error
        self._frame = frame

    def _expected(self) -> StoredOutline | None:
        if self._outline is None:
            self._outline = self._source.outlines.get(self._mark)
        return self._outline

    def _parse(self) -> None:
        """Read and parse the headers one by one."""
        shards, shard, offset = self._source.shards, self._shard, self._offset
        found, text, layout = parse_layout(
            lambda begin, length: shards.read_bytes(shard, length, offset + begin), self._mark[1]
        )
        if found != self.key:
            raise ContractError(f"sample {found!r} stands at its offset")
        self._fill(text, layout)

    def _fill(self, text: bytes, layout: Layout) -> None:
        meta = parse_meta(text)
        self.corpus, self.recording, self.meta = meta["corpus"], meta["recording"], meta
        outlines, tags = self._source.outlines, meta["ucs"]
        outline = outlines.get(self._mark)
        if outline is None or outline.tags is not tags or outline.layout is not layout:
            outline = StoredOutline(tags=tags, shapes=layout.shapes, layout=layout)
            if len(outlines) >= MAX_OUTLINES:
                outlines.clear()
            outlines[self._mark] = outline
        self._outline, self._is_open, self._frame = outline, True, None

    def _stored_arrays(self) -> dict[str, StoredArray]:
        shards, layout = self._source.shards, self.outline().layout
        return {
            kind: StoredArray(
                key=self.key, shape=shape, shards=shards, shard=self._shard, offset=self._offset + layout.begins[kind]
            )
            for kind, shape in layout.shapes.items()
        }


def read_rows(array: np.ndarray | StoredArray, rows: Sequence[int], out_CT: np.ndarray, *, start: int = 0) -> None:
    """`array[rows, start : start + T]` into `out_CT`, which is contiguous; no other bytes are read.

    The rows are ascending, without repeats.

    Raises:
        SampleReadError: The shard ends before, or cannot be read.
    """
    width = out_CT.shape[1]
    if isinstance(array, StoredArray):
        array.read(rows, out_CT, start=start)
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
        self._source = _Source(shards=Shards(locate), outlines={})
        self._num_threads = num_threads
        self._prefetch = prefetch
        self._max_replaced = max_replaced
        self._lock = threading.Lock()
        self.replaced: list[str] = []  # keys of the samples that failed, in the order of their failure

    @property
    def num_bytes(self) -> int:
        """Bytes read so far."""
        return self._source.shards.num_bytes

    def read(self, addresses: Sequence[Address], *, order: Order) -> list[Window]:
        """Windows of the addresses, in their order, with all arrays in memory.

        Raises:
            ContractError: More samples failed than `max_replaced`.
        """
        return self.work_on(addresses, loaded, order=order)

    def work_on(
        self, addresses: Sequence[Address], work: Callable[[list[Window]], ResultT], *, order: Order
    ) -> ResultT:
        """`work(windows)`, which reads what it needs of them; again if that fails for one.

        Raises:
            ContractError: More samples failed than `max_replaced`.
        """
        sources = list(addresses)
        windows: list[Window] = [self._window(address, address) for address in addresses]
        while True:
            try:
                return work(windows)
            except SampleReadError as error:
                place = next(i for i, window in enumerate(windows) if window.key == error.key)
                self._report(sources[place], error)
                # The place in the order stays that of the sample which failed; only the content is another's.
                sources[place] = order.address(sources[place].stream, sources[place].position + 1)
                windows[place] = self._window(addresses[place], sources[place])

    def _window(self, wanted: Address, source: Address) -> StoredWindow:
        return StoredWindow(self._source, source, wanted, self._streams[source.stream])

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
        self._source.shards.close()


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
    return [
        Window(
            key=window.key,
            position=window.position,
            epoch=window.epoch,
            corpus=window.corpus,
            recording=window.recording,
            meta=window.meta,
            arrays={kind: _load(array) for kind, array in window.arrays.items()},
        )
        for window in windows
    ]


def _load(array: np.ndarray | StoredArray) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return array
    out_CT = np.empty(array.shape, dtype=np.int16)
    read_rows(array, range(len(out_CT)), out_CT)
    out_CT.flags.writeable = False
    return out_CT


def parse_meta(text: bytes) -> dict[str, Any]:
    """JSON of a sample. Its tags, nine tenths of it, mostly repeat from window to window and are parsed once.

    They stand last where the engine wrote them. Where they do not, one of the two pieces is no JSON, and all is
    parsed together.
    """
    begin = text.find(UCS_MARK)
    if begin >= 0:
        with suppress(ValueError):
            meta = orjson.loads(text[:begin] + b"}")
            meta["ucs"] = _tags_of(meta.get("recording"), text[begin + len(UCS_MARK) : -1])
            return meta
    meta = orjson.loads(text)
    meta["ucs"] = Tags(meta["ucs"])
    return meta


def _tags_of(recording: object, text: bytes) -> Tags:
    """Tags of a window: most often those of its recording's last one. To compare takes a tenth of a hash's time."""
    name = str(recording)
    last, tags = _last_tags.get(name, (b"", None))
    if tags is None or last != text:
        tags = _parse_tags(text)
        if len(_last_tags) >= MAX_TAGS:
            _last_tags.clear()
        _last_tags[name] = text, tags
    return tags


@lru_cache(maxsize=MAX_TAGS)
def _parse_tags(text: bytes) -> Tags:
    return Tags(orjson.loads(text))
