import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from trainer.augment import AugmentConfig, augment
from trainer.batches import ChannelBatch
from trainer.models.univariate import UnivariateEncoder, UnivariateEncoderConfig
from trainer.objectives.build import build_objective
from trainer.objectives.crops import NtXentBatch
from trainer.objectives.nt_xent import NtXentConfig

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


def test_blocks_computed_again_give_the_same_gradient():
    gradients = []
    for is_checkpointed in (False, True):
        encoder = make_encoder(checkpoint_blocks=is_checkpointed, depth=2)
        encoder(make_batch(2, 2)).pooled_BD.square().sum().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


def waves(num, rate, seed, *, high_hz=40.0, seconds=4):
    """The same `num` band-limited signals at any rate: twelve sines between 1 and `high_hz`, unit variance."""
    draw = np.random.default_rng(seed)
    hz, phase = draw.uniform(1, high_hz, (num, 12, 1)), draw.uniform(0, 2 * np.pi, (num, 12, 1))
    strength = draw.uniform(0.2, 1, (num, 12, 1)) / np.sqrt(hz)
    signal = (strength * np.sin(2 * np.pi * hz * np.arange(rate * seconds) / rate + phase)).sum(axis=1)
    return (signal / signal.std(axis=1, keepdims=True)).astype(np.float32)


def as_batch(signal_NT, rate):
    ids = torch.zeros(len(signal_NT), 1, dtype=torch.int64)
    return ChannelBatch(
        signal_BCT=torch.from_numpy(signal_NT)[:, None],
        mask_BC=torch.ones_like(ids, dtype=torch.bool),
        anode_BC=ids,
        cathode_BC=ids,
        kind_BC=ids,
        rate_hz=float(rate),
    )


@torch.no_grad()
def rate_agreement(encoder, first_hz, second_hz):
    """Cosine of one signal's embeddings at two rates, of two signals' embeddings, and of one signal's after the
    mean over signals is taken away, which no constant output can raise."""
    first, second = (encoder.eval()(as_batch(waves(100, rate, 9), rate)).pooled_BD for rate in (first_hz, second_hz))
    mean = (first.mean(dim=0) + second.mean(dim=0)) / 2
    return [
        float(cosine_similarity(*pair, dim=-1).mean())
        for pair in ((first, second), (first, second.roll(1, 0)), (first - mean, second - mean))
    ]


def train_at_two_rates(*, steps, num=32, mix_rates=True, seed=0, **options):
    """Encoder after NT-Xent on crops that are half at 128 and half at 200 Hz."""
    torch.manual_seed(seed)
    encoder = UnivariateEncoder(UnivariateEncoderConfig(width=32, depth=1, **options))
    objective = build_objective(encoder, NtXentConfig(rates_hz=(128, 200), mix_rates=mix_rates))
    optimiser = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    ids = {"channel_N": torch.zeros(num), "recording_N": torch.arange(num), "start_ms_N": torch.zeros(num)}
    for step in range(steps):
        groups = []
        for rate in (128, 200):
            signal = waves(num // 2, rate, 1000 + 2 * step + (rate == 200))
            draws = [np.random.default_rng([step, rate, n]) for n in range(num)]
            views = [augment(row, rng, AugmentConfig()) for row, rng in zip([*signal, *signal], draws, strict=True)]
            groups.append(as_batch(np.stack(views), rate))
        keeps = (torch.zeros(num, 1),) * 2
        batch = NtXentBatch(groups=tuple(groups), keeps=keeps, counts=(num // 2,) * 2, **ids)
        loss, _ = objective(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return encoder


def test_one_signal_at_128_and_200_hz_gives_one_embedding_after_training():
    same, other, centred = rate_agreement(train_at_two_rates(steps=80, kernel_rate_hz=128), 128, 200)
    assert same > 0.95
    assert other < 0.8
    assert centred > 0.9


def test_kernels_in_time_bring_rates_together_before_any_training():
    torch.manual_seed(0)
    in_samples = rate_agreement(UnivariateEncoder(UnivariateEncoderConfig()), 128, 256)[2]
    torch.manual_seed(0)
    in_time = rate_agreement(UnivariateEncoder(UnivariateEncoderConfig(kernel_rate_hz=128)), 128, 256)[2]
    assert in_time > in_samples + 0.2


def test_kernels_in_time_are_the_plain_ones_at_their_own_rate():
    batch = make_batch(2, 2, rate=64)
    timed, plain = make_encoder(kernel_rate_hz=64.0), make_encoder()
    torch.testing.assert_close(timed(batch).pooled_BD, plain(batch).pooled_BD, rtol=0, atol=0)
