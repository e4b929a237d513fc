"""Tokenizers: one channel's samples, at any rate, as a fixed number of tokens."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool1d, conv1d, gelu

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

    Without `kernel_rate_hz` a kernel has the same taps at any rate and so sees 117 ms at 128 Hz and 75 ms at 200 Hz:
    the same wave gives other features. With it the kernels are functions of time, written down at that rate.
    """

    def __init__(
        self,
        width: int,
        *,
        num_tokens: int = 16,
        channels: Sequence[int] = (16, 32, 64),
        kernels: Sequence[int] = (15, 7, 5),
        strides: Sequence[int] = (2, 2, 1),
        kernel_rate_hz: float | None = None,
    ) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.kernel_rate_hz = kernel_rate_hz
        self.convs = conv_stack(channels, kernels=kernels, strides=strides)
        self.norms = nn.ModuleList(nn.GroupNorm(1, count) for count in channels)
        self.project = nn.Linear(channels[-1], width)

    def forward(self, signal_NT: torch.Tensor, rate_hz: float) -> torch.Tensor:
        """Tokens (N, num_tokens, D) of signals (N, T) at a rate in Hz."""
        stretch = 1.0 if self.kernel_rate_hz is None else rate_hz / self.kernel_rate_hz
        features_NCT = signal_NT.to(self.project.weight.dtype)[:, None, :]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            features_NCT = gelu(norm(conv(features_NCT, stretch)))
        return self.project(pool_to(features_NCT, self.num_tokens).transpose(1, 2))


class TimedConv1d(nn.Conv1d):
    """A convolution whose kernel can be stretched in time, so that it means the same at another sampling rate."""

    def forward(self, features_NCT: torch.Tensor, stretch: float = 1.0) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Features at the stride's share of the samples; `stretch` is the rate over the rate of the kernel."""
        if stretch == 1.0:
            return super().forward(features_NCT)
        resample_KJ = stretching(self.kernel_size[0], stretch).to(self.weight)
        kernel = self.weight @ resample_KJ
        return conv1d(features_NCT, kernel, self.bias, stride=self.stride, padding=kernel.shape[-1] // 2)


@functools.cache
def stretching(taps: int, stretch: float) -> torch.Tensor:
    """Matrix (taps, longer) that turns a kernel into the same function of time at `stretch` times its rate.

    Cubic convolution (Keys 1981) between the taps; at a lower rate the cubic is widened, which keeps what is faster
    than the new rate can hold out of the kernel. The sum of a kernel, its answer to a constant, stays as it is.
    """
    widened = min(1.0, stretch)
    reach = (taps - 1) / 2 + 2 / widened  # beyond it the interpolated kernel is zero
    half = max(1, int(reach * stretch))
    at_J = torch.arange(-half, half + 1, dtype=torch.float64) / stretch
    tap_K = torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2
    x_KJ = (widened * (at_J[None, :] - tap_K[:, None])).abs()
    near = 1.5 * x_KJ**3 - 2.5 * x_KJ**2 + 1
    far = -0.5 * x_KJ**3 + 2.5 * x_KJ**2 - 4 * x_KJ + 2
    weight_KJ = torch.where(x_KJ < 1, near, torch.where(x_KJ < 2, far, torch.zeros_like(x_KJ)))
    return weight_KJ / weight_KJ.sum(dim=1, keepdim=True)


def conv_stack(channels: Sequence[int], *, kernels: Sequence[int], strides: Sequence[int]) -> nn.ModuleList:
    """Conv1d layers from 1 channel through `channels`, padded by half a kernel."""
    inputs = (1, *channels[:-1])
    return nn.ModuleList(
        TimedConv1d(before, after, kernel, stride=stride, padding=kernel // 2)
        for before, after, kernel, stride in zip(inputs, channels, kernels, strides, strict=True)
    )


def pool_to(features_NCT: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Averages over `num_slots` equal stretches of time, (N, C, num_slots), for any number of samples."""
    return adaptive_avg_pool1d(features_NCT, num_slots)
