"""Machines that die, leave and come back, against real Ray clusters of several nodes on this machine.

Minutes each, so `make soak` runs them; tests/trainer/test_launch.py has the cheap ones. Seconds to recovery are told
and not tested: nearly all of them are processes that start and import torch, and Ray's patience.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from manifests.config import dump_yaml
from trainer import launch as launch_module
from trainer.config import PretrainConfig
from trainer.loop import pretrain
from trainer.metrics import read_metrics
from trainer.watchdog import read_heartbeat

MakeConfig = Callable[..., PretrainConfig]

# The tiny model would be done before anything can happen to it, so every step takes a moment longer.
DRIVER = """
import sys, time
from manifests.config import load_config
from trainer import launch
from trainer.config import PretrainConfig
train_on_worker = launch.train_on_worker
def slowly(plain):
    from trainer import loop
    original = loop.train_step
    def train_step(*arguments, **options):
        time.sleep(SECONDS)
        return original(*arguments, **options)
    loop.train_step = train_step
    train_on_worker(plain)
if __name__ == "__main__":
    launch.train_on_worker = slowly
    result = launch.launch(load_config(PretrainConfig, sys.argv[1]))
    print("ended at", result.step, flush=True)
"""
SETTINGS: dict[str, Any] = {
    "save_every": 10,
    "evaluation": None,
    "encoder": {"kind": "sleep", "width": 16, "depth": 1},  # no dropout: its draws differ between two ranks and three
    "objective": {"kind": "leave_one_out"},
    "global_batch": 12,
}


@contextmanager
def driver(config: PretrainConfig, *, seconds: float = 0.1) -> Iterator[subprocess.Popen[bytes]]:
    """A process that launches the run and takes `seconds` longer for each step."""
    path = Path(config.run_dir + ".yaml")
    path.write_text(dump_yaml(config.model_dump(mode="json")))
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER.replace("SECONDS", str(seconds)), str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(launch_module.__file__).parent.parent,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


@contextmanager
def cluster_of(num_nodes: int) -> Iterator[tuple[Cluster, list[Any]]]:
    """A head without CPUs and so many nodes of one CPU each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(num_nodes)]
        cluster.wait_for_nodes()
        yield cluster, nodes
    finally:
        ray.shutdown()
        cluster.shutdown()


def wait(done: Callable[[], bool], process: subprocess.Popen[bytes], *, timeout_s: float = 400.0) -> float:
    """Seconds until something is so."""
    began = time.monotonic()
    while not done():
        assert process.poll() is None, f"the driver ended with exit code {process.returncode}"
        assert time.monotonic() - began < timeout_s, "waited in vain"
        time.sleep(0.05)
    return time.monotonic() - began


def trains(config: PretrainConfig, *, workers: int, since: float) -> Callable[[], bool]:
    """Whether a step was logged after `since` (s of the wall clock) by a group of so many workers."""

    def ask() -> bool:
        beat, rows = read_heartbeat(Path(config.run_dir)), read_metrics(config.run_dir)
        is_new = bool(rows) and rows[-1]["time"] > since
        return is_new and beat is not None and beat.world_size == workers and beat.time > since

    return ask


def stop(config: PretrainConfig, process: subprocess.Popen[bytes]) -> None:
    Path(config.run_dir, "STOP").touch()
    assert process.wait(timeout=120) == 0


def hold_against_one_process(config: PretrainConfig, plain: PretrainConfig, *, rel: float) -> None:
    """The losses are those of a run of one process to which nothing happened."""
    rows = read_metrics(config.run_dir)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    pretrain(plain.model_copy(update={"stop_at": len(rows)}))
    found, expected = ([row["loss"] for row in some] for some in (rows, read_metrics(plain.run_dir)))
    assert found == (pytest.approx(expected, rel=rel) if rel else expected)


def node_of_rank(config: PretrainConfig, rank: int, nodes: list[Any]) -> Any:
    """The emulated machine that a worker runs on: its raylet is the worker's parent."""
    pid = int(Path(config.run_dir, "workers", f"rank-{rank}.pid").read_text())
    parent = psutil.Process(pid).ppid()
    return next(node for node in nodes if node.all_processes["raylet"][0].process.pid == parent)


def last_step(config: PretrainConfig) -> int:
    rows = read_metrics(config.run_dir)
    return int(rows[-1]["step"]) if rows else 0


def saved_steps(config: PretrainConfig) -> list[int]:
    return [int(path.name[5:14]) for path in Path(config.run_dir, "checkpoints").glob("step-*")]


