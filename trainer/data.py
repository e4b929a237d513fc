"""The order of samples as a pure function of position: no shuffle buffer, no worker state.

A *stream* is one corpus of one snapshot after filters. Its positions run over an endless concatenation of
epochs, each a keyed permutation of its samples. Global batch b of constant size G takes the next positions of
every stream by the mixture's closed form; nothing is padded and nothing dropped. Ranks and loader workers cut
batches and never the order, so their number may change at any resume.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from manifests.config import digest
from manifests.errors import ConfigError, ContractError
from manifests.shards import SAMPLES_FILE, Snapshot, load_snapshot
from trainer.mixture import Segment, cycle_totals, interleave, stream_positions

ORDER_VERSION = 1
BLOCK_SAMPLES = 100_000
BLOCK_SHARDS = 10


class SampleFilter(BaseModel):
    """Which samples of a snapshot take part; chosen from samples.parquet without opening a tar."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kinds: list[str] | None = None  # count only these kinds; None = all
    min_kinds: Annotated[int, Field(ge=1)] = 1  # so many of them must be present
    min_quality: Annotated[float, Field(ge=0, le=1)] = 0.0
    corpora: list[str] | None = None
    labelled: bool = False  # only windows with a stage or a class


class SnapshotSource(BaseModel):
    """A snapshot folder and its weight in the mixture (None for all: proportional to size)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    weight: Annotated[float, Field(gt=0)] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stream:
    """One corpus of one snapshot after filters, sorted by shard and ordinal. N samples.

    Attributes:
        snapshot: Digest of the snapshot.
        shards: Path of every shard of the snapshot.
        keys: (N,) sample keys.
        shard: (N,) int32 index into `shards`.
        offset: (N,) int64, byte where the sample's tar blocks begin.
        num_bytes: (N,) int64, their length in bytes.
    """

    snapshot: str
    corpus: str
    shards: tuple[Path, ...]
    keys: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    num_bytes: np.ndarray
    weight: float

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where one place of a batch is read: row `row` of stream `stream`, which is its `position` in `epoch`."""

    stream: int
    position: int
    epoch: int
    row: int


def load_streams(sources: Sequence[SnapshotSource], *, split: str, keep: SampleFilter) -> list[Stream]:
    """Streams of the snapshots after filters, in the order of the sources and of corpus names.

    Raises:
        ConfigError: Nothing is left, or only some snapshots have a weight.
        ContractError: A snapshot or its samples.parquet was changed after it was written.
    """
    if len({source.weight is None for source in sources}) > 1:
        raise ConfigError("snapshots: give a weight to all of them or to none")
    streams: list[Stream] = []
    for source in sources:
        streams += _streams_of(source, split=split, keep=keep)
    if not streams:
        paths = ", ".join(source.path for source in sources)
        raise ConfigError(
            f"{paths}: no sample of split {split!r} (of train, val, test) passes {keep}; widen the filter"
        )
    return streams


def _streams_of(source: SnapshotSource, *, split: str, keep: SampleFilter) -> list[Stream]:
    folder = Path(source.path)
    snapshot = load_snapshot(folder)
    table = _read_samples(folder, snapshot)
    mask = pc.equal(table["split"], split)  # pyright: ignore[reportAttributeAccessIssue] (made at run time)
    chosen = table.filter(mask).to_pandas()
    wanted = set(keep.kinds) if keep.kinds is not None else None
    present = chosen["kinds"].map(lambda kinds: len(set(kinds) & wanted) if wanted is not None else len(kinds))
    chosen = chosen[(present >= keep.min_kinds) & (chosen["quality"] >= keep.min_quality)]
    if keep.corpora is not None:
        chosen = chosen[chosen["corpus"].isin(keep.corpora)]
    if keep.labelled:
        has_class = chosen["classes"].map(lambda classes: classes is not None and len(classes) > 0)
        chosen = chosen[has_class | (chosen["stage"].notna() & (chosen["stage"] != "?"))]
    paths = [entry.path for entry in snapshot.shards]
    number = {path: index for index, path in enumerate(paths)}
    for entry in snapshot.shards:
        path = folder / entry.path
        size = path.stat().st_size if path.is_file() else -1
        if size != entry.num_bytes:
            found = f"has {size} bytes" if size >= 0 else "is missing"
            raise ContractError(f"{path}: {found}, {entry.num_bytes} were written; run kymo convert again to mend it")
    if unknown := set(chosen["shard"]) - number.keys():
        raise ContractError(f"{folder}: {SAMPLES_FILE} names shard {min(unknown)!r}, which the snapshot lacks")
    chosen = chosen.assign(shard=chosen["shard"].map(number)).sort_values(["corpus", "shard", "ordinal"])
    return [
        Stream(
            snapshot=snapshot.digest,
            corpus=str(corpus),
            shards=tuple(folder / path for path in paths),
            keys=rows["key"].to_numpy(dtype=object),
            shard=rows["shard"].to_numpy(dtype=np.int32),
            offset=rows["offset"].to_numpy(dtype=np.int64),
            num_bytes=rows["num_bytes"].to_numpy(dtype=np.int64),
            weight=len(rows) if source.weight is None else source.weight * len(rows) / len(chosen),
        )
        for corpus, rows in chosen.groupby("corpus", sort=True)
    ]


