"""What a run survives: batches without a finite loss, samples that cannot be read. For machines see test_cluster."""

import math
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from manifests.errors import ConfigError, ContractError
from trainer import loop
from trainer.config import PretrainConfig
from trainer.fragments import held_fragments
from trainer.loop import pretrain
from trainer.metrics import describe, read_metrics
from trainer.objectives.leave_one_out import LeaveOneOut
from trainer.paths import read_skipped
from trainer.status import run_status
from trainer.tiny import write_tiny_snapshot
from trainer.watchdog import read_heartbeat

MakeConfig = Callable[..., PretrainConfig]


@pytest.fixture
def nan_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the loss NaN in the given forward passes in training, counted from 1."""
    original = LeaveOneOut.loss

    def damage(*calls: int, value: float = math.nan) -> None:
        count = 0

        def loss(self: LeaveOneOut, embedded: dict[str, torch.Tensor]) -> object:
            nonlocal count
            count += 1
            found, metrics = original(self, embedded)
            if count in calls:
                # Finite gradients below a loss that is none: nothing but the loss tells.
                return found + value, metrics | {"loss": metrics["loss"] + value}
            return found, metrics

        monkeypatch.setattr(LeaveOneOut, "loss", loss)

    return damage


def rows_of(config: PretrainConfig) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["skipped"]) for row in read_metrics(config.run_dir)]


@pytest.mark.usefixtures("zero_alone")
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_step_without_a_finite_loss_changes_nothing_at_any_stage(
    zero_stage: int, tiny_config: MakeConfig, nan_at: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(zero_stage=zero_stage, steps=4, evaluation=None, encoder={"kind": "sleep", "width": 16})
    nan_at(2, 4)
    seen: list[list[torch.Tensor]] = []
    original = loop.train_step

    def look(model, batches, **options):
        found = original(model, batches, **options)
        # Weights, both moments and Adam's count of steps.
        fragments = held_fragments(model)
        seen.append([t.clone() for f in fragments for t in (*f.tensors.values(), f.adam["step"])])
        return found

    monkeypatch.setattr(loop, "train_step", look)
    result = pretrain(config)
    assert result.is_finished
    same = [all(torch.equal(a, b) for a, b in zip(one, two, strict=True)) for one, two in pairwise(seen)]
    assert same == [True, False, True]
    assert all(tensor.isfinite().all() for tensor in seen[-1])
    rows = rows_of(config)
    assert [skipped for _, _, skipped in rows] == [0, 1, 1, 2]
    assert rows[0][1] == rows[1][1], "the loss of a skipped step is that of the one before it"


def skip_on_one_of_two(number: int, port: int, plain: list[dict[str, Any]]) -> None:
    """Train each run with a loss that is NaN on rank 1 alone in the second step; both ranks must leave it out."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ.update({**group, "RANK": str(number), "LOCAL_RANK": str(number)})
    original, step = LeaveOneOut.loss, loop.train_step
    for item in plain:
        calls, seen = [0], []

        def loss(self: Any, embedded: Any, calls: list[int] = calls) -> Any:
            calls[0] += 1
            found, metrics = original(self, embedded)
            return found + (math.nan if number == 1 and calls[0] == 2 else 0.0), metrics

        def look(model: Any, batches: Any, seen: list[Any] = seen, **options: Any) -> Any:
            found = step(model, batches, **options)
            seen.append([t.clone() for f in held_fragments(model) for t in f.tensors.values()])
            return found

        LeaveOneOut.loss, loop.train_step = loss, look
        config = PretrainConfig.model_validate(item)
        pretrain(config)
        same = [all(torch.equal(a, b) for a, b in zip(one, two, strict=True)) for one, two in pairwise(seen)]
        assert same == [True, False], (number, config.zero_stage, same)
        if config.zero_stage == 0:  # every rank has all of it
            for tensor in seen[-1]:
                other = tensor.clone()
                torch.distributed.broadcast(other, src=0)
                assert torch.equal(tensor, other)
    LeaveOneOut.loss, loop.train_step = original, step


