"""Saving beside the training: a copy of the state in the host's memory, written and committed by a thread.

At most one checkpoint is under way. Whatever fails in the thread is raised on all ranks after the same step.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from trainer.checkpoint import HostState, Progress, copy_to_host, write_checkpoint
from trainer.checkpoint_store import gather_objects
from trainer.collectives import sum_over_ranks, world_size
from trainer.lock import Fence

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A committed checkpoint."""

    path: Path
    progress: Progress


class Saver:
    """Saves the checkpoints of a run. All ranks call all methods together, after the same steps.

    Args:
        folder: Folder of all checkpoints of the run.
        fence: Claim of this start.
        is_async: Whether training goes on while a checkpoint is written.
        on_commit: Called with each committed checkpoint, in the thread that wrote it, on every rank.
        timeout_s: How long a rank waits for another to have written its share.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fence: Fence,
        is_async: bool,
        on_commit: Callable[[Path], object],
        timeout_s: float = 900.0,
    ) -> None:
        self._folder = folder
        self._fence = fence
        self._is_async = is_async
        self._on_commit = on_commit
        self._thread: threading.Thread | None = None
        self._state: HostState | None = None
        self._saved: Saved | None = None
        self._failure: Exception | None = None
        self._gather: Callable[[Any], list[Any]] = gather_objects
        if is_async and world_size() > 1:
            # A group of its own: the thread's messages must not mix with those of the training.
            group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            self._gather = lambda value: _gather_in(group, value)

    def begin(self, model: Any, *, progress: Progress, extra: Mapping[str, Any]) -> None:
        """Save the state of now. The checkpoint before must have been fetched by `finished`."""
        assert self._thread is None, "a checkpoint is under way"
        earlier = self._state if self._is_async else None
        state = copy_to_host(model, progress=progress, extra=extra, earlier=earlier)
        if self._is_async:
            self._state = state  # its memory serves the next checkpoint
        self._thread = threading.Thread(target=self._write, args=(state,), name="saver", daemon=True)
        if self._is_async:
            self._thread.start()
        else:
            self._write(state)

    def _write(self, state: HostState) -> None:
        try:
            path = write_checkpoint(
                self._folder, state, attempt=self._fence.attempt, fence=self._fence, gather=self._gather
            )
            self._on_commit(path)
        except Exception as error:  # noqa: BLE001 (raised by `finished`)
            self._failure = error
        else:
            self._saved = Saved(path=path, progress=state.progress)

    def finished(self, *, wait: bool) -> Saved | None:
        """The checkpoint that was begun, if all ranks have written it by now; each is returned once.

        Args:
            wait: Until it is committed, instead of having a look.

        Raises:
            Exception: What went wrong when it was written, on all ranks.
        """
        if self._thread is None:
            return None
        if self._is_async:
            if not wait and not _all_ranks(not self._thread.is_alive()):
                return None
            self._thread.join()
        self._thread = None
        failed = _all_ranks(self._failure is not None, least=1)
        saved, failure, self._saved, self._failure = self._saved, self._failure, None, None
        if failure is not None:
            raise failure
        if failed:
            raise RuntimeError("another rank failed after the checkpoint was committed; its log tells why")
        return saved

    def close(self) -> None:
        """Let a checkpoint that is under way come to its end, when the run ends by an error."""
        if self._thread is not None and self._is_async:
            self._thread.join()
        if self._failure is not None:
            logger.error("the last checkpoint was not saved: %s", self._failure)


def _gather_in(group: Any, value: Any) -> list[Any]:
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value, group=group)
    return values


def _all_ranks(is_so: bool, *, least: int | None = None) -> bool:  # noqa: FBT001 (the value itself)
    """Whether it is so on all ranks, or on `least` of them."""
    if world_size() == 1:
        return is_so
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    count = sum_over_ranks(torch.tensor([float(is_so)], device=device)).item()
    return count >= (world_size() if least is None else least)