def _read_samples(folder: Path, snapshot: Snapshot) -> Any:
    path = folder / SAMPLES_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ContractError(f"{path}: cannot be read ({error.strerror}); finalise the snapshot again") from None
    if hashlib.sha256(content).hexdigest() != snapshot.samples_sha256:
        raise ContractError(f"{path}: its SHA-256 is not the snapshot's; restore the file or finalise again")
    return pq.read_table(path)


def permutation(shard: np.ndarray, *, key: Sequence[Any]) -> np.ndarray:
    """Order of N samples for one epoch, int64 (N,): shards permuted, then samples inside blocks of shards.

    A block holds at least `BLOCK_SAMPLES` samples and `BLOCK_SHARDS` shards, so that only its shards are hot.

    Args:
        shard: (N,) shard of each sample, sorted.
        key: What the permutation depends on; its digest keys a Philox generator.
    """
    # Raw words and a stable sort: numpy promises the bit generator's words for ever, and no more than that.
    words = np.random.Philox(key=int(digest(list(key))[:32], 16))
    _, start, count = np.unique(shard, return_index=True, return_counts=True)
    by_chance = np.argsort(words.random_raw(len(start)), kind="stable")
    result = np.empty(len(shard), dtype=np.int64)
    filled = 0
    first = 0
    while first < len(by_chance):
        last, size = first, 0
        while last < len(by_chance) and (size < BLOCK_SAMPLES or last - first < BLOCK_SHARDS):
            size += int(count[by_chance[last]])
            last += 1
        rows = np.concatenate([np.arange(int(start[s]), int(start[s] + count[s])) for s in by_chance[first:last]])
        result[filled : filled + size] = rows[np.argsort(words.random_raw(size), kind="stable")]
        filled += size
        first = last
    return result