def test_a_loss_that_is_nan_on_one_rank_skips_the_step_on_all(
    tiny_config: MakeConfig, run_ranks: Callable[..., None]
) -> None:
    settings = {"steps": 3, "evaluation": None, "encoder": {"kind": "sleep", "width": 16, "depth": 1}}
    configs = [tiny_config(f"zero-{stage}", zero_stage=stage, **settings) for stage in range(4)]
    run_ranks(skip_on_one_of_two, [config.model_dump(mode="json") for config in configs])
    for config in configs:
        assert [row["step"] for row in read_skipped(Path(config.run_dir))] == [2]
        assert [skipped for _, _, skipped in rows_of(config)] == [0, 1, 1]


def test_a_gradient_that_is_not_finite_skips_the_step_too_and_its_samples_are_written_out(
    tiny_config: MakeConfig, nan_at: Callable[..., None]
) -> None:
    config = tiny_config(steps=3, evaluation=None)
    nan_at(2, value=math.inf)
    pretrain(config)
    (row,) = read_skipped(Path(config.run_dir))
    assert (row["step"], row["loss"], row["grad_norm"]) == (2, "inf", "inf")
    assert len(set(row["keys"])) == config.global_batch
    assert [row["step"] for row in read_metrics(config.run_dir) if "grad_norm" not in row] == [2]


def test_beyond_the_budget_the_run_stops_with_the_name_of_the_file_and_goes_on_with_a_larger_one(
    tiny_config: MakeConfig, nan_at: Callable[..., None]
) -> None:
    # sync: the message names the newest checkpoint that is committed.
    small = tiny_config(steps=6, evaluation=None, save_every=2, save="sync", faults={"max_skipped": 1})
    nan_at(3, 4)
    with pytest.raises(ConfigError, match=r"step 4: the loss is nan.*max_skipped allows 1 .*skipped\.jsonl.*a1"):
        pretrain(small)
    beat = read_heartbeat(Path(small.run_dir))
    assert beat is not None
    assert beat.state == "failed"
    assert "skipped.jsonl" in beat.message
    assert [row["step"] for row in read_skipped(Path(small.run_dir))] == [3, 4]
    # Going on from step 2, the third and fourth step come again, and the file does not name them twice.
    nan_at(1, 2)
    larger = tiny_config(steps=6, evaluation=None, save_every=2, faults={"max_skipped": 2})
    assert pretrain(larger).is_finished
    assert [row["step"] for row in read_skipped(Path(small.run_dir))] == [3, 4]
    assert [skipped for _, _, skipped in rows_of(larger)] == [0, 0, 1, 2, 2, 2]
    # What was skipped survives a restart: it is part of the checkpoint.
    nan_at(1)
    with pytest.raises(ConfigError, match="max_skipped allows 2"):
        pretrain(tiny_config(steps=7, evaluation=None, faults={"max_skipped": 2}))


def test_a_sample_that_cannot_be_read_is_replaced_the_same_way_every_time_counted_and_told(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    write_tiny_snapshot(tmp_path / "own")
    table = pq.read_table(tmp_path / "own" / "samples.parquet").to_pandas()
    hurt = table[table["split"] == "train"].iloc[3]
    with (tmp_path / "own" / hurt["shard"]).open("r+b") as shard:
        shard.seek(hurt["offset"])
        shard.write(bytes(512))  # the header of its first member
    settings = {"snapshots": [{"path": str(tmp_path / "own")}], "evaluation": None}
    one, two = tiny_config("one", **settings), tiny_config("two", **settings, read_threads=2)
    pretrain(one)
    pretrain(two.model_copy(update={"stop_at": 5}))
    pretrain(two)
    rows = read_metrics(one.run_dir)
    assert [row["loss"] for row in rows] == [row["loss"] for row in read_metrics(two.run_dir)]
    assert rows[-1]["replaced"] > 0
    assert "could not be read" in describe(rows[-1], steps=8)
    assert run_status(Path(one.run_dir)).row["replaced"] == rows[-1]["replaced"]
    with pytest.raises(ContractError, match=f"sample {hurt['key']} is number 1 that cannot be read, 0 are allowed"):
        pretrain(tiny_config("none", **settings, max_replaced=0))
    beat = read_heartbeat(tmp_path / "none")
    assert beat is not None
    assert beat.state == "failed"
