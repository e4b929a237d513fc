import pytest
import torch

from trainer.batches import ChannelBatch
from trainer.models.univariate import UnivariateEncoder, UnivariateEncoderConfig

TINY = UnivariateEncoderConfig(width=16, depth=1, conv_channels=(4, 8, 8))


def make_batch(num_windows, num_channels, *, rate=64, seconds=4):
    draw = torch.Generator().manual_seed(0)
    shape = (num_windows, num_channels)
    return ChannelBatch(
        signal_BCT=torch.randn(*shape, rate * seconds, generator=draw, dtype=torch.float64),
        mask_BC=torch.ones(shape, dtype=torch.bool),
        anode_BC=torch.randint(1, 60, shape, generator=draw),
        cathode_BC=torch.randint(0, 60, shape, generator=draw),
        kind_BC=torch.randint(0, 5, shape, generator=draw),
        rate_hz=float(rate),
    )


def make_encoder(**options):
    torch.manual_seed(0)
    return UnivariateEncoder(TINY.model_copy(update=options)).double()


@pytest.mark.parametrize("rate", [2, 50, 128, 200, 512])
def test_sixteen_tokens_at_any_rate(rate):
    pooled, tokens = make_encoder()(make_batch(2, 3, rate=rate))
    assert pooled.shape == (2, 16)
    assert tokens.shape == (2, 16, 16)


def test_pooled_is_the_mean_of_channels_encoded_alone():
    encoder, batch = make_encoder(channel_code=True, rate_code=True), make_batch(1, 3)
    alone = [
        encoder(
            ChannelBatch(
                signal_BCT=batch.signal_BCT[:, c : c + 1],
                mask_BC=batch.mask_BC[:, c : c + 1],
                anode_BC=batch.anode_BC[:, c : c + 1],
                cathode_BC=batch.cathode_BC[:, c : c + 1],
                kind_BC=batch.kind_BC[:, c : c + 1],
                rate_hz=batch.rate_hz,
            )
        )
        for c in range(3)
    ]
    both = encoder(batch)
    torch.testing.assert_close(both.pooled_BD, sum(x.pooled_BD for x in alone) / 3, rtol=0, atol=1e-10)
    torch.testing.assert_close(both.tokens_BPD, sum(x.tokens_BPD for x in alone) / 3, rtol=0, atol=1e-10)


def test_padding_and_batch_mates_change_nothing():
    encoder, batch = make_encoder(channel_code=True), make_batch(2, 3)
    batch.mask_BC[1, 1:] = False
    before = encoder(batch).pooled_BD
    batch.signal_BCT[1, 1:] = float("nan")
    batch.signal_BCT[0] *= 2
    after = encoder(batch).pooled_BD
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-10)
    assert not torch.allclose(after[0], before[0])


def test_fast_content_survives_the_pooling():
    """16 averages of a linear feature would not see 25 Hz: the convolutions must end in a non-linearity."""
    encoder = make_encoder()
    time = torch.arange(512, dtype=torch.float64) / 128
    fast, faster = torch.sin(2 * torch.pi * 25 * time), torch.sin(2 * torch.pi * 45 * time)
    batch = make_batch(2, 1, rate=128)
    batch.signal_BCT = torch.stack([fast, faster])[:, None]
    pooled = encoder(batch).pooled_BD
    assert (pooled[0] - pooled[1]).norm() > 0.05 * pooled[0].norm()


def test_codes_are_absent_unless_asked_for():
    encoder = make_encoder()
    assert encoder.position is None
    batch = make_batch(1, 1)
    before = encoder(batch).pooled_BD
    batch.anode_BC, batch.rate_hz = batch.anode_BC + 1, 99.0
    assert torch.equal(encoder(batch).pooled_BD, before)


@pytest.mark.parametrize("code", ["channel_code", "rate_code"])
def test_codes_enter_and_can_be_hidden(code):
    encoder, batch, other = make_encoder(**{code: True}), make_batch(2, 1), make_batch(2, 1)
    other.anode_BC, other.rate_hz = other.anode_BC + 1, 100.0
    assert not torch.allclose(encoder(batch).pooled_BD, encoder(other).pooled_BD)
    hidden = torch.zeros(2, 1)
    torch.testing.assert_close(
        encoder(batch, code_keep_BC=hidden).pooled_BD, encoder(other, code_keep_BC=hidden).pooled_BD
    )


def test_no_channel_gives_zeros_and_no_gradient():
    encoder, batch = make_encoder(channel_code=True), make_batch(2, 1)
    batch.mask_BC[:] = False
    pooled = encoder(batch).pooled_BD
    assert not pooled.any()
    pooled.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in encoder.parameters())


def test_train_equals_eval_without_dropout():
    encoder, batch = make_encoder(), make_batch(2, 2)
    assert torch.equal(encoder.train()(batch).pooled_BD, encoder.eval()(batch).pooled_BD)
