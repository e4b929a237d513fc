"""Training end to end for comparison: it learns, no test person has a say, and the report names it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manifests.tasks import load_task
from trainer.evaluation.assess import evaluate_run
from trainer.evaluation.config import EndToEndConfig, EvaluateConfig, TaskEvaluation
from trainer.evaluation.features import Reading, random_encoder
from trainer.evaluation.probe import Folds
from trainer.evaluation.scratch import train_end_to_end
from trainer.evaluation.windows import load_labelled, read_windows
from trainer.export import save_encoder
from trainer.models.sleep import SleepEncoderConfig

ENCODER = SleepEncoderConfig(width=16, depth=1)
READING = Reading(groups={"BAS": ("eeg",), "EKG": ("ecg",)}, view="zscore", segment_s=None)


def labelled(snapshot: Path) -> Any:
    settings = TaskEvaluation(task="wake_deep", snapshots=[str(snapshot)], folds=2)
    return load_labelled(load_task("wake_deep"), settings)[0]


def train(rows: Any, *, steps: int, seed: int = 0, folds: Folds = 2) -> tuple[np.ndarray, np.ndarray]:
    return train_end_to_end(
        rows,
        ENCODER,
        READING,
        EndToEndConfig(steps=steps, batch=8, lr=1e-2),
        folds=folds,
        fold_seed=0,
        seed=seed,
        num_classes=2,
        device="cpu",
    )


def test_every_window_is_tested_once_and_the_seed_decides_the_rest(tiny_snapshot: Path) -> None:
    rows = labelled(tiny_snapshot)
    tested, probabilities = train(rows, steps=2)
    assert tested.tolist() == list(range(len(rows)))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, atol=1e-9)
    np.testing.assert_array_equal(train(rows, steps=2)[1], probabilities)
    assert not np.array_equal(train(rows, steps=2, seed=1)[1], probabilities)


def test_labels_of_the_tested_persons_change_nothing(tiny_snapshot: Path) -> None:
    rows = labelled(tiny_snapshot)
    is_test = rows["subject"].isin(rows["subject"].unique()[:3]).to_numpy()
    rows = rows.assign(split=np.where(is_test, "test", "train"))
    turned = rows.assign(target=np.where(is_test, 1 - rows["target"], rows["target"]))
    others = rows.assign(target=np.where(is_test, rows["target"], 1 - rows["target"]))
    tested, probabilities = train(rows, steps=4, folds="split")
    assert tested.tolist() == np.flatnonzero(is_test).tolist()
    np.testing.assert_array_equal(train(turned, steps=4, folds="split")[1], probabilities)
    assert not np.array_equal(train(others, steps=4, folds="split")[1], probabilities)


def test_it_learns_what_can_be_learnt(tiny_snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A label that the mean of the signal tells is found on persons that were not trained on."""
    rows = labelled(tiny_snapshot)
    target = np.arange(len(rows)) % 2
    rows = rows.assign(target=target)
    of_key = dict(zip(rows["key"], target, strict=True))

    def shifted(table: Any, *, batch: int) -> Any:
        for windows in read_windows(table, batch=batch):
            for window in windows:
                window.arrays = {
                    kind: array + np.int16(150 * of_key[window.key]) for kind, array in window.arrays.items()
                }
            yield windows

    monkeypatch.setattr("trainer.evaluation.scratch.read_windows", shifted)
    tested, probabilities = train(rows, steps=40)
    assert (probabilities.argmax(axis=1) == target[tested]).mean() > 0.9


def test_the_report_names_it_and_the_probe_with_dropout(tiny_snapshot: Path, tmp_path: Path) -> None:
    save_encoder(tmp_path / "encoder", random_encoder(ENCODER, seed=5), recipes={}, step=3)
    config = EvaluateConfig.model_validate(
        {
            "run": str(tmp_path / "encoder"),
            "tasks": [{"task": "wake_deep", "snapshots": [str(tiny_snapshot)], "folds": 2}],
            "scratch_seeds": [0],
            "end_to_end": {"steps": 2, "batch": 8, "seeds": [0, 1]},
            "ablation": {"subsets": 2, "dropout": 3},
            "retrieval": None,
            "device": "cpu",
        }
    )
    (task,) = evaluate_run(config)["tasks"]
    assert {"trained from scratch, seed 0", "trained from scratch, seed 1"} <= task["methods"].keys()
    assert task["over_seeds"]["trained from scratch"]["seeds"] == 2
    assert [item["against"] for item in task["comparisons"]] == ["random weights", "trained from scratch", "band power"]
    lines = task["ablation"]
    assert list(lines) == ["pretrained", "random weights, seed 0", "pretrained, probe with channel dropout"]
    drawn = [[row["subsets"] for row in found["counts"]] for found in lines.values()]
    assert drawn[0] == drawn[1] == drawn[2]
    assert lines["pretrained"]["counts"] != lines["pretrained, probe with channel dropout"]["counts"]
    page = (tmp_path / "encoder" / "evaluation" / "report.html").read_text()
    assert "Better than trained from scratch" in page
    assert "probe with channel dropout" in page
