"""Which samples of a snapshot take part, from the columns of samples.parquet alone."""

from collections.abc import Collection
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute
from pydantic import BaseModel, ConfigDict, Field, field_validator

from manifests.channels import KINDS, ChannelTag, resolve

pc: Any = pyarrow.compute  # its functions are made at run time
TICKS_PER_HOUR = 3_600_000_000  # hours are summed as whole microseconds, so that no order of adding matters
_BLOCK_KEYS = 1 << 18  # hashed at once: 20 MB for keys of 64 bytes


class SampleFilter(BaseModel):
    """Which samples of a snapshot take part; chosen from samples.parquet without opening a tar.

    Caps in hours keep the samples with the smallest hash of their key: the same ones in every run and epoch, and a
    lower cap keeps a part of what a higher one keeps.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kinds: list[str] | None = None  # count only these kinds; None = all
    min_kinds: Annotated[int, Field(ge=1)] = 1  # so many of them must be present
    channels: Annotated[list[str], Field(min_length=1)] | None = None  # UCS symbols that must be present:
    channel_match: Literal["any", "all"] = "any"  # at least one of them, or each
    min_channels: Annotated[int, Field(ge=1)] = 1  # of all kinds together
    min_quality: Annotated[float, Field(ge=0, le=1)] = 0.0
    corpora: list[str] | None = None
    labelled: bool = False  # only windows with a stage or a class
    subject_hours: Annotated[float, Field(gt=0)] | None = None  # at most so much signal of a subject
    corpus_hours: Annotated[float, Field(gt=0)] | None = None  # and of a corpus, in each split

    @field_validator("channels")
    @classmethod
    def _are_symbols(cls, channels: list[str] | None) -> list[str] | None:
        for symbol in channels or ():
            tag = resolve(symbol)
            if not isinstance(tag, ChannelTag):
                raise ValueError(f"{symbol!r} is no channel ({tag.reason}); write a UCS symbol, e.g. eeg:C3-M2")
            if tag.symbol != symbol:
                raise ValueError(f"{symbol!r} is not how UCS writes it; write {tag.symbol}")
        return channels

    @field_validator("kinds")
    @classmethod
    def _are_kinds(cls, kinds: list[str] | None) -> list[str] | None:
        for kind in kinds or ():
            if kind not in KINDS:
                raise ValueError(f"{kind!r} is not a kind; choose from {', '.join(KINDS)}")
        return kinds

    def columns(self) -> set[str]:
        """Columns of samples.parquet that the filter looks at."""
        named = {"num_channels", "quality", "corpus"}
        # A sample with a channel has a kind; lists are dear to read.
        named |= {"kinds"} if self.kinds is not None or self.min_kinds > 1 else set()
        named |= {"symbols"} if self.channels is not None else set()
        named |= {"stage", "classes"} if self.labelled else set()
        return named | ({"subject"} if self.subject_hours is not None else set())


def passes(rows: pa.Table, keep: SampleFilter) -> np.ndarray:
    """Which rows pass all but the caps in hours, bool of shape (rows,)."""
    mask = _numbers(rows["quality"], fill=-1.0) >= keep.min_quality
    mask &= _numbers(rows["num_channels"], fill=0) >= keep.min_channels
    if "kinds" in keep.columns():
        mask &= _count(rows["kinds"], keep.kinds) >= keep.min_kinds
    if keep.channels is not None:
        has = [_count(rows["symbols"], [symbol]) > 0 for symbol in keep.channels]
        mask &= np.all(has, axis=0) if keep.channel_match == "all" else np.any(has, axis=0)
    if keep.corpora is not None:
        mask &= _is_in(rows["corpus"], keep.corpora)
    if keep.labelled:
        unknown = pa.array(["?", None], type=pa.string())
        mask &= (_count(rows["classes"], None) > 0) | ~pc.is_in(rows["stage"], value_set=unknown).to_numpy()
    return mask


def within_hours(hours: float, *, ticks: np.ndarray, group: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """Which samples make up the first `hours` of their group in the order of `chance`, bool of shape (N,).

    Args:
        hours: The cap.
        ticks: (N,) int64, length of each sample in `TICKS_PER_HOUR`.
        group: (N,) number of the subject or corpus.
        chance: (N,) uint64 of `key_hash`.
    """
    order = np.lexsort((chance, group))
    begins = np.flatnonzero(np.diff(group[order], prepend=-1))
    used = np.cumsum(ticks[order])
    before = np.repeat(used[begins] - ticks[order][begins], np.diff(begins, append=len(order)))
    mask = np.empty(len(order), dtype=bool)
    mask[order] = used - before <= hours * TICKS_PER_HOUR
    return mask


def key_hash(keys: np.ndarray) -> np.ndarray:
    """64-bit hash of fixed-width bytes (dtype `S`), the same on every machine and for every width: uint64 (N,)."""
    words = -(-keys.dtype.itemsize // 8)
    columns = keys.astype(f"S{8 * words}").view("<u8").reshape(len(keys), words)
    state = np.full(len(keys), 0x9E3779B97F4A7C15, dtype=np.uint64)
    for column in columns.T:
        mixed = state ^ column
        # The finaliser of SplitMix64 (Steele, Lea & Flood 2014): each bit of the input moves half of the output's.
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        # A word of padding changes nothing, so that a longer key elsewhere leaves the hash of this one.
        state = np.where(column == 0, state, mixed ^ (mixed >> np.uint64(31)))
    return state


def lowest(keys: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` keys with the lowest `key_hash`: hashes, uint64, ascending, and rows, int64.

    Any key is as likely to be among them, and a key stays as long as no lower one comes. Block after block, so that
    millions of keys need no memory of their own.
    """
    hashes, rows = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
    for begin in range(0, len(keys), _BLOCK_KEYS):
        block = key_hash(keys[begin : begin + _BLOCK_KEYS])
        is_low = block < hashes[-1] if len(hashes) == count else np.ones(len(block), dtype=bool)
        hashes = np.concatenate([hashes, block[is_low]])
        rows = np.concatenate([rows, begin + np.flatnonzero(is_low)])
        order = np.argsort(hashes, kind="stable")[:count]
        hashes, rows = hashes[order], rows[order]
    return hashes, rows


def _numbers(column: pa.ChunkedArray, *, fill: float) -> np.ndarray:
    return column.fill_null(fill).to_numpy()


def _count(column: pa.ChunkedArray, wanted: Collection[str] | None) -> np.ndarray:
    """How many entries of each list are wanted ones, or are there at all, int64 of shape (rows,)."""
    lists = column.combine_chunks()
    lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
    if wanted is None:
        return pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
    parents = pc.list_parent_indices(lists).to_numpy()
    return np.bincount(parents[_is_in(lists.flatten(), wanted)], minlength=len(lists))


def _is_in(values: pa.Array | pa.ChunkedArray, wanted: Collection[str]) -> np.ndarray:
    if isinstance(values, pa.DictionaryArray):  # a comparison per distinct value and not per row
        found = pc.is_in(values.dictionary, value_set=pa.array([*wanted], type=pa.string()))
        hits = np.append(found.to_numpy(zero_copy_only=False), False)
        return hits[values.indices.fill_null(len(values.dictionary)).to_numpy()]
    if pa.types.is_dictionary(values.type):
        return np.concatenate([np.empty(0, dtype=bool), *(_is_in(chunk, wanted) for chunk in values.chunks)])
    found = pc.is_in(values, value_set=pa.array([*wanted], type=pa.string()))
    return found.to_numpy() if isinstance(found, pa.ChunkedArray) else found.to_numpy(zero_copy_only=False)
