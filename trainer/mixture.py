"""How many samples of each stream a global batch takes: integer, never negative, in closed form.

Rounding each batch's quota by itself gives negative quotas for small weights. Here the integer totals of a whole
cycle of `CYCLE` batches are fixed first and laid out once; use of stream k up to batch b is then
`(b // CYCLE) * total_k + prefix[b % CYCLE, k]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from manifests.errors import ConfigError

CYCLE = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stretch of batches with one mixture.

    Attributes:
        from_batch: First global batch of the stretch.
        totals: Samples of each stream in a cycle of `CYCLE` batches; they add up to `CYCLE * G`.
        base: Position of each stream at `from_batch`.
    """

    from_batch: int
    totals: tuple[int, ...]
    base: tuple[int, ...]


def cycle_totals(weights: Sequence[float], *, global_batch: int) -> tuple[int, ...]:
    """Samples of each stream in a cycle, by largest remainder; they add up to `CYCLE * global_batch`.

    Raises:
        ConfigError: A weight that is not positive, or so small that its stream would never be drawn.
    """
    if not weights or any(not weight > 0 or not np.isfinite(weight) for weight in weights):
        raise ConfigError(f"mixture weights {list(weights)}: every weight must be a positive number")
    slots = CYCLE * global_batch
    scale = slots / sum(weights)
    exact = [weight * scale for weight in weights]
    totals = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: (totals[k] - exact[k], k))
    for k in by_remainder[: slots - sum(totals)]:
        totals[k] += 1
    if 0 in totals:
        k = totals.index(0)
        raise ConfigError(
            f"mixture weight {weights[k]} of stream {k}: under one sample in {slots}; raise it or drop the stream"
        )
    return tuple(totals)


@lru_cache(maxsize=8)
def cycle_prefix(totals: tuple[int, ...]) -> np.ndarray:
    """Samples of each stream used before each batch of a cycle, int64 of shape (CYCLE + 1, streams).

    Item j of stream k falls due at (j + ½) / total_k of the cycle; batches cut the sequence of all items.
    """
    due = np.concatenate([(np.arange(total) + 0.5) / total for total in totals])
    stream = np.repeat(np.arange(len(totals)), totals)[np.argsort(due, kind="stable")]
    counts = np.zeros((CYCLE + 1, len(totals)), dtype=np.int64)
    batch = np.repeat(np.arange(CYCLE), len(stream) // CYCLE)
    np.add.at(counts, (batch + 1, stream), 1)
    return np.cumsum(counts, axis=0)


def stream_positions(segments: Sequence[Segment], batch: int) -> np.ndarray:
    """Position of each stream before a global batch, int64 of shape (streams,)."""
    segment = next(item for item in reversed(segments) if item.from_batch <= batch)
    cycles, rest = divmod(batch - segment.from_batch, CYCLE)
    used = cycles * np.asarray(segment.totals, dtype=np.int64) + cycle_prefix(segment.totals)[rest]
    return np.asarray(segment.base, dtype=np.int64) + used


def interleave(counts: np.ndarray) -> np.ndarray:
    """Stream of each place in a batch, spread evenly so that every rank's slice has the same mixture."""
    due = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(due, kind="stable")]
