"""Runs whose checkpoints lie in an object store: another machine, which has the store alone, goes on from there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner
from upath import UPath

from adapters import train
from adapters.checkpoint import TENSORS_FILE, copy_trainable
from adapters.config import AdaptConfig
from adapters.rows import CLOCK, describe
from adapters.run_folder import saved_step
from adapters.status import is_learn_run, learn_status
from adapters.train import adapt
from jobs.cli import app
from manifests.errors import ConfigError
from trainer.config import PretrainConfig
from trainer.metrics import read_metrics
from trainer.storage import location

MakeConfig = Callable[..., AdaptConfig]


@pytest.fixture
def store(s3: None, tmp_path: Path) -> str:
    """URL of an empty folder in a bucket."""
    UPath("s3://runs").mkdir(exist_ok=True)
    return f"s3://runs/{tmp_path.name}"


@pytest.fixture
def make_run(make_config: MakeConfig, tmp_path: Path) -> Callable[..., AdaptConfig]:
    """Makes a run of one task and six steps, in the folder of a machine."""

    def make(machine: str, **changes: Any) -> AdaptConfig:
        task = {**make_config().tasks[1].model_dump(), "batch": 4}
        defaults = {"tasks": [task], "steps": 6, "log_every": 1, "eval_every": 3, "eval_windows": 16}
        return make_config(**{**defaults, "run_dir": str(tmp_path / machine), **changes})

    return make


def rows(config: AdaptConfig) -> list[dict]:
    """Rows without what a clock tells."""
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in read_metrics(config.run_dir)]


def stop_at(step: int, config: AdaptConfig) -> None:
    """Train, and ask for a stop in a step."""

    def ask(row: dict) -> None:
        if row["step"] == step:
            Path(config.run_dir, "STOP").touch()

    with pytest.raises(KeyboardInterrupt):
        adapt(config, report=ask)


def steps_trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills with the number of each step that is trained from now on."""
    steps: list[int] = []
    real = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *a, step, **k: (steps.append(step), real(*a, step=step, **k))[1])
    return steps


def assert_same(result: Any, expected: Any) -> None:
    """The same weights, bit for bit, and the same scores."""
    got, wanted = copy_trainable(result.model), copy_trainable(expected.model)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert (result.scores, result.kept_step) == (expected.scores, expected.kept_step)


def test_a_fresh_machine_goes_on_from_the_store_and_a_third_has_nothing_to_do(make_run, store, monkeypatch):
    whole = adapt(make_run("whole"))
    first, second, third = (make_run(name, storage=store) for name in ("first", "second", "third"))
    assert saved_step(first) is None
    stop_at(3, first)
    assert saved_step(second) == 3
    assert not Path(first.run_dir, "checkpoints").exists(), "the checkpoints lie in the store alone"
    steps = steps_trained(monkeypatch)
    result = adapt(second)
    assert steps == [3, 4, 5]
    assert_same(result, whole)
    assert rows(second) == rows(make_run("whole"))
    assert_same(adapt(third), whole)
    assert steps == [3, 4, 5], "what another machine has finished is not trained again"
    assert rows(third) == rows(second)
    assert json.loads(Path(third.run_dir, "result.json").read_text())["scores"] == whole.scores
    # The first one, which stopped at step 3, learns it from the store as well.
    assert_same(adapt(first), whole)


def test_a_row_is_told_with_the_metric_that_it_is_of():
    scores = {"staging": {"kappa": 0.992, "auroc": 1.0}, "rhythm": {"auroc": None}}
    assert describe({"step": 4, "split": "val", "scores": scores}, steps=9) == "step 4/9: val staging kappa 0.992"
    row = {"step": 4, "split": "train", "loss": {"a": 0.5}, "skipped": 1, "windows_per_s": 7.0, "eta_s": 3.0}
    assert describe(row, steps=9) == "step 4/9: loss a 0.500; 1 steps skipped; 7 windows/s; 3 s left"


