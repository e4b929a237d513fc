"""Scores of predictions with chance levels and confidence intervals over subjects."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import (
    cohen_kappa_score,
    confusion_matrix,
    f1_score,
    recall_score,
    roc_auc_score,
)

REPLICATES = 1000
AUROC_REPLICATES = 200  # sorting makes one of them as dear as a hundred confusion matrices


def score_classes(
    truth: np.ndarray, probabilities: np.ndarray, *, labels: Sequence[str], subjects: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """Scores of exclusive classes: balanced accuracy, macro F1, kappa, and AUROC when there are two classes.

    Args:
        truth: (N,) class indices.
        probabilities: (N, K), rows add up to 1.
        labels: K names; AUROC takes the last as positive.
        subjects: N subjects; the intervals resample these, since windows of a subject are not independent.
        seed: Of the bootstrap.

    Returns:
        `n`, `subjects`, `support` per label, `confusion` (rows = truth) and per metric `value`, `chance` (of
        a guess that ignores the signal) and `interval` (95 %, percentiles; null under two subjects, too narrow
        under about ten). Balanced accuracy averages over
        the classes that occur in `truth`, as scikit-learn does.
    """
    truth = np.asarray(truth)
    guess = probabilities.argmax(axis=1)
    classes = list(range(len(labels)))
    confusion = confusion_matrix(truth, guess, labels=classes)
    present = np.unique(truth)
    values = {
        # balanced_accuracy_score by its definition; that function warns when a class is guessed that never occurs.
        "balanced_accuracy": recall_score(truth, guess, labels=present, average="macro"),
        "macro_f1": f1_score(truth, guess, labels=present, average="macro"),
        "kappa": cohen_kappa_score(truth, guess, labels=classes) if len(present) > 1 else float("nan"),
    }
    share = np.bincount(truth, minlength=len(labels)).max() / len(truth)
    chance = {
        "balanced_accuracy": 1 / len(present),
        "macro_f1": 2 * share / (1 + share) / len(present),  # always the most frequent class
        "kappa": 0.0,
    }
    intervals = _confusion_intervals(truth, guess, size=len(labels), subjects=subjects, seed=seed)
    if len(labels) == 2 and len(present) == 2:
        values["auroc"] = roc_auc_score(truth, probabilities[:, 1])
        chance["auroc"] = 0.5
        intervals["auroc"] = _auroc_interval(truth, probabilities[:, 1], subjects=subjects, seed=seed)
    return {
        "n": len(truth),
        "subjects": len(set(subjects)),
        "support": {label: int(count) for label, count in zip(labels, confusion.sum(axis=1), strict=True)},
        "confusion": confusion.tolist(),
        "metrics": {name: _entry(value, chance[name], intervals[name]) for name, value in values.items()},
    }


def score_yes_no(
    truth: np.ndarray, probabilities: np.ndarray, *, labels: Sequence[str], subjects: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """Scores of independent yes/no labels, averaged over the labels that have both answers.

    Args:
        truth: (N, K) of 0 and 1.
        probabilities: (N, K) in [0, 1]; above 0.5 is a yes.
        labels: K names.
        subjects: N subjects.
        seed: Of the bootstrap.

    Returns:
        As `score_classes`, without a confusion matrix; the interval is that of the first such label's mean.
    """
    per_label = {
        label: score_classes(
            truth[:, k].astype(int),
            np.stack([1 - probabilities[:, k], probabilities[:, k]], axis=1),
            labels=["no", "yes"],
            subjects=subjects,
            seed=seed,
        )
        for k, label in enumerate(labels)
    }
    both = [scores for scores in per_label.values() if len(scores["metrics"]) == 4]
    metrics = {
        name: _entry(
            np.mean([scores["metrics"][name]["value"] for scores in both]),
            np.mean([scores["metrics"][name]["chance"] for scores in both]),
            both[0]["metrics"][name]["interval"] if len(both) == 1 else None,
        )
        for name in (both[0]["metrics"] if both else ())
    }
    return {
        "n": len(truth),
        "subjects": len(set(subjects)),
        "support": {label: int(truth[:, k].sum()) for k, label in enumerate(labels)},
        "per_label": {label: scores["metrics"] for label, scores in per_label.items()},
        "metrics": metrics,
    }


def _entry(value: Any, chance: Any, interval: list[float] | None) -> dict[str, Any]:
    finite = float(value) if np.isfinite(value) else None
    return {"value": finite, "chance": float(chance), "interval": interval}


def _draws(subjects: Sequence[str], *, replicates: int, seed: int) -> tuple[np.ndarray, np.ndarray] | None:
    """(index of each window's subject (N,), times each subject is drawn (R, S)), or None under two subjects."""
    names, index = np.unique(np.asarray(subjects), return_inverse=True)
    if len(names) < 2:
        return None
    generator = np.random.default_rng(seed)
    return index, generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=replicates)


def _percentiles(values: np.ndarray) -> list[float] | None:
    finite = values[np.isfinite(values)]
    if len(finite) < len(values) / 2:
        return None
    low, high = np.percentile(finite, [2.5, 97.5])
    return [float(low), float(high)]


def _confusion_intervals(
    truth: np.ndarray, guess: np.ndarray, *, size: int, subjects: Sequence[str], seed: int
) -> dict[str, list[float] | None]:
    """Percentile intervals from confusion matrices summed over resampled subjects."""
    drawn = _draws(subjects, replicates=REPLICATES, seed=seed)
    if drawn is None:
        return dict.fromkeys(("balanced_accuracy", "macro_f1", "kappa"))
    index, times_RS = drawn
    per_subject = np.zeros((times_RS.shape[1], size, size))
    np.add.at(per_subject, (index, truth, guess), 1)
    confusion = np.tensordot(times_RS.astype(float), per_subject, axes=1)
    hit = np.diagonal(confusion, axis1=1, axis2=2)
    actual, guessed, total = confusion.sum(axis=2), confusion.sum(axis=1), confusion.sum(axis=(1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = np.where(actual > 0, hit / actual, np.nan)
        f1 = np.where(actual > 0, 2 * hit / (actual + guessed), np.nan)
        agreement = hit.sum(axis=1) / total
        expected = (actual * guessed).sum(axis=1) / total**2
        kappa = (agreement - expected) / (1 - expected)
    return {
        "balanced_accuracy": _percentiles(np.nanmean(recall, axis=1)),
        "macro_f1": _percentiles(np.nanmean(f1, axis=1)),
        "kappa": _percentiles(kappa),
    }


def _auroc_interval(truth: np.ndarray, score: np.ndarray, *, subjects: Sequence[str], seed: int) -> list[float] | None:
    drawn = _draws(subjects, replicates=AUROC_REPLICATES, seed=seed)
    if drawn is None:
        return None
    index, times_RS = drawn
    values = np.full(len(times_RS), np.nan)
    for replicate, times in enumerate(times_RS):
        weight = times[index]
        chosen = weight > 0
        if len(np.unique(truth[chosen])) == 2:
            values[replicate] = roc_auc_score(truth[chosen], score[chosen], sample_weight=weight[chosen])
    return _percentiles(values)
