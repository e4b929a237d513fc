import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from manifests.errors import ConfigError, ContractError
from trainer.checkpoint import Progress, load_checkpoint, read_weights, save_checkpoint
from trainer.checkpoint_store import claim_attempt, collect_garbage, find_checkpoint, verify_checkpoint
from trainer.config import PretrainConfig
from trainer.data import DataState
from trainer.fragments import STATES, held_fragments
from trainer.zero import initialise, join_processes, train_step

RunRanks = Callable[..., None]
DATA = DataState(
    order_version=1,
    snapshots=("a" * 16,),
    config_digest="c",
    seed=0,
    global_batch=4,
    segments=(),
    batches_committed=2,
)
PROGRESS = Progress(step=2, windows=8, seconds=1.5, loss=0.25, data=DATA)


class Toy(nn.Module):
    """Weights of one and two dimensions, a frozen layer and a buffer that the forward pass changes."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.first = nn.Linear(3, width)
        self.frozen = nn.Linear(width, width).requires_grad_(requires_grad=False)
        self.last = nn.Linear(width, 1, bias=False)
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.seen += len(rows)
        out = self.last(torch.tanh(self.frozen(torch.tanh(self.first(rows)))))
        loss = ((out * self.log_scale.exp() - rows.sum(dim=1, keepdim=True)) ** 2).mean()
        return loss, {"loss": loss.detach()}


def make(stage: int, *, seed: int = 0, width: int = 5) -> Any:
    join_processes("auto")
    torch.manual_seed(seed)
    config = PretrainConfig.model_validate(
        {
            "run_dir": "unused",
            "snapshots": [{"path": "unused"}],
            "encoder": {"kind": "sleep"},
            "objective": {"kind": "leave_one_out"},
            "steps": 10,
            "zero_stage": stage,
            "optimizer": {"lr": 0.05},
        }
    )
    return initialise(Toy(width), config)


def train(model: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        rows = torch.randn(6, 3, generator=torch.Generator().manual_seed(step))
        losses.append(float(train_step(model, [rows])[0]["loss"]))
    return losses


def save(folder: Path, model: Any, *, step: int = 2, attempt: int = 1) -> Path:
    return save_checkpoint(folder, model, progress=replace(PROGRESS, step=step), attempt=attempt, extra={"config": {}})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_goes_on_bit_for_bit_under_every_zero_stage(stage: int, tmp_path: Path) -> None:
    model = make(stage)
    train(model, range(2))
    path = save(tmp_path, model)
    expected = train(model, range(2, 6))
    other = make(stage, seed=99)
    assert train(other, range(2, 4)) != expected[:2]
    assert load_checkpoint(path, other) == PROGRESS
    assert float(other.module.seen) == 12
    assert train(other, range(2, 6)) == expected


def test_a_checkpoint_is_free_of_the_zero_stage(tmp_path: Path) -> None:
    model = make(1)
    train(model, range(2))
    path = save(tmp_path, model)
    expected = train(model, range(2, 5))
    for stage in (0, 3):
        other = make(stage, seed=99)
        load_checkpoint(path, other)
        assert train(other, range(2, 5)) == pytest.approx(expected, rel=1e-6)


def test_moments_and_frozen_weights_are_saved_by_name(tmp_path: Path) -> None:
    model = make(2)
    train(model, range(2))
    path = save(tmp_path, model)
    tensors = load_file(path / "zero_00000_of_00001.safetensors")
    names = {f.name for f in held_fragments(model)}
    assert names == {"first.weight", "first.bias", "last.weight", "log_scale"}
    assert tensors.keys() == {f"{state}::{name}" for state in STATES for name in names}
    assert load_file(path / "aux.safetensors").keys() == {"frozen.weight", "frozen.bias", "seen"}
    weights = read_weights(path)
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    assert read_weights(path, prefix="first.").keys() == {"weight", "bias"}
    assert not [file for file in path.iterdir() if file.suffix not in {".safetensors", ".json"}]


def test_a_model_with_other_shapes_is_refused_by_name(tmp_path: Path) -> None:
    path = save(tmp_path, make(1))
    with pytest.raises(ConfigError, match=r"first\.bias"):
        load_checkpoint(path, make(1, width=6))


def test_a_gap_between_fragments_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, make(1))
    shutil.move(path / "zero_00000_of_00001.safetensors", tmp_path / "away.safetensors")
    with pytest.raises(ContractError, match="values of"):
        load_checkpoint(path, make(1))
    with pytest.raises(ContractError, match="values of"):
        read_weights(path)


DAMAGES = {
    "flipped shard": ("zero_00000_of_00001.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    "truncated shard": ("zero_00000_of_00001.safetensors", lambda content: content[:-1]),
    "missing shard": ("zero_00000_of_00001.safetensors", None),
    "stale shard of another world": ("zero_00001_of_00002.safetensors", lambda _: b"stale"),
    "damaged aux": ("aux.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    "truncated manifest": ("MANIFEST.json", lambda content: content[: len(content) // 2]),
    "manifest of something else": ("MANIFEST.json", lambda _: b"[1, 2]"),
    "no manifest": ("MANIFEST.json", None),
    "no meta": ("meta.json", None),
}


def damage_file(folder: Path, name: str) -> str:
    """Damage a checkpoint, local or in a store; the name of the file that was touched."""
    file, change = DAMAGES[name]
    if change is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(change((folder / file).read_bytes() if (folder / file).exists() else b""))
    return file


@pytest.mark.parametrize("name", DAMAGES)
def test_resume_walks_back_past_a_damaged_checkpoint(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make(1)
    older, newer = save(tmp_path, model, step=2), save(tmp_path, model, step=4)
    assert find_checkpoint(tmp_path) == newer
    file = damage_file(newer, name)
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path) == older
    assert newer.name in caplog.text
    assert file in caplog.text
    assert not newer.exists()
    assert (tmp_path / f"damaged-{newer.name}").exists()
    verify_checkpoint(older)


def test_a_partial_checkpoint_is_never_picked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(1)
    folder = tmp_path / "checkpoints"
    older = save(folder, model, step=2)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.checkpoint.commit", die)
    with pytest.raises(KeyboardInterrupt):
        save(folder, model, step=4)
    monkeypatch.undo()
    assert (folder / ".tmp-step-000000004-a1").is_dir()
    assert find_checkpoint(folder) == older
    assert claim_attempt(folder).attempt == 2
    assert save(folder, model, step=4, attempt=2).name == "step-000000004-a2"
    collect_garbage(folder, keep=5, attempt=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000002-a1", "step-000000004-a2"]


class Whole:
    """State of a checkpoint put together from its files by the format's description alone."""

    def __init__(self, path: Path) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.steps: dict[str, set[float]] = {}
        for file in sorted(path.glob("zero_*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                for name, (start, numel, step) in json.loads(opened.metadata()["fragments"]).items():
                    self.steps.setdefault(name, set()).add(step)
                    for state in STATES:
                        key = f"{state}::{name}"
                        size = torch.Size(json.loads((path / "meta.json").read_text())["shapes"][name]).numel()
                        whole = self.tensors.setdefault(key, torch.full((size,), float("nan")))
                        assert whole[start : start + numel].isnan().all(), f"{key} is stored twice"
                        whole[start : start + numel] = opened.get_tensor(key)
        self.tensors |= load_file(path / "aux.safetensors")

    def assert_same(self, other: "Whole") -> None:
        assert self.tensors.keys() == other.tensors.keys()
        for name, tensor in self.tensors.items():
            assert torch.equal(tensor, other.tensors[name]), name
            assert not tensor.isnan().any(), name
        assert self.steps == other.steps


def join(number: int, port: int, world: int) -> None:
    torch.set_num_threads(1)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    os.environ.update({**group, "RANK": str(number), "LOCAL_RANK": str(number)})
    join_processes("gloo")


def save_every_stage(number: int, port: int, folder: Path) -> None:
    join(number, port, 2)
    for stage in range(4):
        model = make(stage)
        train(model, range(3))
        save(folder / f"stage-{stage}", model)
    load_every_stage(folder, 2)


def join_and_load(number: int, port: int, folder: Path, world: int) -> None:
    join(number, port, world)
    load_every_stage(folder, world)


def load_every_stage(folder: Path, world: int) -> None:
    """Load what two ranks wrote, at the same stage and at the next one, and save it again at once."""
    for stage in range(4):
        found = find_checkpoint(folder / f"stage-{stage}")
        assert found is not None
        for other in (stage, (stage + 1) % 4):
            model = make(other, seed=99)
            assert load_checkpoint(found, model) == PROGRESS
            save(folder / f"{world}-ranks" / f"{stage}-to-{other}", model)


@pytest.fixture(scope="module")
def two_ranks_saved(tmp_path_factory: pytest.TempPathFactory, run_ranks: RunRanks) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_ranks(save_every_stage, folder, world=2)
    return folder


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_what_two_ranks_saved_comes_back_bit_for_bit_at_any_world_size_and_stage(
    world: int, two_ranks_saved: Path, run_ranks: RunRanks
) -> None:
    if world == 1:
        load_every_stage(two_ranks_saved, 1)
    elif world > 2:
        run_ranks(join_and_load, two_ranks_saved, world, world=world)
    for stage in range(4):
        saved = Whole(two_ranks_saved / f"stage-{stage}" / "step-000000002-a1")
        assert saved.steps == {name: {3.0} for name in ("first.weight", "first.bias", "last.weight", "log_scale")}
        assert all(tensor.any() for tensor in saved.tensors.values())
        for other in (stage, (stage + 1) % 4):
            again = two_ranks_saved / f"{world}-ranks" / f"{stage}-to-{other}" / "step-000000002-a1"
            assert len(list(again.glob("zero_*"))) == world
            Whole(again).assert_same(saved)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    model = make(0)
    for step in (2, 4, 6):
        save(tmp_path, model, step=step)
    collect_garbage(tmp_path, keep=2, attempt=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000004-a1", "step-000000006-a1"]


def test_the_manifest_names_every_file_with_its_digest(tmp_path: Path) -> None:
    path = save(tmp_path, make(0))
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert manifest.keys() == {"zero_00000_of_00001.safetensors", "aux.safetensors", "meta.json"}
    assert all(len(entry["sha256"]) == 64 for entry in manifest.values())
    meta = json.loads((path / "meta.json").read_text())
    assert meta["optimizer_groups"][0]["weight_decay"] == 0.05
    assert len(meta["progress"]["data"]) < 1024
