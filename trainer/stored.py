"""Samples in their shards: where the members of one stand, and reads of their bytes into a batch's memory.

The samples of a shard are mostly laid out alike, and their headers differ in the key and in the size of the JSON
alone. So a layout that was parsed once is remembered; for the next sample of that size the headers are compared with
it, all of them, and parsed only where they differ. What counts as damage does not depend on what was read before.
"""

import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from pathlib import Path

import numpy as np

from manifests.errors import ContractError
from manifests.shards import BLOCK, npy_layout, parse_member

MAX_OPEN_SHARDS = 128
NPY_HEADER_BYTES = 128  # of every array that the engine writes (manifests/shards.py)
HEADER_BYTES = BLOCK + NPY_HEADER_BYTES
# Two stretches of a shard so near to each other are read by one call: it costs as much as 16 KiB from the page cache.
GAP_BYTES = 16 << 10
MAX_PARTS = 512  # of one call; Linux takes 1024
# Bytes of a tar header: size 124 to 136, checksum 148 to 156.
_SIZE_BEGIN, _SIZE_BYTES, _SUM_BEGIN, _SUM_END = 124, 12, 148, 156

_gap = memoryview(bytearray(GAP_BYTES))  # what lies between is read into it by all threads, and never looked at


class ArrayReadError(ContractError):
    """The signal of an opened sample could not be read."""

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

    def read(self, shard: Path, parts: list[memoryview], offset: int) -> None:
        """Fill one buffer after the other from a byte of the shard on.

        Raises:
            ContractError: The shard ends before.
        """
        num_bytes = sum(map(len, parts))
        file = self._file(shard, num_bytes)
        if os.preadv(file.descriptor, parts, offset) < num_bytes:
            _read_by_parts(file.descriptor, parts, offset)

    def read_spans(self, shard: Path, spans: Sequence[tuple[int, int]], offset: int) -> bytes:
        """Some bytes of the shard, given as (begin, length) counted from `offset`, one after the other.

        Raises:
            ContractError: The shard ends before.
        """
        num_bytes = sum(length for _, length in spans)
        file = self._file(shard, num_bytes)
        content = b"".join([os.pread(file.descriptor, length, offset + begin) for begin, length in spans])
        if len(content) < num_bytes:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredArray:
    """An array of a sample that still lies in its shard: int16 of shape (C, T)."""

    key: str
    shape: tuple[int, int]
    shards: Shards
    shard: Path
    offset: int


def read_stored(wanted: Sequence[tuple[StoredArray, Sequence[int], np.ndarray]], *, start: int = 0) -> None:
    """`array[rows, start : start + T]` into `out_CT` for each (array, rows, out_CT) of one sample.

    The rows are ascending, without repeats; the outputs are contiguous. Bytes between two stretches are read too if
    they are few.

    Raises:
        ArrayReadError: The shard ends before, or cannot be read.
    """
    array = wanted[0][0]
    try:
        for offset, parts in _calls(sorted(_stretches(wanted, start), key=itemgetter(0))):
            array.shards.read(array.shard, parts, offset)
    except (OSError, ContractError) as error:
        raise ArrayReadError(array.key, str(error)) from error


def _stretches(
    wanted: Sequence[tuple[StoredArray, Sequence[int], np.ndarray]], start: int
) -> list[tuple[int, memoryview]]:
    """(byte of the shard, where it goes) of all rows; of a whole array at once."""
    found: list[tuple[int, memoryview]] = []
    for array, rows, out_CT in wanted:
        if not out_CT.size:
            continue
        into = memoryview(out_CT).cast("B")  # pyright: ignore[reportArgumentType]  # a buffer from Python 3.12 on
        length, width = array.shape[1], out_CT.shape[1]
        if width == length and len(rows) == array.shape[0]:
            found.append((array.offset, into))
            continue
        step = 2 * width
        begins = range(0, len(into), step)
        found += [
            (array.offset + 2 * (row * length + start), into[begin : begin + step])
            for row, begin in zip(rows, begins, strict=True)
        ]
    return found


def _calls(stretches: Sequence[tuple[int, memoryview]]) -> list[tuple[int, list[memoryview]]]:
    """Stretches in ascending order as few calls of `preadv`: (byte of the shard, buffers one after the other)."""
    calls: list[tuple[int, list[memoryview]]] = []
    end = -1
    for offset, into in stretches:
        gap = offset - end
        if calls and 0 <= gap <= GAP_BYTES and len(calls[-1][1]) < MAX_PARTS:
            calls[-1][1].extend([_gap[:gap], into] if gap else [into])
        else:
            calls.append((offset, [into]))
        end = offset + len(into)
    return calls


