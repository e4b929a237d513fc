"""Starting Ray: what conversion and training both do about two of its traps. Needs nothing of Ray itself."""

import logging
from collections.abc import Callable
from pathlib import Path

from manifests.errors import ConfigError

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent  # of the packages that this process runs
PACKAGES = ("adapters", "engine", "jobs", "manifests", "trainer")
ATTEMPTS = 2
TOO_SLOW = "timed out during startup"  # how Ray words that its daemon did not come up in 30 s


def start_ray(start: Callable[[], object], stop: Callable[[], object]) -> None:
    """Run `start`, a second time where the machine was too busy for Ray's half minute.

    Args:
        start: Starts or joins Ray.
        stop: Ends what a failed start has left.

    Raises:
        ConfigError: The working folder hides this code from Ray's workers, or Ray does not come up.
    """
    check_working_folder(Path.cwd())
    for attempt in range(1, ATTEMPTS + 1):
        try:
            start()
        except Exception as error:
            if TOO_SLOW not in str(error):
                raise
            stop()
            logger.warning("Ray did not come up in 30 s (attempt %d of %d)", attempt, ATTEMPTS)
        else:
            return
    raise ConfigError(
        f"Ray did not come up in 30 s, {ATTEMPTS} times: this machine is too busy or its temporary folder is full; "
        "end other work and run the same command again, which goes on where it was"
    )


def check_working_folder(folder: Path) -> None:
    """Refuse a working folder with packages of our names: Ray's workers look there before they look here.

    Raises:
        ConfigError: It holds one.
    """
    if folder.resolve() == ROOT:
        return
    for name in PACKAGES:
        for found in (folder / name / "__init__.py", folder / f"{name}.py"):
            if found.exists():
                raise ConfigError(
                    f"{found}: Ray's workers would import this in place of {ROOT / name}; run the command from another "
                    "folder"
                )
