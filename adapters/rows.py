"""Rows of metrics.jsonl of a run that learns tasks, and the clock that they tell."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from manifests.config import write_atomically
from trainer.paths import METRICS_FILE

logger = logging.getLogger(__name__)

CLOCK = frozenset(
    {"time", "step_s", "windows_per_s", "eta_s"}
)  # keys that differ between two runs of one configuration


class Rows:
    """Rows of metrics.jsonl; those of steps that a resumed run repeats are dropped first.

    Args:
        run_dir: Folder of the run.
        after: Last step whose rows are kept.
        report: Called with every row.
        is_active: Nothing is written or reported otherwise; the first rank's are.
    """

    def __init__(
        self, run_dir: Path, *, after: int, report: Callable[[dict[str, Any]], None] | None, is_active: bool
    ) -> None:
        self._path = run_dir / METRICS_FILE
        self._report = report
        self._is_active = is_active
        self._began = self._since = time.monotonic()
        self._steps = self._all_steps = self._windows = 0
        if is_active:
            # A line without its end was cut off by a kill.
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True) if self._path.exists() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= after]
            write_atomically(self._path, "".join(kept))

    def count(self, windows: int) -> None:
        """Count a step of so many windows over all ranks."""
        self._steps += 1
        self._all_steps += 1
        self._windows += windows

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not a step's."""
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began

    def write_timed(self, row: Mapping[str, Any], *, steps: int) -> None:
        """Write a row with the time of the steps since the last one, and say in the log how far the run is."""
        now = time.monotonic()
        seconds = max(now - self._since, 1e-9)
        left_s = (steps - row["step"]) * (now - self._began) / max(self._all_steps, 1)
        timed = {"step_s": seconds / max(self._steps, 1), "windows_per_s": self._windows / seconds, "eta_s": left_s}
        self._since, self._steps, self._windows = now, 0, 0
        self.write({**row, **{name: round(value, 4) for name, value in timed.items()}})
        if self._is_active:
            logger.info(describe({**row, **timed}, steps=steps))

    def write(self, row: Mapping[str, Any]) -> None:
        """Write a row."""
        if not self._is_active:
            return
        timed = {**row, "time": round(time.time(), 3)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(timed) + "\n")
        if self._report is not None:
            self._report(timed)


def describe(row: Mapping[str, Any], *, steps: int) -> str:
    """One line about a row, such as `step 40/200: loss rhythm 0.412; 310 windows/s; 12 s left`."""
    if row["split"] == "train":
        named = row["loss"]
    else:
        firsts = {task: next(iter(scores.items())) for task, scores in row["scores"].items()}
        named = {f"{task} {metric}": value for task, (metric, value) in firsts.items()}
    texts = ", ".join(f"{name} {value:.3f}" for name, value in named.items() if value is not None)
    if row["split"] != "train":
        return f"step {row['step']}/{steps}: {row['split']} {texts}"
    skipped = f"; {row['skipped']} steps skipped" if row["skipped"] else ""
    speed = f"{row['windows_per_s']:.0f} windows/s; {row['eta_s']:.0f} s left"
    return f"step {row['step']}/{steps}: loss {texts}{skipped}; {speed}"
