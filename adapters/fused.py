"""Attention whose q, k and v are one linear layer, so that one adapter serves the three."""

import torch
from torch import nn

from manifests.errors import ConfigError
from trainer.models.attention import Attention


class FusedAttention(Attention):
    """The same numbers as the attention it is made of; `qkv` holds the weights of q, k and v, in this order.

    MTEEG's 1.8 M trainable parameters (six tasks, LaBraM-Base) are those of one LoRA on such a layer, which has one A
    for all three: 4 r D parameters, where separate adapters have 6 r D.
    """

    def __init__(self, attention: Attention) -> None:
        nn.Module.__init__(self)
        self.num_heads = attention.num_heads
        self.dropout = attention.dropout
        parts = (attention.q, attention.k, attention.v)
        width = attention.q.in_features
        self.qkv = nn.Linear(width, 3 * width, device="meta")
        self.qkv.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]))
        self.qkv.bias = nn.Parameter(torch.cat([part.bias.detach() for part in parts]))
        self.o = attention.o

    def project(self, tokens_BLD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, (B, L, D) each."""
        return self.qkv(tokens_BLD).chunk(3, dim=-1)


def fuse_attention(blocks: nn.ModuleList) -> None:
    """Replace the attention of every block by its fused form; done already is fine.

    Raises:
        ConfigError: A block whose `attn` has no separate q, k and v.
    """
    for index, block in enumerate(blocks):
        attention = getattr(block, "attn", None)
        if not isinstance(attention, Attention):
            raise ConfigError(
                f"lora.attn: fused, but blocks.{index}.attn is a {type(attention).__name__} without q, k and v to "
                "join; use attn: split, or targets: feed_forward"
            )
        if not isinstance(attention, FusedAttention):
            block.attn = FusedAttention(attention)
