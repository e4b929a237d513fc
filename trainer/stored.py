"""Shards that are open, and arrays that still lie in them: reads of their bytes into a batch's memory."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from manifests.errors import ContractError
from trainer.layout import GAP_BYTES, Call, calls_of, row_stretches

MAX_OPEN_SHARDS = 128

_gap = memoryview(bytearray(GAP_BYTES))  # what lies between is read into it by all threads, and never looked at


class SampleReadError(ContractError):
    """A sample, or the signal of one, could not be read."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key = key


class _File:
    """A file descriptor that is closed when nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class Shards:
    """Open shards, the least recently used one let go beyond the limit.

    Args:
        locate: Local file of a shard, asked for before each read; None: a shard is a local file itself.
    """

    def __init__(self, locate: Callable[[Path], Path] | None) -> None:
        self.num_bytes = 0
        self._locate = locate
        # A cache that evicts a shard wins its disk space only when the file is closed.
        self._limit = MAX_OPEN_SHARDS if locate is None else MAX_OPEN_SHARDS // 8
        self._open: OrderedDict[Path, _File] = OrderedDict()
        self._last: tuple[Path, _File] | None = None
        self._lock = threading.Lock()

    def read(self, shard: Path, calls: Sequence[Call], offset: int, *, rows: memoryview, frame: memoryview) -> None:
        """Do the calls for a sample or an array that begins at byte `offset` of a shard.

        Raises:
            ContractError: The shard ends before.
        """
        targets = rows, frame, _gap
        for begin, num_bytes, parts in calls:
            file = self._file(shard, num_bytes)
            memory = [targets[target][first:last] for target, first, last in parts]
            if os.preadv(file.descriptor, memory, offset + begin) < num_bytes:
                _read_by_parts(file.descriptor, memory, offset + begin)

    def read_bytes(self, shard: Path, length: int, offset: int) -> bytes:
        """Some bytes of a shard from `offset` on.

        Raises:
            ContractError: The shard ends before.
        """
        content = os.pread(self._file(shard, length).descriptor, length, offset)
        if len(content) < length:
            raise ContractError("the shard ends before the sample does")
        return content

    def _file(self, shard: Path, num_bytes: int) -> _File:
        """An open shard, of which so many bytes are going to be read."""
        path = shard if self._locate is None else self._locate(shard)
        with self._lock:
            self.num_bytes += num_bytes
            if self._last is None or self._last[0] is not shard:  # to hash a path takes half a microsecond
                file = self._open[shard] = self._open.pop(shard, None) or _File(path)
                self._last = shard, file
                if len(self._open) > self._limit:
                    self._open.popitem(last=False)
            return self._last[1]

    def close(self) -> None:
        """Close all."""
        with self._lock:
            self._open.clear()
            self._last = None


def _read_by_parts(descriptor: int, parts: Sequence[memoryview], offset: int) -> None:
    """The same again after a call that was cut short, by a signal or by the end of the shard."""
    for part in parts:
        filled = 0
        while filled < len(part):
            count = os.preadv(descriptor, [part[filled:]], offset + filled)
            if count == 0:
                raise ContractError("the shard ends before the sample does")
            filled += count
        offset += len(part)


@dataclass(slots=True, kw_only=True, eq=False)
class StoredArray:
    """An array of a sample that still lies in its shard: int16 of shape (C, T)."""

    key: str
    shape: tuple[int, int]
    shards: Shards
    shard: Path
    offset: int

    def read(self, rows: Sequence[int], out_CT: np.ndarray, *, start: int) -> None:
        """`array[rows, start : start + T]` into `out_CT`, which is contiguous.

        The rows are ascending, without repeats. Bytes between two stretches are read too if they are few.

        Raises:
            SampleReadError: The shard ends before, or cannot be read.
        """
        if not out_CT.size:
            return
        calls = calls_of(row_stretches(self.shape, rows, begin=0, start=start, width=out_CT.shape[1]))
        into = memoryview(out_CT).cast("B")  # pyright: ignore[reportArgumentType]  # a buffer from Python 3.12 on
        try:
            self.shards.read(self.shard, calls, self.offset, rows=into, frame=_gap)
        except (OSError, ContractError) as error:
            raise SampleReadError(self.key, str(error)) from error
