"""One conversion at a time writes to an output: a file lock on a disk, a lock object with a heartbeat on a store."""

import contextlib
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

from engine.storage import create_exclusively, is_remote, make_folder, reachable
from manifests.errors import ConfigError

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
LOCK_BEAT_S = 30.0
STALE_S = 300.0  # ten missed beats: a process that froze or lost its network for so long has lost the output
_SETTLE_S = 2.0  # between two takers of one stale lock the last writer wins; both look again after this time


class Holder(BaseModel):
    """Content of a lock object: who holds it, and when it last told so, in s of the wall clock.

    `started` is when the process began, so that another process of the same number is not taken for it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    token: str
    host: str
    pid: int
    started: float
    time: float

    @classmethod
    def of_this_process(cls, token: str) -> "Holder":
        """This process, now."""
        return cls(
            token=token,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=psutil.Process().create_time(),
            time=time.time(),
        )

    def is_gone(self) -> bool:
        """Whether the process has ended (told at once on its own host) or has been silent for `STALE_S` s."""
        if self.host == socket.gethostname():
            with contextlib.suppress(psutil.NoSuchProcess):
                return psutil.Process(self.pid).create_time() != self.started
            return True
        return time.time() - self.time > STALE_S

    def to_bytes(self) -> bytes:
        """Content of the lock object."""
        return json.dumps(self.model_dump()).encode()


def _read_holder(path: Path) -> Holder | None:
    """Who holds a lock object; None for nobody."""
    try:
        return Holder.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        raise ConfigError(f"{path}: not a lock of this kymo; remove it if no kymo convert runs") from None


def _refused(output: Path, holder: Holder) -> ConfigError:
    return ConfigError(
        f"{output}: another kymo convert is writing here (process {holder.pid} on {holder.host}, last heard "
        f"{time.time() - holder.time:.0f} s ago); wait for it or choose another output. "
        f"A dead one on another machine is passed over after {STALE_S:.0f} s"
    )


def _take(output: Path, path: Path, token: str) -> None:
    """Write the lock object, or refuse."""
    try:
        create_exclusively(path, Holder.of_this_process(token).to_bytes())
    except FileExistsError:
        holder = _read_holder(path)
    else:
        return
    if holder is not None and holder.token != token:  # ours: a lost answer made the store's client try twice
        if not holder.is_gone():
            raise _refused(output, holder)
        logger.info("%s: took over from process %d on %s, which ended", path, holder.pid, holder.host)
        path.write_bytes(Holder.of_this_process(token).to_bytes())
        time.sleep(_SETTLE_S)
        holder = _read_holder(path)
    if holder is None or holder.token != token:
        raise ConfigError(f"{output}: another kymo convert has just begun or ended here; run again")


@contextmanager
def _object_lock(output: Path) -> Iterator[Callable[[], None]]:
    path = output / LOCK_FILE
    token = secrets.token_hex(8)
    with reachable(output):
        _take(output, path, token)
    stop = threading.Event()
    taken: list[Holder | None] = []

    def beat() -> None:
        while not stop.wait(LOCK_BEAT_S):
            try:
                holder = _read_holder(path)
                if holder is None or holder.token != token:
                    taken.append(holder)
                    return
                path.write_bytes(Holder.of_this_process(token).to_bytes())
            except Exception as error:  # noqa: BLE001 - the network may come back; staleness tells if it does not
                logger.warning("%s: lock not renewed: %s", path, error)

    def check() -> None:
        if taken:
            raise ConfigError(f"{output}: the lock was taken by another kymo convert, nothing is published; run again")

    thread = threading.Thread(target=beat, daemon=True, name="lock")
    thread.start()
    try:
        yield check
    finally:
        stop.set()
        thread.join()
        if not taken:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


@contextmanager
def locked(output: Path) -> Iterator[Callable[[], None]]:
    """Hold the output folder for one conversion.

    On a disk the lock ends with the process, however that ends. On a store it is an object that is created
    exclusively and renewed every `LOCK_BEAT_S` s; one whose process is gone is taken over.

    Returns:
        A function that raises a ConfigError when the lock was lost; call it before publishing.

    Raises:
        ConfigError: Another conversion writes there, or the store does not answer.
    """
    if is_remote(output):
        with _object_lock(output) as check:
            yield check
        return
    make_folder(output)
    with (output / LOCK_FILE).open("a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{output}: another kymo convert is writing here; wait for it or choose another output"
            ) from None
        yield lambda: None
