import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ray.train.v2.api.preemption import PreemptionInfo

from manifests.config import dump_yaml
from manifests.errors import ConfigError, ContractError
from trainer import launch as launch_module
from trainer.config import PretrainConfig
from trainer.launch import launch, train_on_worker
from trainer.metrics import read_metrics
from trainer.samples import SnapshotSource
from trainer.storage import StoreError
from trainer.watchdog import RAY

MakeConfig = Callable[..., PretrainConfig]

RANKS = """
import sys
from manifests.config import load_config
from trainer.config import PretrainConfig
from trainer.launch import launch
if __name__ == "__main__":
    result = launch(load_config(PretrainConfig, sys.argv[1]))
    assert result.is_finished, result
"""

PLAIN = """
import sys
from manifests.config import load_config
from trainer.config import PretrainConfig
from trainer.loop import pretrain
pretrain(load_config(PretrainConfig, sys.argv[1]))
"""


def start(script: str, config: PretrainConfig, **environment: str) -> subprocess.Popen[bytes]:
    path = Path(config.run_dir + ".yaml")
    path.write_text(dump_yaml(config.model_dump(mode="json")))
    return subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=Path(launch_module.__file__).parent.parent,
    )


def wait_for_step(config: PretrainConfig, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        rows = read_metrics(config.run_dir)
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.05)
    pytest.fail(f"step {step} was never reached; exit code {process.poll()}")


@pytest.mark.slow
def test_a_worker_that_is_killed_comes_back_and_the_losses_are_the_same(
    tiny_config: MakeConfig, two_ranks: Callable[[], list[dict[str, str]]]
) -> None:
    # Enough steps that the kill falls into the middle; a save every few of them.
    settings = {"steps": 80, "save_every": 10, "keep": 2, "num_workers": 2, "evaluation": None}
    under_ray, plain = tiny_config("ray", **settings), tiny_config("plain", **settings)
    process = start(RANKS, under_ray)
    try:
        wait_for_step(under_ray, 15, process)
        killed = int(Path(under_ray.run_dir, "workers", "rank-1.pid").read_text())
        os.kill(killed, signal.SIGKILL)
        assert process.wait(timeout=240) == 0
    finally:
        process.terminate()
        process.wait(timeout=60)
    attempts = {path.name.rpartition("-a")[2] for path in Path(under_ray.run_dir, "checkpoints").iterdir()}
    assert attempts == {"2"}, "the run was not started again, or not from a checkpoint"
    ranks = [start(PLAIN, plain, **environment) for environment in two_ranks()]
    assert [rank.wait(timeout=180) for rank in ranks] == [0, 0]
    expected = [(row["step"], row["loss"]) for row in read_metrics(plain.run_dir)]
    assert [(row["step"], row["loss"]) for row in read_metrics(under_ray.run_dir)] == expected
    assert len(expected) == 80


def test_a_wrong_configuration_is_told_before_ray_starts(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        pytest.fail("Ray was started")

    monkeypatch.setattr(launch_module.ray, "init", fail)
    with pytest.raises(ConfigError, match="widen the filter"):
        launch(tiny_config(split="absent"))


def test_more_workers_than_windows_are_told_before_ray_starts(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        pytest.fail("Ray was started")

    monkeypatch.setattr(launch_module.ray, "init", fail)
    with pytest.raises(ConfigError, match="num_workers: 5 is more than the 4 windows of a micro-batch"):
        launch(tiny_config(num_workers=(2, 5), gradient_accumulation=2))


def test_only_what_a_person_must_change_ends_a_run_at_once() -> None:
    told = launch_module.EndAtOnce()
    for passing in (RuntimeError("connection reset"), StoreError("the store does not answer")):
        told.after_exception(None, {0: passing})
    with pytest.raises(ConfigError, match="lower the rate"):
        told.after_exception(None, {2: ConfigError("not this"), 1: ConfigError("lower the rate"), 0: OSError("x")})
    with pytest.raises(ContractError, match="shard"):
        told.after_exception(None, {0: ContractError("shard")})


@pytest.mark.slow
def test_an_error_that_would_come_back_is_not_tried_again(tiny_config: MakeConfig) -> None:
    """Seen on the workers only: the snapshot is damaged, which no check before the start can tell."""
    config = tiny_config("ray", max_replaced=0, ray={"max_failures": 5}, evaluation=None)
    folder = Path(config.run_dir).with_name("damaged")
    shutil.copytree(config.snapshots[0].path, folder)
    for shard in folder.glob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    config = config.model_copy(update={"snapshots": [SnapshotSource(path=str(folder))]})
    with pytest.raises(ContractError, match="number 1 that cannot be read, 0 are allowed"):
        launch(config)
    assert [path.name for path in Path(config.run_dir, "attempts").iterdir()] == ["000001.json"]


def test_each_node_that_goes_away_is_news_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[PreemptionInfo | None] = [
        None,
        PreemptionInfo(deadline_ms=1, preempted_node_to_ranks={"a": [1]}),
        PreemptionInfo(deadline_ms=2, preempted_node_to_ranks={"a": [1]}),
        PreemptionInfo(deadline_ms=2, preempted_node_to_ranks={"a": [1], "b": [0]}),
        None,
    ]
    monkeypatch.setattr(launch_module.ray.train, "get_preemption_info", lambda: told.pop(0))
    notice = launch_module._Notice()
    assert [notice() for _ in range(5)] == [False, True, False, True, False]


def test_a_worker_tells_its_run_that_ray_carries_it_out(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, object] = {}
    monkeypatch.setattr(launch_module, "pretrain", lambda _, **options: seen.update(options))
    train_on_worker({"config": tiny_config().model_dump(mode="json"), "has_notice": False})
    assert seen["launcher"] == RAY
