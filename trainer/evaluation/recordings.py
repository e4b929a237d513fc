"""Retrieval over recordings: does a window's embedding lie nearest to another window of its own recording?"""

from typing import Any

import numpy as np

from trainer.evaluation.bootstrap import draw_subjects, interval
from trainer.evaluation.windows import Rows

NEAR_S = 60.0  # neighbours in time are no achievement


def recording_retrieval(features: np.ndarray, rows: Rows, *, near_s: float = NEAR_S) -> dict[str, Any] | None:
    """Share of windows whose nearest window (cosine) is of their recording; None where nothing can be found.

    Windows of the same recording that begin nearer than `near_s` are not candidates. Those without another candidate
    of their recording are not asked. `chance` is the share by drawing a candidate. High is no virtue by itself: an
    embedding that is all recording is of no use for stages.
    """
    recording = rows["recording"].to_numpy()
    start = rows["start_s"].to_numpy(dtype=float)
    centred = features - features.mean(axis=0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    same = recording[:, None] == recording
    allowed = ~(same & (np.abs(start[:, None] - start) < near_s))
    asked = (allowed & same).any(axis=1) & (allowed & ~same).any(axis=1)
    if not asked.any():
        return None
    nearest = np.where(allowed, unit @ unit.T, -np.inf).argmax(axis=1)
    hit = (recording[nearest] == recording)[asked]
    chance = ((allowed & same).sum(axis=1) / np.maximum(allowed.sum(axis=1), 1))[asked]
    draws = draw_subjects(rows["subject"].to_numpy()[asked].tolist())
    bounds = None
    if draws is not None:
        size = draws.times_RS.shape[1]
        hits = draws.times_RS @ np.bincount(draws.index_N, weights=hit, minlength=size)
        bounds = interval(hits / (draws.times_RS @ np.bincount(draws.index_N, minlength=size)))
    return {
        "top1": float(hit.mean()),
        "chance": float(chance.mean()),
        "interval": bounds,
        "n": int(asked.sum()),
        "recordings": len(np.unique(recording[asked])),
        "near_s": near_s,
    }
