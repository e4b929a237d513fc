import numpy as np
import pandas as pd
import pytest

from trainer.evaluation.probe import fit_folds, predict_folds, split_rows
from trainer.evaluation.recordings import recording_retrieval


def make_rows(num_subjects: int, per_subject: int = 20, *, num_classes: int = 2) -> pd.DataFrame:
    splits = ["train"] * (num_subjects - 4) + ["val"] * 2 + ["test"] * 2
    return pd.DataFrame(
        {
            "subject": np.repeat([f"s{n:02d}" for n in range(num_subjects)], per_subject),
            "recording": np.repeat([f"r{n:02d}" for n in range(num_subjects)], per_subject),
            "split": np.repeat(splits, per_subject),
            "start_s": np.tile(np.arange(per_subject) * 30.0, num_subjects),
            "target": np.tile(np.arange(per_subject) % num_classes, num_subjects),
        }
    )


def make_features(rows: pd.DataFrame, *, signal: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((len(rows), 6)) + signal * np.eye(6)[rows["target"]] + 5.0


@pytest.mark.parametrize("name", ["linear", "knn"])
@pytest.mark.parametrize("folds", ["split", "subjects", 3])
def test_probes_find_what_is_there_and_no_more(name, folds) -> None:
    rows = make_rows(6, 16)
    scores = []
    for signal in (4.0, 0.0):
        features = make_features(rows, signal=signal)
        fitted = fit_folds(name, features, rows, folds=folds)
        tested, probabilities = predict_folds(fitted, features, num_classes=2)
        assert list(tested) == sorted(tested)
        assert probabilities.sum(axis=1) == pytest.approx(1.0)
        scores.append((probabilities.argmax(axis=1) == rows["target"].to_numpy()[tested]).mean())
        assert len(tested) == (32 if folds == "split" else len(rows))
    assert scores[0] > 0.9
    assert abs(scores[1] - 0.5) < 3 * 0.5 / np.sqrt(len(tested))  # three standard errors of guessing


def test_a_subject_is_never_on_both_sides() -> None:
    rows = make_rows(9)
    for folds in ("split", "subjects", 4):
        for train, test in split_rows(rows, folds, seed=0):
            assert not set(rows["subject"].iloc[train]) & set(rows["subject"].iloc[test])
    assert len(list(split_rows(rows, "subjects", seed=0))) == 9


def test_tuning_never_sees_the_tested_labels() -> None:
    """Other labels on the test windows change nothing of what was fitted."""
    rows = make_rows(8)
    features = make_features(rows, signal=1.0)
    changed = rows.copy()
    is_test = changed["split"] == "test"
    changed.loc[is_test, "target"] = 1 - changed.loc[is_test, "target"]
    one, other = (predict_folds(fit_folds("linear", features, r), features, num_classes=2)[1] for r in (rows, changed))
    assert np.array_equal(one, other)


def test_what_the_value_was_chosen_on_is_told() -> None:
    rows = make_rows(6, 8)
    features = make_features(rows, signal=1.0)
    assert fit_folds("linear", features, rows)[0].chosen_on == "val"
    assert fit_folds("linear", features, rows, folds="subjects")[0].chosen_on == "subjects of train"
    alone = rows[rows["subject"].isin(["s00", "s05"])].reset_index(drop=True)
    assert fit_folds("linear", features[: len(alone)], alone)[0].chosen_on == "nothing"


def test_classes_that_training_lacks_get_no_probability() -> None:
    rows = make_rows(8, num_classes=3)
    features = make_features(rows, signal=3.0)
    poor = rows.copy()
    poor.loc[(poor["split"] != "test") & (poor["target"] == 2), "target"] = 1
    _, probabilities = predict_folds(fit_folds("linear", features, poor), features, num_classes=3)
    assert probabilities.shape[1] == 3
    assert np.all(probabilities[:, 2] == 0)


def test_a_window_finds_its_recording_only_where_recordings_differ() -> None:
    rows = make_rows(6)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((len(rows), 8))
    blind = recording_retrieval(noise, rows)
    told = recording_retrieval(noise + 6 * rng.standard_normal((6, 8))[np.repeat(np.arange(6), 20)], rows)
    assert told is not None
    assert blind is not None
    assert told["top1"] > 0.95
    assert blind["top1"] < 0.35
    assert blind["chance"] == pytest.approx(17.1 / 117.1, abs=0.01)  # of 119 others those within 60 s are out
    assert told["recordings"] == 6


def test_neighbours_in_time_are_no_candidates() -> None:
    rows = make_rows(6)
    angle = np.linspace(0, 3, len(rows))
    drift = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    near, far = (recording_retrieval(drift, rows, near_s=near_s) for near_s in (30.0, 600.0))
    assert near is not None
    assert near["top1"] > 0.9
    assert far is None
