"""Tiny snapshots whose labels can be learned, and a tiny encoder."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters.bundle import write_bundle
from adapters.config import AdaptConfig
from adapters.train import AdaptResult, adapt
from manifests.config import digest, dump_yaml
from manifests.recipes import KindRule, Recipe
from manifests.shards import SNAPSHOT_FILE, npy_bytes
from manifests.tasks import load_task
from trainer import tiny
from trainer.export import save_encoder
from trainer.models.build import build_encoder
from trainer.models.sleep import SleepEncoder, SleepEncoderConfig
from trainer.pretrained_on import PretrainedOn

RATE_HZ = 32
SECONDS = 8
STAGES = ("W", "N1", "N2", "N3", "R")
CODES = {"426783006": 1.0, "164889003": 5.0, "426177001": 0.5, "427084000": 3.0}
LAYOUT = ("train", "train", "train", "train", "val", "val", "test", "test")
RECIPES = {
    "staged": Recipe(
        id="tiny_psg",
        title="Tiny sleep",
        window_s=SECONDS,
        hop_s=SECONDS,
        kinds={"eeg": KindRule(rate_hz=RATE_HZ, high_hz=12), "ecg": KindRule(rate_hz=RATE_HZ)},
    ),
    "coded": Recipe(
        id="tiny_ecg", title="Tiny ECG", window_s=SECONDS, hop_s=SECONDS, kinds={"ecg": KindRule(rate_hz=RATE_HZ)}
    ),
}
CHANNELS = {"staged": {"eeg": ("eeg:C3-M2", "eeg:C4-M1"), "ecg": ("ecg:II",)}, "coded": {"ecg": ("ecg:II",)}}


def subject_name(corpus: str, subject: int) -> str:
    return hashlib.sha256(f"{corpus}/{subject}".encode()).hexdigest()[:12]


def make_sample(
    corpus: str, *, subject: int, window: int, recipe: str, split: str
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """One window whose frequency follows its label; every sixth window of a staged snapshot is unscored."""
    rng = np.random.default_rng([subject, window, 3])
    seconds = np.arange(RATE_HZ * SECONDS) / RATE_HZ
    if recipe == "staged":
        stage = "?" if window % 6 == 5 else STAGES[window % 6]
        classes: list[str] = []
        frequency = 1.0 + 2.0 * (window % 6)
    else:
        stage, classes = "?", [list(CODES)[window % 4], "55930002"]
        frequency = CODES[classes[0]]
    ucs, members = {}, {}
    for kind, symbols in CHANNELS[recipe].items():
        wave = np.sin(2 * np.pi * frequency * seconds + rng.uniform(0, 6))
        signal_CT = np.stack([wave + 0.2 * rng.standard_normal(len(seconds)) for _ in symbols])
        members[f"{kind}.npy"] = npy_bytes(np.round(signal_CT / tiny.SCALE).astype(np.int16))
        ucs[kind] = [tiny._tag(symbol, row, rate_hz=RATE_HZ) for row, symbol in enumerate(symbols)]
    name = subject_name(corpus, subject)
    meta = {
        "key": f"{corpus}-{name}-{window:06d}",
        "corpus": corpus,
        "subject": name,
        "recording": f"{name}-r0",
        "session": "",
        "split": split,
        "recipe": RECIPES[recipe].id,
        "start": window * len(seconds),
        "length": len(seconds),
        "rate": [RATE_HZ, 1],
        "quality": 1.0,
        "ucs_version": 1,
        "ucs": ucs,
        "labels": {"stage": [stage], "classes": classes, "events": []},
    }
    return meta, members


def write_snapshot(folder: Path, recipe: str, *, num_windows: int = 24) -> Path:
    """Snapshot of eight subjects: four train, two val, two test."""
    folder.mkdir(parents=True)
    samples = [
        make_sample(recipe, subject=subject, window=window, recipe=recipe, split=split)
        for subject, split in enumerate(LAYOUT)
        for window in range(num_windows)
    ]
    entry, rows = tiny._write_shard(folder, f"{recipe}-00000.tar", samples)
    snapshot = tiny._write_index(folder, corpus=recipe, entries=[entry], rows=rows)
    data = RECIPES[recipe].model_dump(mode="json")
    corpora = {recipe: {"id": recipe, "title": f"Tiny {recipe}", "licence": "CC0-1.0", "mains_hz": 50}}
    corpora[recipe]["split"] = {"rule": "table", "table": {"Erika Mustermann": "train"}}
    snapshot = snapshot.model_copy(update={"recipe": data, "recipe_digest": digest(data), "corpora": corpora})
    snapshot = snapshot.model_copy(update={"digest": snapshot.content_digest()})
    (folder / SNAPSHOT_FILE).write_text(json.dumps(snapshot.model_dump(mode="json")))
    return folder


@pytest.fixture(scope="session")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a staged sleep snapshot and of a 12-lead-like one with SNOMED codes."""
    root = tmp_path_factory.mktemp("snapshots")
    return {recipe: write_snapshot(root / recipe, recipe) for recipe in RECIPES}


