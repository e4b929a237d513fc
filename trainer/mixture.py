"""How many samples of each stream a global batch takes: integer, never negative, in closed form.

Rounding each batch's quota by itself gives negative quotas for small weights. Here the integer totals of a whole
cycle of `CYCLE` batches are fixed first and laid out once; use of stream k up to batch b is then
`(b // CYCLE) * total_k + prefix[b % CYCLE, k]`. Streams of different shape stand in different *buckets*: a batch is of
one bucket, which a second cycle table chooses in the same way, and the cycle of streams counts the bucket's batches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from manifests.config import digest
from manifests.errors import ConfigError

CYCLE = 512
MAX_BUCKET_CYCLE = 65_536  # batches; a rarer bucket than one batch of so many is refused

# Weight of each corpus in the mixture; 0 lets a corpus rest.
CorpusWeights = dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]


class CurriculumStep(BaseModel):
    """Another mixture from an optimizer step on: it applies to the batch after `from_step` steps were done."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    from_step: Annotated[int, Field(ge=1)]
    weights: CorpusWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stretch of batches with one mixture.

    Attributes:
        from_batch: First global batch of the stretch.
        bucket: Bucket of each stream.
        batches: Batches of each bucket in a cycle of `sum(batches)`.
        totals: Samples of each stream in `CYCLE` batches of its bucket; a bucket's add up to `CYCLE * G`, or to 0.
        base: Position of each stream at `from_batch`.
    """

    from_batch: int
    bucket: tuple[int, ...]
    batches: tuple[int, ...]
    totals: tuple[int, ...]
    base: tuple[int, ...]

    def share(self, stream: int) -> float:
        """Part of the samples of the stretch that a stream gives."""
        k = self.bucket[stream]
        total = sum(n for n, bucket in zip(self.totals, self.bucket, strict=True) if bucket == k)
        return self.batches[k] / sum(self.batches) * self.totals[stream] / max(total, 1)

    def mark(self) -> str:
        """16 hex digits that tell one mixture from another; where it begins is not a part of it."""
        # Of one bucket, the mark is that of the totals, which older checkpoints hold in full.
        return digest([*self.totals] if len(self.batches) == 1 else [[*self.batches], [*self.totals]])[:16]


def new_segment(
    weights: Sequence[float],
    *,
    bucket: Sequence[int],
    global_batch: int,
    earlier: Sequence[Segment],
    from_batch: int,
    names: Sequence[str] = (),
) -> Segment:
    """Segment that goes on from `from_batch` where the earlier ones stand.

    Args:
        weights: Of each stream; 0 lets a stream rest.
        bucket: Bucket of each stream, numbered from 0.
        global_batch: Samples of a batch.
        earlier: Segments before it, none at batch 0.
        from_batch: First batch.
        names: Of the streams, for messages.

    Raises:
        ConfigError: A weight is too small for its stream, or for its bucket, ever to be drawn.
    """
    bucket_weights = np.bincount(np.asarray(bucket), weights=np.asarray(weights, dtype=np.float64))
    totals = np.zeros(len(bucket), dtype=np.int64)
    for k in np.flatnonzero(bucket_weights).tolist():
        streams = np.flatnonzero((np.asarray(bucket) == k) & (np.asarray(weights) != 0))
        own = [names[s] for s in streams.tolist()] if names else []
        totals[streams] = cycle_totals([weights[s] for s in streams.tolist()], global_batch=global_batch, names=own)
    return Segment(
        from_batch=from_batch,
        bucket=tuple(bucket),
        batches=_bucket_batches(bucket_weights),
        totals=tuple(totals.tolist()),
        base=tuple(stream_positions(earlier, from_batch).tolist()) if earlier else (0,) * len(bucket),
    )


def _bucket_batches(weights: np.ndarray) -> tuple[int, ...]:
    """Batches of each bucket in a cycle that is long enough for the rarest one."""
    if len(weights) == 1:
        return (1,)
    active = np.flatnonzero(weights)
    cycle = CYCLE
    while cycle < MAX_BUCKET_CYCLE and weights[active].min() * cycle < weights.sum():
        cycle *= 2
    batches = np.zeros(len(weights), dtype=np.int64)
    batches[active] = _shares(weights[active].tolist(), cycle, [f"bucket {k}" for k in active])
    return tuple(batches.tolist())


def corpus_weights(
    weights: Mapping[str, float], *, corpora: Sequence[str], sizes: Sequence[int], where: str
) -> list[float]:
    """Weight of each stream: its corpus's, shared among the streams of the corpus by their size.

    Args:
        weights: Corpus to weight.
        corpora: Corpus of each stream.
        sizes: Samples of each stream.
        where: Key of the configuration, for messages.

    Raises:
        ConfigError: A corpus without a weight, a weight without a corpus, or only zeros.
    """
    present = dict.fromkeys(corpora)
    for name in [*present.keys() - weights.keys(), *weights.keys() - present.keys()]:
        fault = "no sample passes the filter for it" if name in weights else "has no weight (0 lets it rest)"
        raise ConfigError(f"{where}: corpus {name!r}: {fault}; give a weight to each of {', '.join(present)}")
    if not any(weights.values()):
        raise ConfigError(f"{where}: all weights are 0; give at least one corpus a positive weight")
    total = {name: sum(n for other, n in zip(corpora, sizes, strict=True) if other == name) for name in present}
    return [weights[name] * size / total[name] for name, size in zip(corpora, sizes, strict=True)]


def cycle_totals(weights: Sequence[float], *, global_batch: int, names: Sequence[str] = ()) -> tuple[int, ...]:
    """Samples of each stream in a cycle, by largest remainder; they add up to `CYCLE * global_batch`.

    Raises:
        ConfigError: A weight that is not positive, or so small that its stream would never be drawn.
    """
    return _shares(weights, CYCLE * global_batch, names)


def _shares(weights: Sequence[float], slots: int, names: Sequence[str]) -> tuple[int, ...]:
    if not weights or any(not weight > 0 or not np.isfinite(weight) for weight in weights):
        raise ConfigError(f"mixture weights {list(weights)}: every weight must be a positive number")
    scale = slots / sum(weights)
    exact = [weight * scale for weight in weights]
    totals = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: (totals[k] - exact[k], k))
    for k in by_remainder[: slots - sum(totals)]:
        totals[k] += 1
    if 0 in totals:
        k = totals.index(0)
        raise ConfigError(
            f"mixture weight {weights[k]:g} of {names[k] if names else f'stream {k}'} ({sum(weights):g} in all): never "
            f"drawn among {slots:,}; raise it or drop the stream (filter.corpora, filter.min_channels, …)"
        )
    return tuple(totals)


@lru_cache(maxsize=64)
def cycle_prefix(totals: tuple[int, ...], length: int = CYCLE) -> np.ndarray:
    """Samples of each stream used before each batch of a cycle, int64 of shape (length + 1, streams).

    Item j of stream k falls due at (j + ½) / total_k of the cycle; batches cut the sequence of all items.
    """
    due = np.concatenate([(np.arange(total) + 0.5) / max(total, 1) for total in totals])
    stream = np.repeat(np.arange(len(totals)), totals)[np.argsort(due, kind="stable")]
    counts = np.zeros((length + 1, len(totals)), dtype=np.int64)
    batch = np.repeat(np.arange(length), len(stream) // length)
    np.add.at(counts, (batch + 1, stream), 1)
    return np.cumsum(counts, axis=0)


def _bucket_counts(segment: Segment, batch: int) -> np.ndarray:
    """Batches of each bucket in the segment before a global batch, int64 of shape (buckets,)."""
    cycles, rest = divmod(batch - segment.from_batch, sum(segment.batches))
    batches = np.asarray(segment.batches, dtype=np.int64)
    return cycles * batches + cycle_prefix(segment.batches, sum(segment.batches))[rest]


def stream_positions(segments: Sequence[Segment], batch: int) -> np.ndarray:
    """Position of each stream before a global batch, int64 of shape (streams,)."""
    segment = next(item for item in reversed(segments) if item.from_batch <= batch)
    result = np.asarray(segment.base, dtype=np.int64).copy()
    bucket = np.asarray(segment.bucket)
    for k, count in enumerate(_bucket_counts(segment, batch).tolist()):
        streams = np.flatnonzero(bucket == k)
        totals = tuple(segment.totals[s] for s in streams)
        if any(totals):
            cycles, rest = divmod(count, CYCLE)
            result[streams] += cycles * np.asarray(totals, dtype=np.int64) + cycle_prefix(totals)[rest]
    return result


def interleave(counts: np.ndarray) -> np.ndarray:
    """Stream of each place in a batch, spread evenly so that every rank's slice has the same mixture."""
    due = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(due, kind="stable")]
