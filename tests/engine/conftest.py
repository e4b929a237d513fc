"""A tiny synthetic corpus as real files, made once for all tests of the engine."""

import shutil
from pathlib import Path

import pytest

from engine.config import ConvertConfig, Source
from engine.convert import convert_all
from engine.synthetic import synthesise


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with three nights of 10 minutes, one broken EDF and three 12-lead records."""
    root = tmp_path_factory.mktemp("recordings")
    synthesise(root, num_subjects=3, num_ecg=3, night_minutes=10)
    return root


def conversion_of(root: Path, output: Path) -> ConvertConfig:
    """Conversion of the tiny nights into several units of several shards; one of four recordings is broken."""
    return ConvertConfig(
        output=output,
        recipe="sleep128",
        sources=[Source(corpus="synthetic_psg", root=root)],
        num_cpus=1,
        unit_bytes=2_500_000,
        shard_bytes=800_000,
        quarantine_budget=0.5,
    )


@pytest.fixture
def tiny_config(tiny_root: Path, tmp_path: Path) -> ConvertConfig:
    """A conversion that has not run yet."""
    return conversion_of(tiny_root, tmp_path / "shards")


@pytest.fixture(scope="session")
def _converted(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> ConvertConfig:
    config = conversion_of(tiny_root, tmp_path_factory.mktemp("converted") / "shards")
    convert_all(config)
    return config


@pytest.fixture
def converted(_converted: ConvertConfig, tmp_path: Path) -> ConvertConfig:
    """A conversion that has run, in a folder of its own."""
    config = _converted.model_copy(update={"output": tmp_path / "converted"})
    shutil.copytree(_converted.output, config.output)
    return config
