import json
from pathlib import Path

import pytest
import torch

from adapters import train
from adapters.checkpoint import TENSORS_FILE, copy_trainable
from adapters.evaluate import evaluate
from adapters.rows import CLOCK
from adapters.train import adapt
from manifests.errors import ConfigError
from trainer.export import load_encoder


def rows(run_dir: str | Path) -> list[dict]:
    """Rows without what a clock tells."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCK} for line in lines]


def test_two_tasks_are_learned_on_one_frozen_encoder(make_config, encoder_dir):
    seen = []
    config = make_config(steps=120, eval_every=40, checkpoint_every=120, log_every=20)
    result = adapt(config, report=seen.append)
    for name, margin in (("sleep_staging", 0.35), ("rhythm", 0.35)):
        entry = result.scores[name]["test"]["metrics"]["balanced_accuracy"]
        assert entry["value"] > entry["chance"] + margin, name
        assert entry["interval"][0] > entry["chance"], name
    assert result.scores["sleep_staging"]["test"]["n"] == 2 * 20  # the unscored windows are not scored
    assert result.data["sleep_staging"]["splits"]["train"]["left_out"] == {"no label of the task": 4 * 4}
    assert [{key: row[key] for key in row.keys() - CLOCK} for row in seen] == rows(config.run_dir)
    timed = [row for row in seen if row["split"] == "train"]
    assert all(row["step_s"] > 0 and row["windows_per_s"] > 0 for row in timed)
    assert timed[-1]["eta_s"] == 0
    assert timed[-1]["epochs"] == {"sleep_staging": 120 * 20 / 80, "rhythm": 120 * 16 / 96}
    losses = [row["loss"]["rhythm"] for row in seen if row["split"] == "train"]
    assert losses[-1] < losses[0]

    base = load_encoder(encoder_dir).state_dict()
    trained = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in result.model.peft.state_dict().items()
        if "lora_" not in name
    }
    assert trained.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], trained[name])}
    assert changed
    assert all(name.startswith("temporal_encoder.") for name in changed)


def test_killed_run_continues_bit_for_bit(make_config, tmp_path, monkeypatch):
    whole = adapt(make_config(run_dir=str(tmp_path / "whole")))
    config = make_config(run_dir=str(tmp_path / "cut"))
    real = train.train_step

    def dies_at_5(*args, step, **kwargs):
        if step == 5:
            raise KeyboardInterrupt
        return real(*args, step=step, **kwargs)

    monkeypatch.setattr(train, "train_step", dies_at_5)
    with pytest.raises(KeyboardInterrupt):
        adapt(config)
    assert not (tmp_path / "cut" / "result.json").exists()
    monkeypatch.setattr(train, "train_step", real)
    continued = adapt(config)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    expected, got = copy_trainable(whole.model), copy_trainable(continued.model)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert whole.scores == continued.scores


def test_damaged_checkpoint_is_never_picked_up(make_config, monkeypatch):
    config = make_config()
    whole = adapt(config)
    run_dir = Path(config.run_dir)
    (run_dir / "result.json").unlink()
    newest = run_dir / "checkpoints" / "step-000000008-a1" / TENSORS_FILE
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    steps = []
    real = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *a, step, **k: (steps.append(step), real(*a, step=step, **k))[1])
    again = adapt(config)
    assert steps == [6, 7]
    assert (run_dir / "checkpoints" / "damaged-step-000000008-a1").is_dir()
    expected, got = copy_trainable(whole.model), copy_trainable(again.model)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_finished_run_is_not_repeated(make_config, monkeypatch):
    config = make_config(steps=4)
    first = adapt(config)
    monkeypatch.setattr(train, "train_step", lambda *_, **__: pytest.fail("trained again"))
    second = adapt(config)
    assert second.scores == first.scores
    expected, got = copy_trainable(first.model), copy_trainable(second.model)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_run_folder_of_another_configuration_is_refused(make_config):
    adapt(make_config(steps=4))
    with pytest.raises(ConfigError, match=r"\(lora\.r: \d+ → 2; seed: 0 → 1\).*choose another run_dir"):
        adapt(make_config(steps=4, seed=1, lora={"r": 2}))


def test_unfinished_run_of_another_configuration_is_refused(make_config):
    config = make_config(steps=4)
    adapt(config)
    (Path(config.run_dir) / "result.json").unlink()
    with pytest.raises(ConfigError, match=r"step-000000004-a1: belongs to another configuration.*\(seed: 0 → 1\)"):
        adapt(make_config(steps=4, seed=1))
    assert len(list(Path(config.run_dir, "attempts").iterdir())) == 1, "what is another run's was claimed"


def test_evaluation_is_without_dropout(adapted, make_config):
    config = make_config()
    adapted.model.train()
    evaluate(adapted.model, train.load_data(config), split="val", limit=10)
    assert not any(module.training for module in adapted.model.modules())


def test_label_without_training_windows_is_refused(make_config, snapshots, task_files):
    with pytest.raises(ConfigError, match="no training window for sinus"):
        adapt(make_config(tasks=[{"task": str(task_files["rhythm"]), "snapshots": [str(snapshots["staged"])]}]))


def test_task_whose_kind_the_recipe_lacks_is_refused(make_config, snapshots):
    with pytest.raises(ConfigError, match="needs eeg, recipe tiny_ecg has ecg"):
        adapt(make_config(tasks=[{"task": "sleep_staging", "snapshots": [str(snapshots["coded"])]}]))
