"""Tokenizers: one channel's samples, at any rate, as a fixed number of tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool1d, gelu

# oneDNN keeps 1,024 compiled convolutions with their scratch memory, one per shape, and the number of channels
# differs from batch to batch: 60 steps of adapting to 12 leads took 2.4 GiB, with 16 of them 0.9. It reads this at
# the first convolution.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")


class PatchTokenizer(nn.Module):
    """One token per patch of time: strided convolutions over the whole window, means within each patch, linear.

    No weight depends on the window's or the patch's length, and there is no norm before the mean: the amplitude of
    a patch against its recording is what tells sleep stages apart. Works on a channel at a time.

    `has_norm` puts a group norm over each window and channel after every convolution, never over the batch. Deep
    stacks need it: SleepFM's six stages without one give fresh tokens that differ by 0.0001 around a bias of 0.05.
    """

    def __init__(
        self,
        width: int,
        *,
        channels: Sequence[int] = (16, 32),
        kernels: Sequence[int] = (16, 5),
        strides: Sequence[int] = (8, 2),
        slots: int = 4,
        has_norm: bool = False,
    ) -> None:
        super().__init__()
        self.slots = slots
        self.convs = conv_stack(channels, kernels=kernels, strides=strides)
        self.norms = nn.ModuleList(nn.GroupNorm(1, count) if has_norm else nn.Identity() for count in channels)
        self.project = nn.Linear(channels[-1] * slots, width)

    def forward(self, signal_NT: torch.Tensor, num_patches: int) -> torch.Tensor:
        """Tokens (N, P, D) of signals (N, T)."""
        features_NCT = signal_NT.to(self.project.weight.dtype)[:, None, :]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            features_NCT = gelu(norm(conv(features_NCT)))
        pooled = pool_to(features_NCT, num_patches * self.slots)
        pooled = pooled.unflatten(-1, (num_patches, self.slots)).transpose(1, 2).flatten(2)
        return self.project(pooled)


class ArtTokenizer(nn.Module):
    """A fixed number of tokens from a window of any rate: convolutions, adaptive average pooling, linear.

    The convolutions end in a non-linearity: the mean of a linear feature would lose everything faster than a token
    (One Model for All, arXiv 2511.08444). Group norm is per window and channel, never over the batch.
    """

    def __init__(
        self,
        width: int,
        *,
        num_tokens: int = 16,
        channels: Sequence[int] = (16, 32, 64),
        kernels: Sequence[int] = (15, 7, 5),
        strides: Sequence[int] = (2, 2, 1),
    ) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.convs = conv_stack(channels, kernels=kernels, strides=strides)
        self.norms = nn.ModuleList(nn.GroupNorm(1, count) for count in channels)
        self.project = nn.Linear(channels[-1], width)

    def forward(self, signal_NT: torch.Tensor) -> torch.Tensor:
        """Tokens (N, num_tokens, D) of signals (N, T)."""
        features_NCT = signal_NT.to(self.project.weight.dtype)[:, None, :]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            features_NCT = gelu(norm(conv(features_NCT)))
        return self.project(pool_to(features_NCT, self.num_tokens).transpose(1, 2))


def conv_stack(channels: Sequence[int], *, kernels: Sequence[int], strides: Sequence[int]) -> nn.ModuleList:
    """Conv1d layers from 1 channel through `channels`, padded by half a kernel."""
    inputs = (1, *channels[:-1])
    return nn.ModuleList(
        nn.Conv1d(before, after, kernel, stride=stride, padding=kernel // 2)
        for before, after, kernel, stride in zip(inputs, channels, kernels, strides, strict=True)
    )


def pool_to(features_NCT: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Averages over `num_slots` equal stretches of time, (N, C, num_slots), for any number of samples."""
    return adaptive_avg_pool1d(features_NCT, num_slots)
