"""Where a channel is measured, as a vector: Fourier code of both electrodes plus learned site and kind."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from manifests.channels import KINDS, positions, site_ids, sites
from manifests.errors import ConfigError

CODE_SIZE = 0.1

# Of the published code: a margin around coordinates taken to lie in [0, 1], and frequencies per axis.
LEGACY_MARGIN = 0.4
LEGACY_FREQUENCIES = 8


class PositionCode(nn.Module):
    """Code of a channel from its anode, cathode and kind, one vector of `width` each.

    Per axis, sine and cosine of `num_frequencies` log-spaced frequencies for anode and cathode, so left differs
    from right and C3-M2 from M2-C3. Sites without coordinates (belts, `average`, no cathode) contribute none. The
    learned site embeddings start small: a montage that training never met still gets the code of its geometry.
    """

    features_SF: torch.Tensor

    def __init__(self, width: int, *, num_frequencies: int = 6) -> None:
        super().__init__()
        # Not persistent: a pure function of the UCS table, whose digest every checkpoint carries.
        table_SF = torch.from_numpy(fourier_features(positions(), num_frequencies=num_frequencies))
        self.register_buffer("features_SF", table_SF, persistent=False)
        self.xyz = nn.Linear(2 * table_SF.shape[1], width)
        self.anode = nn.Embedding(site_ids(), width, padding_idx=0)
        self.cathode = nn.Embedding(site_ids(), width, padding_idx=0)
        self.kind = nn.Embedding(len(KINDS), width)
        self.norm = nn.LayerNorm(width)
        with torch.no_grad():
            self.anode.weight[1:].normal_(std=0.02)
            self.cathode.weight[1:].normal_(std=0.02)
            self.kind.weight.normal_(std=0.3)
            # A fresh tokenizer's output varies by 0.03-0.1. A code of size 1 drowned it, and leave-one-out first
            # learned which montage goes with which: held-out top-1 after 160 steps 3 x chance against 8-12 x.
            self.norm.weight.fill_(CODE_SIZE)

    def forward(self, anode_BC: torch.Tensor, cathode_BC: torch.Tensor, kind_BC: torch.Tensor) -> torch.Tensor:
        """Code of shape (*ids.shape, width) of int64 site ids and kind indices."""
        features = torch.cat([self.features_SF[anode_BC], self.features_SF[cathode_BC]], dim=-1)
        summed = self.xyz(features.to(self.xyz.weight.dtype))
        summed = summed + self.anode(anode_BC) + self.cathode(cathode_BC) + self.kind(kind_BC)
        return self.norm(nn.functional.gelu(summed))


class LegacyPositionCode(nn.Module):
    """The published code of SleepFM's transfer to wake EEG (arXiv 2605.02500), its defects kept, for comparison only.

    Left equals right: of the 8 x 8 x 8 phases the first `width / 2` are kept, which up to width 128 all have the
    frequency 0 on the x axis. C3-M2 equals M2-C3: a derivation stands at the midpoint of its sites. And the period,
    made for [0, 1], folds a head that spans [-1, 1]. Channels without a place on the head get no code, where the
    published code raises.
    """

    xyz_S3: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % 2 or width > 2 * LEGACY_FREQUENCIES**3:
            raise ConfigError(f"encoder.position: s4b_legacy with width {width}; it needs an even width up to 1024")
        on_head = np.array([False, *(row.kind in {"eeg", "eog"} for row in sites())])
        xyz_S3 = np.where(on_head[:, None], positions(), np.float32("nan"))
        self.register_buffer("xyz_S3", torch.from_numpy(xyz_S3), persistent=False)
        self.width = width
        self.project = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, anode_BC: torch.Tensor, cathode_BC: torch.Tensor, kind_BC: torch.Tensor) -> torch.Tensor:
        """Code of shape (*ids.shape, width) of int64 site ids; kinds play no part."""
        del kind_BC
        ends_BCE3 = torch.stack([self.xyz_S3[anode_BC], self.xyz_S3[cathode_BC]], dim=-2)
        midpoint_BC3 = ends_BCE3.nanmean(dim=-2)
        features = legacy_features(midpoint_BC3.nan_to_num(), width=self.width)
        features = features * midpoint_BC3.isfinite().all(dim=-1, keepdim=True)
        return self.norm(nn.functional.gelu(self.project(features.to(self.project.weight.dtype))))


def legacy_features(xyz_N3: torch.Tensor, *, width: int) -> torch.Tensor:
    """The published features (..., width): cosines, then sines, of the first `width / 2` phases, x slowest."""
    steps = torch.arange(LEGACY_FREQUENCIES, dtype=xyz_N3.dtype, device=xyz_N3.device)
    frequencies_3F = torch.stack([axis.flatten() for axis in torch.meshgrid(steps, steps, steps, indexing="ij")])
    scaled_N3 = 2 * math.pi * (xyz_N3 + LEGACY_MARGIN) / (1 + 2 * LEGACY_MARGIN)
    phase_NF = scaled_N3 @ frequencies_3F[:, : width // 2]
    return torch.cat([phase_NF.cos(), phase_NF.sin()], dim=-1)


def fourier_features(xyz_S3: np.ndarray, *, num_frequencies: int) -> np.ndarray:
    """Features of every site, float32 (sites, 6 K + 1): per axis K sines and K cosines, then 1 if xyz is known.

    Frequencies are pi/4 x 2^k per unit of head radius: the slowest has a period of 8 radii, so no two sites on or
    near the head share a phase. Rows of unknown coordinates are zeros.
    """
    frequencies_K = (math.pi / 4) * 2.0 ** np.arange(num_frequencies)
    known_S1 = np.isfinite(xyz_S3).all(axis=1, keepdims=True)
    phase_SA = (np.nan_to_num(xyz_S3.astype(np.float64))[:, :, None] * frequencies_K).reshape(len(xyz_S3), -1)
    features = np.concatenate([np.sin(phase_SA), np.cos(phase_SA), known_S1], axis=1)
    return (features * known_S1).astype(np.float32)


def time_code(num_tokens: int, width: int, *, like: torch.Tensor) -> torch.Tensor:
    """Sinusoidal code of token order, (num_tokens, width), for any number of tokens (Vaswani et al. 2017)."""
    half = (width + 1) // 2
    rates = torch.exp(torch.arange(half, device=like.device) * (-math.log(10_000.0) / max(1, half)))
    phase = torch.arange(num_tokens, device=like.device)[:, None] * rates
    return torch.cat([phase.sin(), phase.cos()], dim=-1)[:, :width].to(like.dtype)
