from dataclasses import replace

import pytest
import torch

from manifests.errors import ConfigError
from trainer.batches import ChannelBatch
from trainer.models.art_gat import ArtGat, ArtGatConfig
from trainer.models.univariate import UnivariateEncoder, UnivariateEncoderConfig

TINY = UnivariateEncoderConfig(width=16, depth=1, num_tokens=4, conv_channels=(4, 8, 8))
IDS = ("mask_BC", "anode_BC", "cathode_BC", "kind_BC")


def make_batch(num_windows=2, num_channels=4, *, rate=64):
    draw = torch.Generator().manual_seed(0)
    shape = (num_windows, num_channels)
    return ChannelBatch(
        signal_BCT=torch.randn(*shape, 2 * rate, generator=draw, dtype=torch.float64),
        mask_BC=torch.ones(shape, dtype=torch.bool),
        anode_BC=torch.stack([torch.randperm(60, generator=draw)[:num_channels] + 1 for _ in range(num_windows)]),
        cathode_BC=torch.randint(1, 60, shape, generator=draw),
        kind_BC=torch.zeros(shape, dtype=torch.int64),
        rate_hz=float(rate),
    )


def make_model(**options):
    torch.manual_seed(0)
    config = ArtGatConfig.model_validate({"depth": 1, "dropout": 0.0, **options})
    return ArtGat(UnivariateEncoder(TINY), config).double()


def reordered(batch, order):
    return replace(
        batch, signal_BCT=batch.signal_BCT[:, order], **{name: getattr(batch, name)[:, order] for name in IDS}
    )


@pytest.mark.parametrize("graph", ["gat", "gcn", "mean"])
def test_the_order_of_channels_changes_nothing(graph):
    model, batch = make_model(graph=graph), make_batch()
    before, after = model(batch), model(reordered(batch, [2, 0, 3, 1]))
    assert before.pooled_BD.shape == (2, 16)
    assert before.tokens_BPD.shape == (2, 4, 16)
    torch.testing.assert_close(after.pooled_BD, before.pooled_BD, rtol=0, atol=1e-10)
    torch.testing.assert_close(after.tokens_BPD, before.tokens_BPD, rtol=0, atol=1e-10)


@pytest.mark.parametrize("graph", ["gat", "gcn", "mean"])
def test_masked_channels_and_batch_mates_change_nothing(graph):
    model, batch = make_model(graph=graph), make_batch()
    fewer = reordered(batch, [0, 1, 2])
    padded = replace(batch, mask_BC=torch.tensor([[True, True, True, False]] * 2))
    padded.signal_BCT[:, 3] = float("nan")
    torch.testing.assert_close(model(padded).pooled_BD, model(fewer).pooled_BD, rtol=0, atol=1e-10)
    alone = replace(fewer, signal_BCT=fewer.signal_BCT[:1], **{name: getattr(fewer, name)[:1] for name in IDS})
    torch.testing.assert_close(model(alone).pooled_BD, model(fewer).pooled_BD[:1], rtol=0, atol=1e-10)


def test_a_channel_more_and_another_place_change_the_result():
    model, batch = make_model(), make_batch()
    assert not torch.allclose(model(batch).pooled_BD, model(reordered(batch, [0, 1, 2])).pooled_BD)
    elsewhere = replace(batch, anode_BC=batch.anode_BC.roll(1, dims=1))
    assert not torch.allclose(model(batch).pooled_BD, model(elsewhere).pooled_BD)


@pytest.mark.parametrize("graph", ["gat", "gcn", "mean"])
def test_every_parameter_gets_a_gradient(graph):
    model = make_model(graph=graph)
    weight = torch.randn(16, dtype=torch.float64)
    (model(make_batch()).pooled_BD * weight).sum().backward()
    silent = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not silent
    flat = {name for name, parameter in model.named_parameters() if not parameter.grad.any()}
    assert all(name.endswith((".k.bias", "receiver")) for name in flat), flat


def test_a_window_without_channels_gives_zeros_and_a_finite_gradient():
    model, batch = make_model(), make_batch()
    batch.mask_BC[0] = False
    pooled = model(batch).pooled_BD
    assert not pooled[0].any()
    pooled.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_fewer_tokens_per_channel_are_means_in_time():
    batch = make_batch()
    every, two = (make_model(depth=0, tokens_per_channel=number)(batch).tokens_BPD for number in (None, 2))
    assert (every.shape, two.shape) == ((2, 4, 16), (2, 2, 16))
    same = make_model(tokens_per_channel=4)(batch).pooled_BD
    torch.testing.assert_close(same, make_model()(batch).pooled_BD, rtol=0, atol=1e-12)
    with pytest.raises(ConfigError, match="3 does not divide the 4 tokens"):
        make_model(tokens_per_channel=3)


def test_blocks_computed_again_give_the_same_gradient():
    gradients = []
    for is_checkpointed in (False, True):
        model = make_model(checkpoint_blocks=is_checkpointed)
        model(make_batch()).pooled_BD.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-12)
