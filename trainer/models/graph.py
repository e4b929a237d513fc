"""Messages between the channels of a window: a dense graph with a mask, weighted by attention, distance or evenly."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn.functional import elu, leaky_relu

from manifests.channels import positions, sites
from trainer.batches import ChannelBatch

Graph = Literal["gat", "gcn", "mean"]

NEGATIVE_SLOPE = 0.2  # of LeakyReLU in GAT
ON_HEAD = ("eeg", "eog")
UNKNOWN_DISTANCE = 1.0  # head radii to a channel that has no place on the head


class ChannelDistance(nn.Module):
    """Distances between the channels of windows in head radii, from the UCS sites; a module for its table alone."""

    xyz_S3: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        on_head = np.array([False, *(row.kind in ON_HEAD for row in sites())])
        xyz_S3 = np.where(on_head[:, None], positions(), np.float32("nan"))
        # Not persistent: a pure function of the UCS table, whose digest every checkpoint carries.
        self.register_buffer("xyz_S3", torch.from_numpy(xyz_S3), persistent=False)

    def forward(self, batch: ChannelBatch) -> torch.Tensor:
        """(B, C, C). A derivation lies between its electrodes; what has no place on the head is one radius away."""
        ends_BCE3 = torch.stack([self.xyz_S3[batch.anode_BC], self.xyz_S3[batch.cathode_BC]], dim=-2)
        place_BC3 = ends_BCE3.nanmean(dim=-2)
        # Not cdist: its gradient at distance 0 and its CUDA kernels are not needed for 64 points.
        distance_BCC = (place_BC3[:, :, None] - place_BC3[:, None, :]).norm(dim=-1)
        distance_BCC = distance_BCC.nan_to_num(nan=UNKNOWN_DISTANCE)
        return distance_BCC * (1 - torch.eye(distance_BCC.shape[1], device=distance_BCC.device))


class GraphLayer(nn.Module):
    """One round of messages between the present channels of a window, each channel its own neighbour too.

    `gat`: graph attention (Veličković et al. 2018), softmax over channels of LeakyReLU(a·Wh_i + b·Wh_j - c d_ij) per
    head; the learned c starts at 0. `gcn`: a graph convolution (Kipf and Welling 2017) with the fixed affinity
    exp(-d^2), normalised on both sides. `mean`: the same weight for every channel. The three share all but the
    weights. Input and output are joined by a sum, and normed before, so that layers can be stacked.
    """

    def __init__(self, width: int, *, graph: Graph, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.graph = graph
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, width, bias=False)
        self.bias = nn.Parameter(torch.zeros(width))
        self.dropout = nn.Dropout(dropout)
        if graph == "gat":
            size = width // num_heads
            self.receiver = nn.Parameter(torch.randn(num_heads, size) * size**-0.5)
            self.sender = nn.Parameter(torch.randn(num_heads, size) * size**-0.5)
            self.nearness = nn.Parameter(torch.zeros(num_heads))

    def forward(self, tokens_BCPD: torch.Tensor, mask_BC: torch.Tensor, distance_BCC: torch.Tensor) -> torch.Tensor:
        """Tokens of the same shape; each of the P tokens of a channel hears those of the same time.

        Channels whose mask is False send nothing; what they receive means nothing.
        """
        sent_BCPHE = self.project(self.norm(tokens_BCPD)).unflatten(-1, (self.num_heads, -1))
        weight_BPHCC = self.dropout(self._weights(sent_BCPHE, mask_BC, distance_BCC))
        heard = torch.einsum(
            "bphij,bjphe->biphe", weight_BPHCC.expand(-1, *self._sizes(sent_BCPHE), -1, -1), sent_BCPHE
        )
        return tokens_BCPD + elu(heard.flatten(-2) + self.bias)

    def _sizes(self, sent_BCPHE: torch.Tensor) -> tuple[int, int]:
        return sent_BCPHE.shape[2], sent_BCPHE.shape[3]

    def _weights(self, sent_BCPHE: torch.Tensor, mask_BC: torch.Tensor, distance_BCC: torch.Tensor) -> torch.Tensor:
        """What channel i takes of channel j, (B, P or 1, H or 1, C, C)."""
        present_BCC = mask_BC[:, None, :] | torch.eye(mask_BC.shape[1], dtype=torch.bool, device=mask_BC.device)
        if self.graph == "gat":
            receiver_BPHC = (sent_BCPHE * self.receiver).sum(dim=-1).permute(0, 2, 3, 1)
            sender_BPHC = (sent_BCPHE * self.sender).sum(dim=-1).permute(0, 2, 3, 1)
            far_BPHCC = self.nearness[:, None, None] * distance_BCC[:, None, None].to(sender_BPHC.dtype)
            score_BPHCC = leaky_relu(receiver_BPHC[..., None] + sender_BPHC[..., None, :] - far_BPHCC, NEGATIVE_SLOPE)
            return score_BPHCC.masked_fill(~present_BCC[:, None, None], float("-inf")).softmax(dim=-1)
        affinity = (-distance_BCC.square()).exp() if self.graph == "gcn" else torch.ones_like(distance_BCC)
        affinity = torch.where(present_BCC, affinity, torch.zeros_like(affinity)).to(sent_BCPHE.dtype)
        if self.graph == "mean":
            weight_BCC = affinity / affinity.sum(dim=-1, keepdim=True)
        else:
            degree_BC = affinity.sum(dim=-1).rsqrt()
            weight_BCC = degree_BC[:, :, None] * affinity * degree_BC[:, None, :]
        return weight_BCC[:, None, None]
