"""Where the members of a sample stand, and by which calls its rows are read.

The samples of a corpus are mostly laid out alike, and their headers differ in the key and in the size of the JSON
alone. So a layout that was parsed once is remembered. The next sample of that size is read as if it were laid out so;
its headers, all of them, come by the same call, are compared with the layout, and parsed only where they differ. What
counts as damage does not depend on what was read before.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from manifests.errors import ContractError
from manifests.shards import BLOCK, npy_layout, parse_member

NPY_HEADER_BYTES = 128  # of every array that the engine writes (manifests/shards.py)
# Two stretches of a shard so near to each other are read by one call: it costs as much as 16 KiB from the page cache.
GAP_BYTES = 16 << 10
MAX_PARTS = 512  # of one call; Linux takes 1024
MAX_PLANS = 64  # of a layout that are kept: one for each choice of kinds and channels
# Bytes of a tar header: size 124 to 136, checksum 148 to 156.
_SIZE_BEGIN, _SIZE_BYTES, _SUM_BEGIN, _SUM_END = 124, 12, 148, 156

# What a part of a call is read into: memory of the rows, the frame, or bytes that nobody looks at.
ROWS, FRAME, GAP = range(3)

# (kind, rows of its array, ascending without repeats), one after the other.
Rows = tuple[tuple[str, tuple[int, ...]], ...]


class Stretch(NamedTuple):
    """`length` bytes from `begin` on, which go to byte `at` of what `target` names (`ROWS`, `FRAME`)."""

    begin: int
    length: int
    target: int
    at: int


class Call(NamedTuple):
    """`num_bytes` from `begin` on, read at once into (target, first byte, last byte) one after the other."""

    begin: int
    num_bytes: int
    parts: list[tuple[int, int, int]]


def calls_of(stretches: Sequence[Stretch]) -> list[Call]:
    """Stretches as few calls in ascending order; few bytes between two are read too."""
    calls: list[Call] = []
    for begin, length, target, at in sorted(stretches):
        into = target, at, at + length
        last = calls[-1] if calls else Call(begin, 0, [])
        gap = begin - last.begin - last.num_bytes
        if calls and 0 <= gap <= GAP_BYTES and len(last.parts) < MAX_PARTS:
            last.parts.extend([(GAP, 0, gap), into] if gap else [into])
            calls[-1] = last._replace(num_bytes=last.num_bytes + gap + length)
        else:
            calls.append(Call(begin, length, [into]))
    return calls


def row_stretches(
    shape: tuple[int, int], rows: Sequence[int], *, begin: int, start: int, width: int, at: int = 0
) -> list[Stretch]:
    """`array[rows, start : start + width]` of an int16 array that begins at byte `begin`."""
    found: list[Stretch] = []
    step = 2 * width
    for row in rows:
        first = begin + 2 * (row * shape[1] + start)
        if found and found[-1].begin + found[-1].length == first:
            found[-1] = found[-1]._replace(length=found[-1].length + step)
        else:
            found.append(Stretch(first, step, ROWS, at))
        at += step
    return [stretch for stretch in found if stretch.length]


class Layout:
    """Where the members of a sample stand, and the check whether another sample of its size is laid out alike.

    Attributes:
        shapes: Kind to shape (C, T) of its array.
        begins: Kind to first byte of the array's data, counted from the begin of the sample.
        frame: All that is no data of an array: the headers, the JSON and the padding. The check sees all of it.
        frame_bytes: Its length.
    """

    def __init__(
        self, key: str, members: Sequence["_Member"], arrays: dict[str, tuple[tuple[int, int], int]], size: int
    ) -> None:
        self.shapes = {kind: shape for kind, (shape, _) in arrays.items()}
        self.begins = {kind: begin for kind, (_, begin) in arrays.items()}
        data = [(begin, begin + 2 * shape[0] * shape[1]) for shape, begin in arrays.values()]
        self.frame: list[Stretch] = []
        self.frame_bytes = 0
        for begin, end in zip([0, *(end for _, end in data)], [*(begin for begin, _ in data), size], strict=True):
            self.frame.append(Stretch(begin, end - begin, FRAME, self.frame_bytes))
            self.frame_bytes += end - begin
        self._plans: dict[tuple[Rows, int, int, bool], list[Call]] = {}
        self._remember(key, members, data)

    def _remember(self, key: str, members: Sequence["_Member"], data: Sequence[tuple[int, int]]) -> None:
        """What the frame of a sample that is laid out alike looks like."""
        formats: list[str] = []
        gaps: list[int] = []
        # Pieces of an array's header: key, two constants; of a JSON's: key, constant, size, two constants, text.
        keys, constants, place, filled = [], [], 0, 0
        for member in members:
            begin = member.begin - sum(end - first for first, end in data if first < member.begin)
            is_json = member.extension == "json"
            formats.append((_json_format if is_json else _array_format)(len(key), len(member.header)))
            gaps.append(begin - filled)
            filled = begin + len(member.header)
            keys.append(place)
            constants += [place + i for i in ((1, 3, 4) if is_json else (1, 2))]
            if is_json:
                self._size, self._text = place + 2, place + 5
            place += 6 if is_json else 3
        spaced = "".join(f"{gap}x{text}" for gap, text in zip(gaps, formats, strict=True))
        self._pieces = struct.Struct(f"<{spaced}{self.frame_bytes - filled}x")
        self._keys, self._num_keys, self._constants = itemgetter(*keys), len(keys), itemgetter(*constants)
        headers = struct.Struct("<" + "".join(formats))
        self._expected = self._constants(headers.unpack(b"".join(member.header for member in members)))

    def text_of(self, key: bytes, frame: bytes | bytearray) -> bytes | None:
        """The JSON of a sample that is laid out like this and bears the key; else None.

        Args:
            key: Of the sample.
            frame: Its bytes where this layout has its `frame`.
        """
        pieces = self._pieces.unpack(frame)
        if self._keys(pieces) != (key,) * self._num_keys or self._constants(pieces) != self._expected:
            return None
        size, room = int(pieces[self._size][:-1], 8), len(pieces[self._text])
        return pieces[self._text][:size] if room - BLOCK < size <= room else None

    def plan(self, rows: Rows, *, start: int, width: int, is_framed: bool) -> list[Call]:
        """Calls that read `width` samples from `start` on of some rows, and the frame along with them."""
        asked = rows, start, width, is_framed
        if asked in self._plans:
            return self._plans[asked]
        stretches = [*self.frame] if is_framed else []
        at = 0
        for kind, chosen in rows:
            stretches += row_stretches(
                self.shapes[kind], chosen, begin=self.begins[kind], start=start, width=width, at=at
            )
            at += 2 * width * len(chosen)
        calls = calls_of(stretches)
        if start == 0:  # a random stretch does not come again
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            self._plans[asked] = calls
        return calls


@dataclass(frozen=True, slots=True, kw_only=True)
class _Member:
    """A member of a sample: where its tar header begins, and that header with the one of its array or its JSON."""

    extension: str
    begin: int
    header: bytes


def _array_format(num_key: int, num_bytes: int) -> str:
    return f"{num_key}s{_SUM_BEGIN - num_key}s{_SUM_END - _SUM_BEGIN}x{num_bytes - _SUM_END}s"


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
        header = content(begin, min(BLOCK + NPY_HEADER_BYTES, size - begin))
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
            header = content(begin, BLOCK + skip)
            arrays[extension.removesuffix(".npy")] = shape, begin + BLOCK + skip
        members.append(_Member(extension=extension, begin=begin, header=header))
        begin += BLOCK + room
    if len(keys) > 1:
        raise ContractError(f"members of {' and '.join(sorted(keys))} in one sample; the index is wrong")
    if not text or not arrays:
        raise ContractError("a sample without JSON or without arrays; run kymo verify on the snapshot")
    key = keys.pop()
    return key, text, Layout(key, members, arrays, size)


@lru_cache(maxsize=1024)
def array_layout(header: bytes) -> tuple[tuple[int, int], int]:
    """Shape of an array, and the byte of its `.npy` member where its data begin.

    Raises:
        ContractError: It is no int16 of two dimensions.
    """
    try:
        dtype, shape, begin = npy_layout(memoryview(header))
    except (SyntaxError, ValueError, KeyError, TypeError) as error:
        raise ContractError(f"the header of an array is damaged ({error}); run kymo verify") from None
    if dtype != np.int16 or len(shape) != 2 or min(shape) < 0:
        raise ContractError(f"an array of {dtype} and shape {shape}; shards hold int16 of channels x samples")
    if begin % 2:
        raise ContractError(f"an array that begins at byte {begin}; int16 stand at even ones")
    return (shape[0], shape[1]), begin
