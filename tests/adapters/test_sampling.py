import numpy as np
import pytest

from adapters.data import Labelled, TaskData
from adapters.sampling import Sampling, Share, epoch_windows, shares
from adapters.stream import task_order
from manifests.errors import ConfigError
from manifests.tasks import Task, load_task
from trainer.data import Order
from trainer.samples import Keys, Stream

WINDOWS = {"big": 90_000, "middle": 10_000, "small": 400}
BATCHES = {"big": 32, "middle": 32, "small": 32}


def tasks(**changes: dict) -> dict[str, Task]:
    rhythm = load_task("rhythm")
    return {name: rhythm.model_copy(update={"id": name, **changes.get(name, {})}) for name in WINDOWS}


def shared(alpha: float, *, batch: int | None = None, **changes: dict) -> dict[str, Share]:
    sampling = Sampling(alpha=alpha, batch=batch)
    return shares(tasks(**changes), windows=WINDOWS, batches=BATCHES, sampling=sampling)


def test_without_sampling_each_task_gives_its_own_batch_and_counts_the_same():
    own = {"big": 32, "middle": 7, "small": 1}
    found = shares(tasks(), windows=WINDOWS, batches=own, sampling=None)
    assert {name: (part.batch, part.weight) for name, part in found.items()} == {n: (b, 1.0) for n, b in own.items()}


def test_alpha_of_zero_is_what_equal_batches_without_sampling_are():
    assert shared(0.0) == shares(tasks(), windows=WINDOWS, batches=BATCHES, sampling=None)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
def test_a_step_is_shared_in_proportion_to_a_power_of_the_windows(alpha):
    found = shared(alpha, batch=1000)
    wanted = np.array([n**alpha for n in WINDOWS.values()])
    part = wanted / wanted.sum()
    assert sum(share.batch for share in found.values()) == 1000
    assert [share.batch for share in found.values()] == pytest.approx(part * 1000, abs=1)
    assert [share.weight for share in found.values()] == pytest.approx(3 * part)
    # Per window of the step all tasks count alike, as if each had been drawn.
    per_window = [share.weight / share.batch for share in found.values()]
    assert per_window == pytest.approx([3 / 1000] * 3, rel=0.3)


def test_the_weight_of_a_task_multiplies_its_share():
    plain, heavy = shared(0.5, batch=4000), shared(0.5, batch=4000, small={"weight": 4.0})
    ratio = (heavy["small"].weight / heavy["big"].weight) / (plain["small"].weight / plain["big"].weight)
    assert ratio == pytest.approx(4)
    assert heavy["small"].batch > 3 * plain["small"].batch


def test_no_task_is_absent_from_a_step_however_small():
    found = shared(1.0, batch=12)
    assert [share.batch for share in found.values()] == [10, 1, 1]
    assert found["small"].weight < 0.02, "what it counts does not follow the rounding"
    with pytest.raises(ConfigError, match="2 windows are fewer than the 3 tasks"):
        shared(1.0, batch=2)


def test_a_cap_makes_an_epoch_shorter_and_the_share_with_it():
    capped = shared(1.0, batch=1000, big={"cap_per_epoch": 0.1})
    assert capped["big"].epoch == 9000
    assert capped["big"].batch == pytest.approx(1000 * 9000 / 19400, abs=1)
    assert epoch_windows(load_task("rhythm").model_copy(update={"cap_per_epoch": 0.001}), 5) == 1


def capped_data(num_samples: int = 1000, num_shards: int = 20) -> TaskData:
    stream = Stream(
        corpus="corpus",
        bucket="",
        snapshot="a" * 64,
        shards=(),
        keys=Keys(np.array([f"k-{i}" for i in range(num_samples)], dtype="S")),
        shard=np.sort(np.arange(num_samples, dtype=np.int32) % num_shards),
        offset=np.zeros(num_samples, dtype=np.int64),
        num_bytes=np.zeros(num_samples, dtype=np.int64),
        seconds=np.ones(num_samples, dtype=np.float32),
        weight=float(num_samples),
    )
    labelled = Labelled(
        streams=(stream,),
        targets={f"k-{i}": (0,) for i in range(num_samples)},
        subjects={},
        counts={},
        symbols={},
        left_out={},
    )
    task = load_task("rhythm").model_copy(update={"cap_per_epoch": 0.1})
    return TaskData(task=task, batch=20, snapshots=(), recipe={}, splits={"train": labelled})


def rows_of(order: Order, steps: range) -> list[int]:
    return [address.row for step in steps for address in order.batch(step)]


def test_each_epoch_under_a_cap_is_a_new_random_part_until_all_have_come():
    data = capped_data()
    share = Share(epoch=100, batch=20, weight=1.0)
    order = task_order(data, share, seed=3)
    epochs = [rows_of(order, range(5 * epoch, 5 * epoch + 5)) for epoch in range(20)]
    assert all(len(set(epoch)) == 100 for epoch in epochs)
    for first in (0, 10):
        assert set().union(*epochs[first : first + 10]) == set(range(1000)), "ten epochs show everything once"
    assert sorted(epochs[0]) != sorted(epochs[10]), "the next ten are cut in another way"
    # A part of the whole corpus and not of a few shards, each of which holds 50 neighbours.
    shards = {row // 50 for row in epochs[0]}
    assert len(shards) == 20
    assert np.mean(epochs[0]) == pytest.approx(499.5, abs=90)  # three standard errors


def test_the_stream_is_a_function_of_seed_and_step_alone():
    data, share = capped_data(), Share(epoch=100, batch=20, weight=1.0)
    in_turn = [rows_of(task_order(data, share, seed=3), range(step, step + 1)) for step in range(60)]
    assert rows_of(task_order(data, share, seed=3), range(47, 48)) == in_turn[47], "a resumed run asks for it first"
    assert rows_of(task_order(data, share, seed=4), range(60)) != [row for step in in_turn for row in step]
