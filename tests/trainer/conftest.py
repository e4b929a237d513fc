"""A tiny snapshot and a tiny run that the trainer's tests share."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

from trainer.config import PretrainConfig
from trainer.tiny import write_tiny_snapshot

MakeConfig = Callable[..., PretrainConfig]


@pytest.fixture(scope="session")
def tiny_snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 windows of 6 subjects in 4 shards: 32 train, 16 val. Read-only: copy it to damage it."""
    folder = tmp_path_factory.mktemp("snapshot") / "tiny"
    write_tiny_snapshot(folder)
    return folder


@pytest.fixture
def two_ranks() -> Callable[[], list[dict[str, str]]]:
    """Makes the environments of two processes of one group, as torchrun does."""

    def make() -> list[dict[str, str]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        return [{**group, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]

    return make


@pytest.fixture
def zero_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of one rank takes the ZeRO stage of its configuration, as several do."""
    monkeypatch.setattr("trainer.run.as_carried_out", lambda config: config)


@pytest.fixture
def tiny_config(tiny_snapshot: Path, tmp_path: Path) -> MakeConfig:
    """Eight steps of a small sleep encoder with dropout; `run_dir` is a name under `tmp_path`."""

    def make(run_dir: str = "run", **changes: Any) -> PretrainConfig:
        return PretrainConfig.model_validate(
            {
                "run_dir": str(tmp_path / run_dir),
                "snapshots": [{"path": str(tiny_snapshot)}],
                "encoder": {"kind": "sleep", "width": 16, "depth": 1, "dropout": 0.1},
                "objective": {"kind": "leave_one_out", "channel_dropout": 0.3},
                "steps": 8,
                "global_batch": 9,
                "log_every": 1,
                "save_every": 3,
                "seed": 4,
                **changes,
            }
        )

    return make
