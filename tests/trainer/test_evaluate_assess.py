"""`evaluate_run` on tiny snapshots: what is written, what it says, and what it refuses."""

import json
import re
import shutil

import pytest

from manifests.config import dump_yaml
from manifests.errors import ConfigError
from trainer.evaluation.assess import evaluate_run, plan_tasks
from trainer.evaluation.config import EvaluateConfig
from trainer.evaluation.features import random_encoder
from trainer.evaluation.report import ablation_sentence, render, sentences
from trainer.evaluation.subject import find_subject
from trainer.export import save_encoder
from trainer.models.sleep import SleepEncoderConfig

ENCODER = SleepEncoderConfig(width=16, depth=1)


@pytest.fixture(scope="module")
def run(tiny_snapshot, tmp_path_factory):
    """Folder of a run with an exported encoder and a configuration, without checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "r"
    folder.mkdir()
    save_encoder(folder / "encoder", random_encoder(ENCODER, seed=5), recipes={}, step=3)
    config = {
        "run_dir": str(folder),
        "snapshots": [{"path": str(tiny_snapshot)}],
        "encoder": ENCODER.model_dump(mode="json"),
        "objective": {"kind": "leave_one_out"},
        "steps": 3,
    }
    (folder / "config.yaml").write_text(dump_yaml(config))
    return folder


def settings(run, tiny_snapshot, **changes) -> EvaluateConfig:
    task = {"task": "wake_deep", "snapshots": [str(tiny_snapshot)], "folds": 2}
    return EvaluateConfig.model_validate(
        {
            "run": str(run),
            "tasks": [task],
            "scratch_seeds": [0, 1],
            "ablation": {"subsets": 2},
            "retrieval": None,
            "device": "cpu",
            **changes,
        }
    )


@pytest.fixture(scope="module")
def scores(run, tiny_snapshot):
    return evaluate_run(settings(run, tiny_snapshot))


def test_the_folder_holds_scores_and_a_page_that_needs_no_network(scores, run) -> None:
    folder = run / "evaluation"
    assert json.loads((folder / "scores.json").read_text()) == json.loads(json.dumps(scores))
    page = (folder / "report.html").read_text()
    assert {path.name for path in (folder / "figures").iterdir()} == {
        f"1-wake_deep-{kind}.svg" for kind in ("scores", "ablation", "map")
    }
    assert page.count("data:image/svg+xml;base64,") == 3
    assert not re.findall(r"""(?:src|href)="(?!data:|#)""", page)
    assert "pretrain_seen: tiny" in page
    assert scores["encoder"]["sha256"] in page
    assert scores["tasks"][0]["snapshots"]["tiny"] in page


def test_every_contender_is_scored_on_the_same_windows(scores) -> None:
    task = scores["tasks"][0]
    assert list(task["methods"]) == [
        *("pretrained", "pretrained, k-NN", "band power"),
        *("random weights, seed 0", "random weights, seed 1"),
    ]
    assert {method["n"] for method in task["methods"].values()} == {sum(row_total(row) for row in task["data"])}
    over = task["over_seeds"]["random weights"]["metrics"]["balanced_accuracy"]
    each = [task["methods"][f"random weights, seed {n}"]["metrics"]["balanced_accuracy"]["value"] for n in (0, 1)]
    assert over == {"mean": pytest.approx(sum(each) / 2), "low": min(each), "high": max(each)}
    assert task["pretrain_seen"]["subjects_seen"] == 4
    assert task["pretrain_seen"]["subjects"] == 6


def row_total(row) -> int:
    return sum(row["labels"].values())


def test_a_second_time_the_features_come_from_the_cache(scores, run, tiny_snapshot, monkeypatch) -> None:
    monkeypatch.setattr("trainer.evaluation.features.read_windows", None)
    again = evaluate_run(settings(run, tiny_snapshot, ablation=None))
    assert again["tasks"][0]["methods"] == scores["tasks"][0]["methods"]
    assert again["tasks"][0]["ablation"] == {}


def test_the_sentence_follows_the_interval() -> None:
    item = {"against": "band power", "difference": -0.1, "interval": [-0.2, -0.05], "verdict": "no", "because": ""}
    assert sentences({"comparisons": [item]}) == [
        "Better than band power: no, it is worse (difference of balanced accuracy -0.100, 95 % interval "
        "-0.200 to -0.050)."
    ]
    open_ = item | {"verdict": "not decided", "interval": [-0.2, 0.1]}
    assert "not decided" in sentences({"comparisons": [open_]})[0]
    assert "the interval holds zero" in sentences({"comparisons": [open_]})[0]
    nothing = {"smallest": None, "full": 0.5}
    assert "no meaning" in ablation_sentence(nothing)


def test_text_from_files_is_escaped(scores) -> None:
    hostile = json.loads(json.dumps(scores))
    hostile["tasks"][0]["title"] = "<script>alert(1)</script>"
    hostile["tasks"][0]["figures"] = []
    page = render(hostile, {})
    assert "<script>" not in page


def test_an_encoder_without_its_run_is_evaluated(run, tiny_snapshot, tmp_path) -> None:
    shutil.copytree(run / "encoder", tmp_path / "given")
    found = evaluate_run(settings(tmp_path / "given", tiny_snapshot, ablation=None, scratch_seeds=[0]))
    assert found["tasks"][0]["pretrain_seen"]["unknown"]
    assert found["encoder"]["objective"] is None
    assert "not known" in (tmp_path / "given" / "evaluation" / "report.html").read_text()


def test_tasks_are_those_whose_labels_the_snapshots_have(run, tiny_snapshot) -> None:
    config = EvaluateConfig(run=str(run))
    planned = plan_tasks(config, folds="subjects")
    assert [task.task for task in planned] == ["sleep_staging", "wake_deep"]
    assert [task.task for task in plan_tasks(config, names=["wake_deep"], folds=3)] == ["wake_deep"]
    with pytest.raises(ConfigError, match="folds: subjects"):
        plan_tasks(config)  # the tiny snapshot has no test split


def test_folders_without_an_encoder_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no exported encoder"):
        find_subject(tmp_path)
    (tmp_path / "config.yaml").write_text("tasks: []\n")
    with pytest.raises(ConfigError, match="not a pretraining run"):
        find_subject(tmp_path)
