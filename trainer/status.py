"""How a pretraining run is, read from its folder while it trains or after it ended. Loads without torch."""

import shlex
import socket
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from manifests.config import read_yaml
from manifests.errors import ConfigError
from manifests.files import is_held
from trainer.metrics import read_metrics
from trainer.mirror import newest_stored
from trainer.paths import CONFIG_FILE, LAUNCH_LOCK_FILE, read_skipped
from trainer.storage import answering, is_remote, location
from trainer.watchdog import BEAT_S, ENDED, RAY, Heartbeat, read_heartbeat

STATES = (
    *("starting", "training", "evaluating", "saving", "stalled", "restarting"),
    *("died", "failed", "stopped", "finished", "elsewhere"),
)
_SILENT_S = 12 * BEAT_S  # a process that beats every 5 s is not just busy
_STALL_FACTOR, _STALL_S = 20.0, 60.0  # times a usual step, and at least so long
_TREND_ROWS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """State of a run folder.

    Attributes:
        run_dir: The folder.
        state: One of `STATES`. Stalled: it lives and makes no steps. Restarting: its workers are gone and the driver
            is there. Died: nobody is there, and nobody said why. Elsewhere: only its store can be seen from here.
        reason: Why it failed, stalled or died.
        step: Optimizer steps done.
        steps: Steps of the whole run.
        row: Newest row of metrics.jsonl (trainer/metrics_writer.py), empty before the first.
        trend: Median loss of the rows before the last, and of the last rows; None before there are enough.
        trend_steps: Steps that the trend reaches over.
        eta_s: Seconds to the last step while it trains, else None.
        checkpoint: Name of the newest committed checkpoint.
        checkpoint_age_s: Seconds since it was committed.
        skipped: Steps that were not taken.
        spikes: Rows with a loss spike.
        evaluation: Newest held-out retrieval, without the prefix of its names.
        heartbeat: Last word of rank 0, None for a run that an earlier kymo made.
        resume: The command that goes on.
    """

    run_dir: str
    state: str
    reason: str
    step: int
    steps: int
    row: Mapping[str, float]
    trend: tuple[float, float] | None
    trend_steps: int
    eta_s: float | None
    checkpoint: str | None
    checkpoint_age_s: float | None
    skipped: int
    spikes: int
    evaluation: Mapping[str, float]
    heartbeat: Heartbeat | None
    resume: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        plain = {name: getattr(self, name) for name in self.__slots__}
        return plain | {"heartbeat": None if self.heartbeat is None else self.heartbeat.model_dump()}


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a pretraining run, or the `storage` of one."""
    path = folder / CONFIG_FILE
    with answering(folder):
        return path.is_file() and {"objective", "run_dir"} <= read_yaml(path).keys()


def run_status(run_dir: Path) -> RunStatus:
    """State of a run, from its folder; where nothing was ever trained in that, from its `storage`.

    Raises:
        ConfigError: The folder holds no pretraining run, or its store does not answer.
    """
    if not is_run(run_dir):
        raise ConfigError(f"{run_dir}: holds no pretraining run; give the run_dir or the storage of one")
    config = read_yaml(run_dir / CONFIG_FILE)
    beat = read_heartbeat(run_dir)  # it lies in the folder alone
    store = run_dir if is_remote(run_dir) else location(config["storage"]) if config.get("storage") else None
    is_elsewhere = beat is None and store is not None and (store == run_dir or not read_metrics(run_dir))
    files = run_dir if store is None or not is_elsewhere else store
    with answering(files):
        rows, skipped = read_metrics(files), read_skipped(files)
    with answering(store or run_dir):
        checkpoint, committed = _newest_checkpoint(store or run_dir, beat)
    steps, now = int(config["steps"]), time.time()
    row = rows[-1] if rows else {}
    step = max(int(row.get("step", 0)), 0 if beat is None else beat.step)
    if is_elsewhere:
        state, reason = _state_from_store(files, checkpoint, steps=steps)
    else:
        state, reason = _state(run_dir, beat, rows, steps=steps, now=now)
    evaluations = [{k[5:]: v for k, v in r.items() if k.startswith("eval_")} for r in rows]
    recent = rows[-_TREND_ROWS:]
    is_moving = state in {"training", "evaluating", "saving"}
    return RunStatus(
        run_dir=str(run_dir),
        state=state,
        reason=reason,
        step=step,
        steps=steps,
        row=row,
        trend=_trend(recent),
        trend_steps=int(recent[-1]["step"] - recent[0]["step"]) if recent else 0,
        eta_s=max(0.0, row["eta_s"] - (now - row["time"])) if is_moving and "eta_s" in row else None,
        checkpoint=checkpoint,
        checkpoint_age_s=None if checkpoint is None else max(0.0, now - committed),
        skipped=len([item for item in skipped if item["step"] <= step]),
        spikes=sum("loss_spike" in r for r in rows),
        evaluation=next((values for values in reversed(evaluations) if values), {}),
        heartbeat=beat,
        resume=_resume(run_dir, config, beat),
    )


def watch(run_dir: Path, *, interval_s: float = 1.0) -> Iterator[RunStatus]:
    """States of a run until it ends."""
    while True:
        began = time.monotonic()
        state = run_status(run_dir)
        yield state
        if state.state in ENDED or state.state in {"died", "elsewhere"}:
            return
        time.sleep(max(interval_s, 10 * (time.monotonic() - began)))  # a long run has many rows to read


def _state(
    run_dir: Path, beat: Heartbeat | None, rows: Sequence[Mapping[str, float]], *, steps: int, now: float
) -> tuple[str, str]:
    is_driven = is_held(run_dir / LAUNCH_LOCK_FILE)
    if is_driven and (beat is None or (run_dir / LAUNCH_LOCK_FILE).stat().st_mtime > beat.time):
        return "starting", ""  # the workers of this start have not said anything yet
    if beat is None:
        return ("finished" if rows and rows[-1]["step"] >= steps else "stopped"), ""
    if beat.state in ENDED:
        return _ended(beat, steps=steps, is_driven=is_driven)
    silent_s = now - beat.time
    if silent_s > _SILENT_S or (beat.host == socket.gethostname() and not psutil.pid_exists(beat.pid)):
        reason = f"process {beat.pid} on {beat.host} was last heard of at step {beat.step}, {silent_s:.0f} s ago"
        return ("restarting" if is_driven else "died"), reason
    usual_s = statistics.median(_seconds_per_step(rows[-_TREND_ROWS:])) if len(rows) > 2 else 0.0
    busy_s = now - beat.since
    if beat.state == "training" and busy_s > max(_STALL_S, _STALL_FACTOR * usual_s):
        return "stalled", f"no step for {busy_s:.0f} s, {usual_s:.2g} s are usual"
    return beat.state, ""


def _ended(beat: Heartbeat, *, steps: int, is_driven: bool) -> tuple[str, str]:
    if beat.state == "finished" and beat.step < steps:
        return "stopped", f"it was finished at step {beat.step}, and steps has been raised since"
    return ("restarting" if is_driven and beat.state == "failed" else beat.state), beat.message


def _resume(run_dir: Path, config: Mapping[str, Any], beat: Heartbeat | None) -> str:
    """The command that goes on the way that the run was carried out; a run that tells nothing goes on under Ray."""
    file, place = run_dir / CONFIG_FILE, ""
    if not is_remote(run_dir):
        told, here = Path(config["run_dir"]), run_dir.absolute()
        depth = len(told.parts)
        if told.absolute() != here and here.parts[-depth:] == told.parts:
            # Its paths are relative to where it was started.
            file, place = told / CONFIG_FILE, f"cd {shlex.quote(str(Path(*here.parts[:-depth])))} && "
    config_file = shlex.quote(str(file))
    if beat is None or beat.launcher == RAY:
        return f"{place}kymo pretrain {config_file}"
    words = f"{beat.launcher} -m jobs.cli" if beat.launcher else "kymo"
    return f"{place}{words} pretrain {config_file} --no-ray"


def _seconds_per_step(rows: Sequence[Mapping[str, float]]) -> list[float]:
    return [(b["time"] - a["time"]) / max(1, b["step"] - a["step"]) for a, b in pairwise(rows)] or [0.0]


def _trend(rows: Sequence[Mapping[str, float]]) -> tuple[float, float] | None:
    losses = [row["loss"] for row in rows if "loss" in row]
    half = len(losses) // 2
    return (statistics.median(losses[:half]), statistics.median(losses[half:])) if half >= 2 else None


def _state_from_store(store: Path, checkpoint: str | None, *, steps: int) -> tuple[str, str]:
    """What can be said of a run of which only the store is at hand: as much as its newest checkpoint tells."""
    if checkpoint is None:
        return "elsewhere", f"nothing was trained in this folder, and there is no checkpoint in {store} yet"
    step = int(checkpoint.split("-")[1])
    if step >= steps:
        return "finished", ""
    return "elsewhere", f"seen from {store}, as of its newest checkpoint; its machine knows more"


def _newest_checkpoint(store: Path, beat: Heartbeat | None) -> tuple[str | None, float]:
    """Name of the newest checkpoint and when it was committed; rank 0 tells of the one that it has committed."""
    if beat is not None and beat.checkpoint:
        return beat.checkpoint, beat.checkpoint_time
    return newest_stored(store) or (None, 0.0)
