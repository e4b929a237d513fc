"""One configuration in one process and on several ranks, with plain sums and under ZeRO-1 and 2."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters.config import AdaptConfig
from adapters.paths import RESULT_FILE, TRAINED_FILE
from adapters.train import adapt
from adapters.update import Update
from adapters.zero import ZeroUpdate

MakeConfig = Callable[..., AdaptConfig]
RunRanks = Callable[..., None]


@pytest.fixture
def make_runs(make_config: MakeConfig, tmp_path: Path) -> Callable[..., AdaptConfig]:
    """Makes a run without dropout of units, which ranks draw for themselves; rhythm has fewer windows than ranks."""

    def make(name: str, **changes: Any) -> AdaptConfig:
        tasks = [task.model_dump() for task in make_config().tasks]
        tasks[0]["batch"], tasks[1]["batch"] = 9, 1
        defaults = {
            "tasks": tasks,
            "lora": {"r": 4, "dropout": 0.0},
            "steps": 6,
            "log_every": 1,
            "eval_every": 6,
            "eval_windows": 32,
        }
        return make_config(**{**defaults, "run_dir": str(tmp_path / name), "keep": "last", **changes})

    return make


def on_a_rank(number: int, port: int, world: int, plain: list[dict[str, Any]]) -> None:
    """Train every run as rank `number` of `world`."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    os.environ.update({**group, "RANK": str(number), "LOCAL_RANK": str(number)})
    for item in plain:
        train(AdaptConfig.model_validate(item))


def train(config: AdaptConfig) -> None:
    result = adapt(config, update=ZeroUpdate if config.zero_stage else Update)
    mine = {name: tensor.detach() for name, tensor in result.model.trainable().items()}
    for name, tensor in load_file(Path(config.run_dir) / TRAINED_FILE).items():
        assert torch.equal(tensor, mine[name]), f"{name} differs from what the first rank wrote"


def losses(config: AdaptConfig) -> list[float]:
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [value for line in lines if "loss" in (row := json.loads(line)) for value in row["loss"].values()]


def assert_alike(config: AdaptConfig, reference: AdaptConfig) -> None:
    """The same losses to 1e-6 of themselves, the same weights and scores.

    Where the transformer is trained some gradients are next to nothing, and Adam makes of their rounding a share of a
    step, which is 1e-3 or less; six steps were taken.
    """
    atol = 1e-6 if config.method == "lora" else 1e-5
    assert len(losses(config)) == 2 * config.steps
    assert losses(config) == pytest.approx(losses(reference), rel=1e-6)
    got, expected = (load_file(Path(item.run_dir) / TRAINED_FILE) for item in (config, reference))
    for name, tensor in expected.items():
        if name.endswith(".k.bias"):
            continue  # a softmax does not feel it: its gradient is rounding alone, and Adam makes steps of that
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=atol, msg=lambda text, n=name: f"{n}: {text}")
    results = [json.loads((Path(item.run_dir) / RESULT_FILE).read_text()) for item in (config, reference)]
    assert results[0]["scores"] == results[1]["scores"]


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks_learns_what_one_process_learns(make_runs, run_ranks: RunRanks, world: int) -> None:
    stages = (0, 1, 2) if world == 2 else (0, 2)
    ranks = [make_runs(f"stage-{stage}", zero_stage=stage) for stage in stages]
    run_ranks(on_a_rank, world, [config.model_dump(mode="json") for config in ranks], world=world)
    alone = make_runs("alone")
    train(alone)
    for config in ranks:
        assert_alike(config, alone)


@pytest.mark.parametrize(("stage", "method"), [(1, "lora"), (2, "lora"), (1, "mmoe"), (2, "hps")])
def test_zero_in_one_process_is_plain_torch(make_runs, stage: int, method: str) -> None:
    split, plain = make_runs("split", zero_stage=stage, method=method), make_runs("plain", method=method)
    train(split)
    train(plain)
    assert_alike(split, plain)


def test_a_run_goes_on_at_another_number_of_ranks_and_another_stage(make_runs, run_ranks: RunRanks) -> None:
    whole = make_runs("whole")
    train(whole)
    for name, first, second in (("to ranks", 0, 2), ("to one", 1, 0)):
        config = make_runs(name, checkpoint_every=2)
        begin = config.model_copy(update={"zero_stage": first})
        go_on = config.model_copy(update={"zero_stage": second})
        if first == 0:
            stopped_at_4(begin)
            run_ranks(on_a_rank, 2, [go_on.model_dump(mode="json")], world=2)
        else:
            run_ranks(stop_on_a_rank, 2, [begin.model_dump(mode="json")], world=2)
            train(go_on)
        assert_alike(config, whole)


def stop_on_a_rank(number: int, port: int, world: int, plain: list[dict[str, Any]]) -> None:
    """As `on_a_rank`, but somebody asks for a stop in the fourth step."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    os.environ.update({**group, "RANK": str(number), "LOCAL_RANK": str(number)})
    for item in plain:
        stopped_at_4(AdaptConfig.model_validate(item))


def stopped_at_4(config: AdaptConfig) -> None:
    update = ZeroUpdate if config.zero_stage else Update

    def ask(row: dict[str, Any]) -> None:
        if row["step"] == 4:
            (Path(config.run_dir) / "STOP").touch()

    with pytest.raises(KeyboardInterrupt):
        adapt(config, report=ask, update=update)
    assert not (Path(config.run_dir) / RESULT_FILE).exists()


def test_a_refusal_of_the_first_rank_ends_all(make_runs, run_ranks: RunRanks) -> None:
    config = make_runs("run", steps=1)
    train(config)
    other = config.model_copy(update={"seed": 5})
    run_ranks(refused_on_a_rank, 2, [other.model_dump(mode="json")], world=2)


def refused_on_a_rank(number: int, port: int, world: int, plain: list[dict[str, Any]]) -> None:
    """Every rank hears what only the first one can see."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    os.environ.update({**group, "RANK": str(number), "LOCAL_RANK": str(number)})
    with pytest.raises(Exception, match="belongs to another configuration"):
        adapt(AdaptConfig.model_validate(plain[0]))
