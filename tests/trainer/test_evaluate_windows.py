from pathlib import Path

import pytest

from manifests.config import dump_yaml
from manifests.errors import ConfigError
from manifests.tasks import Task, load_task
from trainer.evaluation.config import TaskEvaluation
from trainer.evaluation.windows import load_labelled

DEEP = {"id": "deep", "loss": "bce", "labels": ["deep"], "map": {"N3": "deep", "W": None, "?": None}}


def own_task(folder: Path, **changes: object) -> Task:
    path = folder / "own.yaml"
    values = {**load_task("wake_deep").model_dump(mode="json"), **changes}
    path.write_text(dump_yaml({**values, "id": "own"}))
    return load_task(path)


def settings(snapshot: Path) -> TaskEvaluation:
    return TaskEvaluation.model_validate({"task": "own", "snapshots": [str(snapshot)], "folds": 2})


def test_a_yes_or_no_is_two_classes(tiny_snapshot: Path, tmp_path: Path) -> None:
    yes_no, left_out, _ = load_labelled(own_task(tmp_path, **DEEP), settings(tiny_snapshot))
    classes, others, _ = load_labelled(own_task(tmp_path), settings(tiny_snapshot))
    assert left_out == others == {"no label of the task": left_out["no label of the task"]}
    assert yes_no["key"].tolist() == classes["key"].tolist()
    assert yes_no["target"].tolist() == classes["target"].tolist()  # no, deep as wake, deep
    assert set(yes_no["target"]) == {0, 1}
    assert own_task(tmp_path, **DEEP).answers == ["not deep", "deep"]


def test_what_has_no_single_answer_is_refused(tiny_snapshot: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"several yes/no labels.*kymo adapt method=linear_probe"):
        load_labelled(own_task(tmp_path, loss="bce"), settings(tiny_snapshot))
    with pytest.raises(ConfigError, match="its windows lie at events"):
        load_labelled(own_task(tmp_path, recipe="eeg200_trials"), settings(tiny_snapshot))
