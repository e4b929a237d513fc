"""Intervals over subjects: windows of a person are not independent, so persons are resampled and not windows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

REPLICATES = 1000
# With fewer persons not even all of them going one way is unlikely by chance: 2 x 0.5^5 > 0.05 (sign test).
MIN_SUBJECTS = 6
FEW_SUBJECTS = 10  # resampling fewer gives too narrow an interval
CELLS = 1 << 14  # draws x windows that are ranked together: arrays that a processor core keeps at hand


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Draws:
    """R draws of S subjects with replacement.

    Attributes:
        index_N: Subject of each window.
        times_RS: How often each subject is drawn.
    """

    index_N: np.ndarray
    times_RS: np.ndarray


def draw_subjects(subjects: Sequence[str], *, replicates: int = REPLICATES, seed: int = 0) -> Draws | None:
    """Draws of the subjects of N windows; None under two subjects. Equal arguments give equal draws."""
    names, index = np.unique(np.asarray(subjects), return_inverse=True)
    if len(names) < 2:
        return None
    generator = np.random.default_rng(seed)
    times = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=replicates)
    return Draws(index_N=index, times_RS=times)


def interval(values_R: np.ndarray) -> list[float] | None:
    """2.5 and 97.5 % of the finite replicates; None where under half of them are finite."""
    finite = values_R[np.isfinite(values_R)]
    if len(finite) < max(1, len(values_R) / 2):
        return None
    low, high = np.percentile(finite, [2.5, 97.5])
    return [float(low), float(high)]


def replicates_of(truth: np.ndarray, probabilities: np.ndarray, draws: Draws) -> dict[str, np.ndarray]:
    """Every metric of `metrics_of_confusions` and `ranking_scores` in every draw, (R,) each."""
    return metrics_of_confusions(confusions(truth, probabilities, draws)) | ranking_scores(
        truth, probabilities, draws.times_RS, draws.index_N
    )


def confusions(truth: np.ndarray, probabilities: np.ndarray, draws: Draws) -> np.ndarray:
    """Confusion matrix of each draw, (R, K, K), rows = truth."""
    size = probabilities.shape[1]
    per_subject_SKK = np.zeros((draws.times_RS.shape[1], size, size))
    np.add.at(per_subject_SKK, (draws.index_N, truth, probabilities.argmax(axis=1)), 1)
    return np.tensordot(draws.times_RS.astype(float), per_subject_SKK, axes=1)


def metrics_of_confusions(confusion_RKK: np.ndarray) -> dict[str, np.ndarray]:
    """Balanced accuracy (mean of the recalls of classes that occur), F1 scores and kappa of each matrix, (R,) each.

    As scikit-learn's on the classes that occur; kappa is not a number where all is one class and all is guessed so.
    """
    hit = np.diagonal(confusion_RKK, axis1=1, axis2=2)
    actual, guessed, total = confusion_RKK.sum(axis=2), confusion_RKK.sum(axis=1), confusion_RKK.sum(axis=(1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = np.where(actual > 0, hit / actual, np.nan)
        f1 = np.where(actual > 0, 2 * hit / (actual + guessed), np.nan)
        agreement = hit.sum(axis=1) / total
        expected = (actual * guessed).sum(axis=1) / total**2
        return {
            "balanced_accuracy": np.nanmean(recall, axis=1),
            "macro_f1": np.nanmean(f1, axis=1),
            "weighted_f1": np.nansum(f1 * actual, axis=1) / total,
            "kappa": (agreement - expected) / (1 - expected),
        }


def ranking_scores(
    truth: np.ndarray, probabilities: np.ndarray, times_RS: np.ndarray, index_N: np.ndarray
) -> dict[str, np.ndarray]:
    """AUROC and average precision in each draw, (R,) each.

    Of two classes the last is the positive one; of more, the mean over each against the rest.
    """
    size = probabilities.shape[1]
    classes = [1] if size == 2 else range(size)
    both = [_rank(truth == k, probabilities[:, k], times_RS, index_N) for k in classes]
    with np.errstate(invalid="ignore"):
        auroc, auprc = (np.stack(values) for values in zip(*both, strict=True))
        counted = np.isfinite(auroc).sum(axis=0)
        return {
            name: np.where(counted > 0, np.nansum(values, axis=0) / np.maximum(counted, 1), np.nan)
            for name, values in (("auroc", auroc), ("auprc", auprc))
        }


def _rank(
    is_positive: np.ndarray, score: np.ndarray, times_RS: np.ndarray, index_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """AUROC (ties count half) and average precision per draw; not a number where all answers are one."""
    order = np.argsort(-score, kind="stable")
    is_positive, subject = is_positive[order], index_N[order]
    ends = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))
    draws_at_once = max(1, CELLS // max(len(score), 1))
    parts = [
        _rank_together(is_positive, times_RS[first : first + draws_at_once, subject], ends)
        for first in range(0, len(times_RS), draws_at_once)
    ]
    return np.concatenate([auroc for auroc, _ in parts]), np.concatenate([precision for _, precision in parts])


def _rank_together(is_positive: np.ndarray, weight_RN: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision per draw of windows in the order of their scores; `ends` are the last of each tie."""
    true = np.cumsum(weight_RN * is_positive, axis=1)[:, ends]
    false = np.cumsum(weight_RN * ~is_positive, axis=1)[:, ends]
    gained = np.diff(true, axis=1, prepend=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        area = (np.diff(false, axis=1, prepend=0) * (true - gained / 2)).sum(axis=1)
        auroc = area / (true[:, -1] * false[:, -1])
        precision = (gained * true / np.maximum(true + false, 1)).sum(axis=1) / true[:, -1]
    is_one = (true[:, -1] == 0) | (false[:, -1] == 0)
    return np.where(is_one, np.nan, auroc), np.where(is_one, np.nan, precision)
