"""Floating-point operations of an encoder, counted from its sizes: matrix products and convolutions, padding left out.

What a model needs, not what a device did: activations computed a second time and padded channels do not count, so that
a share of the device's peak (MFU) cannot be raised by wasting more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.models.build import Encoder
from trainer.models.sleep import SleepEncoder, SleepEncoderConfig, count_patches
from trainer.models.univariate import UnivariateEncoder, UnivariateEncoderConfig

# The backward pass takes two products, by the weight and by the input, for each one of the forward pass.
TRAINING_FACTOR = 3.0


def training_flops(encoder: Encoder, batch: Any) -> float:
    """Forward and backward pass of the encoder over all `groups` of an objective's batch."""
    return TRAINING_FACTOR * sum(encoder_flops(encoder, group) for group in batch.groups)


def encoder_flops(encoder: Encoder, batch: Any) -> float:
    """Forward pass over a ChannelBatch, better still as it is on the host: it asks for the number of real channels."""
    channels_B = [int(count) for count in batch.mask_BC.sum(dim=1).tolist()]
    num_samples = batch.num_samples
    if isinstance(encoder, SleepEncoder):
        num_patches = count_patches(num_samples, rate_hz=batch.rate_hz, patch_s=encoder.config.patch_s)
        return sleep_flops(encoder.config, channels_B, num_samples=num_samples, num_patches=num_patches)
    assert isinstance(encoder, UnivariateEncoder)
    return univariate_flops(encoder.config, sum(channels_B), num_samples=num_samples)


def sleep_flops(config: SleepEncoderConfig, channels_B: Sequence[int], *, num_samples: int, num_patches: int) -> float:
    """Forward pass over windows of so many channels each."""
    width, hidden = config.width, config.hidden_ratio * config.width
    num_rows, num_windows = sum(channels_B), len(channels_B)
    tokenizer = _conv_flops(config, num_samples=num_samples)
    tokenizer += 2 * num_patches * config.conv_channels[-1] * config.patch_slots * width
    if config.position == "s4b_legacy":
        position = 3 * width + 2 * width**2
    else:
        position = 2 * _num_features(config.num_frequencies) * width
    over_channels = [count for count in channels_B for _ in range(num_patches)]
    over_time = [num_patches] * num_windows
    return (
        num_rows * (tokenizer + position)
        + _pool_flops(config, over_channels)
        + config.depth * _block_flops(width, hidden, over_time)
        + _pool_flops(config, over_time)
    )


def univariate_flops(config: UnivariateEncoderConfig, num_rows: int, *, num_samples: int) -> float:
    """Forward pass over so many channels, each by itself."""
    width = config.width
    row = _conv_flops(config, num_samples=num_samples) + 2 * config.num_tokens * config.conv_channels[-1] * width
    if config.channel_code:
        row += 2 * _num_features(config.num_frequencies) * width
    blocks = config.depth * _block_flops(width, config.hidden_ratio * width, [config.num_tokens] * num_rows)
    return num_rows * row + blocks + (4 * config.num_frequencies * width if config.rate_code else 0)


def _num_features(num_frequencies: int) -> int:
    """Numbers that describe both electrodes: sine and cosine on three axes, and whether the place is known."""
    return 2 * (6 * num_frequencies + 1)


def _conv_flops(config: SleepEncoderConfig | UnivariateEncoderConfig, *, num_samples: int) -> float:
    """Convolutions of a tokenizer over one channel."""
    total, length = 0, num_samples
    inputs = (1, *config.conv_channels[:-1])
    for before, after, kernel, stride in zip(
        inputs, config.conv_channels, config.conv_kernels, config.conv_strides, strict=True
    ):
        length = (length + 2 * (kernel // 2) - kernel) // stride + 1
        total += 2 * length * before * after * kernel
    return total


def _block_flops(width: int, hidden: int, set_sizes: Sequence[int]) -> float:
    """A transformer block over sets of tokens."""
    return 2 * sum(set_sizes) * (4 * width**2 + 2 * width * hidden) + 4 * width * sum(n * n for n in set_sizes)


def _pool_flops(config: SleepEncoderConfig, set_sizes: Sequence[int]) -> float:
    """Sets of tokens to one vector each."""
    width = config.width
    if config.pool == "layer":
        return _block_flops(width, config.hidden_ratio * width, set_sizes)
    return 4 * sum(set_sizes) * width**2 + 2 * len(set_sizes) * width**2
