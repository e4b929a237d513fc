import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from manifests.errors import ConfigError, ContractError
from trainer import data
from trainer.data import (
    Order,
    SampleFilter,
    SnapshotSource,
    Stream,
    load_streams,
    order_state,
    permutation,
    rank_slice,
    resume_order,
    state_from_json,
)
from trainer.mixture import CYCLE, cycle_prefix, cycle_totals, interleave
from trainer.tiny import write_tiny_snapshot


def stream(num_samples: int, *, shards: int = 7, corpus: str = "a", weight: float | None = None) -> Stream:
    rng = np.random.default_rng(num_samples)
    shard = np.sort(rng.integers(0, shards, num_samples)).astype(np.int32)
    return Stream(
        snapshot="5" * 64,
        corpus=corpus,
        shards=tuple(Path(f"{corpus}{i}.tar") for i in range(shards)),
        keys=np.array([f"{corpus}-{i}" for i in range(num_samples)], dtype=object),
        shard=shard,
        offset=np.arange(num_samples) * 1024,
        num_bytes=np.full(num_samples, 1024),
        weight=float(num_samples) if weight is None else weight,
    )


def keys_of(order: Order, batches: range) -> list[str]:
    return [order.streams[a.stream].keys[a.row] for b in batches for a in order.batch(b)]


def test_each_sample_exactly_once_an_epoch_though_the_batch_does_not_divide_it() -> None:
    order = Order([stream(103)], seed=1, global_batch=8)
    keys = keys_of(order, range(26))  # 208 places: two epochs of 103 and two samples more
    assert 103 % 8 != 0
    assert sorted(keys[:103]) == sorted(order.streams[0].keys)
    assert sorted(keys[103:206]) == sorted(order.streams[0].keys)
    assert keys[:103] != keys[103:206]


def test_changing_ranks_and_workers_gives_the_same_stream() -> None:
    order = Order([stream(103), stream(60, corpus="b")], seed=3, global_batch=10)
    expected = [order.batch(index) for index in range(30)]
    got = []
    for begin, end, world, num_workers in ((0, 7, 8, 3), (7, 12, 3, 1), (12, 13, 1, 4), (13, 30, 7, 2)):
        for index in range(begin, end):
            batch = []
            for rank in range(world):
                worker = index % num_workers
                parts = order.batches(begin, rank=rank, world=world, worker=worker, num_workers=num_workers)
                batch += next(addresses for number, addresses in parts if number == index)
            got.append(batch)
    assert got == expected


@pytest.mark.parametrize(("total", "world"), [(10, 3), (7, 8), (64, 6)])
def test_rank_slices_cover_the_batch_once(total: int, world: int) -> None:
    places = [i for rank in range(world) for i in range(total)[rank_slice(total, rank=rank, world=world)]]
    assert places == list(range(total))


def test_the_seed_the_epoch_and_the_corpus_each_change_the_permutation() -> None:
    shard = stream(500).shard
    orders = [permutation(shard, key=key) for key in (["s", 1, 0], ["s", 2, 0], ["s", 1, 1], ["t", 1, 0])]
    assert len({tuple(order) for order in orders}) == 4
    assert np.array_equal(orders[0], permutation(shard, key=["s", 1, 0]))


def test_the_order_is_frozen() -> None:
    # A change of these numbers orphans every checkpoint: raise ORDER_VERSION with it.
    assert permutation(np.repeat(np.arange(3), 4), key=["frozen", 0]).tolist() == FROZEN
    assert data.ORDER_VERSION == 1


FROZEN = [8, 3, 6, 0, 5, 10, 2, 4, 11, 7, 1, 9]


def test_samples_are_permuted_inside_blocks_of_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "BLOCK_SAMPLES", 100)
    monkeypatch.setattr(data, "BLOCK_SHARDS", 2)
    shard = np.repeat(np.arange(20), 50)
    order = permutation(shard, key=["x"])
    assert sorted(order) == list(range(1000))
    hot = [set(shard[order[i : i + 100]]) for i in range(0, 1000, 100)]
    assert all(len(shards) == 2 for shards in hot)
    assert len(set.union(*hot)) == 20
    assert any(shard[order[0]] != shard[order[i]] for i in range(1, 20))


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
    with pytest.raises(ConfigError, match="positive"):
        cycle_totals([1.0, 0.0], global_batch=8)


