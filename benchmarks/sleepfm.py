"""SleepFM as published, in public torch calls: what `benchmarks/train.py` holds our encoder against.

Re-stated from the description of zou-group/sleepfm-clinical (commit 70ce04e6, sleepfm/models/models.py and
sleepfm/pipeline/pretrain.py), its choices kept also where kymo departs from them: batch norm over all patches, padding
that is tokenized, a pooling layer that is skipped for one channel, one call for each modality.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

WIDTH = 128
PATCH_SAMPLES = 640
STAGES = (1, 4, 8, 16, 32, 64, 128)
NUM_HEADS = 8
HIDDEN = 2048
DEPTH = 6
DROPOUT = 0.3
MAX_TOKENS = 128


class Tokenizer(nn.Module):
    """Six stages of strided convolution, batch norm, ELU and layer norm over each patch of 640 samples."""

    def __init__(self) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        length = PATCH_SAMPLES
        for before, after in itertools.pairwise(STAGES):
            length //= 2
            stages += [
                nn.Conv1d(before, after, kernel_size=5, stride=2, padding=2),
                nn.BatchNorm1d(after),
                nn.ELU(),
                nn.LayerNorm([after, length]),
            ]
        self.stages = nn.Sequential(*stages, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(STAGES[-1], WIDTH))

    def forward(self, signal_BCT: torch.Tensor) -> torch.Tensor:
        """Tokens (B, C, S, E)."""
        num_windows, num_channels, _ = signal_BCT.shape
        patches = signal_BCT.reshape(-1, 1, PATCH_SAMPLES)
        return self.stages(patches).reshape(num_windows, num_channels, -1, WIDTH)


class Pooling(nn.Module):
    """A transformer layer over the members of a set, then the mean of those that are not padding."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, NUM_HEADS, HIDDEN, DROPOUT, batch_first=True)

    def forward(self, tokens_BLE: torch.Tensor, is_padding_BL: torch.Tensor | None = None) -> torch.Tensor:
        """Pooled vectors (B, E)."""
        if is_padding_BL is None:
            return self.layer(tokens_BLE).mean(dim=1)
        if is_padding_BL.shape[1] > 1:
            tokens_BLE = self.layer(tokens_BLE, src_key_padding_mask=is_padding_BL)
        real = (~is_padding_BL)[..., None].to(tokens_BLE.dtype)
        return (tokens_BLE * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)


class SleepFM(nn.Module):
    """The set transformer: tokens of each channel, pooled over channels, a transformer over time, pooled over time."""

    code_SE: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = Tokenizer()
        self.channel_pooling = Pooling()
        position = torch.arange(MAX_TOKENS)[:, None]
        rate = torch.exp(torch.arange(0, WIDTH, 2) * (-math.log(10_000.0) / WIDTH))
        code = torch.stack([(position * rate).sin(), (position * rate).cos()], dim=-1).flatten(1)
        self.register_buffer("code_SE", code)
        self.norm = nn.LayerNorm(WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, NUM_HEADS, HIDDEN, DROPOUT, batch_first=True, norm_first=True)
        self.transformer = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
        self.time_pooling = Pooling()
        self.temperature = nn.Parameter(torch.zeros(1))

    def forward(self, signal_BCT: torch.Tensor, is_padding_BC: torch.Tensor) -> torch.Tensor:
        """Pooled embeddings (B, E)."""
        tokens_BCSE = self.tokenizer(signal_BCT)
        num_windows, _, num_tokens, _ = tokens_BCSE.shape
        sets = tokens_BCSE.transpose(1, 2).flatten(0, 1)
        pooled = self.channel_pooling(sets, is_padding_BC.repeat_interleave(num_tokens, dim=0))
        tokens_BSE = pooled.unflatten(0, (num_windows, num_tokens)) + self.code_SE[:num_tokens]
        return self.time_pooling(self.transformer(self.norm(tokens_BSE)))

    def loss(self, signals: Sequence[torch.Tensor], paddings: Sequence[torch.Tensor]) -> torch.Tensor:
        """Leave-one-out loss of windows that have every modality."""
        unit_MNE = torch.stack([normalize(self(*group), dim=-1) for group in zip(signals, paddings, strict=True)])
        num_modalities, num_windows, _ = unit_MNE.shape
        own = torch.arange(num_windows, device=unit_MNE.device)
        total = unit_MNE.new_zeros(())
        for anchor, others in zip(unit_MNE, unit_MNE.sum(dim=0) - unit_MNE, strict=True):
            logits = anchor @ (others / (num_modalities - 1)).T * self.temperature.exp()
            total = total + cross_entropy(logits, own) + cross_entropy(logits.T, own)
        return total / (2 * num_modalities)
