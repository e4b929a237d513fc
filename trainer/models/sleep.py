"""Sleep encoder: patches per channel, a set of channels to one token, a transformer over time.

The architecture of SleepFM with its published defects left out (research: defect register D1-D4): coordinates on
all three axes, padding never enters, the pooling layer always runs, no batch statistics.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from trainer.batches import ChannelBatch, Encoded
from trainer.models.attention import AttentionPool, Block, LayerPool, run_blocks
from trainer.models.position import LegacyPositionCode, PositionCode, time_code
from trainer.models.tokenizers import PatchTokenizer


class SleepEncoderConfig(BaseModel):
    """Sizes of a SleepEncoder. The defaults are the tiny one that trains on two CPU cores.

    SleepFM as published, as far as it is sound, is `jobs/configs/pretrain_sleepfm.yaml`.

    Attributes:
        hidden_ratio: Width of a block's hidden layer over `width`.
        patch_s: Seconds of a patch, which becomes one token.
        conv_norm: Group norm after each convolution of the tokenizer; deep stacks need it.
        patch_slots: Means of features kept per patch, in order of time.
        num_frequencies: Frequencies per axis of the position code.
        position: `s4b_legacy` is the published code, in which left equals right, for comparison only.
        pool: How sets become one vector: `query` attends with a learned query, `layer` is SleepFM's transformer layer
            and mean, which about doubles the cost of the encoder.
        checkpoint_blocks: Keep only the inputs of the blocks over time for the backward pass, and compute the rest
            again: a third more time in the blocks, and memory for one block instead of `depth`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["sleep"] = "sleep"
    width: int = Field(default=64, ge=8)
    depth: int = Field(default=2, ge=1)
    num_heads: int = Field(default=4, ge=1)
    hidden_ratio: int = Field(default=2, ge=1)
    patch_s: float = Field(default=2.0, gt=0)
    conv_channels: tuple[int, ...] = (16, 32)
    conv_kernels: tuple[int, ...] = (16, 5)
    conv_strides: tuple[int, ...] = (8, 2)
    conv_norm: bool = False
    patch_slots: int = Field(default=4, ge=1)
    num_frequencies: int = Field(default=6, ge=1)
    position: Literal["fourier", "s4b_legacy"] = "fourier"
    pool: Literal["query", "layer"] = "query"
    dropout: float = Field(default=0.0, ge=0, lt=1)
    checkpoint_blocks: bool = False


class SleepEncoder(nn.Module):
    """One vector per window and one per patch, whatever the channels, their number, order and rate."""

    def __init__(self, config: SleepEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        self.temporal_encoder = PatchTokenizer(
            config.width,
            channels=config.conv_channels,
            kernels=config.conv_kernels,
            strides=config.conv_strides,
            slots=config.patch_slots,
            has_norm=config.conv_norm,
        )
        self.position = _position(config)
        self.channel_pool = _pool(config)
        self.blocks = nn.ModuleList(
            Block(
                config.width,
                num_heads=config.num_heads,
                hidden=config.hidden_ratio * config.width,
                dropout=config.dropout,
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        self.time_pool = _pool(config)

    def forward(self, batch: ChannelBatch, *, tokens_NPD: torch.Tensor | None = None) -> Encoded:
        """Pooled (B, D) and one token per patch (B, P, D). A window without channels gives finite numbers.

        Args:
            batch: Windows of one rate.
            tokens_NPD: What `temporal_tokens` gave for the batch; None computes it.
        """
        temporal_NPD = self.temporal_tokens(batch) if tokens_NPD is None else tokens_NPD
        num_patches = temporal_NPD.shape[1]
        mask_BC = batch.mask_BC
        num_windows, num_channels = mask_BC.shape
        row_N = _real_rows(mask_BC)
        ids_3N = (rows_of(x, row_N) for x in (batch.anode_BC, batch.cathode_BC, batch.kind_BC))
        placed_NPD: torch.Tensor = temporal_NPD + self.position(*ids_3N)[:, None, :]
        sets_BPCD = placed_NPD.new_zeros(num_windows, num_patches, num_channels, self.width)
        sets_BPCD[row_N // num_channels, :, row_N % num_channels] = placed_NPD
        mask_LC = mask_BC.repeat_interleave(num_patches, dim=0)
        tokens_BPD = self.channel_pool(sets_BPCD.flatten(0, 1), mask_LC).unflatten(0, (num_windows, num_patches))
        tokens_BPD = tokens_BPD + time_code(num_patches, self.width, like=tokens_BPD)
        tokens_BPD = self.norm(
            run_blocks(self.blocks, tokens_BPD, is_checkpointed=self.config.checkpoint_blocks and self.training)
        )
        return Encoded(self.time_pool(tokens_BPD), tokens_BPD)

    def temporal_tokens(self, batch: ChannelBatch) -> torch.Tensor:
        """Tokens (N, P, D) of the real channels, window after window, by the temporal encoder alone.

        Only real channels are tokenized: padding costs nothing and cannot enter.
        """
        num_patches = count_patches(batch.signal_BCT.shape[2], rate_hz=batch.rate_hz, patch_s=self.config.patch_s)
        return self.temporal_encoder(rows_of(batch.signal_BCT, _real_rows(batch.mask_BC)), num_patches)


def _real_rows(mask_BC: torch.Tensor) -> torch.Tensor:
    """Places b x C + c of the real channels, ascending."""
    return with_one_real(mask_BC).flatten().nonzero()[:, 0]


def rows_of(values_BC: torch.Tensor, row_N: torch.Tensor) -> torch.Tensor:
    """Chosen rows of (B, C, ...) counted over both, (N, ...); without a copy when all are chosen."""
    flat = values_BC.flatten(0, 1)
    return flat if len(row_N) == len(flat) else flat[row_N]


def _position(config: SleepEncoderConfig) -> nn.Module:
    if config.position == "s4b_legacy":
        return LegacyPositionCode(config.width)
    return PositionCode(config.width, num_frequencies=config.num_frequencies)


def _pool(config: SleepEncoderConfig) -> nn.Module:
    if config.pool == "layer":
        hidden = config.hidden_ratio * config.width
        return LayerPool(config.width, num_heads=config.num_heads, hidden=hidden, dropout=config.dropout)
    return AttentionPool(config.width, num_heads=config.num_heads)


def count_patches(num_samples: int, *, rate_hz: float, patch_s: float) -> int:
    """Number of patches of `patch_s` seconds in a window, at least 1."""
    return max(1, round(num_samples / (rate_hz * patch_s)))


def with_one_real(mask_BC: torch.Tensor) -> torch.Tensor:
    """The mask, with one padded (zero) channel let in when a whole batch has none.

    Under ZeRO-3 every rank must run every module, so a batch without channels still runs; callers mask its result.
    """
    first = torch.zeros_like(mask_BC)
    first[0, 0] = True
    return mask_BC | (first & ~mask_BC.any())
