"""Signs of life of a unit: a small file that its converting process renews, and the rows of what it has done.

The file says which recording (by its place in the unit, never by its name) is being converted since when, and when
the process last told. A process that ended leaves its last word, which grows old; a decoder that hangs leaves an old
`since` beside a young `time`.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from engine.storage import is_remote
from manifests.files import read_at_once

logger = logging.getLogger(__name__)

PROGRESS_DIR = "progress"
BEAT_SUFFIX = ".beat"
BEAT_S = 5.0
STORE_BEAT_S = 20.0  # every beat on a store is a request that is paid


class Heartbeat(BaseModel):
    """Last word of the process that converts a unit.

    Attributes:
        unit: Id of the unit.
        recording: Place of the recording in the unit, counted from 0; None while shards are written.
        recordings: Recordings of the unit.
        since: When this recording (or the writing of shards) began, s of the wall clock.
        time: When this was written, s of the wall clock. Renewed every `BEAT_S` s, `STORE_BEAT_S` on a store.
        host: Machine of the process.
        pid: Its process id there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    unit: str
    recording: int | None
    recordings: int
    since: float
    time: float
    host: str
    pid: int


def heartbeat_path(output: Path, unit: str) -> Path:
    """Heartbeat file of a unit."""
    return output / PROGRESS_DIR / f"{unit}{BEAT_SUFFIX}"


def read_heartbeat(output: Path, unit: str) -> Heartbeat | None:
    """Heartbeat of a unit that is being converted, or was when its process was killed; None for any other."""
    try:
        return Heartbeat.model_validate_json(read_at_once(heartbeat_path(output, unit)))
    except (FileNotFoundError, ValueError):  # a heartbeat of another version tells nothing
        return None


def progress_path(output: Path, unit: str) -> Path:
    """Progress rows of a unit."""
    return output / PROGRESS_DIR / f"{unit}.jsonl"


def append_progress(output: Path, unit: str, row: Mapping[str, Any]) -> None:
    """Append one line to a unit's progress file, which the driver and `kymo status` read while it runs."""
    path = progress_path(output, unit)
    if is_remote(output):  # an object cannot be appended to
        rows = [*read_progress(output, unit), row]
        path.write_text("".join(json.dumps(item) + "\n" for item in rows), encoding="utf-8")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_progress(output: Path, unit: str) -> list[dict[str, Any]]:
    """Complete lines of a unit's progress file; none before it began."""
    try:
        text = read_at_once(progress_path(output, unit)).decode()
    except FileNotFoundError:
        return []
    # What follows the last line end is being written.
    return [json.loads(line) for line in text.split("\n")[:-1]]


class Pulse:
    """Heartbeat and progress rows of one unit; use as a context manager around its conversion.

    A thread renews the heartbeat, also while a child decodes for long. Nothing here ends a conversion: what cannot
    be written is logged, and whatever is wrong with the disk meets the shards as well.
    """

    def __init__(self, output: Path, unit: str, num_recordings: int, *, interval_s: float | None = None) -> None:
        self._output = output
        self._unit = unit
        self._num_recordings = num_recordings
        self._is_remote = is_remote(output)
        self._interval_s = interval_s or (STORE_BEAT_S if self._is_remote else BEAT_S)
        self._recording: int | None = None
        self._since = time.time()
        self._lines: list[str] = []  # rows that wait for the next beat, on a store
        self._num_flushed = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"pulse-{unit}")

    def __enter__(self) -> "Pulse":
        if not self._is_remote:
            (self._output / PROGRESS_DIR).mkdir(parents=True, exist_ok=True)
        progress_path(self._output, self._unit).write_text("", encoding="utf-8")
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._flush()
            heartbeat_path(self._output, self._unit).unlink(missing_ok=True)

    def at(self, recording: int | None) -> None:
        """Say which recording begins now; None: the shards."""
        self._recording, self._since = recording, time.time()

    def record(self, row: Mapping[str, Any]) -> None:
        """Add one row of what is done: at once on a disk, with the next beat on a store."""
        if self._is_remote:
            self._lines.append(json.dumps(row) + "\n")
        else:
            append_progress(self._output, self._unit, row)

    def beat(self) -> None:
        """Write the heartbeat now."""
        content = Heartbeat(
            unit=self._unit,
            recording=self._recording,
            recordings=self._num_recordings,
            since=self._since,
            time=time.time(),
            host=socket.gethostname(),
            pid=os.getpid(),
        ).model_dump_json()
        path = heartbeat_path(self._output, self._unit)
        try:
            if self._is_remote:
                path.write_text(content, encoding="utf-8")
                self._flush()
            else:  # renamed and not flushed to the disk: after a crash of the machine nobody needs it
                temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
                temporary.write_text(content, encoding="utf-8")
                temporary.replace(path)
        except OSError as error:
            logger.warning("%s: no heartbeat written: %s", path, error)

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.beat()

    def _flush(self) -> None:
        if self._num_flushed != len(self._lines):
            self._num_flushed = len(self._lines)
            progress_path(self._output, self._unit).write_text("".join(self._lines), encoding="utf-8")
