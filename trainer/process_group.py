"""torch's process group: joined from what Ray Train made or what torchrun tells, left when the process ends."""

import atexit
import math
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from manifests.errors import ConfigError, ContractError
from trainer.collectives import from_rank_zero, rank, world_size

ResultT = TypeVar("ResultT")


def is_launched() -> bool:
    """Whether this process is a rank of a group: of Ray Train's, or of one that torchrun tells of."""
    return distributed.is_initialized() or {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def torchrun_words() -> str:
    """The words that start these ranks once more, empty where torchrun did not start them.

    >>> torchrun_words()
    'torchrun --nproc-per-node 4'
    """
    if not distributed.is_torchelastic_launched():
        return ""
    local, world = os.environ["LOCAL_WORLD_SIZE"], os.environ["WORLD_SIZE"]
    if local == world:
        return f"torchrun --nproc-per-node {local}"
    nodes = math.ceil(int(world) / int(local))
    endpoint = f"--rdzv-backend c10d --rdzv-endpoint {os.environ['MASTER_ADDR']}"
    return f"torchrun --nnodes {nodes} {endpoint} --nproc-per-node {local}"


def join_group(backend: str, *, timeout_s: float = 900.0) -> str:
    """Make sure that a process group exists, and return its backend.

    Ray Train has made one already; under torchrun the environment tells; otherwise this is a group of one process,
    which needs no port and lives as long as the process.

    Args:
        backend: `gloo`, `nccl`, or `auto` = nccl where there is a GPU.
        timeout_s: A collective that this does not suffice for fails.

    Raises:
        ConfigError: NCCL was asked for and there is no GPU.
    """
    has_gpu = torch.cuda.is_available()
    if backend == "nccl" and not has_gpu:
        raise ConfigError("backend: nccl needs a GPU and this machine has none; set backend to auto or gloo")
    chosen = ("nccl" if has_gpu else "gloo") if backend == "auto" else backend
    if not distributed.is_initialized():
        if is_launched():
            if has_gpu:  # Ray Train has done so; torchrun leaves it to us
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            distributed.init_process_group(chosen, timeout=timedelta(seconds=timeout_s))
        else:
            store = distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage] (public in torch's manual)
            distributed.init_process_group(chosen, store=store, rank=0, world_size=1)
        atexit.register(_leave_group)
    os.environ.setdefault("LOCAL_RANK", "0")
    return chosen


def _leave_group() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def run_on_rank_zero(action: Callable[[], ResultT]) -> ResultT:
    """What `action` returns on rank 0, on every rank. It runs there alone, and its error is everybody's.

    A collective; what is returned travels pickled between the run's own processes.
    """
    if world_size() == 1:
        return action()
    found: tuple[ResultT | None, tuple[str, str] | None] = (None, None)
    failure: Exception | None = None
    if rank() == 0:
        try:
            found = action(), None
        except Exception as error:  # noqa: BLE001 (raised below, when the others know)
            failure, found = error, (None, (type(error).__name__, str(error)))
    result, told = from_rank_zero(found)
    if failure is not None:
        raise failure
    if told is not None:
        kind = {"ConfigError": ConfigError, "ContractError": ContractError}.get(told[0], RuntimeError)
        raise kind(told[1])
    return result  # pyright: ignore[reportReturnType]  # None only where the action returned it
