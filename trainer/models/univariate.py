"""Univariate encoder (One Model for All, arXiv 2511.08444): every channel by itself, 16 tokens at any rate."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from trainer.batches import ChannelBatch, Encoded
from trainer.models.attention import Block, masked_mean, run_blocks
from trainer.models.position import PositionCode
from trainer.models.sleep import with_one_real
from trainer.models.tokenizers import ArtTokenizer


class UnivariateEncoderConfig(BaseModel):
    """Sizes of a UnivariateEncoder. The defaults are the tiny one that trains on two CPU cores.

    For real runs: width 200, depth 4-6, 8 heads, conv_channels 32/64/128. `channel_code` and `rate_code` build the
    embeddings of channel and rate; what pretraining does with them is the objective's `id_leak_guard`.
    `kernel_rate_hz` makes the convolutions' kernels functions of time, written down at that rate, so that one signal
    gives about one embedding at any rate; null keeps the same taps at every rate. `checkpoint_blocks` computes the
    blocks again in the backward pass instead of keeping what they need.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["univariate"] = "univariate"
    width: int = Field(default=64, ge=8)
    depth: int = Field(default=2, ge=1)
    num_heads: int = Field(default=4, ge=1)
    hidden_ratio: int = Field(default=2, ge=1)
    num_tokens: int = Field(default=16, ge=1)
    conv_channels: tuple[int, ...] = (16, 32, 64)
    conv_kernels: tuple[int, ...] = (15, 7, 5)
    conv_strides: tuple[int, ...] = (2, 2, 1)
    kernel_rate_hz: float | None = Field(default=None, gt=0)
    channel_code: bool = False
    rate_code: bool = False
    num_frequencies: int = Field(default=6, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    checkpoint_blocks: bool = False


class RateCode(nn.Module):
    """Code of a sampling rate, (D,): a linear map of sines and cosines of its octave above 1 Hz."""

    def __init__(self, width: int, *, num_frequencies: int) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.project = nn.Linear(2 * num_frequencies, width)

    def forward(self, rate_hz: float) -> torch.Tensor:
        """Code of a rate in Hz."""
        weight = self.project.weight
        octave = math.log2(rate_hz)
        frequencies = (math.pi / 16) * 2.0 ** torch.arange(self.num_frequencies, device=weight.device)
        return self.project(torch.cat([(octave * frequencies).sin(), (octave * frequencies).cos()]).to(weight.dtype))


class UnivariateEncoder(nn.Module):
    """One vector per window and one per token: the mean over channels that were each encoded alone.

    `position` is None unless the config asks for `channel_code`.
    """

    def __init__(self, config: UnivariateEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        self.temporal_encoder = ArtTokenizer(
            config.width,
            num_tokens=config.num_tokens,
            channels=config.conv_channels,
            kernels=config.conv_kernels,
            strides=config.conv_strides,
            kernel_rate_hz=config.kernel_rate_hz,
        )
        self.token_code = nn.Embedding(config.num_tokens, config.width)
        nn.init.normal_(self.token_code.weight, std=0.1)
        frequencies = config.num_frequencies
        self.position = PositionCode(config.width, num_frequencies=frequencies) if config.channel_code else None
        self.rate = RateCode(config.width, num_frequencies=frequencies) if config.rate_code else None
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

    def forward(
        self,
        batch: ChannelBatch,
        *,
        code_keep_BC: torch.Tensor | None = None,
        tokens_NPD: torch.Tensor | None = None,
    ) -> Encoded:
        """Pooled (B, D) and tokens (B, num_tokens, D), zeros for a window without channels.

        Args:
            batch: Windows of one rate.
            code_keep_BC: Factor on the channel and rate codes; None keeps them. Zeros hide the identity of a channel
                while every module still runs, as ZeRO-3 needs.
            tokens_NPD: What `temporal_tokens` gave for the batch; None computes it.
        """
        tokens_BCPD = self.channel_tokens(batch, code_keep_BC=code_keep_BC, tokens_NPD=tokens_NPD)
        tokens_BPD = masked_mean(tokens_BCPD, batch.mask_BC)
        return Encoded(tokens_BPD.mean(dim=1), tokens_BPD)

    def temporal_tokens(self, batch: ChannelBatch) -> torch.Tensor:
        """Tokens (N, num_tokens, D) of the real channels, window after window, by the temporal encoder alone."""
        return self.temporal_encoder(batch.signal_BCT[with_one_real(batch.mask_BC)], batch.rate_hz)

    def channel_tokens(
        self,
        batch: ChannelBatch,
        *,
        code_keep_BC: torch.Tensor | None = None,
        tokens_NPD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Tokens (B, C, num_tokens, D) of every channel by itself, zeros where the mask is False; see `forward`."""
        real_BC = with_one_real(batch.mask_BC)
        own_NPD: torch.Tensor = self.temporal_tokens(batch) if tokens_NPD is None else tokens_NPD
        own_NPD = own_NPD + self.token_code(torch.arange(own_NPD.shape[1], device=own_NPD.device))
        keep_N1 = None if code_keep_BC is None else code_keep_BC[real_BC][:, None].to(own_NPD.dtype)
        if self.position is not None:
            code_ND = self.position(batch.anode_BC[real_BC], batch.cathode_BC[real_BC], batch.kind_BC[real_BC])
            own_NPD = own_NPD + (code_ND if keep_N1 is None else code_ND * keep_N1)[:, None, :]
        if self.rate is not None:
            code_1D = self.rate(batch.rate_hz)[None, :]
            own_NPD = own_NPD + (code_1D if keep_N1 is None else code_1D * keep_N1)[:, None, :]
        is_checkpointed = self.config.checkpoint_blocks and self.training
        own_NPD = self.norm(run_blocks(self.blocks, own_NPD, is_checkpointed=is_checkpointed))
        tokens_BCPD = own_NPD.new_zeros(*real_BC.shape, *own_NPD.shape[1:])
        tokens_BCPD[real_BC] = own_NPD
        # A window without channels had one made up for it: no gradient, no trace.
        return torch.where(batch.mask_BC[..., None, None], tokens_BCPD, torch.zeros_like(tokens_BCPD))
