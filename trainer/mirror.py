"""The small files of a run beside its checkpoints in `storage`: configuration, metrics, steps that were not taken.

Another machine has only the store. There `kymo status` reads them, and a run that goes on has its rows from the first
step on. They are as old as the newest checkpoint. Loads without torch.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from manifests.config import write_atomically
from trainer.metrics import read_metrics
from trainer.paths import (
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    EVENT_FILES,
    METRICS_FILE,
    SKIPPED_FILE,
    TENSORBOARD_FOLDER,
    read_skipped,
)
from trainer.storage import is_remote, names_below, names_in

MANIFEST_FILE = "MANIFEST.json"  # of a checkpoint, written last
DAMAGED_FILE = "DAMAGED"  # in a store: why the checkpoint is passed over
_FILES = (CONFIG_FILE, METRICS_FILE, SKIPPED_FILE)


def send(run_dir: Path, store: Path) -> None:
    """Copy the small files of a run to its store, over those of earlier."""
    for name in _FILES:
        if (run_dir / name).exists():
            content = (run_dir / name).read_bytes()
            if is_remote(store):
                (store / name).write_bytes(content)
            else:
                write_atomically(store / name, content)


def fetch(run_dir: Path, store: Path) -> None:
    """Put the rows of the store before those of the run folder, which keeps its own where they go on.

    Curves of rows that change are deleted; `trainer.metrics_writer` draws them anew.
    """
    readers: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
        METRICS_FILE: read_metrics,
        SKIPPED_FILE: read_skipped,
    }
    for name, read in readers.items():
        stored, own = read(store), read(run_dir)
        if not stored:
            continue
        rows = [*stored, *(row for row in own if row["step"] > stored[-1]["step"])]
        if rows == own:
            continue
        if name == METRICS_FILE:  # before the rows: after a crash they still differ
            for file in (run_dir / TENSORBOARD_FOLDER).glob(EVENT_FILES):
                file.unlink()
        write_atomically(run_dir / name, "".join(json.dumps(row) + "\n" for row in rows))


def newest_stored(store: Path) -> tuple[str, float] | None:
    """Name of the newest committed checkpoint and when it was committed (Unix time in s); None if there is none."""
    folder = store / CHECKPOINT_FOLDER
    if is_remote(folder):
        files = names_below(folder)
        names = [name for name, held in files.items() if MANIFEST_FILE in held and DAMAGED_FILE not in held]
    else:
        names = names_in(folder)
    # Committed ones are named `step-…`, on a disk an unfinished one has another name.
    newest = max((name for name in names if name.startswith("step-")), default=None)
    return None if newest is None else (newest, (folder / newest / MANIFEST_FILE).stat().st_mtime)
