"""One run, one writer: a lock that ends with the process, and a numbered claim that a later start overrules."""

import fcntl
import json
import os
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from manifests.errors import ConfigError
from trainer.storage import create_exclusively, names_in

POLL_S = 0.2


def hold(path: Path, *, patience_s: float = 0.0) -> TextIO:
    """An open file whose lock is held until it is closed, modified when that began.

    Args:
        path: Lock file; made with its folder when missing.
        patience_s: How long to wait for another holder, e.g. a worker that Ray is just ending.

    Raises:
        ConfigError: Another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+", encoding="ascii")
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.close()
                message = f"{path.parent}: another run is training here; wait for it or give another run_dir"
                raise ConfigError(message) from None
            time.sleep(POLL_S)
        else:
            os.utime(path)
            return file


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """The claim of one start of a run: a file of its own that is never removed, so a number is never given twice.

    Two machines may start one run at once, and a machine that was taken for dead may wake up: no lock tells it, but
    before it commits it looks here. What it writes bears its number, so it cannot overwrite another's files either.

    Attributes:
        folder: Of the claims of all starts, local or in a store.
        attempt: Number of this start.
    """

    folder: Path
    attempt: int

    def check(self) -> None:
        """Nothing, as long as no later start has claimed the run.

        Raises:
            ConfigError: One has.
        """
        newest = max(_numbers(self.folder), default=0)
        if newest > self.attempt:
            raise ConfigError(
                f"{self.folder}: start {self.attempt} of this run was overruled by start {newest} "
                f"({_who(self.folder / _name(newest))}); this one ends without saving. One run may have one writer: "
                "look which of the two should go on"
            )


def claim(folder: Path, *, at_least: int = 1) -> Fence:
    """Claim a run for this process; every earlier claim is overruled from now on.

    Of two at the same moment each gets its own number where the place can create exclusively (a local disk, S3,
    Google Cloud Storage); elsewhere the last of them wins, as far as reading back can tell.
    """
    attempt = max([at_least, *(number + 1 for number in _numbers(folder))])
    who = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time(), "token": secrets.token_hex(8)}
    content = json.dumps(who).encode()
    while True:
        path = folder / _name(attempt)
        try:
            create_exclusively(path, content)
        except FileExistsError:
            attempt += 1
            continue
        if path.read_bytes() == content:
            return Fence(folder=folder, attempt=attempt)
        attempt += 1


def _name(attempt: int) -> str:
    return f"{attempt:06d}.json"


def _numbers(folder: Path) -> list[int]:
    return [int(name[:-5]) for name in names_in(folder) if name.endswith(".json") and name[:-5].isdecimal()]


def _who(path: Path) -> str:
    try:
        who = json.loads(path.read_bytes())
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(who["time"]))
        return f"process {who['pid']} on {who['host']}, {began}"
    except (OSError, ValueError, KeyError, TypeError):
        return "by whom cannot be read"
