"""From real recordings to a stranger: trained, published, pulled by a fresh process, used on a person never seen."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import edfio
import pytest
import torch

from adapters.bundle import write_bundle
from adapters.config import AdaptConfig
from adapters.hub import Access
from adapters.publish import publish
from adapters.train import adapt
from engine.config import ConvertConfig
from engine.convert import convert_all
from manifests.recipes import load_recipe
from trainer.export import save_encoder
from trainer.models.build import build_encoder
from trainer.models.univariate import UnivariateEncoderConfig

Kymo = Callable[..., tuple[int, str]]

REPO = "sleeplab/wake-or-deep"
TRUTH = {"Sleep stage W": "wake", "Sleep stage 3": "deep", "Sleep stage 4": "deep"}


@pytest.fixture(scope="module")
def trained(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle of wake against deep sleep, learned from three persons of UCDDB; 018 is left out."""
    root = tmp_path_factory.mktemp("wake")
    recordings = root / "recordings"
    recordings.mkdir()
    for path in (shared_data / "ucddb_epochs").glob("*.mat"):
        (recordings / path.name).symlink_to(path)
    source = {"corpus": "ucddb_epochs_mat", "root": str(recordings)}
    settings = {"output": str(root / "shards"), "recipe": "sleep128", "sources": [source], "num_cpus": 1}
    convert_all(ConvertConfig.model_validate(settings))
    torch.manual_seed(0)
    encoder = build_encoder(
        UnivariateEncoderConfig(width=32, depth=1, num_heads=2, num_tokens=4, conv_channels=(4, 8, 16))
    )
    recipe = load_recipe("sleep128").model_dump(mode="json")
    save_encoder(root / "encoder", encoder, recipes={"sleep128": recipe}, step=0)
    values: dict[str, Any] = {
        "run_dir": str(root / "run"),
        "encoder": str(root / "encoder"),
        "tasks": [{"task": "wake_deep", "snapshots": [str(root / "shards")], "batch": 16}],
        "steps": 80,
        "optimizer": {"lr_lora": 3e-3, "lr_temporal": 3e-3, "lr_head": 6e-3},  # nobody has pretrained this encoder
        "eval_every": 80,
        "eval_windows": 100,
        "threads": 1,
    }
    return write_bundle(adapt(AdaptConfig.model_validate(values)), root / "bundle").path


@pytest.fixture(scope="module")
def stranger(shared_data: Path) -> Path:
    return shared_data / "ucddb_epochs" / "ucd018_C3A2_reassembled.edf"


def fresh_kymo(folder: Path, hub_url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`kymo ARGUMENTS` in a process of its own, at home in `folder`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "XDG_"))}
    home = {"HOME": str(folder), "HF_ENDPOINT": hub_url, "HF_TOKEN": "hf_loopback", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "jobs.cli", *arguments]
    return subprocess.run(
        command, cwd=folder, env={**kept, **home}, capture_output=True, text=True, check=False, timeout=300
    )


def balanced_accuracy(table: Path, recording: Path) -> float:
    """Of the predictions in a CSV, against the stages that stand in the recording; windows of both kinds count."""
    stages = {
        int(mark.onset) + second: TRUTH.get(mark.text)
        for mark in edfio.read_edf(recording).annotations
        for second in range(0, int(mark.duration or 0), 30)
    }
    hits: dict[str, list[bool]] = {"wake": [], "deep": []}
    for row in csv.DictReader(table.open()):
        truth = stages.get(int(float(row["onset_s"])))
        if truth is not None:
            hits[truth].append(row["label"] == truth)
    assert all(len(found) > 20 for found in hits.values())
    return sum(sum(found) / len(found) for found in hits.values()) / 2


@pytest.mark.slow
def test_a_stranger_pulls_it_predicts_and_needs_no_network_the_second_time(
    hub: Any, trained: Path, stranger: Path, tmp_path: Path
) -> None:
    publish(trained, REPO, tag="v1", access=Access(endpoint=hub.url, token=hub.TOKEN))
    hub.log.clear()
    command = ("predict", f"{REPO}@v1", str(stranger), "--corpus", "ucddb_epochs", "--no-picture", "--format", "csv")
    command += ("--task", "wake_deep")
    first = fresh_kymo(tmp_path, hub.url, *command, "--out", "first")
    assert first.returncode == 0, first.stdout + first.stderr
    assert any(line.startswith("GET") and line.endswith("adapters/wake_deep/head.safetensors") for line in hub.log)
    (table,) = (tmp_path / "first").glob("*.csv")
    assert balanced_accuracy(table, stranger) > 0.8

    hub.shutdown()
    hub.server_close()
    second = fresh_kymo(tmp_path, hub.url, *command, "--out", "second")
    assert second.returncode == 0, second.stdout + second.stderr
    assert (tmp_path / "second" / table.name).read_bytes() == table.read_bytes()
    assert hub.TOKEN not in first.stdout + first.stderr + second.stdout + second.stderr
    holders = [path for path in tmp_path.rglob("*") if path.is_file() and hub.TOKEN.encode() in path.read_bytes()]
    assert holders == []


def test_the_publish_verb_shows_what_it_sends(
    hub: Any, trained: Path, kymo: Kymo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.TOKEN)
    command = ("publish", trained, REPO, "--tag", "v1", "--endpoint", hub.url)
    code, text = kymo(*command, "--dry-run")
    assert code == 0
    assert hub.log == []
    size = (trained / "adapters" / "wake_deep" / "head.safetensors").stat().st_size
    (row,) = (line for line in text.splitlines() if "wake_deep/head.safetensors" in line)
    assert f"{size:,}" in row
    assert "licence other; private" in text
    assert f"dry run, nothing was sent → {REPO}, tag v1" in text

    code, text = kymo(*command)
    assert code == 0
    assert f"{REPO}@v1, commit {hub.repositories[REPO].tags['v1']}" in text
    code, text = kymo(*command)
    assert "it was there already, nothing was sent" in text
    assert hub.TOKEN not in text
    code, text = kymo("publish", trained, "nobody", "--tag", "v1")
    assert (code, "give OWNER/NAME" in text) == (2, True)