def test_a_run_is_seen_from_its_store(make_run, store):
    config = make_run("there", storage=store)
    stop_at(3, config)
    assert learn_status(Path(config.run_dir)).state == "stopped"
    here = Path(config.run_dir).with_name("here")
    here.mkdir()
    shutil.copy(Path(config.run_dir, "config.yaml"), here)
    for place in (location(store), here):
        assert is_learn_run(place)
        state = learn_status(place)
        assert (state.state, state.step, state.checkpoint, state.eta_s) == ("elsewhere", 3, 3, None)
        assert state.reason == f"seen from {store}, as of its newest checkpoint"
        assert state.scores["rhythm"]["balanced_accuracy"] is not None
    shown = CliRunner().invoke(app, ["status", store])
    assert shown.exit_code == 0, shown.output
    assert "elsewhere" in shown.output
    assert "step 3 of 6" in shown.output
    assert "checkpoint of step 3" in shown.output
    other = make_run("other", storage=store)
    stop_at(4, other)
    assert learn_status(Path(config.run_dir)).state == "elsewhere", "the store is further than this folder"
    result = adapt(other)
    for place in (location(store), here, Path(config.run_dir)):
        state = learn_status(place)
        assert (state.state, state.step, state.checkpoint, state.reason) == ("finished", 6, 6, "")
        expected = result.scores["rhythm"]["test"]["metrics"]["balanced_accuracy"]["value"]
        assert state.scores["rhythm"]["balanced_accuracy"] == expected


def test_a_writer_that_another_has_replaced_saves_nothing_more(make_run, store):
    first, second = (make_run(name, storage=store) for name in ("first", "second"))

    def let_another_start(row: dict) -> None:
        if row["step"] == 3 and row["split"] == "train":
            stop_at(4, second)

    with pytest.raises(ConfigError, match=r"start 1 of this run was overruled by start 2"):
        adapt(first, report=let_another_start)
    names = {path.name for path in (location(store) / "checkpoints").iterdir()}
    assert names == {"step-000000002-a1", "step-000000004-a2"}


def test_a_damaged_checkpoint_in_the_store_is_passed_over_and_marked(make_run, store, monkeypatch):
    whole = adapt(make_run("whole"))
    first, second = (make_run(name, storage=store) for name in ("first", "second"))
    stop_at(4, first)
    newest = location(store) / "checkpoints" / "step-000000004-a1"
    content = bytearray((newest / TENSORS_FILE).read_bytes())
    content[-1] ^= 1
    (newest / TENSORS_FILE).write_bytes(bytes(content))
    steps = steps_trained(monkeypatch)
    assert_same(adapt(second), whole)
    assert steps == [2, 3, 4, 5]


def test_the_store_of_another_run_is_neither_used_nor_claimed(make_run, store):
    stop_at(3, make_run("first", storage=store))
    other = make_run("other", storage=store, seed=1)
    with pytest.raises(ConfigError, match=r"belongs to another configuration.*choose another run_dir and storage"):
        adapt(other)
    assert len(list((location(store) / "attempts").iterdir())) == 1
    assert not Path(other.run_dir, "config.yaml").exists()
    adapt(make_run("second", storage=store))
    with pytest.raises(ConfigError, match=r"result\.json: belongs to another configuration"):
        adapt(other)


@pytest.mark.usefixtures("s3")
def test_a_bucket_that_is_not_there_is_told_with_the_remedy(make_run):
    with pytest.raises(ConfigError, match=r"s3://absent/run.*check the bucket"):
        adapt(make_run("first", storage="s3://absent/run"))


@pytest.mark.parametrize("config", [AdaptConfig, PretrainConfig])
def test_a_folder_in_a_store_is_refused_and_storage_is_named(config):
    with pytest.raises(ValueError, match="need a disk; give a folder of this machine and storage=s3://bucket/run"):
        config.model_validate({"run_dir": "s3://bucket/run"})
