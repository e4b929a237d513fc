"""Tasks learned from snapshots in an object store give what they give from a disk."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from upath import UPath

from adapters.checkpoint import copy_trainable
from adapters.config import AdaptConfig
from adapters.train import adapt
from manifests.errors import ConfigError

MakeConfig = Callable[..., AdaptConfig]


@pytest.fixture(scope="module")
def stored(s3: None, snapshots: dict[str, Path]) -> dict[str, str]:
    """URLs of the snapshots in a bucket."""
    urls = {}
    for name, folder in snapshots.items():
        url = UPath(f"s3://labelled/{name}")
        url.fs.makedirs("labelled", exist_ok=True)
        url.fs.put(f"{folder}/", url.path, recursive=True)
        urls[name] = str(url)
    return urls


@pytest.fixture
def settings(make_config: MakeConfig, stored: dict[str, str], tmp_path: Path) -> dict:
    tasks = [task.model_dump() for task in make_config().tasks]
    for task, name in zip(tasks, ("staged", "coded"), strict=True):
        task["snapshots"] = [stored[name]]
    return {"tasks": tasks, "steps": 3, "keep": "last", "eval_windows": 32, "run_dir": str(tmp_path / "remote")}


def test_a_run_on_an_object_store_equals_one_on_a_disk(make_config, settings, tmp_path):
    cache = {"folder": str(tmp_path / "cache"), "max_bytes": 10_000_000}
    remote = adapt(make_config(**settings, cache=cache))
    local = adapt(make_config(steps=3, keep="last", eval_windows=32, run_dir=str(tmp_path / "local")))
    expected = copy_trainable(local.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in copy_trainable(remote.model).items())
    assert remote.scores == local.scores
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2


def test_without_a_cache_it_is_refused_with_the_remedy(make_config, settings):
    with pytest.raises(ConfigError, match=r"read through a cache on each node; give cache"):
        adapt(make_config(**settings))
