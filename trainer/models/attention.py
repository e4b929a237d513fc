"""Transformer blocks and attention pooling, made of plain nn.Linear calls.

Never nn.TransformerEncoderLayer: its fast path in eval mode reads the weights directly, past a LoRA adapter
(PEFT then has no effect in evaluation). Every Linear here is called as a module.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint


class Attention(nn.Module):
    """Multi-head self-attention over L tokens, with an optional key mask."""

    def __init__(self, width: int, *, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)

    def forward(self, tokens_BLD: torch.Tensor, mask_BL: torch.Tensor | None = None) -> torch.Tensor:
        """Mixed tokens (B, L, D). Keys where the mask is False are not attended to."""
        query, key, value = (split_heads(part, self.num_heads) for part in self.project(tokens_BLD))
        mixed = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if mask_BL is None else answerable(mask_BL)[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.o(mixed.transpose(1, 2).flatten(2))

    def project(self, tokens_BLD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, (B, L, D) each."""
        return self.q(tokens_BLD), self.k(tokens_BLD), self.v(tokens_BLD)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a two-layer GELU network, each added to its input."""

    def __init__(self, width: int, *, num_heads: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, num_heads=num_heads, dropout=dropout)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens_BLD: torch.Tensor, mask_BL: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens of the same shape."""
        tokens_BLD = tokens_BLD + self.dropout(self.attn(self.norm1(tokens_BLD), mask_BL))
        return tokens_BLD + self.dropout(self.fc2(gelu(self.fc1(self.norm2(tokens_BLD)))))


def run_blocks(
    blocks: Iterable[nn.Module],
    tokens_BLD: torch.Tensor,
    mask_BL: torch.Tensor | None = None,
    *,
    is_checkpointed: bool,
) -> torch.Tensor:
    """Tokens after all blocks. `is_checkpointed` keeps their inputs only and computes the rest again in backward."""
    for block in blocks:
        if is_checkpointed and torch.is_grad_enabled():
            # Dropout draws again what it drew: the state of the generators is kept too.
            tokens_BLD = checkpoint(block, tokens_BLD, mask_BL, use_reentrant=False)
        else:
            tokens_BLD = block(tokens_BLD, mask_BL)
    return tokens_BLD


class LayerPool(nn.Module):
    """One vector from a masked set as SleepFM pools: a transformer block over its members, then their mean.

    Unlike there, the block runs for a set of one as well, and members that are padding enter neither.
    """

    def __init__(self, width: int, *, num_heads: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.block = Block(width, num_heads=num_heads, hidden=hidden, dropout=dropout)

    def forward(self, tokens_BLD: torch.Tensor, mask_BL: torch.Tensor | None = None) -> torch.Tensor:
        """Pooled vectors (B, D) of tokens (B, L, D); zeros for a set with no member."""
        return masked_mean(self.block(tokens_BLD, mask_BL), mask_BL)


class AttentionPool(nn.Module):
    """One vector from a masked set: masked mean plus what a learned query attends to.

    The layer runs for sets of one as for any other (published code skips it there, so that an embedding depends on
    the padding of its batch). A set with no member gives zeros.
    """

    def __init__(self, width: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.randn(1, width) * width**-0.5)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)

    def forward(self, tokens_BLD: torch.Tensor, mask_BL: torch.Tensor | None = None) -> torch.Tensor:
        """Pooled vectors (B, D) of tokens (B, L, D); only tokens where the mask is True enter."""
        normed = self.norm(tokens_BLD)
        key_BLHE, value_BLHE, query_1HE = (
            x.unflatten(-1, (self.num_heads, -1)) for x in (self.k(normed), self.v(normed), self.query)
        )
        # By hand: for one query a quarter faster than scaled_dot_product_attention, whose CUDA kernels also take 65,535
        # sets at most, and 128 windows of 4 modalities and 60 patches are half as many.
        score_BLH = (key_BLHE * query_1HE).sum(dim=-1) * key_BLHE.shape[-1] ** -0.5
        if mask_BL is not None:
            score_BLH = score_BLH.masked_fill(~answerable(mask_BL)[..., None], -torch.inf)
        attended_BHE = (score_BLH.softmax(dim=1)[..., None] * value_BLHE).sum(dim=1)
        pooled = self.o(attended_BHE.flatten(1)) + masked_mean(tokens_BLD, mask_BL)
        return pooled if mask_BL is None else pooled * mask_BL.any(dim=1, keepdim=True)


def masked_mean(tokens_BLD: torch.Tensor, mask_BL: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over dimension 1 of the entries whose mask is True, (B, ...); zeros where there is none."""
    if mask_BL is None:
        return tokens_BLD.mean(dim=1)
    weight = mask_BL.reshape(*mask_BL.shape, *(1 for _ in tokens_BLD.shape[2:]))
    total = torch.where(weight, tokens_BLD, torch.zeros_like(tokens_BLD)).sum(dim=1)
    return total / weight.sum(dim=1).clamp(min=1)


def answerable(mask_BL: torch.Tensor) -> torch.Tensor:
    """The mask with rows of no True set to all True: a softmax over nothing would be NaN; callers zero the row."""
    return mask_BL | ~mask_BL.any(dim=1, keepdim=True)


def split_heads(tokens_BLD: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, L, D) as (B, heads, L, D / heads)."""
    return tokens_BLD.unflatten(-1, (num_heads, -1)).transpose(1, 2)
