"""The order of samples as a pure function of position: no shuffle buffer, no worker state.

A *stream* is one corpus of one snapshot after filters. Its positions run over an endless concatenation of
epochs, each a keyed permutation of its samples. Global batch b of constant size G takes the next positions of
every stream by the mixture's closed form; nothing is padded and nothing dropped. Ranks and loader workers cut
batches and never the order, so their number may change at any resume.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from manifests.config import digest
from manifests.errors import ConfigError, ContractError
from trainer.mixture import (
    CurriculumStep,
    Segment,
    corpus_weights,
    interleave,
    new_segment,
    stream_positions,
)
from trainer.samples import Stream

ORDER_VERSION = 1
BLOCK_SAMPLES = 100_000
BLOCK_SHARDS = 10


class Address(NamedTuple):
    """Where one place of a batch is read: row `row` of stream `stream`, which is its `position` in `epoch`.

    A named tuple, for one is made for every sample of a run: it takes a third of a frozen dataclass's time.
    """

    stream: int
    position: int
    epoch: int
    row: int


def permutation(shard: np.ndarray, *, key: Sequence[Any], block_samples: int | None = None) -> np.ndarray:
    """Order of N samples for one epoch, int64 (N,): shards permuted, then samples inside blocks of shards.

    A block holds at least `block_samples` samples and `BLOCK_SHARDS` shards, so that only its shards are hot.

    Args:
        shard: (N,) shard of each sample, sorted.
        key: What the permutation depends on; its digest keys a Philox generator.
        block_samples: `BLOCK_SAMPLES` by default.
    """
    block_samples = block_samples or BLOCK_SAMPLES
    # Raw words and a stable sort: numpy promises the bit generator's words for ever, and no more than that.
    words = np.random.Philox(key=int(digest(list(key))[:32], 16))
    _, start, count = np.unique(shard, return_index=True, return_counts=True)
    by_chance = np.argsort(words.random_raw(len(start)), kind="stable")
    result = np.empty(len(shard), dtype=np.int64)
    filled = 0
    first = 0
    while first < len(by_chance):
        last, size = first, 0
        while last < len(by_chance) and (size < block_samples or last - first < BLOCK_SHARDS):
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
    """Addresses of every global batch, from the streams, the seed, the batch size and the mixture alone."""

    def __init__(
        self,
        streams: Sequence[Stream],
        *,
        seed: int,
        global_batch: int,
        segments: Sequence[Segment] = (),
        block_samples: int | None = None,
    ) -> None:
        self.streams = tuple(streams)
        self._sizes = tuple(map(len, self.streams))
        self.seed = seed
        self.global_batch = global_batch
        self._block_samples = block_samples
        buckets = sorted({stream.bucket for stream in streams})
        self._bucket = tuple(buckets.index(stream.bucket) for stream in streams)
        self.segments = tuple(segments) or (self._segment([stream.weight for stream in streams], from_batch=0),)
        # Two epochs of every stream: a batch may straddle their border.
        self._epoch_rows = lru_cache(maxsize=2 * len(self.streams))(self._permute)
        self._first_needs = lru_cache(maxsize=2 * len(self.streams))(self._find_first_needs)

    def _segment(self, weights: Sequence[float], *, from_batch: int, earlier: Sequence[Segment] = ()) -> Segment:
        return new_segment(
            weights,
            bucket=self._bucket,
            global_batch=self.global_batch,
            earlier=earlier,
            from_batch=from_batch,
            names=[f"{stream.corpus} {stream.bucket}".rstrip() for stream in self.streams],
        )

    def with_weights(self, weights: Sequence[float], *, from_batch: int) -> "Order":
        """The same order up to `from_batch`, with another mixture after it; a stream of weight 0 rests."""
        kept = [segment for segment in self.segments if segment.from_batch < from_batch]
        segments = [*kept, self._segment(weights, from_batch=from_batch, earlier=kept)]
        return Order(
            self.streams,
            seed=self.seed,
            global_batch=self.global_batch,
            segments=segments,
            block_samples=self._block_samples,
        )

    def _permute(self, stream: int, epoch: int) -> np.ndarray:
        item = self.streams[stream]
        shape = [item.bucket] if item.bucket else []
        key = [ORDER_VERSION, item.snapshot, self.seed, item.corpus, epoch, *shape]
        return permutation(item.shard, key=key, block_samples=self._block_samples)

    def address(self, stream: int, position: int) -> Address:
        """What stands at a position of a stream."""
        epoch, place = divmod(position, self._sizes[stream])
        return Address(stream, position, epoch, self._epoch_rows(stream, epoch).item(place))

    def rows(self, stream: int, begin: int, count: int) -> np.ndarray:
        """Rows of a stream at positions from `begin` on, int64 (count,)."""
        epochs, places = np.divmod(np.arange(begin, begin + count), len(self.streams[stream]))
        parts = [self._epoch_rows(stream, int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate(parts)

    def batch(self, index: int) -> list[Address]:
        """The G addresses of a global batch, streams interleaved."""
        return self._addresses(index, [slice(0, self.global_batch)])

    def _addresses(self, index: int, places: Sequence[slice]) -> list[Address]:
        """Addresses at some places of a global batch."""
        begin, end = stream_positions(self.segments, index), stream_positions(self.segments, index + 1)
        stream = interleave(end - begin)
        position = np.empty_like(stream)
        position[np.argsort(stream, kind="stable")] = np.concatenate(
            [np.arange(first, last) for first, last in zip(begin, end, strict=True)]
        )
        own = np.concatenate([np.arange(self.global_batch)[part] for part in places])
        return list(map(self.address, stream[own].tolist(), position[own].tolist()))

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
            yield index, self._addresses(index, parts)
            index += num_workers

    def upcoming_shards(self, batch: int, *, limit: int) -> list[Path]:
        """The next `limit` shards that are needed for the first time in their epoch at or after a global batch.

        In the order of need, as far as the mixture of that batch goes on. All ranks of a node need the same ones.
        """
        segment = next(item for item in reversed(self.segments) if item.from_batch <= batch)
        found: list[tuple[float, Path]] = []
        for number, position in enumerate(stream_positions(self.segments, batch).tolist()):
            item = self.streams[number]
            per_batch = segment.totals[number] * segment.batches[segment.bucket[number]]
            if not per_batch:
                continue
            epoch, place = divmod(position, len(item))
            for ahead in range(2):  # to the end of this epoch, then the next one's
                needs = self._first_needs(number, epoch + ahead)
                away = needs[:, 0] + ahead * len(item) - place
                chosen = np.flatnonzero(away >= 0)[:limit]
                found += [(away[i] / per_batch, item.shards[needs[i, 1]]) for i in chosen]
        return list(dict.fromkeys(shard for _, shard in sorted(found, key=lambda pair: pair[0])))[:limit]

    def _find_first_needs(self, stream: int, epoch: int) -> np.ndarray:
        """(place in the epoch, shard) of the first sample of every shard, ascending, int64 of shape (shards, 2)."""
        shards, first = np.unique(self.streams[stream].shard[self._epoch_rows(stream, epoch)], return_index=True)
        return np.stack([first, shards], axis=1)[np.argsort(first, kind="stable")]


def mixed_order(
    streams: Sequence[Stream],
    *,
    seed: int,
    global_batch: int,
    weights: Mapping[str, float] | None = None,
    curriculum: Sequence[CurriculumStep] = (),
    block_samples: int | None = None,
) -> Order:
    """Order under the weights of corpora, and under those of the curriculum from its steps on.

    Raises:
        ConfigError: A corpus has no weight or too small a one, or the steps of the curriculum do not ascend.
    """
    corpora, sizes = [stream.corpus for stream in streams], [len(stream) for stream in streams]
    if weights is not None:
        shared = corpus_weights(weights, corpora=corpora, sizes=sizes, where="weights")
        streams = [replace(stream, weight=weight) for stream, weight in zip(streams, shared, strict=True)]
    order = Order(streams, seed=seed, global_batch=global_batch, block_samples=block_samples)
    for index, item in enumerate(curriculum):
        where = f"curriculum.{index}"
        if item.from_step <= order.segments[-1].from_batch:
            raise ConfigError(f"{where}.from_step: {item.from_step} is not after the one before it; let them ascend")
        shared = corpus_weights(item.weights, corpora=corpora, sizes=sizes, where=f"{where}.weights")
        order = order.with_weights(shared, from_batch=item.from_step)
    return order


@dataclass(frozen=True, slots=True, kw_only=True)
class DataState:
    """Where the data stand: under 1 KB of JSON, independent of ranks, workers and prefetching.

    Attributes:
        order_version: `ORDER_VERSION`.
        snapshots: The first hex digits of each digest, enough to tell one from another.
        config_digest: Of the configuration that shapes the order, without the mixture.
        seed: Of the order.
        global_batch: Samples of a batch.
        segments: (first batch, mark) of each mixture. What a mark stands for is computed from the configuration
            again, which keeps the state small with any number of corpora.
        batches_committed: Optimizer steps done, not batches read.
    """

    order_version: int
    snapshots: tuple[str, ...]
    config_digest: str
    seed: int
    global_batch: int
    segments: tuple[tuple[int, str], ...]
    batches_committed: int

    def to_json(self) -> str:
        """Compact JSON text."""
        return json.dumps(asdict(self), separators=(",", ":"))


def state_from_json(text: str) -> DataState:
    """State of `DataState.to_json`; ContractError when it is not one."""
    try:
        fields = json.loads(text)
        segments = tuple(_segment_mark(item) for item in fields.pop("segments"))
        return DataState(**{**fields, "snapshots": tuple(fields["snapshots"])}, segments=segments)
    except (ValueError, KeyError, TypeError) as error:
        raise ContractError(f"data state is not readable ({error}); resume from another checkpoint") from None


def _segment_mark(item: Any) -> tuple[int, str]:
    if isinstance(item, dict):  # checkpoints of 2026-11 and before hold the totals themselves
        return int(item["from_batch"]), digest([*item["totals"]])[:16]
    from_batch, mark = item
    return int(from_batch), str(mark)


def order_state(order: Order, *, config_digest: str, batches_committed: int) -> DataState:
    """State of an order after so many optimizer steps."""
    return DataState(
        order_version=ORDER_VERSION,
        snapshots=_snapshot_marks(order),
        config_digest=config_digest,
        seed=order.seed,
        global_batch=order.global_batch,
        segments=tuple((segment.from_batch, segment.mark()) for segment in order.segments),
        batches_committed=batches_committed,
    )


def check_state(order: Order, state: DataState, *, config_digest: str) -> None:
    """Refuse to go on with another order than the one that a checkpoint's steps were made with.

    The mixture of steps that are still to be done may differ: a curriculum can be changed at a resume.

    Raises:
        ConfigError: The state belongs to another version, configuration, seed, batch size or mixture.
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
    marks = _snapshot_marks(order)
    if len(marks) != len(state.snapshots) or any(
        not then.startswith(now) for now, then in zip(marks, state.snapshots, strict=False)
    ):
        raise ContractError(
            f"data order: snapshots {list(marks)} are not the checkpoint's {list(state.snapshots)}; "
            "give back the snapshots it was trained on, or start in another run_dir"
        )
    done = state.batches_committed
    now = [(segment.from_batch, segment.mark()) for segment in order.segments if segment.from_batch < done]
    then = [segment for segment in state.segments if segment[0] < done]
    if now != then:
        first = next(i for i in range(max(len(now), len(then))) if now[i : i + 1] != then[i : i + 1])
        step = min(item[first][0] for item in (now, then) if first < len(item))
        raise ConfigError(
            f"data order: the mixture from step {step} on is not the one that the checkpoint's {done} steps were made "
            f"with; set weights and curriculum back for the steps before {done} (later ones may change), "
            "or start in another run_dir"
        )


def _snapshot_marks(order: Order) -> tuple[str, ...]:
    return tuple(dict.fromkeys(stream.snapshot[:8] for stream in order.streams))
