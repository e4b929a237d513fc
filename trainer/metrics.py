"""Metrics of a run as they are read: one JSON row per logged step, one line for a person. Loads without torch."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manifests.files import read_at_once
from trainer.paths import METRICS_FILE

SLOW_DATA = 0.05  # share of the time that a person should hear of


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """Rows of a run in the order of their steps; a half-written last row is left out."""
    path = (Path(run_dir) if isinstance(run_dir, str) else run_dir) / METRICS_FILE  # a UPath stays one
    if not path.exists():
        return []
    lines = read_at_once(path).decode().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]  # a whole row ends with a line break


def describe(row: Mapping[str, float], *, steps: int) -> str:
    """One line about a row, such as `step 40/200  loss 1.234  lr 1.0e-03  310 windows/s  ETA 0:12`."""
    parts = [f"step {int(row['step'])}/{steps}", f"loss {row.get('loss', math.nan):.4f}", f"lr {row['lr']:.1e}"]
    if "grad_norm" in row:
        parts.append(f"|g| {row['grad_norm']:.2f}")
    if "eval_top1" in row:
        parts.append(f"held-out top-1 {row['eval_top1']:.3f} (chance {row['eval_chance']:.3f})")
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.1%}")
    if row.get("data_wait", 0.0) >= SLOW_DATA:
        parts.append(f"waits for data {row['data_wait']:.0%} of the time")
    if row.get("loss_spike"):
        parts.append(f"loss spike of {row['loss_spike']:.0f} sigma")
    if row.get("skipped"):
        parts.append(f"{int(row['skipped'])} steps skipped: see skipped.jsonl")
    if row.get("replaced"):
        parts.append(f"{int(row['replaced'])} samples could not be read: run kymo verify")
    minutes, seconds = divmod(round(row["eta_s"]), 60)
    hours, minutes = divmod(minutes, 60)
    eta = f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
    return "  ".join([*parts, f"{row['windows_per_s']:.0f} windows/s", f"ETA {eta}"])
