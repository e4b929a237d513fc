import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from manifests.errors import ConfigError, ContractError
from trainer import data
from trainer.config import PretrainConfig
from trainer.data import (
    Order,
    check_state,
    mixed_order,
    order_state,
    permutation,
    rank_slice,
    state_from_json,
)
from trainer.loop import pretrain
from trainer.mixture import CurriculumStep
from trainer.samples import Keys, Stream
from trainer.tiny import write_tiny_snapshot


def stream(
    num_samples: int, *, shards: int = 7, corpus: str = "a", weight: float | None = None, bucket: str = ""
) -> Stream:
    rng = np.random.default_rng(num_samples)
    shard = np.sort(rng.integers(0, shards, num_samples)).astype(np.int32)
    return Stream(
        snapshot="5" * 64,
        corpus=corpus,
        shards=tuple(Path(f"{corpus}{i}.tar") for i in range(shards)),
        keys=Keys(np.array([f"{corpus}-{i}" for i in range(num_samples)], dtype="S")),
        shard=shard,
        offset=np.arange(num_samples) * 1024,
        num_bytes=np.full(num_samples, 1024),
        seconds=np.full(num_samples, 30.0),
        weight=float(num_samples) if weight is None else weight,
        bucket=bucket,
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


def test_a_batch_takes_from_every_stream_and_spreads_it_over_ranks() -> None:
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


def test_state_is_small_with_46_corpora_and_5_mixtures_and_round_trips() -> None:
    streams = [
        replace(stream(1000 + i, corpus=f"corpus{i}", weight=1 / (i + 3)), snapshot=f"{i:064x}"[::-1])
        for i in range(46)
    ]
    order = Order(streams, seed=2**63 - 1, global_batch=1440)
    for step in range(1, 6):
        order = order.with_weights([1.0 + (i * step) % 7 for i in range(46)], from_batch=step * 123_456)
    state = order_state(order, config_digest="c" * 64, batches_committed=987_654_321)
    assert len(state.segments) == 6
    assert len(state.to_json()) < 1024
    assert state_from_json(state.to_json()) == state
    check_state(order, state, config_digest="c" * 64)


def test_a_state_that_holds_its_totals_is_still_read() -> None:
    # As kymo wrote it before it kept marks.
    order = Order([stream(40), stream(40, corpus="b")], seed=7, global_batch=8)
    fields = json.loads(order_state(order, config_digest="c" * 64, batches_committed=3).to_json())
    old = fields | {
        "snapshots": ["5" * 16],
        "segments": [{"from_batch": 0, "totals": [2048, 2048], "base": [0, 0]}],
    }
    check_state(order, state_from_json(json.dumps(old)), config_digest="c" * 64)
    other = old | {"segments": [{"from_batch": 0, "totals": [2047, 2049], "base": [0, 0]}]}
    with pytest.raises(ConfigError, match="another run_dir"):
        check_state(order, state_from_json(json.dumps(other)), config_digest="c" * 64)


def curriculum_of(*steps: tuple[int, float]) -> list[CurriculumStep]:
    return [CurriculumStep(from_step=step, weights={"a": 1.0, "b": weight}) for step, weight in steps]


def test_a_curriculum_changes_the_mixture_at_its_steps() -> None:
    streams = [stream(40), stream(40, corpus="b")]
    order = mixed_order(
        streams, seed=0, global_batch=8, weights={"a": 1.0, "b": 1.0}, curriculum=curriculum_of((5, 3.0), (9, 0.0))
    )
    assert [Counter(a.stream for a in order.batch(b)) for b in (4, 5, 8, 9)] == [
        {0: 4, 1: 4},
        {0: 2, 1: 6},
        {0: 2, 1: 6},
        {0: 8},
    ]
    # The corpus that rests goes on later from where it stood: no sample is left out or seen twice in an epoch.
    later = order.with_weights([1.0, 1.0], from_batch=12)
    own = [key for key in keys_of(later, range(14)) if key.startswith("b")]
    assert sorted(own[:40]) == sorted(streams[1].keys)
    with pytest.raises(ConfigError, match=r"curriculum\.1\.from_step: 5"):
        mixed_order(streams, seed=0, global_batch=8, curriculum=curriculum_of((5, 3.0), (5, 2.0)))


def test_the_mixture_of_steps_to_come_may_change_and_that_of_steps_done_may_not() -> None:
    streams = [stream(40), stream(40, corpus="b")]

    def order_with(*steps: tuple[int, float]) -> Order:
        return mixed_order(streams, seed=0, global_batch=8, curriculum=curriculum_of(*steps))

    state = order_state(order_with((5, 3.0), (20, 2.0)), config_digest="c", batches_committed=9)
    for steps in ([(5, 3.0)], [(5, 3.0), (9, 4.0)], [(5, 3.0), (20, 7.0)]):
        check_state(order_with(*steps), state, config_digest="c")
        assert order_with(*steps).batch(8) == order_with((5, 3.0), (20, 2.0)).batch(8)
    for steps, step in (([], 5), ([(5, 2.0)], 5), ([(4, 3.0)], 4), ([(5, 3.0), (8, 2.0)], 8)):
        with pytest.raises(ConfigError, match=f"the mixture from step {step} on"):
            check_state(order_with(*steps), state, config_digest="c")


def test_a_batch_is_of_one_bucket_and_every_sample_comes_once_an_epoch() -> None:
    streams = [
        stream(50, bucket="128Hz"),
        stream(30, bucket="200Hz"),
        stream(20, corpus="b", bucket="128Hz"),
        stream(3, corpus="b", bucket="500Hz"),
    ]
    order = Order(streams, seed=0, global_batch=6)
    batches = [order.batch(index) for index in range(600)]
    buckets = [{streams[a.stream].bucket for a in batch} for batch in batches]
    assert all(len(found) == 1 for found in buckets)
    assert set.union(*buckets) == {"128Hz", "200Hz", "500Hz"}
    shares = Counter(next(iter(found)) for found in buckets)
    assert shares["200Hz"] / 600 == pytest.approx(30 / 103, abs=0.01)
    for number, item in enumerate(streams):
        positions = [a.position for batch in batches for a in batch if a.stream == number]
        assert positions == list(range(len(positions)))
        first = [item.keys[a.row] for batch in batches for a in batch if a.stream == number][: len(item)]
        assert sorted(first) == sorted(item.keys)


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
    check_state(order, state_from_json(json.dumps(fields)), config_digest="c" * 64)
    with pytest.raises(error, match="another run_dir"):
        check_state(order, state_from_json(json.dumps(fields | change)), config_digest="c" * 64)


def test_an_unreadable_state_is_a_contract_error() -> None:
    with pytest.raises(ContractError, match="another checkpoint"):
        state_from_json('{"seed": 1}')


def test_the_shards_that_come_next_are_known_in_the_order_of_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "BLOCK_SAMPLES", 20)
    monkeypatch.setattr(data, "BLOCK_SHARDS", 2)
    order = Order([stream(200, shards=20), stream(60, corpus="b", shards=6)], seed=0, global_batch=10)
    for batch in (0, 3, 24, 25):
        soon = order.upcoming_shards(batch, limit=8)
        assert len(soon) == len(set(soon)) == 8
        needed = list(
            dict.fromkeys(
                order.streams[a.stream].shards[order.streams[a.stream].shard[a.row]]
                for index in range(batch, batch + 30)
                for a in order.batch(index)
            )
        )
        hot = set(needed) - set(soon)
        # Whatever is needed before the last of them is one of them, or was needed before.
        before = {
            order.streams[a.stream].shards[order.streams[a.stream].shard[a.row]]
            for index in range(max(0, batch - 25), batch)
            for a in order.batch(index)
        }
        assert set(needed[: needed.index(soon[-1])]) & hot <= before


