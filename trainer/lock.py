"""One run folder, one run: a lock that ends with the process, however that ends."""

import fcntl
import time
from pathlib import Path
from typing import TextIO

from manifests.errors import ConfigError

POLL_S = 0.2


def hold(path: Path, *, patience_s: float = 0.0) -> TextIO:
    """An open file whose lock is held until it is closed.

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
            return file