def test_a_batch_takes_from_every_stream_and_spreads_it_over_ranks() -> None:
    assert interleave(np.array([2, 4])).tolist() == [1, 0, 1, 1, 0, 1]
    order = Order([stream(100, weight=1.0), stream(100, corpus="b", weight=3.0)], seed=0, global_batch=8)
    for half in (slice(0, 4), slice(4, 8)):
        assert Counter(a.stream for a in order.batch(5)[half]) == {0: 1, 1: 3}


def test_streams_go_on_without_a_gap_when_weights_change() -> None:
    order = Order([stream(40), stream(40, corpus="b")], seed=0, global_batch=8)
    changed = order.with_weights([3.0, 1.0], from_batch=5)
    keys = keys_of(changed, range(5)) + keys_of(changed, range(5, 9))
    assert keys[:40] == keys_of(order, range(5))
    for corpus in "ab":
        own = [key for key in keys if key.startswith(corpus)]
        assert len(set(own[:40])) == min(len(own), 40)
    assert Counter(key[0] for key in keys_of(changed, range(5, 9))) == {"a": 24, "b": 8}


def test_state_is_small_and_round_trips() -> None:
    streams = [stream(1000 + i, corpus=f"corpus{i}", weight=1 / (i + 3)) for i in range(12)]
    order = Order(streams, seed=2**31, global_batch=1440).with_weights([1.0] * 12, from_batch=123_456)
    state = order_state(order, config_digest="c" * 64, batches_committed=987_654_321)
    assert len(state.to_json()) < 1024
    assert state_from_json(state.to_json()) == state
    resumed = resume_order(Order(streams, seed=2**31, global_batch=1440), state, config_digest="c" * 64)
    assert resumed.batch(123_460) == order.batch(123_460)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"seed": 8}, ConfigError),
        ({"global_batch": 16}, ConfigError),
        ({"config_digest": "d" * 64}, ConfigError),
        ({"order_version": 0}, ConfigError),
        ({"snapshots": ["6" * 16]}, ContractError),
    ],
)
def test_a_state_that_differs_is_an_error(change: dict, error: type[Exception]) -> None:
    order = Order([stream(50)], seed=7, global_batch=8)
    fields = json.loads(order_state(order, config_digest="c" * 64, batches_committed=3).to_json())
    resume_order(order, state_from_json(json.dumps(fields)), config_digest="c" * 64)
    with pytest.raises(error, match="another run_dir"):
        resume_order(order, state_from_json(json.dumps(fields | change)), config_digest="c" * 64)


def test_an_unreadable_state_is_a_contract_error() -> None:
    with pytest.raises(ContractError, match="another checkpoint"):
        state_from_json('{"seed": 1}')


def test_filters_choose_from_the_table(tiny_snapshot: Path) -> None:
    source = SnapshotSource(path=str(tiny_snapshot))

    def count(split: str = "train", **keep: object) -> int:
        streams = load_streams([source], split=split, keep=SampleFilter.model_validate(keep))
        return sum(len(item) for item in streams)

    assert count() == 32
    assert count("val") == 16
    assert count(kinds=["resp"]) == 24  # one training subject has no belt
    assert count(kinds=["ecg", "resp"], min_kinds=2) == 24
    assert count(labelled=True) == 32
    for keep in ({"min_quality": 1.0, "corpora": ["other"]}, {"min_kinds": 4}):
        with pytest.raises(ConfigError, match="widen the filter"):
            count(**keep)


def test_a_changed_table_or_snapshot_is_refused(tmp_path: Path) -> None:
    write_tiny_snapshot(tmp_path)
    source = SnapshotSource(path=str(tmp_path))
    table = tmp_path / "samples.parquet"
    content = table.read_bytes()
    table.write_bytes(content[:-1] + b"x")
    with pytest.raises(ContractError, match="SHA-256"):
        load_streams([source], split="train", keep=SampleFilter())
    table.write_bytes(content)
    assert load_streams([source], split="train", keep=SampleFilter())


def test_weights_are_given_to_all_snapshots_or_to_none(tiny_snapshot: Path) -> None:
    sources = [SnapshotSource(path=str(tiny_snapshot), weight=1.0), SnapshotSource(path=str(tiny_snapshot))]
    with pytest.raises(ConfigError, match="all of them or to none"):
        load_streams(sources, split="train", keep=SampleFilter())


def test_a_shard_of_another_size_stops_before_training(tiny_snapshot: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_snapshot, copy)
    shard = next(copy.rglob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ContractError, match="were written"):
        load_streams([SnapshotSource(path=str(copy))], split="train", keep=SampleFilter())
    shard.unlink()
    with pytest.raises(ContractError, match="is missing"):
        load_streams([SnapshotSource(path=str(copy))], split="train", keep=SampleFilter())
