"""The same configuration under torchrun, and in one process."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import trainer
from manifests.config import dump_yaml
from trainer.config import PretrainConfig
from trainer.loop import pretrain
from trainer.metrics import read_metrics
from trainer.status import run_status

MakeConfig = Callable[..., PretrainConfig]


def torchrun(path: Path) -> subprocess.CompletedProcess[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    verb = ["-m", "jobs.cli", "pretrain", str(path), "--no-ray"]
    with subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *group, *verb],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(trainer.__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=300)
        finally:
            process.terminate()  # the agent ends its ranks
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def test_under_torchrun_two_ranks_give_the_losses_of_one_process(tiny_config: MakeConfig, tmp_path: Path) -> None:
    # Without dropout, whose draws differ between one rank and two.
    settings = {"encoder": {"kind": "sleep", "width": 16, "depth": 1}, "zero_stage": 2, "steps": 4}
    ranks, alone = tiny_config("ranks", **settings), tiny_config("alone", **settings)
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(ranks.model_dump(mode="json")))
    finished = torchrun(path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("step 4 of 4") == 1, "one rank speaks for all"
    folder = Path(ranks.run_dir)
    again = f"torchrun --nproc-per-node 2 -m jobs.cli pretrain {folder / 'config.yaml'} --no-ray"
    assert run_status(folder).resume == again
    pretrain(alone)
    rows = {name: read_metrics(config.run_dir) for name, config in (("ranks", ranks), ("alone", alone))}
    assert [row["step"] for row in rows["ranks"]] == [1, 2, 3, 4]
    assert [row["loss"] for row in rows["ranks"]] == pytest.approx([row["loss"] for row in rows["alone"]], rel=1e-6)
    assert rows["ranks"][-1]["eval_top1"] == rows["alone"][-1]["eval_top1"]
