"""Logging of Ray's worker processes. A module of its own: every process imports it at its start, torch would weigh."""

import logging
import warnings


def set_up_logging() -> None:
    """Let our lines through, and not what Ray says every half second because its dashboard is off."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
