"""A graceful stop: SIGINT, SIGTERM or a file in the run folder end a run after the step in progress."""

import logging
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from trainer.collectives import rank, sum_over_ranks, world_size
from trainer.paths import STOP_FILE

logger = logging.getLogger(__name__)

NOTICE_EVERY_S = 5.0  # as often as Ray looks itself


class Stopper:
    """Turns SIGINT, SIGTERM and the stop file into a stop that all ranks make after the same step.

    Args:
        run_dir: Folder of the run.
        notice: Asked on all ranks together every few seconds: does a machine go away soon? True on all or on none.
    """

    def __init__(self, run_dir: Path, *, notice: Callable[[], bool] | None = None) -> None:
        self._file = run_dir / STOP_FILE
        self._is_asked = False
        self._notice = notice
        self._looked = time.monotonic()
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stopper":
        if threading.current_thread() is threading.main_thread():  # Ray calls from another and has its own way
            for number in (signal.SIGINT, signal.SIGTERM):
                self._earlier[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        logger.warning("%s: stopping after this step", signal.Signals(number).name)
        self._is_asked = True

    def poll(self) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether a checkpoint is wanted now. A collective."""
        if rank() == 0 and self._file.exists():
            self._file.unlink()
            self._is_asked = True
        is_time = rank() == 0 and time.monotonic() - self._looked > NOTICE_EVERY_S
        is_stopping, is_looking = self._is_asked, is_time
        if world_size() > 1:
            device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
            asked = sum_over_ranks(torch.tensor([float(is_stopping), float(is_looking)], device=device)).tolist()
            is_stopping, is_looking = asked[0] > 0, asked[1] > 0
        if not is_looking:
            return is_stopping, False
        self._looked = time.monotonic()
        return is_stopping, self._notice is not None and self._notice()
