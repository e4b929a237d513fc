"""What ranks tell each other: rows as one tensor, with gradient; sums; rank 0's word. The identity without a group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This rank, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_sizes(num_rows: int, *, device: torch.device | str) -> list[int]:
    """Number of rows of every rank, which may differ."""
    if world_size() == 1:
        return [num_rows]
    own = torch.tensor([num_rows], dtype=torch.int64, device=device)
    sizes = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(sizes, own)
    return [int(size) for size in torch.cat(sizes).tolist()]


def all_gather_rows(rows: torch.Tensor, sizes: list[int] | None = None) -> torch.Tensor:
    """Rows of all ranks in rank order, without gradient. `sizes` spares a call when already known."""
    if world_size() == 1:
        return rows.detach()
    sizes = gather_sizes(len(rows), device=rows.device) if sizes is None else sizes
    # Bool is not a type of every backend, and ranks must send equal shapes: pad to the longest, cut on arrival.
    sent = rows.detach().to(torch.uint8) if rows.dtype == torch.bool else rows.detach()
    padded = sent.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = sent
    received = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(received, padded)
    return torch.cat([part[:size] for part, size in zip(received, sizes, strict=True)]).to(rows.dtype)


class _GatherRows(torch.autograd.Function):
    """All-gather forward; reduce-scatter (own slice of the sum over ranks) backward.

    Own function because torch's differentiable gathers were renamed or deprecated in three releases in a row, and
    re-inserting the own slice into a gather without gradient is wrong by 26-50 % under DeepSpeed's mean reduction.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        ctx.sizes = sizes
        return all_gather_rows(rows, sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        # One slice per rank, padded to the longest: a backend takes equal shapes only.
        sent = gradients[0].new_zeros(len(ctx.sizes), max(ctx.sizes), *gradients[0].shape[1:])
        for slot, part in zip(sent, gradients[0].split(ctx.sizes), strict=True):
            slot[: len(part)] = part
        summed = torch.empty_like(sent[0])
        dist.reduce_scatter(summed, list(sent))
        return summed[: ctx.sizes[rank()]], None


def all_gather_with_grad(rows: torch.Tensor, sizes: list[int] | None = None) -> torch.Tensor:
    """Rows of all ranks in rank order; the gradient of every rank's loss flows back to the owner of a row.

    Every rank must call it, with any number of rows (0 included), and run backward through it.
    """
    if world_size() == 1:
        return rows
    sizes = gather_sizes(len(rows), device=rows.device) if sizes is None else sizes
    return _GatherRows.apply(rows, sizes)  # pyright: ignore[reportReturnType]  # torch leaves apply untyped


def exact(rows: torch.Tensor) -> torch.Tensor:
    """Rows in fp64 on a CPU, as they are on a GPU.

    For contrastive losses: logits up to 100 and a loss around 1 leave fp32 no digit to spare, and what a step came to
    differed by 2e-7 between numbers of ranks, its gradient's norm by 2e-6. Beside an encoder fp64 costs nothing; on a
    GPU, where many are slow at it, the order of summation is not fixed anyway.
    """
    return rows.double() if rows.device.type == "cpu" else rows


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over ranks, without gradient."""
    total = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


@contextmanager
def explained_timeouts(timeout_s: float) -> Iterator[None]:
    """Turns the error of a collective that waited too long into one that says what to do.

    Gloo raises; NCCL's watchdog ends the process by itself, with a line in its log.

    Raises:
        TimeoutError: Another rank did not take part in a collective.
    """
    try:
        yield
    except RuntimeError as error:
        if "timed out" not in str(error).lower():
            raise
        raise TimeoutError(
            f"rank {rank()} of {world_size()}: another rank did not answer for {timeout_s:g} s (collective_timeout_s): "
            "it hangs or is far behind; look at its log, then run the same command again"
        ) from error


def from_rank_zero(value: Any) -> Any:
    """Rank 0's value on all ranks."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
