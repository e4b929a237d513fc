from math import comb

import numpy as np
import pandas as pd
import pytest

from manifests.tasks import load_task
from trainer.evaluation.ablation import ablate, choose_montage, draw_subsets, judge, numbers_of_channels
from trainer.evaluation.channelwise import band_power
from trainer.evaluation.config import AblationConfig, TaskEvaluation
from trainer.evaluation.features import features_of
from trainer.evaluation.probe import fit_folds
from trainer.evaluation.windows import load_labelled
from trainer.tiny import write_tiny_snapshot

MONTAGE = tuple(f"eeg:C{n}" for n in range(1, 9))


def test_subsets_are_distinct_the_same_every_time_and_all_of_them_where_there_are_few() -> None:
    subsets = draw_subsets(MONTAGE, counts=[8, 5, 1], number=20, seed=0)
    assert subsets == draw_subsets(MONTAGE, counts=[8, 5, 1], number=20, seed=0)
    assert subsets != draw_subsets(MONTAGE, counts=[8, 5, 1], number=20, seed=1)
    assert subsets[8] == [MONTAGE]
    assert len(set(subsets[5])) == 20
    assert set(subsets[1]) == {(symbol,) for symbol in MONTAGE}
    assert all(len(set(subset)) == 5 and set(subset) <= set(MONTAGE) for subset in subsets[5])


def test_large_montages_are_drawn_without_listing_all_subsets() -> None:
    many = [f"eeg:{n}" for n in range(64)]
    assert comb(64, 20) > 10**15
    assert len(set(draw_subsets(many, counts=[20], number=20, seed=0)[20])) == 20


def test_numbers_run_from_all_channels_down_to_one() -> None:
    assert numbers_of_channels(7, None) == [7, 6, 5, 4, 3, 2, 1]
    assert numbers_of_channels(64, None)[0] == 64
    assert numbers_of_channels(64, None)[-12:] == list(range(12, 0, -1))
    assert numbers_of_channels(19, [3, 40, 1]) == [19, 3, 1]


def test_the_montage_is_the_one_with_most_channel_windows() -> None:
    rows = pd.DataFrame({"symbols": [("a", "b", "c")] * 5 + [("a", "b", "d")] * 5 + [("a",)]})
    assert choose_montage(rows) == ("a", "b", "c")
    rows = pd.DataFrame({"symbols": [("a", "b", "c")] * 5 + [("a", "b", "d")] * 6})
    assert choose_montage(rows) == ("a", "b")


def test_the_least_number_that_keeps_95_percent() -> None:
    counts = [{"n": n, "mean": mean} for n, mean in ((4, 0.8), (3, 0.75), (2, 0.77), (1, 0.6))]
    found = judge(counts, chance=0.5)
    assert found["threshold"] == pytest.approx(0.76)
    assert found["smallest"] == 2
    assert found["stable_from"] == 4
    assert judge(counts, chance=0.77)["smallest"] is None


def test_ablation_stores_subsets_by_symbol_and_scores_the_full_montage_first(tmp_path) -> None:
    channels = {"eeg": ("eeg:C3-M2", "eeg:C4-M1", "eeg:O1-M2")}
    write_tiny_snapshot(tmp_path / "s", channels=channels, num_subjects=5, windows_per_subject=10, num_held_out=1)
    task = load_task("wake_deep")
    rows, _, snapshots = load_labelled(
        task, TaskEvaluation(task="wake_deep", snapshots=[str(tmp_path / "s")], folds="subjects")
    )
    extractor = band_power(task)
    features = features_of(
        rows, extractor, cache=tmp_path / "cache", snapshots=[item.digest for item in snapshots], batch=8
    )
    folds = fit_folds("linear", features, rows, folds="subjects")
    found = ablate(folds, rows, extractor, AblationConfig(subsets=2), labels=task.labels, batch=8, seed=0)
    assert found is not None
    assert found["montage"] == sorted(channels["eeg"])
    assert [row["n"] for row in found["counts"]] == [3, 2, 1]
    assert [len(row["subsets"]) for row in found["counts"]] == [1, 2, 2]
    guess = np.zeros(len(rows), dtype=int)
    for fold in folds:
        guess[fold.test] = fold.model.predict(features[fold.test])
    target = rows["target"].to_numpy()
    assert found["full"] == pytest.approx(np.mean([(guess[target == k] == k).mean() for k in (0, 1)]))
    assert found["counts"][1]["interval"][0] <= found["counts"][1]["mean"] <= found["counts"][1]["interval"][1]
