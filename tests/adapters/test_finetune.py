"""Fine-tuning of stage 2: on tiny snapshots, and on real trials where the recordings are at hand."""

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from upath import UPath

from adapters import train
from adapters.checkpoint import copy_trainable
from adapters.config import FinetuneConfig
from adapters.data import TaskData
from adapters.evaluate import evaluate
from adapters.finetune import FinetuneModel, finetune
from adapters.rows import CLOCK
from adapters.status import learn_status
from adapters.stream import labelled_batches
from adapters.train import load_data, share_out, train_tasks
from adapters.update import build_optimizer, loss_weight, summed_loss
from engine.config import ConvertConfig
from engine.convert import convert_all
from manifests.errors import ConfigError
from manifests.shards import SAMPLES_FILE, SNAPSHOT_FILE, load_snapshot
from trainer.export import load_encoder, save_encoder
from trainer.models.art_gat import ArtGatConfig
from trainer.models.build import build_encoder
from trainer.models.univariate import UnivariateEncoderConfig
from trainer.storage import location

MakeConfig = Callable[..., FinetuneConfig]
TINY = UnivariateEncoderConfig(width=16, depth=1, num_heads=2, num_tokens=4, conv_channels=(4, 8, 16))


@pytest.fixture(scope="module")
def univariate_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("univariate") / "encoder"
    torch.manual_seed(7)
    save_encoder(folder, build_encoder(TINY), recipes={}, step=3)
    return folder


@pytest.fixture
def make_finetune(
    snapshots: dict[str, Path], univariate_dir: Path, task_files: dict[str, Path], tmp_path: Path
) -> MakeConfig:
    def make(**changes: Any) -> FinetuneConfig:
        values = {
            "run_dir": str(tmp_path / "run"),
            "encoder": str(univariate_dir),
            "tasks": [{"task": str(task_files["sleep_staging"]), "snapshots": [str(snapshots["staged"])], "batch": 10}],
            "model": {"depth": 1, "num_heads": 2, "graph_heads": 2, "graph_layers": 1},
            "steps": 4,
            "log_every": 2,
            "eval_every": 4,
            "checkpoint_every": 2,
        }
        return FinetuneConfig.model_validate({**values, **changes})

    return make


def rows(run_dir: str | Path) -> list[dict]:
    """Rows without what a clock tells."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCK} for line in lines]


def test_encoder_and_head_move_at_their_own_rates(make_finetune, univariate_dir):
    """AdamW's first step moves every weight that has a gradient by its learning rate, whatever the gradient."""
    config = make_finetune(
        steps=1, optimizer={"weight_decay": 0.0, "warmup_share": 0.0}, model={"depth": 1, "num_heads": 2, "dropout": 0}
    )
    result = finetune(config)
    fresh = FinetuneModel(load_encoder(univariate_dir), {"sleep_staging": 5}, config=config.model, seed=config.seed)
    moved: dict[str, list[float]] = {"encoder": [], "head": []}
    before = dict(fresh.named_parameters())
    for name, parameter in result.model.named_parameters():
        moved[fresh.group(name)].append(float((parameter.detach() - before[name].detach()).abs().max()))
    assert max(moved["encoder"]) == pytest.approx(5e-6, rel=0.05)
    assert max(moved["head"]) == pytest.approx(1e-4, rel=0.05)


@pytest.mark.parametrize("graph", ["gat", "gcn", "mean"])
def test_gradient_reaches_encoder_and_head(make_finetune, univariate_dir, graph):
    config = make_finetune()
    (item,) = load_data(config).values()
    model = FinetuneModel(load_encoder(univariate_dir), {"t": 5}, config=ArtGatConfig(graph=graph), seed=0).train()
    (share,) = share_out(config, {item.task.id: item}).values()
    with closing(labelled_batches(item, share, seed=0, start=0)) as batches:
        first = next(batches)
    loss = summed_loss(first.task, model("t", first.batch), first.target)
    (loss / loss_weight(first.task, first.target)).backward()
    optimizer = build_optimizer(config, model)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [5e-6, 1e-4]
    for group in optimizer.param_groups:
        assert sum(float(parameter.grad.abs().sum()) for parameter in group["params"]) > 0
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))


