"""How a run that learns tasks is, read from its folder while it trains or after it ended. Loads without torch."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from manifests.config import read_yaml
from manifests.files import is_held
from trainer.metrics import read_metrics
from trainer.paths import CHECKPOINT_FOLDER, CONFIG_FILE, LAUNCH_LOCK_FILE, LOCK_FILE

RESULT_FILE = "result.json"
VERBS = {"lora": "adapt", "model": "finetune"}  # by a key that only the one's configuration has


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnStatus:
    """State of a run folder.

    Attributes:
        state: `training`, `restarting` (workers are gone, Ray's driver is there), `stopped` or `finished`.
        step: Optimizer steps done, as far as metrics.jsonl tells.
        loss: Task to its newest mean training loss.
        scores: Task to metric to value, of the newest evaluation on `val`, or of the finished run on `test`.
        epochs: Task to epochs seen.
        step_s: Seconds of a step, None before the first row.
        eta_s: Seconds to the last step while it trains.
        checkpoint: Step of the newest checkpoint.
        resume: The command that goes on.
    """

    run_dir: str
    state: str
    step: int
    steps: int
    loss: Mapping[str, float]
    scores: Mapping[str, Mapping[str, float | None]]
    epochs: Mapping[str, float]
    step_s: float | None
    windows_per_s: float | None
    eta_s: float | None
    checkpoint: int | None
    skipped: int
    resume: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def is_learn_run(folder: Path) -> bool:
    """Whether a folder is that of `kymo adapt` or `kymo finetune`."""
    path = folder / CONFIG_FILE
    return path.is_file() and {"tasks", "encoder", "run_dir", "steps"} <= read_yaml(path).keys()


def learn_status(run_dir: Path) -> LearnStatus:
    """State of a run; `is_learn_run` holds."""
    config = read_yaml(run_dir / CONFIG_FILE)
    rows = read_metrics(run_dir)
    train = next((row for row in reversed(rows) if row["split"] == "train"), {})
    scores = next((row["scores"] for row in reversed(rows) if row["split"] == "val"), {})
    finished = run_dir / RESULT_FILE
    if finished.exists():
        found = json.loads(finished.read_text(encoding="utf-8"))["scores"]
        scores = {name: _values(splits["test"] or splits["val"]) for name, splits in found.items()}
    state = _state(run_dir, is_finished=finished.exists())
    checkpoints = sorted((run_dir / CHECKPOINT_FOLDER).glob("step-*.json"))
    verb = next((verb for key, verb in VERBS.items() if key in config), "adapt")
    left_s = train.get("eta_s", 0.0) - (time.time() - train.get("time", 0.0))
    return LearnStatus(
        run_dir=str(run_dir),
        state=state,
        step=int(config["steps"]) if state == "finished" else int(train.get("step", 0)),
        steps=int(config["steps"]),
        loss=train.get("loss", {}),
        scores=scores,
        epochs=train.get("epochs", {}),
        step_s=train.get("step_s"),
        windows_per_s=train.get("windows_per_s"),
        eta_s=max(0.0, left_s) if state == "training" and train else None,
        checkpoint=int(checkpoints[-1].stem.partition("-")[2]) if checkpoints else None,
        skipped=int(train.get("skipped", 0)),
        resume=f"kymo {verb} {run_dir / CONFIG_FILE}",
    )


def watch(run_dir: Path, *, interval_s: float = 1.0) -> Iterator[LearnStatus]:
    """States until nobody trains any more."""
    while True:
        state = learn_status(run_dir)
        yield state
        if state.state in {"finished", "stopped"}:
            return
        time.sleep(interval_s)


def _state(run_dir: Path, *, is_finished: bool) -> str:
    if is_finished:
        return "finished"
    if is_held(run_dir / LOCK_FILE):
        return "training"
    return "restarting" if is_held(run_dir / LAUNCH_LOCK_FILE) else "stopped"


def _values(scores: Mapping[str, Any] | None) -> dict[str, float | None]:
    return {} if scores is None else {name: entry["value"] for name, entry in scores["metrics"].items()}
