"""Probes of frozen features: multinomial logistic regression and cosine nearest neighbours, tuned on subjects.

What is tuned is tuned on subjects that the probe was not fitted on, and never on those it is tested on.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import recall_score
from sklearn.model_selection import LeaveOneGroupOut, StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from trainer.evaluation.windows import Rows

ProbeName = Literal["linear", "knn"]
Folds = Literal["split", "subjects"] | int

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C of the logistic regression, strongest regularisation first
NEIGHBOURS = (50, 20, 10, 5, 1)
INNER_FOLDS = 5
# Numbers in a table of features. The products of a smaller one are so short that threads of BLAS mostly wait for each
# other: beside other work a fit took thirty times the CPU time.
THREADS_FROM = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fold:
    """A fitted probe and the windows it is tested on.

    Attributes:
        test: Rows of the table.
        value: Chosen C or number of neighbours.
        chosen_on: How: `val`, `subjects of train`, or `nothing` with a single subject to train on.
    """

    test: np.ndarray
    model: Any
    value: float
    chosen_on: str


def split_rows(rows: Rows, folds: Folds, *, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(train rows, test rows) of each fold; a subject is never in both. `val` belongs to train."""
    if folds == "split":
        yield np.flatnonzero(rows["split"].isin(["train", "val"])), np.flatnonzero(rows["split"] == "test")
        return
    groups, target = rows["subject"].to_numpy(), rows["target"].to_numpy()
    if folds == "subjects":
        yield from LeaveOneGroupOut().split(target, target, groups)
    else:
        number = min(int(folds), rows["subject"].nunique())
        yield from StratifiedGroupKFold(number, shuffle=True, random_state=seed).split(target, target, groups)


def fit_folds(
    name: ProbeName, features: np.ndarray, rows: Rows, *, folds: Folds = "split", seed: int = 0
) -> list[Fold]:
    """A probe for each fold, tuned inside the fold's training windows, then fitted on all of them.

    `features` may hold further copies of all rows after the first: training windows are then taken of all copies.
    """
    with threadpool_limits(1 if features.size < THREADS_FROM else None, user_api="blas"):
        return _fit_folds(name, features, rows, folds=folds, seed=seed)


def _fit_folds(name: ProbeName, features: np.ndarray, rows: Rows, *, folds: Folds, seed: int) -> list[Fold]:
    fitted = []
    for train, test in split_rows(rows, folds, seed=seed):
        if rows["target"].iloc[train].nunique() < 2 or len(test) == 0:
            continue
        fitted_on = np.concatenate([train + first for first in range(0, len(features), len(rows))])
        own = rows.iloc[fitted_on % len(rows)]
        inner, chosen_on = _inner_splits(own, has_val=folds == "split", seed=seed)
        target = own["target"].to_numpy()
        value = _choose(name, features[fitted_on], target, inner)
        fitted.append(
            Fold(test=test, model=_fit(name, value, features[fitted_on], target), value=value, chosen_on=chosen_on)
        )
    return fitted


def predict(fold: Fold, features: np.ndarray, *, num_classes: int) -> np.ndarray:
    """(N, K) probabilities; 0 for classes that the training windows lacked."""
    probabilities = np.zeros((len(features), num_classes))
    probabilities[:, fold.model.classes_] = fold.model.predict_proba(features)
    return probabilities


def predict_folds(folds: Sequence[Fold], features: np.ndarray, *, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that were tested, in the order of the table, and their probabilities."""
    rows = np.concatenate([fold.test for fold in folds])
    probabilities = np.concatenate([predict(fold, features[fold.test], num_classes=num_classes) for fold in folds])
    order = np.argsort(rows, kind="stable")
    return rows[order], probabilities[order]


def _inner_splits(rows: Rows, *, has_val: bool, seed: int) -> tuple[list[tuple[np.ndarray, np.ndarray]], str]:
    is_val = (rows["split"] == "val").to_numpy()
    target, subjects = rows["target"].to_numpy(), rows["subject"].to_numpy()
    both = [len(np.unique(target[part])) > 1 for part in (is_val, ~is_val)]
    if has_val and all(both):
        return [(np.flatnonzero(~is_val), np.flatnonzero(is_val))], "val"
    number = min(INNER_FOLDS, len(np.unique(subjects)))
    if number < 2:
        return [], "nothing"
    splits = StratifiedGroupKFold(number, shuffle=True, random_state=seed).split(target, target, subjects)
    return [(train, test) for train, test in splits if len(np.unique(target[train])) > 1], "subjects of train"


def _choose(
    name: ProbeName, features: np.ndarray, target: np.ndarray, splits: Sequence[tuple[np.ndarray, np.ndarray]]
) -> float:
    """Value with the best balanced accuracy over the held-out windows of all splits; of equals the simplest."""
    values = STRENGTHS if name == "linear" else NEIGHBOURS
    if not splits:
        return values[len(values) // 2]
    truth = np.concatenate([target[test] for _, test in splits])
    scores = []
    for value in values:
        guesses = [_fit(name, value, features[a], target[a]).predict(features[b]) for a, b in splits]
        scores.append(recall_score(truth, np.concatenate(guesses), average="macro", labels=np.unique(truth)))
    return values[int(np.argmax(scores))]


def _fit(name: ProbeName, value: float, features: np.ndarray, target: np.ndarray) -> Any:
    return PROBES[name](value, len(target)).fit(features, target)


def _linear(value: float, _: int) -> Any:
    return make_pipeline(StandardScaler(), LogisticRegression(C=value, class_weight="balanced", max_iter=500))


def _knn(value: float, num_windows: int) -> Any:
    # Centred first: embeddings share a large mean, beside which every cosine is near 1.
    number = min(int(value), num_windows)
    return make_pipeline(StandardScaler(with_std=False), KNeighborsClassifier(number, metric="cosine"))


PROBES: dict[str, Callable[[float, int], Any]] = {"linear": _linear, "knn": _knn}
