"""Metrics: one JSON row per logged step, TensorBoard scalars, one line for a person."""

import json
import logging
import math
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from manifests.config import write_atomically

logger = logging.getLogger(__name__)

SLOW_DATA = 0.05  # share of the time that a person should hear of
METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
ETA_ROWS = 10  # that the speed is averaged over
# In the row, not worth a curve.
NO_CURVE = frozenset({"step", "time", "eta_s", "seconds"})


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """Rows of a run in the order of their steps; a half-written last row is left out."""
    path = Path(run_dir) / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]  # a whole row ends with a line break


class MetricsWriter:
    """Appends to `metrics.jsonl` and TensorBoard. Does nothing on ranks other than 0.

    Args:
        run_dir: Folder of the run.
        step: Where the run goes on; rows of later steps, which will come again, are cut off.
        steps: Last step of the run, for the ETA.
        is_active: Rank 0 writes.
    """

    def __init__(self, run_dir: Path, *, step: int, steps: int, is_active: bool = True) -> None:
        self._steps = steps
        self._is_active = is_active
        self._times = deque([(step, time.monotonic())], maxlen=ETA_ROWS)
        if not is_active:
            return
        kept = [row for row in read_metrics(run_dir) if row["step"] <= step]
        path = run_dir / METRICS_FILE
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / TENSORBOARD_FOLDER), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Append the row of a step: `values`, ETA and the time of day.

        Args:
            step: Optimizer steps done.
            values: Metrics by name; None and what is not finite are left out, for JSON has no word for it.
        """
        if not self._is_active:
            return
        row: dict[str, float] = {"step": step}
        row |= {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}
        self._times.append((step, time.monotonic()))
        (first, since), (last, now) = self._times[0], self._times[-1]
        row["eta_s"] = round((self._steps - step) * (now - since) / max(1, last - first), 3)
        row["time"] = round(time.time(), 3)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name not in NO_CURVE:
                self._board.add_scalar(name, value, step)
        logger.info("%s", describe(row, steps=self._steps))

    def close(self) -> None:
        """Flush and close both files."""
        if self._is_active:
            self._file.close()
            self._board.close()


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