def tiny_encoder(seed: int = 0) -> SleepEncoder:
    torch.manual_seed(seed)
    encoder = build_encoder(SleepEncoderConfig(width=16, depth=2, num_heads=2))
    assert isinstance(encoder, SleepEncoder)
    return encoder


@pytest.fixture
def make_encoder() -> Callable[..., SleepEncoder]:
    return tiny_encoder


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported encoder with fresh weights."""
    folder = tmp_path_factory.mktemp("encoder")
    facts = PretrainedOn(
        split="train",
        snapshots=["0" * 64],
        corpora={"staged": {"title": "Tiny staged", "licence": "CC0-1.0", "windows": 96, "hours": 0.2, "subjects": 4}},
        subjects={"staged": [subject_name("staged", subject) for subject in (0, 1, 4, 6)]},
    )
    recipes = {r.id: r.model_dump(mode="json") for r in RECIPES.values()}
    save_encoder(folder / "encoder", tiny_encoder(), recipes=recipes, step=7, licence="CC-BY-4.0", pretrained_on=facts)
    return folder / "encoder"


@pytest.fixture(scope="session")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shipped tasks, narrowed to the kinds and the window of the tiny snapshots."""
    folder = tmp_path_factory.mktemp("tasks")
    paths = {}
    for name, recipe in (("sleep_staging", "staged"), ("rhythm", "coded")):
        task = load_task(name).model_copy(update={"kinds": list(CHANNELS[recipe]), "window_s": SECONDS})
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(dump_yaml(task.model_dump(mode="json")))
    return paths


@pytest.fixture
def make_config(
    snapshots: dict[str, Path], encoder_dir: Path, task_files: dict[str, Path], tmp_path: Path
) -> Callable[..., AdaptConfig]:
    """Configuration of a run on both tasks."""

    def make(**changes: Any) -> AdaptConfig:
        values = config_values(snapshots, encoder_dir, task_files, tmp_path / "run")
        return AdaptConfig.model_validate({**values, **changes})

    return make


def config_values(snapshots: dict[str, Path], encoder: Path, tasks: dict[str, Path], run_dir: Path) -> dict[str, Any]:
    return {
        "run_dir": str(run_dir),
        "encoder": str(encoder),
        "tasks": [
            {"task": str(tasks["sleep_staging"]), "snapshots": [str(snapshots["staged"])], "batch": 20},
            {"task": str(tasks["rhythm"]), "snapshots": [str(snapshots["coded"])], "batch": 16},
        ],
        "steps": 8,
        "lora": {"r": 4},
        "keep": "best",
        "log_every": 2,
        "eval_every": 4,
        "checkpoint_every": 2,
        "threads": 1,
    }


@pytest.fixture(scope="session")
def adapted(
    snapshots: dict[str, Path],
    encoder_dir: Path,
    task_files: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> AdaptResult:
    """A finished run that has learned both tasks."""
    values = config_values(snapshots, encoder_dir, task_files, tmp_path_factory.mktemp("adapted") / "run")
    return adapt(AdaptConfig.model_validate({**values, "steps": 80, "eval_every": 40, "checkpoint_every": 40}))


@pytest.fixture(scope="session")
def bundle_dir(adapted: AdaptResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `adapted`."""
    return write_bundle(adapted, tmp_path_factory.mktemp("bundles") / "bundle").path
