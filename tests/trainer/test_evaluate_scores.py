import numpy as np
import pytest
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    f1_score,
    roc_auc_score,
)

from trainer.evaluation.scores import compare, score_classes, score_yes_no

RNG = np.random.default_rng(0)


def guesses(truth: np.ndarray, size: int, *, right: float) -> np.ndarray:
    probabilities = RNG.dirichlet(np.ones(size), len(truth))
    return probabilities + right * RNG.random((len(truth), 1)) * np.eye(size)[truth]


def test_values_are_those_of_scikit_learn():
    truth = RNG.integers(0, 5, 400)
    probabilities = guesses(truth, 5, right=0.8)
    guess = probabilities.argmax(axis=1)
    scores = score_classes(truth, probabilities, labels=list("WABCD"), subjects=[str(i % 8) for i in range(400)])
    values = {name: entry["value"] for name, entry in scores["metrics"].items()}
    assert values == pytest.approx(
        {
            "balanced_accuracy": balanced_accuracy_score(truth, guess),
            "macro_f1": f1_score(truth, guess, average="macro"),
            "weighted_f1": f1_score(truth, guess, average="weighted"),
            "kappa": cohen_kappa_score(truth, guess),
            "auroc": np.mean([roc_auc_score(truth == k, probabilities[:, k]) for k in range(5)]),
            "auprc": np.mean([average_precision_score(truth == k, probabilities[:, k]) for k in range(5)]),
        }
    )
    assert scores["n"] == 400
    assert scores["subjects"] == 8
    assert scores["metrics"]["balanced_accuracy"]["chance"] == pytest.approx(0.2)
    for entry in scores["metrics"].values():
        low, high = entry["interval"]
        assert low < entry["value"] < high


def test_binary_balanced_accuracy_is_not_plain_accuracy():
    truth = np.array([0] * 90 + [1] * 10)
    probabilities = np.tile([0.9, 0.1], (100, 1))
    scores = score_classes(truth, probabilities, labels=["no", "yes"], subjects=["a", "b"] * 50)
    assert scores["metrics"]["balanced_accuracy"]["value"] == pytest.approx(0.5)
    assert scores["metrics"]["kappa"]["value"] == pytest.approx(0.0)
    always = scores["metrics"]["macro_f1"]
    assert always["value"] == pytest.approx(always["chance"])


def test_binary_tasks_have_auroc():
    truth = RNG.integers(0, 2, 200)
    probabilities = guesses(truth, 2, right=0.5)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    scores = score_classes(truth, probabilities, labels=["a", "b"], subjects=[str(i % 5) for i in range(200)])
    entry = scores["metrics"]["auroc"]
    assert entry["value"] == pytest.approx(roc_auc_score(truth, probabilities[:, 1]))
    assert entry["interval"][0] < entry["value"] < entry["interval"][1]
    precision = scores["metrics"]["auprc"]
    assert precision["value"] == pytest.approx(average_precision_score(truth, probabilities[:, 1]))
    assert precision["chance"] == pytest.approx(truth.mean())


def test_tied_scores_count_half():
    truth = np.array([0, 1, 0, 1, 1, 0])
    score = np.array([0.2, 0.2, 0.1, 0.9, 0.2, 0.9])
    scores = score_classes(truth, np.stack([1 - score, score], axis=1), labels=["a", "b"], subjects=list("xyzxyz"))
    assert scores["metrics"]["auroc"]["value"] == pytest.approx(roc_auc_score(truth, score))
    assert scores["metrics"]["auprc"]["value"] == pytest.approx(average_precision_score(truth, score))


def test_recall_by_class_has_an_interval_over_subjects():
    truth = np.tile([0, 1], 20)
    probabilities = np.eye(2)[np.where(np.arange(40) < 10, 0, truth)]  # subject w guesses 0 always
    subjects = np.repeat(list("wxyz"), 10).tolist()
    recall = score_classes(truth, probabilities, labels=["a", "b"], subjects=subjects)["recall"]
    assert recall["a"] == {"value": 1.0, "interval": [1.0, 1.0]}
    assert recall["b"]["value"] == pytest.approx(0.75)
    assert recall["b"]["interval"][0] < 0.75 < recall["b"]["interval"][1]


def paired(num_subjects: int, *, ours: float, theirs: float) -> dict:
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 2, 40 * num_subjects)
    subjects = np.repeat([f"s{n}" for n in range(num_subjects)], 40).tolist()

    def guess(right: float) -> np.ndarray:
        return np.eye(2)[np.where(rng.random(len(truth)) < right, truth, 1 - truth)]

    others = [guess(theirs) for _ in range(3)]
    return compare(truth, guess(ours), others, subjects=subjects, metric="balanced_accuracy")


def test_a_comparison_is_decided_by_the_interval_of_the_difference():
    assert paired(12, ours=0.9, theirs=0.7)["verdict"] == "yes"
    assert paired(12, ours=0.7, theirs=0.9)["verdict"] == "no"
    equal = paired(12, ours=0.8, theirs=0.8)
    assert equal["verdict"] == "not decided"
    assert equal["interval"][0] < 0 < equal["interval"][1]


