"""Adaptation runs as a person starts them: killed, stopped, started twice, under torchrun and under Ray."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import adapters
from adapters.config import AdaptConfig, FinetuneConfig
from adapters.finetune import finetune
from adapters.paths import RESULT_FILE, TRAINED_FILE
from adapters.train import adapt
from manifests.config import dump_yaml
from trainer.checkpoint_store import newest_checkpoint, step_of
from trainer.export import save_encoder
from trainer.lock import hold
from trainer.models.build import build_encoder
from trainer.models.univariate import UnivariateEncoderConfig
from trainer.paths import CHECKPOINT_FOLDER, LOCK_FILE

AnyConfig = AdaptConfig | FinetuneConfig
MakeConfig = Callable[..., AdaptConfig]
REPOSITORY = Path(adapters.__file__).parent.parent
VERB = [sys.executable, "-m", "jobs.cli", "adapt"]


@pytest.fixture
def make_run(make_config: MakeConfig, tmp_path: Path) -> Callable[..., AdaptConfig]:
    """Makes a run with dropout that is long enough to be interrupted."""

    def make(name: str, **changes: Any) -> AdaptConfig:
        tasks = [{**task.model_dump(), "batch": 4} for task in make_config().tasks]
        defaults = {"tasks": tasks, "steps": 60, "log_every": 1, "eval_every": 20, "checkpoint_every": 7}
        return make_config(**{**defaults, "eval_windows": 32, "run_dir": str(tmp_path / name), **changes})

    return make


@contextmanager
def started(config: AnyConfig, *, verb: list[str] = VERB) -> Iterator[subprocess.Popen[str]]:
    path = Path(config.run_dir + ".yaml")
    path.write_text(dump_yaml(config.model_dump(mode="json")))
    # A session of its own, so that a signal to its group reaches the ranks and nobody else.
    with subprocess.Popen(
        [*verb, str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def finish(config: AdaptConfig, *, verb: list[str] = VERB) -> tuple[int, str]:
    with started(config, verb=verb) as process:
        output, _ = process.communicate(timeout=540)
    return process.returncode, output


def rows(config: AnyConfig) -> list[dict[str, Any]]:
    path = Path(config.run_dir) / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def wait_for_step(config: AnyConfig, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if any(row["step"] >= step for row in rows(config)):
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} was never reached; exit code {process.poll()}")


def assert_same(config: AdaptConfig, expected: AdaptConfig) -> None:
    """The same weights and the same training losses, bit for bit."""
    files = [Path(item.run_dir) / TRAINED_FILE for item in (config, expected)]
    assert files[0].read_bytes() == files[1].read_bytes()
    losses = [[(row["step"], row["loss"]) for row in rows(item) if "loss" in row] for item in (config, expected)]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, config.steps + 1))


def newest_step(config: AdaptConfig) -> int:
    newest = newest_checkpoint(Path(config.run_dir) / CHECKPOINT_FOLDER)
    assert newest is not None
    return step_of(newest)


def pid_of(config: AnyConfig, rank: int) -> int:
    return int(Path(config.run_dir, "workers", f"rank-{rank}.pid").read_text())


def test_killed_or_stopped_the_same_command_ends_with_the_same_bits(make_run: MakeConfig) -> None:
    config, whole = make_run("run"), make_run("whole")
    with started(config) as process:
        wait_for_step(config, 9, process)
        process.kill()
        process.wait()
    killed_at = newest_step(config)
    assert 7 <= killed_at < config.steps
    with started(config) as process:
        wait_for_step(config, killed_at + 3, process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=300)
    stopped_at = newest_step(config)
    if stopped_at < config.steps:
        assert process.returncode == 130, output
        assert "run the same command again to go on" in output
        assert stopped_at == rows(config)[-1]["step"], "nothing that was done is lost"
    adapt(config)
    adapt(whole)
    assert_same(config, whole)


def test_a_run_folder_has_one_writer(make_run: MakeConfig) -> None:
    config = make_run("run")
    with hold(Path(config.run_dir) / LOCK_FILE):
        code, output = finish(config)
    assert code == 2
    assert "another run is training here" in output
    assert not (Path(config.run_dir) / "config.yaml").exists(), "it wrote before it held the folder"


def torchrun(world: int) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = ["--nproc-per-node", str(world), "--master-addr", "127.0.0.1", "--master-port", str(port)]
    return [sys.executable, "-m", "torch.distributed.run", *group, "-m", "jobs.cli", "adapt"]


@pytest.mark.slow
def test_ranks_of_torchrun_that_are_killed_go_on_from_the_checkpoint(make_run: MakeConfig) -> None:
    config, whole = make_run("run", zero_stage=2), make_run("whole", zero_stage=2)
    with started(config, verb=torchrun(2)) as process:
        wait_for_step(config, 9, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert newest_step(config) >= 7
    for item in (config, whole):
        code, output = finish(item, verb=torchrun(2))
        assert code == 0, output
    assert output.count("balanced accuracy") == 4, "one rank speaks for all, of two tasks on two splits"
    assert_same(config, whole)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_worker_of_ray_that_is_killed_comes_back_and_a_stop_leaves_a_checkpoint(make_run: MakeConfig) -> None:
    settings = {"num_workers": 2, "zero_stage": 1, "steps": 120, "eval_every": 120}
    config, whole = make_run("run", **settings), make_run("whole", **settings)
    with started(config) as process:
        wait_for_step(config, 9, process)
        os.kill(pid_of(config, 1), signal.SIGKILL)
        wait_for_step(config, 30, process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    assert 30 <= newest_step(config) < config.steps
    assert not (Path(config.run_dir) / RESULT_FILE).exists()
    for item, verb in ((whole, torchrun(2)), (config, VERB)):  # Ray changes nothing of the numbers
        code, output = finish(item, verb=verb)
        assert code == 0, output
    assert "balanced accuracy" in output
    assert_same(config, whole)


def assert_alike(config: AnyConfig, expected: AnyConfig) -> None:
    """Every step once, and losses and weights up to the order of summation, which optimizer steps carry on."""
    losses = [
        [(row["step"], *row["loss"].values()) for row in rows(item) if "loss" in row] for item in (config, expected)
    ]
    assert [step for step, *_ in losses[0]] == list(range(1, config.steps + 1))
    assert np.array(losses[0]) == pytest.approx(np.array(losses[1]), rel=1e-4)
    got, wanted = (load_file(Path(item.run_dir) / TRAINED_FILE) for item in (config, expected))
    for name, tensor in wanted.items():
        if not name.endswith(".k.bias"):  # a softmax does not feel it: its gradient is rounding alone
            torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


ELASTIC: dict[str, Any] = {"lora": {"r": 4, "dropout": 0.0}, "steps": 60, "keep": "last"}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_an_elastic_run_whose_worker_is_killed_ends_as_an_undisturbed_one(make_run: MakeConfig) -> None:
    config, whole = make_run("run", **ELASTIC, num_workers=[1, 2], zero_stage=1), make_run("whole", **ELASTIC)
    with started(config) as process:
        wait_for_step(config, 9, process)
        os.kill(pid_of(config, 1), signal.SIGKILL)
        output, _ = process.communicate(timeout=540)
    assert process.returncode == 0, output
    assert "balanced accuracy" in output
    assert len(list(Path(config.run_dir, "attempts").iterdir())) == 2, "started again once"
    adapt(whole)
    assert_alike(config, whole)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_finetuning_on_workers_of_ray_goes_on_after_one_was_killed(make_run: MakeConfig, tmp_path: Path) -> None:
    univariate = UnivariateEncoderConfig(
        width=16, depth=1, num_heads=2, num_tokens=4, conv_channels=(4, 8, 16), dropout=0.0
    )
    save_encoder(tmp_path / "encoder", build_encoder(univariate), recipes={}, step=3)
    sizes = {"depth": 1, "num_heads": 2, "graph_heads": 2, "graph_layers": 1, "dropout": 0.0}

    def make(name: str, **changes: Any) -> FinetuneConfig:
        keys = ("tasks", "log_every", "eval_every", "checkpoint_every", "eval_windows", "run_dir", "steps")
        shared = make_run(name, steps=40, eval_every=40).model_dump(include=set(keys))
        return FinetuneConfig(**shared, encoder=str(tmp_path / "encoder"), model=sizes, **changes)  # pyright: ignore[reportArgumentType]

    config, whole = make("run", num_workers=2), make("whole")
    with started(config, verb=[*VERB[:-1], "finetune"]) as process:
        wait_for_step(config, 9, process)
        os.kill(pid_of(config, 1), signal.SIGKILL)
        output, _ = process.communicate(timeout=540)
    assert process.returncode == 0, output
    assert "weights of step 40" in output
    assert len(list(Path(config.run_dir, "attempts").iterdir())) == 2
    finetune(whole)
    assert_alike(config, whole)
