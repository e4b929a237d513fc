"""Is a run alive? A thread on every rank that ends a process without steps; rank 0's says in a file how the run is.

A process that hangs is no use to anybody: it ends itself with a message and the stacks of all its threads in
`run_dir/stacks/`, and Ray or torchrun starts it again, or a person reads why.
"""

import faulthandler
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from pydantic import BaseModel, ConfigDict

from trainer.paths import HEARTBEAT_FILE, STACKS_FOLDER

logger = logging.getLogger(__name__)

BEAT_S = 5.0
HANG_EXIT_CODE = 75  # EX_TEMPFAIL: the same command may succeed
_STANDSTILL = 4  # beats
_START_FACTOR = 5.0  # reading a checkpoint, compiling, the first step
_GIL_GRACE_S = 30.0  # then not even this thread came to run, and faulthandler's own thread ends the process
RAY = "ray"  # as a launcher
ENDED = frozenset({"finished", "stopped", "failed"})


class Heartbeat(BaseModel):
    """Last word of rank 0.

    Attributes:
        state: starting, training, evaluating or saving; of a run that ended: finished, stopped or failed.
        message: Why it failed.
        step: Optimizer steps done.
        since: When the state or, in training, the step began, s of the wall clock.
        time: When this was written, s of the wall clock.
        lived_s: Time that the run has been at work since its first start, also while it was being restarted after
            a death, but not between a stop and the next start.
        attempt: Number of this start.
        world_size: Ranks of this start.
        host: Machine of rank 0.
        pid: Its process id there.
        checkpoint: Name of the last checkpoint that this start has committed, or nothing.
        checkpoint_time: When that was, s of the wall clock.
        launcher: `RAY`, or the words of torchrun, or nothing for a process alone.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    state: str
    message: str = ""
    step: int
    since: float
    time: float
    lived_s: float
    attempt: int
    world_size: int
    host: str
    pid: int
    checkpoint: str = ""
    checkpoint_time: float = 0.0
    launcher: str = ""


def read_heartbeat(run_dir: Path) -> Heartbeat | None:
    """Heartbeat of a run, None when it has none that can be read."""
    try:
        return Heartbeat.model_validate_json((run_dir / HEARTBEAT_FILE).read_bytes())
    except (OSError, ValueError):
        return None


class Watchdog:
    """Watches one rank as long as the context lasts. What was marked last, or an error, is how the run ended.

    Args:
        run_dir: Folder of the run.
        rank: This rank; 0 writes the heartbeat.
        world_size: Number of ranks.
        attempt: Number of this start.
        hang_timeout_s: Longest time without `mark`, five times as long up to the first; None: no limit.
        launcher: What started the ranks, as in `Heartbeat`.
        beat_s: How often it looks.
        leave: Ends the process; another one in tests.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        world_size: int,
        attempt: int,
        hang_timeout_s: float | None,
        launcher: str = "",
        beat_s: float = BEAT_S,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self._run_dir = run_dir
        self._rank, self._world_size, self._attempt = rank, world_size, attempt
        self._hang_timeout_s, self._launcher = hang_timeout_s, launcher
        self._beat_s = beat_s if hang_timeout_s is None else min(beat_s, hang_timeout_s / 4)
        self._leave = leave
        self._state, self._message, self._step = "starting", "", 0
        self._checkpoint, self._checkpoint_time = "", 0.0
        self._since = self._began = time.monotonic()
        self._lived_before_s = _lived_before(run_dir)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watchdog")
        self._stacks = run_dir / STACKS_FOLDER / f"rank-{rank}.txt"

    def __enter__(self) -> "Watchdog":
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Stop watching; the last heartbeat says how the run ended."""
        self._stop.set()
        self._thread.join()
        if kind is not None:
            self._state, self._message = "failed", str(error) or kind.__name__
        self._beat()

    def mark(self, state: str, step: int) -> None:
        """Say what begins now, after how many steps."""
        self._state, self._step, self._since = state, step, time.monotonic()

    def note_checkpoint(self, name: str) -> None:
        """Say that a checkpoint has been committed."""
        self._checkpoint, self._checkpoint_time = name, time.time()

    def lived_s(self) -> float:
        """Time that the run has been at work, over all starts."""
        return self._lived_before_s + time.monotonic() - self._began

    def _run(self) -> None:
        self._stacks.parent.mkdir(parents=True, exist_ok=True)
        with self._stacks.open("a", encoding="utf-8") as stacks:
            self._watch(stacks)
            faulthandler.cancel_dump_traceback_later()
        if not self._stacks.stat().st_size:
            self._stacks.unlink()

    def _watch(self, stacks: TextIO) -> None:
        last = time.monotonic()
        while not self._stop.wait(self._beat_s):
            now = time.monotonic()
            if now - last > _STANDSTILL * self._beat_s:
                self._since = now  # the whole process stood still: a debugger, a sleeping machine
            last = now
            self._beat()
            if self._hang_timeout_s is None:
                continue
            limit_s = self._hang_timeout_s * (_START_FACTOR if self._state == "starting" else 1.0)
            faulthandler.dump_traceback_later(limit_s + _GIL_GRACE_S, exit=True, file=stacks)
            if now - self._since > limit_s:
                self._give_up(now - self._since, stacks)
                return

    def _give_up(self, seconds: float, stacks: TextIO) -> None:
        message = (
            f"rank {self._rank} has been {self._state} for {seconds:.0f} s after step {self._step}, "
            f"faults.hang_timeout_s allows {self._hang_timeout_s:g}; where it hangs: {self._stacks}"
        )
        stacks.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")
        stacks.flush()
        faulthandler.dump_traceback(file=stacks, all_threads=True)
        logger.error("%s; the process ends itself, the same command goes on", message)
        self._state, self._message = "failed", message
        self._beat()
        self._leave(HANG_EXIT_CODE)

    def _beat(self) -> None:
        if self._rank != 0:
            return
        now = time.time()
        beat = Heartbeat(
            state=self._state,
            message=self._message,
            step=self._step,
            since=now - (time.monotonic() - self._since),
            time=now,
            lived_s=self.lived_s(),
            attempt=self._attempt,
            world_size=self._world_size,
            host=socket.gethostname(),
            pid=os.getpid(),
            checkpoint=self._checkpoint,
            checkpoint_time=self._checkpoint_time,
            launcher=self._launcher,
        )
        path = self._run_dir / HEARTBEAT_FILE
        try:  # renamed and not flushed to the disk: after a crash of the machine nobody needs it
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text(beat.model_dump_json() + "\n", encoding="utf-8")
            temporary.replace(path)
        except OSError as error:  # whatever is wrong with the disk meets the checkpoint as well
            logger.warning("%s: no heartbeat written: %s", path, error)


def _lived_before(run_dir: Path) -> float:
    """Time at work of the starts before this one; the time since a death counts, that since a stop does not."""
    earlier = read_heartbeat(run_dir)
    if earlier is None:
        return 0.0
    return earlier.lived_s + (0.0 if earlier.state in ENDED else max(0.0, time.time() - earlier.time))
