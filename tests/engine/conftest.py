"""A tiny synthetic corpus as real files, made once for all tests of the engine."""

from pathlib import Path

import pytest

from engine.config import ConvertConfig, Source
from engine.synthetic import synthesise


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with three nights of 10 minutes, one broken EDF and three 12-lead records."""
    root = tmp_path_factory.mktemp("recordings")
    synthesise(root, num_subjects=3, num_ecg=3, night_minutes=10)
    return root


@pytest.fixture
def tiny_config(tiny_root: Path, tmp_path: Path) -> ConvertConfig:
    """Conversion of the tiny nights into several units of several shards; one of four recordings is broken."""
    return ConvertConfig(
        output=tmp_path / "shards",
        recipe="psg128",
        sources=[Source(corpus="synthetic_psg", root=tiny_root)],
        num_cpus=1,
        unit_bytes=2_500_000,
        shard_bytes=800_000,
        quarantine_budget=0.5,
    )
