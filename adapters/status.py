"""How a run that learns tasks is, read from its folder, or on another machine from its store. Loads without torch."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapters.paths import RESULT_FILE
from manifests.config import read_yaml
from manifests.files import is_held, read_at_once
from trainer.metrics import read_metrics
from trainer.mirror import newest_stored
from trainer.paths import CONFIG_FILE, LAUNCH_LOCK_FILE, LOCK_FILE
from trainer.storage import answering, is_remote, location

VERBS = {"lora": "adapt", "model": "finetune"}  # by a key that only the one's configuration has


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnStatus:
    """State of a run folder.

    Attributes:
        state: `training`, `restarting` (workers are gone, Ray's driver is there), `stopped`, `finished`, or
            `elsewhere`: only its store can be seen from here.
        reason: What the state rests on, where that is not the run's own folder.
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
    reason: str
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
    """Whether a folder is that of `kymo adapt` or `kymo finetune`, or the `storage` of one."""
    path = folder / CONFIG_FILE
    with answering(folder):
        return path.is_file() and {"tasks", "encoder", "run_dir", "steps"} <= read_yaml(path).keys()


def learn_status(run_dir: Path) -> LearnStatus:
    """State of a run; `is_learn_run` holds. From its folder, or from its `storage` where that is further.

    Raises:
        ConfigError: Its store does not answer.
    """
    with answering(run_dir):
        config = read_yaml(run_dir / CONFIG_FILE)
    store = run_dir if is_remote(run_dir) else location(config.get("storage") or run_dir)
    with answering(store):
        newest = newest_stored(store)
        checkpoint = None if newest is None else int(newest[0].split("-")[1])
        is_elsewhere = config.get("storage") is not None and _is_elsewhere(run_dir, store, checkpoint)
        place = store if is_elsewhere else run_dir
        rows = read_metrics(place)
        result = json.loads(read_at_once(place / RESULT_FILE)) if (place / RESULT_FILE).exists() else None
    state = "finished" if result is not None else "elsewhere" if is_elsewhere else _state(run_dir)
    train = next((row for row in reversed(rows) if row["split"] == "train"), {})
    scores = next((row["scores"] for row in reversed(rows) if row["split"] == "val"), {})
    if result is not None:
        scores = {name: _values(splits["test"] or splits["val"]) for name, splits in result["scores"].items()}
    verb = next((verb for key, verb in VERBS.items() if key in config), "adapt")
    left_s = train.get("eta_s", 0.0) - (time.time() - train.get("time", 0.0))
    return LearnStatus(
        run_dir=str(run_dir),
        state=state,
        reason=f"seen from {store}, as of its newest checkpoint" if state == "elsewhere" else "",
        step=int(config["steps"]) if state == "finished" else int(train.get("step", 0)),
        steps=int(config["steps"]),
        loss=train.get("loss", {}),
        scores=scores,
        epochs=train.get("epochs", {}),
        step_s=train.get("step_s"),
        windows_per_s=train.get("windows_per_s"),
        eta_s=max(0.0, left_s) if state == "training" and train else None,
        checkpoint=checkpoint,
        skipped=int(train.get("skipped", 0)),
        resume=f"kymo {verb} {run_dir / CONFIG_FILE}",
    )


def _is_elsewhere(run_dir: Path, store: Path, checkpoint: int | None) -> bool:
    """Whether the store knows more of a run than its folder: another machine trains it, or has."""
    if is_remote(run_dir) or run_dir == store:
        return True
    if any(is_held(run_dir / name) for name in (LOCK_FILE, LAUNCH_LOCK_FILE)):
        return False
    rows = read_metrics(run_dir)
    return not rows or (checkpoint is not None and checkpoint > rows[-1]["step"])


def watch(run_dir: Path, *, interval_s: float = 1.0) -> Iterator[LearnStatus]:
    """States until nobody trains any more."""
    while True:
        state = learn_status(run_dir)
        yield state
        if state.state in {"finished", "stopped", "elsewhere"}:
            return
        time.sleep(interval_s)


def _state(run_dir: Path) -> str:
    if is_held(run_dir / LOCK_FILE):
        return "training"
    return "restarting" if is_held(run_dir / LAUNCH_LOCK_FILE) else "stopped"


def _values(scores: Mapping[str, Any] | None) -> dict[str, float | None]:
    return {} if scores is None else {name: entry["value"] for name, entry in scores["metrics"].items()}