class Layout:
    """Where the members of a sample stand, and the check whether another sample of its size is laid out alike.

    Attributes:
        arrays: Kind to shape of the array and first byte of its data, counted from the begin of the sample.
        headers: (first byte, length) of what the check must see: every header, and the JSON.
    """

    def __init__(self, key: str, members: Sequence["_Member"], arrays: dict[str, tuple[tuple[int, int], int]]) -> None:
        self.arrays = arrays
        self.headers = [(member.begin, len(member.header)) for member in members]
        formats = [
            _json_format(len(key), len(member.header)) if member.extension == "json" else _array_format(len(key))
            for member in members
        ]
        ends = [0, *(begin + length for begin, length in self.headers)]
        gaps = [begin - end for (begin, _), end in zip(self.headers, ends, strict=False)]
        self._packed = struct.Struct("<" + "".join(formats))
        self._whole = struct.Struct("<" + "".join(f"{gap}x{text}" for gap, text in zip(gaps, formats, strict=True)))
        # Pieces of an array's header: key, two constants; of a JSON's: key, constant, size, two constants, text.
        keys, constants, place = [], [], 0
        for member in members:
            is_json = member.extension == "json"
            keys.append(place)
            constants += [place + i for i in ((1, 3, 4) if is_json else (1, 2))]
            if is_json:
                self._size, self._text = place + 2, place + 5
            place += 6 if is_json else 3
        self._keys, self._num_keys, self._constants = itemgetter(*keys), len(keys), itemgetter(*constants)
        self._expected = self._constants(self._packed.unpack(b"".join(member.header for member in members)))

    def text_of(self, key: bytes, content: memoryview | bytes, *, is_whole: bool) -> bytes | None:
        """The JSON of a sample that is laid out like this and bears the key; else None.

        Args:
            key: Of the sample.
            content: All of it, or its `headers` one after the other.
            is_whole: Which of both.
        """
        pieces = (self._whole.unpack_from if is_whole else self._packed.unpack)(content)
        if self._keys(pieces) != (key,) * self._num_keys or self._constants(pieces) != self._expected:
            return None
        size, room = int(pieces[self._size][:-1], 8), len(pieces[self._text])
        return pieces[self._text][:size] if room - BLOCK < size <= room else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Member:
    """A member of a sample: where its tar header begins, and that header with the one of its array or its JSON."""

    extension: str
    begin: int
    header: bytes


def _array_format(num_key: int) -> str:
    return f"{num_key}s{_SUM_BEGIN - num_key}s{_SUM_END - _SUM_BEGIN}x{HEADER_BYTES - _SUM_END}s"


def _json_format(num_key: int, num_bytes: int) -> str:
    constant = _SUM_BEGIN - _SIZE_BEGIN - _SIZE_BYTES
    return (
        f"{num_key}s{_SIZE_BEGIN - num_key}s{_SIZE_BYTES}s{constant}s{_SUM_END - _SUM_BEGIN}x"
        f"{BLOCK - _SUM_END}s{num_bytes - BLOCK}s"
    )


def parse_layout(content: Callable[[int, int], bytes], size: int) -> tuple[str, bytes, Layout]:
    """Key, JSON and layout of a sample.

    Args:
        content: `length` bytes of it from `begin` on, as a function of both.
        size: Its length in bytes.

    Raises:
        ContractError: It breaks the format of shards.
    """
    members: list[_Member] = []
    arrays: dict[str, tuple[tuple[int, int], int]] = {}
    keys: set[str] = set()
    text = b""
    begin = 0
    while begin < size:
        header = content(begin, min(HEADER_BYTES, size - begin))
        key, extension, length = parse_member(memoryview(header)[:BLOCK])
        keys.add(key)
        room = length + (-length % BLOCK)
        if begin + BLOCK + room > size:
            raise ContractError(f"{extension} of {key} ends after its sample; run kymo verify on the snapshot")
        if extension == "json":
            header = content(begin, BLOCK + room)
            text = header[BLOCK : BLOCK + length]
        else:
            shape, skip = array_layout(header[BLOCK:])
            if skip + 2 * shape[0] * shape[1] > length:
                raise ContractError(f"{extension} of {key} is shorter than its shape {shape}; run kymo verify")
            arrays[extension.removesuffix(".npy")] = shape, begin + BLOCK + skip
        members.append(_Member(extension=extension, begin=begin, header=header))
        begin += BLOCK + room
    if len(keys) > 1:
        raise ContractError(f"members of {' and '.join(sorted(keys))} in one sample; the index is wrong")
    if not text or not arrays:
        raise ContractError("a sample without JSON or without arrays; run kymo verify on the snapshot")
    key = keys.pop()
    return key, text, Layout(key, members, arrays)


@lru_cache(maxsize=1024)
def array_layout(header: bytes) -> tuple[tuple[int, int], int]:
    """Shape of an array, and the byte of its `.npy` member where its data begin.

    Raises:
        ContractError: It is no int16 of two dimensions.
    """
    dtype, shape, begin = npy_layout(memoryview(header))
    if dtype != np.int16 or len(shape) != 2:
        raise ContractError(f"an array of {dtype} and shape {shape}; shards hold int16 of channels x samples")
    if begin % 2:
        raise ContractError(f"an array that begins at byte {begin}; int16 stand at even ones")
    return (shape[0], shape[1]), begin
