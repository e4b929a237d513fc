"""Stage 2 of One Model for All (arXiv 2511.08444): channels encoded alone, a graph over them, a transformer."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from manifests.errors import ConfigError
from trainer.batches import ChannelBatch, Encoded
from trainer.models.attention import Block, masked_mean, run_blocks
from trainer.models.graph import ChannelDistance, Graph, GraphLayer
from trainer.models.position import PositionCode
from trainer.models.univariate import RateCode, UnivariateEncoder


class ArtGatConfig(BaseModel):
    """Sizes of what stands on the encoder. `gcn` and `mean` are the published ablations of `gat`.

    `tokens_per_channel` takes means over neighbouring tokens in time before the transformer, whose cost grows with the
    square of their number: 64 channels of 16 tokens are 1,024. null = all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    graph: Graph = "gat"
    graph_layers: int = Field(default=2, ge=0)
    graph_heads: int = Field(default=4, ge=1)
    tokens_per_channel: int | None = Field(default=None, ge=1)
    depth: int = Field(default=2, ge=0)
    num_heads: int = Field(default=4, ge=1)
    hidden_ratio: int = Field(default=2, ge=1)
    num_frequencies: int = Field(default=6, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    checkpoint_blocks: bool = False


class ArtGat(nn.Module):
    """One vector per window and one per time token, from any set of channels in any order.

    Every channel is encoded by itself, then learns its place and its rate, which `id_leak_guard: drop` hid in
    pretraining. Channels of the same time exchange messages over the graph, and the transformer runs over all tokens
    of all channels.
    """

    def __init__(self, encoder: UnivariateEncoder, config: ArtGatConfig) -> None:
        super().__init__()
        width, num_tokens = encoder.width, encoder.config.num_tokens
        if num_tokens % (config.tokens_per_channel or num_tokens):
            raise ConfigError(
                f"model.tokens_per_channel: {config.tokens_per_channel} does not divide the {num_tokens} tokens of the "
                "encoder; choose a divisor"
            )
        self.config = config
        self.width = width
        self.encoder = encoder
        self.position = PositionCode(width, num_frequencies=config.num_frequencies)
        nn.init.ones_(self.position.norm.weight)  # the encoder's tokens are normed: a code of their size drowns nothing
        self.rate = RateCode(width, num_frequencies=config.num_frequencies)
        self.distance = ChannelDistance()
        self.graph = nn.ModuleList(
            GraphLayer(width, graph=config.graph, num_heads=config.graph_heads, dropout=config.dropout)
            for _ in range(config.graph_layers)
        )
        self.blocks = nn.ModuleList(
            Block(width, num_heads=config.num_heads, hidden=config.hidden_ratio * width, dropout=config.dropout)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, batch: ChannelBatch) -> Encoded:
        """Pooled (B, D) and tokens (B, P, D): means over channels; zeros for a window without channels."""
        tokens_BCPD = self.encoder.channel_tokens(batch)
        code_BCD = self.position(batch.anode_BC, batch.cathode_BC, batch.kind_BC) + self.rate(batch.rate_hz)
        tokens_BCPD = tokens_BCPD + code_BCD[:, :, None]
        distance_BCC = self.distance(batch)
        for layer in self.graph:
            tokens_BCPD = layer(tokens_BCPD, batch.mask_BC, distance_BCC)
        num_tokens = self.config.tokens_per_channel or tokens_BCPD.shape[2]
        tokens_BCPD = tokens_BCPD.unflatten(2, (num_tokens, -1)).mean(dim=3)
        mask_BL = batch.mask_BC.repeat_interleave(num_tokens, dim=1)
        is_checkpointed = self.config.checkpoint_blocks and self.training
        tokens_BLD = run_blocks(self.blocks, tokens_BCPD.flatten(1, 2), mask_BL, is_checkpointed=is_checkpointed)
        tokens_BCPD = self.norm(tokens_BLD).unflatten(1, (-1, num_tokens))
        tokens_BPD = masked_mean(tokens_BCPD, batch.mask_BC)
        return Encoded(tokens_BPD.mean(dim=1), tokens_BPD)
