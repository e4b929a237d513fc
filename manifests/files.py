"""Files that others look at meanwhile: read at one moment, replaced as a whole, held by a lock."""

import fcntl
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


def read_at_once(path: Path) -> bytes:
    """Content of a file that others replace; of a store in one request, since what changes between two is refused."""
    if isinstance(path, Path):
        return path.read_bytes()
    return path.fs.cat_file(path.path)  # a `upath.UPath`


def is_held(path: Path) -> bool:
    """Whether another process on this machine holds a lock file."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextmanager
def replaced_folder(folder: Path) -> Generator[Path, None, None]:
    """A new folder beside `folder`, which takes its name and its place when the block ends without an error."""
    temporary, old = folder.with_name(f".{folder.name}-new"), folder.with_name(f".{folder.name}-old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
