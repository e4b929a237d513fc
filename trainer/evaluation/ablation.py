"""Channel ablation: how much a probe of the full montage loses when channels are missing (research: seeds §2.10).

One probe, fitted once on all channels, is scored on random subsets of n channels, for n from all of them down to one.
The subsets are drawn from a fixed seed and stored by symbol, so that another encoder can be scored on the same ones.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import t
from sklearn.metrics import recall_score

from trainer.batches import generator
from trainer.evaluation.config import AblationConfig
from trainer.evaluation.features import Extractor
from trainer.evaluation.probe import Fold, predict
from trainer.evaluation.windows import Rows, read_windows, spread

KEPT_SHARE = 0.95  # of the full montage's score
DENSE = 12  # numbers of channels up to this one are all tried
MAX_LISTED = 2000  # possible subsets that are listed rather than drawn


def choose_montage(rows: Rows) -> tuple[str, ...]:
    """The channels to take away: of all recorded montages, and what they share, the one with most channel-windows.

    Windows that lack one of its channels do not take part.
    """
    recorded = sorted({tuple(sorted(symbols)) for symbols in rows["symbols"]})
    shared = tuple(sorted(set.intersection(*map(set, recorded))))
    windows = rows["symbols"].map(frozenset)
    return max([*recorded, shared], key=lambda montage: len(montage) * sum(windows.map(set(montage).issubset)))


def numbers_of_channels(total: int, wanted: Sequence[int] | None) -> list[int]:
    """Numbers of channels to try, the full montage first."""
    if wanted is not None:
        return sorted({total, *(count for count in wanted if count < total)}, reverse=True)
    counts = {total, *range(1, min(total, DENSE) + 1)}
    step = DENSE
    while step < total:
        counts.add(step)
        step = math.ceil(step * 4 / 3)
    return sorted(counts, reverse=True)


def draw_subsets(
    montage: Sequence[str], *, counts: Sequence[int], number: int, seed: int
) -> dict[int, list[tuple[str, ...]]]:
    """Distinct subsets per number of channels; all of them where there are no more than `number`."""
    subsets: dict[int, list[tuple[str, ...]]] = {}
    for count in counts:
        rng = generator(seed, "ablation", *montage, count)
        possible = math.comb(len(montage), count)
        if possible <= MAX_LISTED:
            listed = list(combinations(montage, count))
            places = rng.permutation(possible)[:number]
            subsets[count] = [listed[place] for place in sorted(places)]
            continue
        drawn: set[tuple[str, ...]] = set()
        while len(drawn) < number:
            drawn.add(tuple(str(montage[i]) for i in sorted(rng.permutation(len(montage))[:count])))
        subsets[count] = sorted(drawn)
    return subsets


def dropout_features(rows: Rows, extractor: Extractor, *, copies: int, batch: int, seed: int) -> np.ndarray:
    """(copies x N, F) features of the rows, copy after copy, of each a random number of its random channels.

    Windows of a montage share their subsets, so that they can be encoded together.
    """
    windows = [window for part in read_windows(rows, batch=batch) for window in part]
    montages: dict[tuple[str, ...], list[int]] = {}
    for place, symbols in enumerate(rows["symbols"]):
        montages.setdefault(tuple(sorted(symbols)), []).append(place)
    found: np.ndarray | None = None
    for copy in range(copies):
        for montage, places in montages.items():
            for number, first in enumerate(range(0, len(places), batch)):
                chosen = places[first : first + batch]
                rng = generator(seed, "channel dropout", *montage, copy, number)
                kept = sorted(rng.permutation(len(montage))[: int(rng.integers(1, len(montage) + 1))].tolist())
                values = extractor([windows[place] for place in chosen], channels=[montage[i] for i in kept])
                found = np.zeros((copies, len(rows), values.shape[1]), values.dtype) if found is None else found
                found[copy, chosen] = values
    return np.zeros((0, 0), np.float32) if found is None else found.reshape(-1, found.shape[2])


def ablate(
    folds: Sequence[Fold],
    rows: Rows,
    extractor: Extractor,
    settings: AblationConfig,
    *,
    labels: Sequence[str],
    batch: int,
    seed: int,
) -> dict[str, Any] | None:
    """Balanced accuracy per number of channels; None where no two channels can be taken apart.

    Returns:
        `montage`, `windows`, `full`, `threshold` (95 % of `full`), `chance`, `smallest` (least n whose mean reaches
        the threshold), `stable_from` (least n from which on all do), and `counts`: per number of channels `n`,
        `mean`, `interval` (95 % of the mean over subsets), `scores` and `subsets`.
    """
    tested = rows.iloc[np.concatenate([fold.test for fold in folds])].assign(
        fold=np.repeat(np.arange(len(folds)), [len(fold.test) for fold in folds])
    )
    montage = choose_montage(tested)
    if len(montage) < 2:
        return None
    chosen = spread(tested[tested["symbols"].map(lambda symbols: set(montage) <= set(symbols))], settings.max_windows)
    truth, fold_of = chosen["target"].to_numpy(), chosen["fold"].to_numpy()
    if len(np.unique(truth)) < 2:
        return None
    windows = [window for part in read_windows(chosen, batch=batch) for window in part]

    def score(channels: Sequence[str]) -> float:
        features = np.concatenate(
            [extractor(windows[a : a + batch], channels=channels) for a in range(0, len(windows), batch)]
        )
        guess = np.zeros(len(chosen), dtype=int)
        for f in np.unique(fold_of):
            own = fold_of == f
            guess[own] = predict(folds[f], features[own], num_classes=len(labels)).argmax(axis=1)
        return float(recall_score(truth, guess, average="macro", labels=np.unique(truth)))

    subsets = draw_subsets(
        montage, counts=numbers_of_channels(len(montage), settings.counts), number=settings.subsets, seed=seed
    )
    counts = [_count_row(count, drawn, [score(channels) for channels in drawn]) for count, drawn in subsets.items()]
    chance = 1 / len(np.unique(truth))
    return {
        "montage": list(montage),
        "windows": len(chosen),
        "subjects": int(chosen["subject"].nunique()),
        "chance": chance,
        **judge(counts, chance=chance),
        "counts": counts,
    }


def _count_row(count: int, subsets: Sequence[tuple[str, ...]], scores: Sequence[float]) -> dict[str, Any]:
    mean = float(np.mean(scores))
    half = None
    if len(scores) > 1:
        half = float(t.ppf(0.975, len(scores) - 1) * np.std(scores, ddof=1) / math.sqrt(len(scores)))
    return {
        "n": count,
        "mean": mean,
        "interval": None if half is None else [max(0.0, mean - half), min(1.0, mean + half)],
        "scores": list(scores),
        "subsets": [list(subset) for subset in subsets],
    }


def judge(counts: Sequence[dict[str, Any]], *, chance: float) -> dict[str, Any]:
    """Score of the full montage, 95 % of it, and the least number of channels that reaches this.

    No number is given where 95 % of the score is no more than chance.
    """
    ordered = sorted(counts, key=lambda row: -row["n"])
    full = ordered[0]["mean"]
    threshold = KEPT_SHARE * full
    reached = [row["n"] for row in ordered if row["mean"] >= threshold]
    stable = ordered[0]["n"]
    for row in ordered:
        if row["mean"] < threshold:
            break
        stable = row["n"]
    is_meaningful = threshold > chance
    return {
        "full": full,
        "threshold": threshold,
        "smallest": min(reached) if is_meaningful else None,
        "stable_from": stable if is_meaningful else None,
    }
