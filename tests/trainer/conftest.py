"""A tiny snapshot that the trainer's tests share."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

from trainer.tiny import write_tiny_snapshot


@pytest.fixture(scope="session")
def tiny_snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 windows of 6 subjects in 4 shards: 32 train, 16 val. Read-only: copy it to damage it."""
    folder = tmp_path_factory.mktemp("snapshot") / "tiny"
    write_tiny_snapshot(folder)
    return folder
