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
from trainer.models.attention import AttentionPool, Block
from trainer.models.position import PositionCode, time_code
from trainer.models.tokenizers import PatchTokenizer


class SleepEncoderConfig(BaseModel):
    """Sizes of a SleepEncoder. The defaults are the tiny one that trains on two CPU cores.

    SleepFM's own sizes: width 128, depth 6 (3), 8 heads, patch 5 s (1 s), hidden_ratio 16, dropout 0.3.
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
    patch_slots: int = Field(default=4, ge=1)
    num_frequencies: int = Field(default=6, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)


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
        )
        self.position = PositionCode(config.width, num_frequencies=config.num_frequencies)
        self.channel_pool = AttentionPool(config.width, num_heads=config.num_heads)
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
        self.time_pool = AttentionPool(config.width, num_heads=config.num_heads)

    def forward(self, batch: ChannelBatch) -> Encoded:
        """Pooled (B, D) and one token per patch (B, P, D). A window without channels gives finite numbers."""
        num_patches = count_patches(batch, patch_s=self.config.patch_s)
        mask_BC = batch.mask_BC
        real_BC = with_one_real(mask_BC)
        # Only real channels are tokenized: padding costs nothing and cannot enter.
        tokens_NPD = self.temporal_encoder(batch.signal_BCT[real_BC], num_patches)
        code_ND = self.position(batch.anode_BC[real_BC], batch.cathode_BC[real_BC], batch.kind_BC[real_BC])
        tokens_NPD = tokens_NPD + code_ND[:, None, :]
        tokens_BCPD = tokens_NPD.new_zeros(*mask_BC.shape, num_patches, self.width)
        tokens_BCPD[real_BC] = tokens_NPD
        sets_LCD = tokens_BCPD.transpose(1, 2).flatten(0, 1)
        tokens_LD = self.channel_pool(sets_LCD, mask_BC.repeat_interleave(num_patches, dim=0))
        tokens_BPD = tokens_LD.unflatten(0, (len(mask_BC), num_patches))
        tokens_BPD = tokens_BPD + time_code(num_patches, self.width, like=tokens_BPD)
        for block in self.blocks:
            tokens_BPD = block(tokens_BPD)
        tokens_BPD = self.norm(tokens_BPD)
        return Encoded(self.time_pool(tokens_BPD), tokens_BPD)


def count_patches(batch: ChannelBatch, *, patch_s: float) -> int:
    """Number of patches of `patch_s` seconds in a window, at least 1."""
    return max(1, round(batch.signal_BCT.shape[2] / (batch.rate_hz * patch_s)))


def with_one_real(mask_BC: torch.Tensor) -> torch.Tensor:
    """The mask, with one padded (zero) channel let in when a whole batch has none.

    Under ZeRO-3 every rank must run every module, so a batch without channels still runs; callers mask its result.
    """
    first = torch.zeros_like(mask_BC)
    first[0, 0] = True
    return mask_BC | (first & ~mask_BC.any())
