from collections import Counter

import numpy as np
import pytest

from manifests.errors import ConfigError
from trainer.mixture import (
    CYCLE,
    corpus_weights,
    cycle_prefix,
    cycle_totals,
    interleave,
    new_segment,
    stream_positions,
)


def test_mixtures_are_never_negative_and_keep_their_weights() -> None:
    rng = np.random.default_rng(0)
    global_batch = 720
    for _ in range(200):
        weights = np.concatenate([rng.dirichlet(np.full(rng.integers(1, 12), 0.5)) + 4e-4, [4e-4]])
        weights = weights / weights.sum()
        totals = cycle_totals(list(weights), global_batch=global_batch)
        prefix = cycle_prefix(totals)
        quotas = np.diff(prefix, axis=0)
        assert quotas.min() >= 0
        assert (quotas.sum(axis=1) == global_batch).all()
        assert np.abs(prefix[-1] / (CYCLE * global_batch) / weights - 1).max() < 0.004
        assert (quotas.max(axis=0) - quotas.min(axis=0)).max() <= len(weights) + 1


def test_a_weight_too_small_for_one_sample_a_cycle_is_refused() -> None:
    with pytest.raises(ConfigError, match="raise it or drop"):
        cycle_totals([1.0, 1e-9], global_batch=8)
    with pytest.raises(ConfigError, match="of shhs"):
        cycle_totals([1.0, 1e-9], global_batch=8, names=["sleep_edf", "shhs"])
    with pytest.raises(ConfigError, match="positive"):
        cycle_totals([1.0, 0.0], global_batch=8)


def test_places_of_a_batch_are_spread_evenly() -> None:
    assert interleave(np.array([2, 4])).tolist() == [1, 0, 1, 1, 0, 1]


def test_a_rare_bucket_lengthens_the_cycle_and_too_rare_a_one_is_refused() -> None:
    weights = [1.0, 1.0, 1 / 1000]
    segment = new_segment(weights, bucket=(0, 0, 1), global_batch=4, earlier=(), from_batch=0)
    assert sum(segment.batches) == 2048  # the first power of two above 2001
    cycle = sum(segment.batches)
    uses = [stream_positions([segment], b + 1) - stream_positions([segment], b) for b in range(cycle)]
    assert all(use.sum() == 4 for use in uses)
    assert all((use[2] == 0) != (use[:2].sum() == 0) for use in uses)
    kinds = Counter(bool(use[2]) for use in uses)
    assert kinds[True] == segment.batches[1] >= 1
    assert kinds[True] / cycle == pytest.approx(0.0005, rel=0.5)
    with pytest.raises(ConfigError, match="raise it or drop"):
        new_segment([1.0, 1e-6], bucket=(0, 1), global_batch=4, earlier=(), from_batch=0)


def test_a_bucket_that_rests_stays_where_it_was() -> None:
    first = new_segment([1.0, 1.0, 2.0], bucket=(0, 1, 1), global_batch=6, earlier=(), from_batch=0)
    second = new_segment([0.0, 1.0, 0.0], bucket=(0, 1, 1), global_batch=6, earlier=[first], from_batch=100)
    before = stream_positions([first], 100)
    after = stream_positions([first, second], 140)
    assert (stream_positions([first, second], 100) == before).all()
    assert (after - before).tolist() == [0, 240, 0]
    assert first.mark() != second.mark()


def test_a_corpus_shares_its_weight_among_its_streams_by_size() -> None:
    shared = corpus_weights({"a": 3, "b": 0}, corpora=["a", "b", "a"], sizes=[10, 5, 20], where="weights")
    assert shared == [1.0, 0.0, 2.0]
    for weights, message in (
        ({"a": 1.0}, "weights: corpus 'b': has no weight"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "weights: corpus 'c': no sample passes"),
        ({"a": 0.0, "b": 0.0}, "weights: all weights are 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            corpus_weights(weights, corpora=["a", "b", "a"], sizes=[10, 5, 20], where="weights")