def test_five_subjects_decide_nothing():
    found = paired(5, ours=0.95, theirs=0.6)
    assert found["interval"][0] > 0
    assert found["verdict"] == "not decided"
    assert found["because"] == "5 subjects, a verdict takes 6"


def test_interval_counts_subjects_and_not_windows():
    """Two subjects, one all right, one all wrong: windows are many, yet nothing is known."""
    truth = np.tile([0, 1], 500)
    right = np.arange(1000) < 500
    probabilities = np.eye(2)[np.where(right, truth, 1 - truth)]
    scores = score_classes(truth, probabilities, labels=["a", "b"], subjects=np.where(right, "x", "y").tolist())
    assert scores["metrics"]["balanced_accuracy"]["interval"] == [0.0, 1.0]


def test_one_subject_and_absent_classes_give_no_nonsense():
    truth = np.zeros(20, dtype=int)
    probabilities = np.tile([0.2, 0.5, 0.3], (20, 1))
    scores = score_classes(truth, probabilities, labels=["a", "b", "c"], subjects=["x"] * 20)
    assert scores["metrics"]["balanced_accuracy"] == {"value": 0.0, "chance": 1.0, "interval": None}
    assert scores["metrics"]["kappa"]["value"] is None
    assert scores["support"] == {"a": 20, "b": 0, "c": 0}


def test_means_over_labels_are_those_of_scikit_learn_and_have_intervals():
    rng = np.random.default_rng(5)
    truth = (rng.random((300, 3)) < [0.5, 0.2, 0.1]).astype(int)
    probabilities = np.clip(0.35 * truth + rng.random((300, 3)) * 0.6, 0, 1)
    guess = (probabilities > 0.5).astype(int)
    subjects = [f"s{i // 15}" for i in range(300)]
    scores = score_yes_no(truth, probabilities, labels=list("abc"), subjects=subjects)
    both = list(zip(truth.T, guess.T, strict=True))
    assert {name: entry["value"] for name, entry in scores["metrics"].items()} == pytest.approx(
        {
            "balanced_accuracy": np.mean([balanced_accuracy_score(t, g) for t, g in both]),
            "kappa": np.mean([cohen_kappa_score(t, g) for t, g in both]),
            "macro_f1": f1_score(truth, guess, average="macro"),
            "weighted_f1": f1_score(truth, guess, average="weighted"),
            "auroc": roc_auc_score(truth, probabilities, average="macro"),
            "auprc": average_precision_score(truth, probabilities, average="macro"),
        }
    )
    for name, entry in scores["metrics"].items():
        low, high = entry["interval"]
        assert low < entry["value"] < high, name
    always = f1_score(truth, np.ones_like(truth), average="weighted")
    assert scores["metrics"]["weighted_f1"]["chance"] == pytest.approx(always)


def test_the_interval_of_a_mean_draws_the_same_persons_for_all_labels():
    """Two labels of which one is right where the other is wrong: their mean does not vary with the persons drawn."""
    truth = np.tile([[0, 0], [1, 1]], (40, 1))
    is_first = np.repeat(np.arange(8) < 4, 10)
    right = np.stack([is_first, ~is_first], axis=1)
    probabilities = np.where(right, truth, 1 - truth).astype(float)
    scores = score_yes_no(truth, probabilities, labels=["a", "b"], subjects=np.repeat(list("stuvwxyz"), 10).tolist())
    assert scores["metrics"]["balanced_accuracy"]["value"] == pytest.approx(0.5)
    assert scores["metrics"]["balanced_accuracy"]["interval"] == pytest.approx([0.5, 0.5])
    low, high = scores["per_label"]["a"]["balanced_accuracy"]["interval"]
    assert high - low > 0.5


def test_one_yes_or_no_is_scored_as_two_classes():
    truth = RNG.integers(0, 2, 200)
    yes = np.clip(0.3 * truth + 0.7 * RNG.random(200), 0, 1)
    subjects = [str(i % 5) for i in range(200)]
    scores = score_yes_no(truth[:, None], yes[:, None], labels=["af"], subjects=subjects)
    two = score_classes(truth, np.stack([1 - yes, yes], axis=1), labels=["not af", "af"], subjects=subjects)
    assert scores == two
    assert scores["metrics"]["auroc"]["value"] == pytest.approx(roc_auc_score(truth, yes))
    assert scores["support"] == {"not af": int((truth == 0).sum()), "af": int(truth.sum())}


def test_labels_that_all_have_one_answer_have_no_mean():
    scores = score_yes_no(np.zeros((4, 2), int), np.full((4, 2), 0.2), labels=["a", "b"], subjects=list("xyxy"))
    assert scores["metrics"] == {}


def test_yes_no_labels_average_over_those_with_both_answers():
    truth = np.stack([RNG.integers(0, 2, 100), np.zeros(100, dtype=int)], axis=1)
    probabilities = np.stack([0.8 * truth[:, 0] + 0.1, np.full(100, 0.2)], axis=1)
    scores = score_yes_no(truth, probabilities, labels=["a", "b"], subjects=[str(i % 4) for i in range(100)])
    assert scores["metrics"]["auroc"]["value"] == pytest.approx(1.0)
    assert scores["metrics"]["balanced_accuracy"]["value"] == pytest.approx(1.0)
    assert "auroc" not in scores["per_label"]["b"]
