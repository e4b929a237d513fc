"""Scores of predictions with chance levels and confidence intervals over subjects."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix

from trainer.evaluation.bootstrap import (
    MIN_SUBJECTS,
    REPLICATES,
    Draws,
    confusions,
    draw_subjects,
    interval,
    metrics_of_confusions,
    ranking_scores,
    replicates_of,
)

METRICS = {
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "weighted_f1": "weighted F1",
    "kappa": "Cohen's kappa",
    "auroc": "AUROC",
    "auprc": "AUC-PR",
}


def score_classes(
    truth: np.ndarray, probabilities: np.ndarray, *, labels: Sequence[str], subjects: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """Scores of exclusive classes, of which none may stand for "unknown".

    Args:
        truth: (N,) class indices.
        probabilities: (N, K), rows add up to 1.
        labels: K names; of two, AUROC and AUC-PR take the last as positive, of more the mean of each against the rest.
        subjects: N subjects; the intervals resample these, since windows of a subject are not independent.
        seed: Of the bootstrap.

    Returns:
        `n`, `subjects`, `support` per label, `confusion` (rows = truth), `recall` per label (`value`, `interval`) and
        per metric `value`, `chance` (of a guess that ignores the signal) and `interval` (95 %, percentiles; null
        under two subjects, too narrow under about ten). Balanced accuracy is the mean of the recalls of the classes
        that occur in `truth`. AUROC and AUC-PR are left out where one class occurs only.
    """
    truth = np.asarray(truth)
    classes = list(range(len(labels)))
    confusion = confusion_matrix(truth, probabilities.argmax(axis=1), labels=classes)
    counts = np.bincount(truth, minlength=len(labels))
    present = np.flatnonzero(counts)
    once, nobody = np.ones((1, 1)), np.zeros(len(truth), dtype=int)
    found = metrics_of_confusions(confusion[None].astype(float))
    if len(present) > 1:
        found |= ranking_scores(truth, probabilities, once, nobody)
    else:
        found["kappa"] = np.array([np.nan])
    draws = draw_subjects(subjects, seed=seed)
    replicates = {} if draws is None else replicates_of(truth, probabilities, draws)
    chance = _chance(counts)
    return {
        "n": len(truth),
        "subjects": len(set(subjects)),
        "support": {label: int(count) for label, count in zip(labels, counts, strict=True)},
        "confusion": confusion.tolist(),
        "recall": _recalls(truth, probabilities, labels=labels, draws=draws),
        "metrics": {
            name: _entry(values[0], chance[name], interval(replicates[name]) if replicates else None)
            for name, values in found.items()
        },
    }


def _chance(counts: np.ndarray) -> dict[str, float]:
    """Each metric of a guess that ignores the signal: always the most frequent class, or all of one rank."""
    present, total = np.count_nonzero(counts), counts.sum()
    share = counts.max() / total
    positive = counts[1:2] if len(counts) == 2 else counts[counts > 0]
    return {
        "balanced_accuracy": 1 / present,
        "macro_f1": 2 * share / (1 + share) / present,
        "weighted_f1": 2 * share / (1 + share) * share,
        "kappa": 0.0,
        "auroc": 0.5,
        "auprc": float(np.mean(positive / total)),
    }


def _recalls(
    truth: np.ndarray, probabilities: np.ndarray, *, labels: Sequence[str], draws: Draws | None
) -> dict[str, dict[str, Any]]:
    hit = probabilities.argmax(axis=1) == truth
    matrices = None if draws is None else confusions(truth, probabilities, draws)
    recalls: dict[str, dict[str, Any]] = {}
    for k, label in enumerate(labels):
        bounds = None
        if matrices is not None:
            actual = matrices[:, k].sum(axis=1)
            bounds = interval(np.divide(matrices[:, k, k], actual, out=np.full(len(actual), np.nan), where=actual > 0))
        value = float(hit[truth == k].mean()) if (truth == k).any() else None
        recalls[label] = {"value": value, "interval": None if value is None else bounds}
    return recalls


def compare(
    truth: np.ndarray,
    ours: np.ndarray,
    others: Sequence[np.ndarray],
    *,
    subjects: Sequence[str],
    metric: str,
    seed: int = 0,
) -> dict[str, Any]:
    """Difference of a metric between two ways to predict the same windows, and whether it is decided.

    Args:
        truth: (N,) class indices.
        ours: (N, K) probabilities.
        others: (N, K) of each run (seed) of the other way; its value is their mean, and the interval resamples the
            runs as well as the subjects.
        subjects: N subjects.
        metric: Name in `METRICS`.
        seed: Of the bootstrap.

    Returns:
        `difference`, `interval` (95 %, the same persons drawn for both), `verdict`: `yes` (better), `no` (worse) or
        `not decided`, and `because` where the number of subjects forbids a verdict.
    """
    nobody = np.zeros(len(truth), dtype=int)
    alone = Draws(index_N=nobody, times_RS=np.ones((1, 1)))
    value = replicates_of(truth, ours, alone)[metric][0] - np.mean(
        [replicates_of(truth, other, alone)[metric][0] for other in others]
    )
    draws = draw_subjects(subjects, seed=seed)
    bounds = None
    if draws is not None:
        runs = np.stack([replicates_of(truth, other, draws)[metric] for other in others])
        chosen = np.random.default_rng(seed).integers(len(runs), size=(len(runs), REPLICATES))
        theirs = np.take_along_axis(runs, chosen, axis=0).mean(axis=0)
        bounds = interval(replicates_of(truth, ours, draws)[metric] - theirs)
    num_subjects = len(set(subjects))
    is_few = num_subjects < MIN_SUBJECTS
    verdict = "not decided"
    if bounds is not None and not is_few:
        verdict = "yes" if bounds[0] > 0 else "no" if bounds[1] < 0 else verdict
    because = f"{num_subjects} subjects, a verdict takes {MIN_SUBJECTS}" if is_few else ""
    return {"difference": float(value), "interval": bounds, "verdict": verdict, "because": because}


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
    both = [scores for scores in per_label.values() if "auroc" in scores["metrics"]]
    return {
        "n": len(truth),
        "subjects": len(set(subjects)),
        "support": {label: int(truth[:, k].sum()) for k, label in enumerate(labels)},
        "per_label": {label: scores["metrics"] for label, scores in per_label.items()},
        "metrics": _mean_metrics(both),
    }


def _mean_metrics(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean of each metric; an interval where there is one label only."""
    return {
        name: _entry(
            np.mean([item["metrics"][name]["value"] for item in scores]),
            np.mean([item["metrics"][name]["chance"] for item in scores]),
            scores[0]["metrics"][name]["interval"] if len(scores) == 1 else None,
        )
        for name in (scores[0]["metrics"] if scores else ())
    }


def _entry(value: Any, chance: Any, bounds: list[float] | None) -> dict[str, Any]:
    finite = float(value) if np.isfinite(value) else None
    return {"value": finite, "chance": float(chance), "interval": bounds}