def test_killed_run_continues_bit_for_bit(make_finetune, tmp_path, monkeypatch):
    whole = finetune(make_finetune(run_dir=str(tmp_path / "whole")))
    config = make_finetune(run_dir=str(tmp_path / "cut"))
    real = train.train_step

    def dies_at_3(*args, step, **kwargs):
        if step == 3:
            raise KeyboardInterrupt
        return real(*args, step=step, **kwargs)

    monkeypatch.setattr(train, "train_step", dies_at_3)
    with pytest.raises(KeyboardInterrupt):
        finetune(config)
    monkeypatch.setattr(train, "train_step", real)
    continued = finetune(config)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    expected, got = copy_trainable(whole.model), copy_trainable(continued.model)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    monkeypatch.setattr(train, "train_step", lambda *_, **__: pytest.fail("trained again"))
    assert finetune(config).scores == whole.scores


@pytest.mark.usefixtures("s3")
def test_a_fresh_machine_goes_on_from_the_store(make_finetune, tmp_path):
    UPath("s3://runs").mkdir(exist_ok=True)
    store = f"s3://runs/{tmp_path.name}"
    whole = finetune(make_finetune(run_dir=str(tmp_path / "whole")))
    first, second = (make_finetune(run_dir=str(tmp_path / name), storage=store) for name in ("first", "second"))

    def ask(row: dict) -> None:
        if row["step"] == 2:
            (tmp_path / "first" / "STOP").touch()

    with pytest.raises(KeyboardInterrupt):
        finetune(first, report=ask)
    state = learn_status(location(store))
    assert (state.state, state.checkpoint) == ("elsewhere", 2)
    continued = finetune(second)
    assert rows(tmp_path / "second") == rows(tmp_path / "whole")
    expected, got = copy_trainable(whole.model), copy_trainable(continued.model)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert learn_status(location(store)).state == "finished"


def test_from_scratch_differs_in_the_encoder_alone(make_finetune, univariate_dir, tmp_path):
    config = make_finetune(from_scratch=True, steps=1, optimizer={"lr_encoder": 0.0, "lr_head": 0.0, "weight_decay": 0})
    scratch = finetune(config).model
    pretrained = load_encoder(univariate_dir).state_dict()
    assert any(not torch.equal(tensor, pretrained[name]) for name, tensor in scratch.body.encoder.state_dict().items())
    kept = finetune(config.model_copy(update={"from_scratch": False, "run_dir": str(tmp_path / "kept")})).model
    assert all(torch.equal(tensor, pretrained[name]) for name, tensor in kept.body.encoder.state_dict().items())
    with pytest.raises(ConfigError, match="choose another run_dir"):
        finetune(config.model_copy(update={"from_scratch": False}))


def without_channels(folder: Path, target: Path, *symbols: str) -> Path:
    """A copy of a snapshot whose first training windows, by its index, lack one of these channels each."""
    shutil.copytree(folder, target)
    table = pq.read_table(target / SAMPLES_FILE)
    records = table.to_pylist()
    scored = [row for row in records if row["split"] == "train" and row["stage"] != "?"]
    for row, symbol in zip(scored, symbols, strict=False):
        row["symbols"] = [other for other in row["symbols"] if other != symbol]
    pq.write_table(type(table).from_pylist(records, schema=table.schema), target / SAMPLES_FILE)
    sha = hashlib.sha256((target / SAMPLES_FILE).read_bytes()).hexdigest()
    snapshot = load_snapshot(folder).model_copy(update={"samples_sha256": sha})
    snapshot = snapshot.model_copy(update={"digest": snapshot.content_digest()})
    (target / SNAPSHOT_FILE).write_text(json.dumps(snapshot.model_dump(mode="json")))
    return target