def rank_slice(total: int, *, rank: int, world: int) -> slice:
    """Places ⌊rank·total/world⌋ up to ⌊(rank+1)·total/world⌋ of a batch."""
    return slice(rank * total // world, (rank + 1) * total // world)


def part_slices(total: int, num_parts: int, *, rank: int, world: int) -> list[slice]:
    """Places of a rank in each of the `num_parts` micro-batches that a batch is cut into.

    The cut into parts comes first: a part holds the same samples whatever the number of ranks.
    """
    slices: list[slice] = []
    for part in range(num_parts):
        whole = rank_slice(total, rank=part, world=num_parts)
        own = rank_slice(whole.stop - whole.start, rank=rank, world=world)
        slices.append(slice(whole.start + own.start, whole.start + own.stop))
    return slices


def part_sizes(total: int, num_parts: int, *, rank: int, world: int) -> list[int]:
    """Samples of a rank in each micro-batch."""
    return [part.stop - part.start for part in part_slices(total, num_parts, rank=rank, world=world)]


class Order:
    """Addresses of every global batch, from the streams, the seed and the batch size alone."""

    def __init__(
        self, streams: Sequence[Stream], *, seed: int, global_batch: int, segments: Sequence[Segment] = ()
    ) -> None:
        self.streams = tuple(streams)
        self.seed = seed
        self.global_batch = global_batch
        totals = cycle_totals([stream.weight for stream in streams], global_batch=global_batch)
        self.segments = tuple(segments) or (Segment(from_batch=0, totals=totals, base=(0,) * len(self.streams)),)
        # Two epochs of every stream: a batch may straddle their border.
        self._epoch_rows = lru_cache(maxsize=2 * len(self.streams))(self._permute)

    def _permute(self, stream: int, epoch: int) -> np.ndarray:
        item = self.streams[stream]
        return permutation(item.shard, key=[ORDER_VERSION, item.snapshot, self.seed, item.corpus, epoch])

    def address(self, stream: int, position: int) -> Address:
        """What stands at a position of a stream."""
        epoch, place = divmod(position, len(self.streams[stream]))
        row = int(self._epoch_rows(stream, epoch)[place])
        return Address(stream=stream, position=position, epoch=epoch, row=row)

    def batch(self, index: int) -> list[Address]:
        """The G addresses of a global batch, streams interleaved."""
        begin, end = stream_positions(self.segments, index), stream_positions(self.segments, index + 1)
        upcoming = begin.copy()
        addresses: list[Address] = []
        for stream in interleave(end - begin):
            addresses.append(self.address(int(stream), int(upcoming[stream])))
            upcoming[stream] += 1
        return addresses

    def batches(
        self,
        start: int,
        *,
        rank: int = 0,
        world: int = 1,
        worker: int = 0,
        num_workers: int = 1,
        num_parts: int = 1,
    ) -> Iterator[tuple[int, list[Address]]]:
        """Endless (batch, this rank's addresses) for batches ≡ worker (mod num_workers) from `start` on.

        With `num_parts` micro-batches, the addresses of one follow those of the other (`part_sizes`).
        """
        index = start + (worker - start) % num_workers
        parts = part_slices(self.global_batch, num_parts, rank=rank, world=world)
        while True:
            batch = self.batch(index)
            yield index, [address for part in parts for address in batch[part]]
            index += num_workers

    def with_weights(self, weights: Sequence[float], *, from_batch: int) -> "Order":
        """The same order up to `from_batch`, with another mixture after it."""
        base = tuple(int(position) for position in stream_positions(self.segments, from_batch))
        totals = cycle_totals(weights, global_batch=self.global_batch)
        kept = [segment for segment in self.segments if segment.from_batch < from_batch]
        segments = [*kept, Segment(from_batch=from_batch, totals=totals, base=base)]
        return Order(self.streams, seed=self.seed, global_batch=self.global_batch, segments=segments)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataState:
    """Where the data stand: under 1 KB of JSON, independent of ranks, workers and prefetching.

    `batches_committed` counts optimizer steps done, not batches read. `snapshots` holds 16 hex digits of each
    digest, enough to tell one from another.
    """

    order_version: int
    snapshots: tuple[str, ...]
    config_digest: str
    seed: int
    global_batch: int
    segments: tuple[Segment, ...]
    batches_committed: int

    def to_json(self) -> str:
        """Compact JSON text."""
        return json.dumps(asdict(self), separators=(",", ":"))


def state_from_json(text: str) -> DataState:
    """State of `DataState.to_json`; ContractError when it is not one."""
    try:
        fields = json.loads(text)
        segments = tuple(
            Segment(from_batch=item["from_batch"], totals=tuple(item["totals"]), base=tuple(item["base"]))
            for item in fields.pop("segments")
        )
        return DataState(**{**fields, "snapshots": tuple(fields["snapshots"])}, segments=segments)
    except (ValueError, KeyError, TypeError) as error:
        raise ContractError(f"data state is not readable ({error}); resume from another checkpoint") from None


def order_state(order: Order, *, config_digest: str, batches_committed: int) -> DataState:
    """State of an order after so many optimizer steps."""
    return DataState(
        order_version=ORDER_VERSION,
        snapshots=_snapshot_marks(order),
        config_digest=config_digest,
        seed=order.seed,
        global_batch=order.global_batch,
        segments=order.segments,
        batches_committed=batches_committed,
    )


def resume_order(order: Order, state: DataState, *, config_digest: str) -> Order:
    """Order that goes on where `state` stands; every quantity that shapes it must be the same.

    Raises:
        ConfigError: The state belongs to another version, configuration, seed or batch size.
        ContractError: The state belongs to another snapshot.
    """
    for name, now, then in (
        ("order version", ORDER_VERSION, state.order_version),
        ("config_digest", config_digest, state.config_digest),
        ("seed", order.seed, state.seed),
        ("global_batch", order.global_batch, state.global_batch),
    ):
        if now != then:
            raise ConfigError(
                f"data order: {name} is {now}, the checkpoint was made with {then}; "
                "set it back, or start in another run_dir"
            )
    if _snapshot_marks(order) != state.snapshots:
        raise ContractError(
            f"data order: snapshots {list(_snapshot_marks(order))} are not the checkpoint's {list(state.snapshots)}; "
            "give back the snapshots it was trained on, or start in another run_dir"
        )
    return Order(order.streams, seed=order.seed, global_batch=order.global_batch, segments=state.segments)


def _snapshot_marks(order: Order) -> tuple[str, ...]:
    return tuple(dict.fromkeys(stream.snapshot[:16] for stream in order.streams))
