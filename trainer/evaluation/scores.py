"""Scores of predictions with chance levels and confidence intervals over subjects."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix

from manifests.tasks import negative
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
    """Scores of yes/no labels: of one label those of two classes, of several the mean over the labels.

    Means are scikit-learn's of multilabel data, over the labels that have both answers: the F1 scores are those of the
    yes (`weighted_f1` weighs them by how often a label is true), all others each label's own.

    Args:
        truth: (N, K) of 0 and 1.
        probabilities: (N, K) in [0, 1]; above 0.5 is a yes.
        labels: K names.
        subjects: N subjects.
        seed: Of the bootstrap.

    Returns:
        Of one label, what `score_classes` gives for the classes `not LABEL` and LABEL. Of several, the same without
        `confusion` and `recall`, and in `per_label` the metrics of each; an interval is that of the mean, with the
        same persons drawn for all labels.
    """
    truth = np.asarray(truth).astype(int)
    if len(labels) == 1:
        names = [negative(labels[0]), labels[0]]
        return score_classes(truth[:, 0], _two(probabilities[:, 0]), labels=names, subjects=subjects, seed=seed)
    per_label = {
        label: score_classes(
            truth[:, k], _two(probabilities[:, k]), labels=["no", "yes"], subjects=subjects, seed=seed
        )["metrics"]
        for k, label in enumerate(labels)
    }
    has_both = np.flatnonzero((truth.min(axis=0) == 0) & (truth.max(axis=0) == 1))
    alone = Draws(index_N=np.zeros(len(truth), dtype=int), times_RS=np.ones((1, 1)))
    metrics: dict[str, Any] = {}
    if len(has_both):
        found = _label_means(truth[:, has_both], probabilities[:, has_both], alone)
        draws = draw_subjects(subjects, seed=seed)
        replicates = {} if draws is None else _label_means(truth[:, has_both], probabilities[:, has_both], draws)
        chance = _yes_no_chance(truth[:, has_both].mean(axis=0))
        metrics = {
            name: _entry(values[0], chance[name], interval(replicates[name]) if replicates else None)
            for name, values in found.items()
        }
    return {
        "n": len(truth),
        "subjects": len(set(subjects)),
        "support": {label: int(truth[:, k].sum()) for k, label in enumerate(labels)},
        "per_label": per_label,
        "metrics": metrics,
    }


def _two(yes_N: np.ndarray) -> np.ndarray:
    return np.stack([1 - yes_N, yes_N], axis=1)


def _label_means(truth: np.ndarray, probabilities: np.ndarray, draws: Draws) -> dict[str, np.ndarray]:
    """Every metric as the mean over labels in each draw, (R,) each; a label with one answer in a draw is left out."""
    by_label: dict[str, list[np.ndarray]] = {}
    weights = []
    for k in range(truth.shape[1]):
        two = _two(probabilities[:, k])
        confusion_R22 = confusions(truth[:, k], two, draws)
        actual, guessed = confusion_R22.sum(axis=2), confusion_R22.sum(axis=1)
        is_whole = actual.min(axis=1) > 0
        with np.errstate(invalid="ignore", divide="ignore"):
            f1 = 2 * confusion_R22[:, 1, 1] / (actual[:, 1] + guessed[:, 1])
        found = replicates_of(truth[:, k], two, draws) | {"macro_f1": f1, "weighted_f1": f1}
        for name, values in found.items():
            by_label.setdefault(name, []).append(np.where(is_whole, values, np.nan))
        weights.append(np.where(is_whole, actual[:, 1], 0.0))
    weight_KR = np.stack(weights)
    means = {}
    for name, listed in by_label.items():
        values_KR = np.stack(listed)
        share_KR = (weight_KR if name == "weighted_f1" else 1.0) * np.isfinite(values_KR)
        with np.errstate(invalid="ignore"):
            means[name] = np.nansum(values_KR * share_KR, axis=0) / share_KR.sum(axis=0)
    return means


def _yes_no_chance(share_K: np.ndarray) -> dict[str, float]:
    """Mean over labels of each metric of a guess that ignores the signal; its best F1 is that of yes to all."""
    f1 = 2 * share_K / (1 + share_K)
    return {
        "balanced_accuracy": 0.5,
        "macro_f1": float(f1.mean()),
        "weighted_f1": float(np.average(f1, weights=share_K)),
        "kappa": 0.0,
        "auroc": 0.5,
        "auprc": float(share_K.mean()),
    }


def _entry(value: Any, chance: Any, bounds: list[float] | None) -> dict[str, Any]:
    finite = float(value) if np.isfinite(value) else None
    return {"value": finite, "chance": float(chance), "interval": bounds}
