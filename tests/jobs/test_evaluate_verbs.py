"""`kymo evaluate` on the command line: a run, or the YAML of an evaluation."""

import json
from pathlib import Path

import pytest

from jobs import cli
from jobs.evaluate_verbs import show_evaluation
from manifests.config import load_config
from manifests.tasks import load_task
from trainer.evaluation.config import EvaluateConfig
from trainer.evaluation.features import random_encoder
from trainer.export import save_encoder
from trainer.models.sleep import SleepEncoderConfig
from trainer.tiny import write_tiny_snapshot

CONFIGS = Path(cli.__file__).parent / "configs"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folder of an encoder, and a snapshot."""
    root = tmp_path_factory.mktemp("evaluate")
    write_tiny_snapshot(root / "shards", num_subjects=4, windows_per_subject=10)
    save_encoder(root / "given", random_encoder(SleepEncoderConfig(width=16, depth=1), seed=1), recipes={}, step=1)
    return root / "given", root / "shards"


def test_an_encoder_is_evaluated_on_the_data_that_are_named(capsys, kymo, places, tmp_path) -> None:
    encoder, shards = places
    code, text = kymo(
        *("evaluate", encoder, "ablation=null", "scratch_seeds=[0]", "--tasks", "wake_deep", "--data", shards),
        *("--folds", "subjects", "--out", tmp_path / "out"),
    )
    text = " ".join(text.split())
    assert code == 0, text
    assert "Better than random weights: not decided" in text
    assert "Not known: the encoder's card does not tell what it was pretrained on" in text
    assert f"report: {tmp_path / 'out' / 'report.html'}" in text
    assert (tmp_path / "out" / "report.html").is_file()
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["tasks"][0]["folds"] == "subjects"
    show_evaluation(scores)
    assert "Wake against deep sleep (N3)" in capsys.readouterr().out


def test_wrong_input_is_one_message(kymo, places, tmp_path) -> None:
    encoder, shards = places
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("objective: {}\nrun_dir: begun\n")
    nothing = ("--data", tmp_path / "no_shards", "--tasks", "wake_deep")
    for arguments, expected in (
        ((tmp_path,), "no exported encoder"),
        ((tmp_path / "nowhere",), "nowhere: no such folder; give the run_dir of a kymo pretrain"),
        ((tmp_path / "nowhere", *nothing), "nowhere: no such folder; give the run_dir of a kymo pretrain"),
        ((tmp_path / "begun", *nothing), "begun: this run has saved no encoder yet"),
        ((encoder, *nothing), "no_shards"),
        ((encoder,), "name snapshots with --data"),
        ((encoder, "--data", shards, "--tasks", "nothing"), "nothing"),
        ((encoder, "--data", shards, "--tasks", "rhythm"), "name other tasks or snapshots"),
        ((encoder, "--data", shards, "--tasks", "wake_deep", "--folds", "some"), "folds"),
        ((encoder, "scratch_seeds=[]"), "scratch_seeds"),
    ):
        code, text = kymo("evaluate", *arguments)
        assert code == 2, text
        assert expected in " ".join(text.split())


@pytest.mark.parametrize("name", ["evaluate_demo", "evaluate_real"])
def test_the_shipped_configurations_are_valid(name: str) -> None:
    config = load_config(EvaluateConfig, CONFIGS / f"{name}.yaml")
    for task in config.tasks:
        assert load_task(task.task).loss == "cross_entropy"
        assert task.folds != "split"