def test_a_run_goes_on_under_another_curriculum_but_not_with_another_past(
    tiny_config: Callable[..., PretrainConfig], tiny_snapshot: Path, tmp_path: Path
) -> None:
    write_tiny_snapshot(tmp_path / "b", corpus="b")

    def config(first: float, second: float, **changes: object) -> PretrainConfig:
        curriculum = [
            {"from_step": step, "weights": {"tiny": 1.0, "b": weight}} for step, weight in ((2, first), (5, second))
        ]
        return tiny_config(
            snapshots=[{"path": str(tiny_snapshot)}, {"path": str(tmp_path / "b")}],
            steps=6,
            evaluation=None,
            curriculum=curriculum,
            **changes,
        )

    assert pretrain(config(3.0, 1.0, stop_at=4)).step == 4
    with pytest.raises(ConfigError, match="the mixture from step 2 on"):
        pretrain(config(2.0, 1.0))
    assert pretrain(config(3.0, 0.0)).is_finished


def test_a_run_over_two_rates_needs_buckets(
    tiny_config: Callable[..., PretrainConfig], tiny_snapshot: Path, tmp_path: Path
) -> None:
    write_tiny_snapshot(tmp_path / "b", corpus="b", rate_hz=128, num_subjects=4)
    snapshots = [{"path": str(tiny_snapshot)}, {"path": str(tmp_path / "b")}]
    with pytest.raises(ConfigError, match="mixes rates"):
        pretrain(tiny_config("mixed", snapshots=snapshots, steps=2))
    config = tiny_config(snapshots=snapshots, steps=4, bucket_by=["rate", "length"])
    assert pretrain(config).is_finished
