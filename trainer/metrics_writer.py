"""Metrics as they are written: rows of `metrics.jsonl` and curves for TensorBoard."""

import json
import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.utils.tensorboard import SummaryWriter

from manifests.config import write_atomically
from trainer.metrics import describe, read_metrics
from trainer.paths import EVENT_FILES, METRICS_FILE, TENSORBOARD_FOLDER

logger = logging.getLogger(__name__)

ETA_ROWS = 10  # that the speed is averaged over
# In the row, not worth a curve.
NO_CURVE = frozenset({"step", "time", "eta_s", "seconds"})


class MetricsWriter:
    """Appends to `metrics.jsonl` and TensorBoard. Does nothing on ranks other than 0.

    Args:
        run_dir: Folder of the run.
        step: Where the run goes on; rows of later steps, which will come again, are cut off. Where there are rows but
            no curves, as on another machine, those of the rows are drawn first.
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
        folder = run_dir / TENSORBOARD_FOLDER
        if kept and not any(folder.glob(EVENT_FILES)):
            _draw(kept, folder)
        self._board = SummaryWriter(str(folder), purge_step=step + 1)

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
        _add(self._board, row)
        logger.info("%s", describe(row, steps=self._steps))

    def close(self) -> None:
        """Flush and close both files."""
        if self._is_active:
            self._file.close()
            self._board.close()


def _draw(rows: Iterable[Mapping[str, float]], folder: Path) -> None:
    """Curves of rows, put in place as a whole: half of them would pass for all after a crash."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as name:
        with SummaryWriter(name) as board:
            for row in rows:
                _add(board, row)
        for file in Path(name).iterdir():
            write_atomically(folder / file.name, file.read_bytes())


def _add(board: SummaryWriter, row: Mapping[str, float]) -> None:
    for name, value in row.items():
        if name not in NO_CURVE:
            board.add_scalar(name, value, int(row["step"]), walltime=row["time"])