def test_union_keeps_every_channel_and_intersection_those_that_all_windows_have(
    make_finetune, snapshots, task_files, tmp_path
):
    folder = without_channels(snapshots["staged"], tmp_path / "uneven", "eeg:C4-M1")
    tasks = [{"task": str(task_files["sleep_staging"]), "snapshots": [str(folder)], "batch": 10}]
    union = finetune(make_finetune(tasks=tasks, steps=1, run_dir=str(tmp_path / "union")))
    assert union.channels == {"sleep_staging": None}
    assert "eeg:C4-M1" in union.data["sleep_staging"]["splits"]["train"]["symbols"]
    shared = finetune(make_finetune(tasks=tasks, steps=1, channels="intersection"))
    assert shared.channels == {"sleep_staging": ["ecg:II", "eeg:C3-M2"]}
    assert sorted(shared.data["sleep_staging"]["splits"]["test"]["symbols"]) == ["ecg:II", "eeg:C3-M2"]


def test_windows_that_share_too_few_channels_are_refused(make_finetune, snapshots, task_files, tmp_path):
    folder = without_channels(snapshots["staged"], tmp_path / "uneven", "eeg:C4-M1", "eeg:C3-M2")
    tasks = [{"task": str(task_files["sleep_staging"]), "snapshots": [str(folder)]}]
    with pytest.raises(ConfigError, match=r"share 0 channel\(s\) of eeg, it needs 1; use union"):
        finetune(make_finetune(tasks=tasks, channels="intersection"))


def test_an_encoder_of_another_kind_is_refused(make_finetune, encoder_dir):
    with pytest.raises(ConfigError, match="kind 'sleep'; fine-tuning builds on"):
        finetune(make_finetune(encoder=str(encoder_dir)))


@pytest.fixture
def ten_trials(shared_data: Path, tmp_path: Path) -> Callable[[FinetuneConfig], dict[str, TaskData]]:
    """Function that cuts the data of a run to 5 trials of each fist, as imagined by eegmmidb S001, 64 channels."""
    source = tmp_path / "recordings" / "S001" / "S001R04.edf"
    source.parent.mkdir(parents=True)
    source.write_bytes((shared_data / "eegmmidb/S001/S001R04.edf").read_bytes())
    sources = [{"corpus": "eegmmidb", "root": str(tmp_path / "recordings"), "split": "cbramod"}]
    output = str(tmp_path / "eeg")
    convert_all(
        ConvertConfig.model_validate({"output": output, "recipe": "eeg200_trials", "sources": sources, "num_cpus": 1})
    )

    def cut(config: FinetuneConfig) -> dict[str, TaskData]:
        (item,) = load_data(config).values()
        labelled = item.splits["train"]
        streams = tuple(stream.take(np.arange(5), weight=5.0) for stream in labelled.streams)
        kept = {key: labelled.targets[key] for stream in streams for key in stream.keys}
        assert sorted(kept.values()) == [(0,)] * 5 + [(1,)] * 5
        cut = replace(labelled, streams=streams, targets=kept)
        return {item.task.id: replace(item, splits={**item.splits, "train": cut})}

    return cut


def test_ten_trials_of_a_real_subject_are_learned_by_heart(ten_trials, univariate_dir, tmp_path):
    config = FinetuneConfig.model_validate(
        {
            "run_dir": str(tmp_path / "run"),
            "encoder": str(univariate_dir),
            "tasks": [{"task": "motor_imagery", "snapshots": [str(tmp_path / "eeg")], "batch": 10}],
            "model": {"depth": 1, "graph_layers": 1, "tokens_per_channel": 1, "dropout": 0.0},
            "optimizer": {"lr_encoder": 1e-3, "lr_head": 3e-3},
            "steps": 90,
            "eval_every": 90,
        }
    )
    data = ten_trials(config)
    model = FinetuneModel(load_encoder(univariate_dir), {"motor_imagery": 2}, config=config.model, seed=0)
    before = evaluate(model, data, split="train", limit=10)["motor_imagery"]["metrics"]["balanced_accuracy"]["value"]
    train_tasks(config, model, data, report=None)
    after = evaluate(model, data, split="train", limit=10)["motor_imagery"]
    assert after["n"] == 10
    assert before < 0.9 < after["metrics"]["balanced_accuracy"]["value"]
