"""What lies where in the folder of a pretraining run. Loads without torch."""

import json
from pathlib import Path
from typing import Any

from manifests.config import write_atomically
from manifests.files import read_at_once

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
EVENT_FILES = "events.out.tfevents.*"  # in it, as TensorBoard names them
CHECKPOINT_FOLDER = "checkpoints"
ENCODER_FOLDER = "encoder"
SKIPPED_FILE = "skipped.jsonl"
HEARTBEAT_FILE = "heartbeat.json"
STACKS_FOLDER = "stacks"
WORKERS_FOLDER = "workers"  # process ids under Ray
LOCK_FILE = "train.lock"  # of rank 0
LAUNCH_LOCK_FILE = "launch.lock"  # of the driver under Ray
STOP_FILE = "STOP"  # made by anyone, stops the run after the current step as SIGTERM does


def read_skipped(run_dir: Path) -> list[dict[str, Any]]:
    """Steps that were not taken (`step`, `loss`, `grad_norm`, `keys` of their batch); half a last row is left out."""
    path = run_dir / SKIPPED_FILE
    lines = read_at_once(path).decode().split("\n") if path.exists() else [""]
    return [json.loads(line) for line in lines[:-1]]


def write_skipped(run_dir: Path, rows: list[dict[str, Any]]) -> None:
    """Replace the list of steps that were not taken."""
    write_atomically(run_dir / SKIPPED_FILE, "".join(json.dumps(row) + "\n" for row in rows))
