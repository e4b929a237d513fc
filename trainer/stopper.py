"""A graceful stop: SIGINT, SIGTERM or a file in the run folder end a run after the step in progress."""

import logging
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from trainer.collectives import rank, sum_over_ranks, world_size

logger = logging.getLogger(__name__)

STOP_FILE = "STOP"  # made by anyone, stops the run after the current step as SIGTERM does


class Stopper:
    """Turns SIGINT, SIGTERM and the stop file into a stop that all ranks make after the same step."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / STOP_FILE
        self._is_asked = False
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

    def is_asked(self) -> bool:
        """Whether any rank was asked to stop. A collective."""
        if rank() == 0 and self._file.exists():
            self._file.unlink()
            self._is_asked = True
        if world_size() == 1:
            return self._is_asked
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        return bool(sum_over_ranks(torch.tensor([float(self._is_asked)], device=device)).item() > 0)