def tell(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with capsys.disabled():
        print(f"\n{text}")  # noqa: T201


@pytest.mark.soak
def test_three_workers_lose_a_node_go_on_with_two_and_grow_to_three_again(
    tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**SETTINGS, "steps": 100_000, "num_workers": [1, 3]}
    with cluster_of(3) as (cluster, nodes):
        config = tiny_config("ray", **settings, ray={"address": cluster.address, "resize_every_s": 5.0})
        with driver(config) as process:
            wait(trains(config, workers=3, since=0.0), process)
            wait(lambda: last_step(config) > 15, process)
            began = time.time()
            os.kill(node_of_rank(config, 2, nodes).all_processes["raylet"][0].process.pid, signal.SIGKILL)
            wait(trains(config, workers=2, since=began), process)
            tell(capsys, f"a raylet was killed: two workers train again after {time.time() - began:.1f} s")
            began = time.time()
            cluster.add_node(num_cpus=1)
            wait(trains(config, workers=3, since=began), process)
            tell(capsys, f"a node was added: three workers train after {time.time() - began:.1f} s")
            stop(config, process)
    hold_against_one_process(config, tiny_config("plain", **{**settings, "num_workers": 1}), rel=1e-5)


@pytest.mark.soak
def test_a_node_that_is_drained_leaves_a_checkpoint_and_is_nobodys_failure(
    tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**SETTINGS, "steps": 100_000, "save_every": 100_000, "num_workers": 2}
    with cluster_of(3) as (cluster, nodes):
        config = tiny_config("ray", **settings, ray={"address": cluster.address, "max_failures": 0})
        with driver(config) as process:
            wait(trains(config, workers=2, since=0.0), process)
            wait(lambda: last_step(config) > 15, process)
            assert saved_steps(config) == []
            node = node_of_rank(config, 1, nodes)
            command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", cluster.address]
            command += ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
            command += ["--reason-message", "test", "--deadline-remaining-seconds", "20"]
            subprocess.run(command, check=True, capture_output=True)
            began = time.time()
            wait(lambda: len(saved_steps(config)) == 1, process)
            tell(capsys, f"a node was drained: a checkpoint stands after {time.time() - began:.1f} s")
            (step,) = saved_steps(config)
            # At the deadline Ray starts the workers again elsewhere, and then the node is taken away.
            wait(lambda: attempt(config) == 2, process)
            cluster.remove_node(node)
            wait(trains(config, workers=2, since=time.time()), process)
            seconds = time.time() - began - 20
            tell(capsys, f"two workers train again {seconds:.1f} s after the deadline of the drained node")
            first = min(row["step"] for row in read_metrics(config.run_dir) if row["time"] > began + 20)
            assert first == step + 1, "it did not go on from the checkpoint made on notice"
            stop(config, process)
    hold_against_one_process(config, tiny_config("plain", **{**settings, "num_workers": 1}), rel=1e-5)


def attempt(config: PretrainConfig) -> int:
    beat = read_heartbeat(Path(config.run_dir))
    return 0 if beat is None else beat.attempt


@pytest.mark.soak
def test_a_worker_that_hangs_is_found_out_by_the_others_and_replaced(
    tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**SETTINGS, "steps": 100_000, "num_workers": 2}
    config = tiny_config("ray", **settings, faults={"hang_timeout_s": 8.0})
    with driver(config) as process:
        wait(lambda: last_step(config) > 15, process)
        hanging = int(Path(config.run_dir, "workers", "rank-1.pid").read_text())
        began = time.time()
        os.kill(hanging, signal.SIGSTOP)
        try:
            wait(lambda: attempt(config) == 2, process)
            wait(trains(config, workers=2, since=time.time()), process)
            tell(
                capsys, f"a worker was stopped: training again after {time.time() - began:.1f} s, 8 s of them patience"
            )
            stop(config, process)
        finally:
            if psutil.pid_exists(hanging):
                os.kill(hanging, signal.SIGKILL)
    stacks = Path(config.run_dir, "stacks", "rank-0.txt").read_text()
    assert "rank 0 has been training for" in stacks
    assert "train_step" in stacks
    hold_against_one_process(config, tiny_config("plain", **{**settings, "num_workers": 1}), rel=1e-5)


@pytest.mark.soak
def test_a_killed_driver_is_started_again_whatever_became_of_rays_own_files(
    tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"steps": 60, "save_every": 10, "evaluation": None}
    config = tiny_config("ray", **settings)
    with driver(config) as process:
        wait(lambda: last_step(config) > 25, process)
        process.kill()
        process.wait()
    # Half a file of this name keeps a run that Ray knows by its name from starting for ever.
    folders = list(Path(config.run_dir, "ray").iterdir())
    for folder in folders:
        (folder / "checkpoint_manager_snapshot.json").write_text('{"ray_version": "2.6')
    began = time.time()
    with driver(config, seconds=0.0) as process:
        # The workers of the killed driver train on for some seconds: it is the second start that counts.
        wait(lambda: attempt(config) == 2, process)
        wait(trains(config, workers=1, since=time.time()), process)
        tell(capsys, f"the driver was killed: training {time.time() - began:.1f} s after it was started again")
        assert process.wait(timeout=120) == 0
    assert folders
    assert attempt(config) == 2
    hold_against_one_process(config, tiny_config("plain", **settings), rel=0.0)
