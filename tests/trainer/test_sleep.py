import pytest
import torch
from pydantic import TypeAdapter

from trainer.batches import ChannelBatch
from trainer.models.build import ENCODERS, EncoderConfig, build_encoder
from trainer.models.sleep import SleepEncoder, SleepEncoderConfig

TINY = SleepEncoderConfig(width=16, depth=1, patch_s=1.0)


def make_batch(num_windows, num_channels, *, rate=64, seconds=5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shape = (num_windows, num_channels)
    return ChannelBatch(
        signal_BCT=torch.randn(*shape, rate * seconds, generator=draw, dtype=torch.float64),
        mask_BC=torch.ones(shape, dtype=torch.bool),
        anode_BC=torch.randint(1, 60, shape, generator=draw),
        cathode_BC=torch.randint(0, 60, shape, generator=draw),
        kind_BC=torch.randint(0, 5, shape, generator=draw),
        rate_hz=float(rate),
    )


def select(batch, windows, channels):
    parts = {name: getattr(batch, name)[windows, channels] for name in ChannelBatch.__slots__ if name != "rate_hz"}
    return ChannelBatch(**parts, rate_hz=batch.rate_hz)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return SleepEncoder(TINY).double()


@pytest.mark.parametrize(
    ("rate", "seconds", "patches"), [(64, 5, 5), (100, 30, 30), (128, 4, 4), (200, 1, 1), (2, 2, 2)]
)
def test_any_rate_and_length_without_new_weights(encoder, rate, seconds, patches):
    pooled, tokens = encoder(make_batch(2, 3, rate=rate, seconds=seconds))
    assert pooled.shape == (2, 16)
    assert tokens.shape == (2, patches, 16)
    assert torch.isfinite(pooled).all()


def test_a_window_that_is_no_multiple_of_the_patch_is_rounded(encoder):
    batch = make_batch(1, 2, rate=64, seconds=4)
    batch.signal_BCT = batch.signal_BCT[..., :230]  # 3.6 s
    assert encoder(batch).tokens_BPD.shape[1] == 4


def test_padding_and_batch_mates_change_nothing(encoder):
    batch = make_batch(3, 4)
    batch.mask_BC[1, 1:] = False
    batch.mask_BC[2, 3:] = False
    full = encoder(batch)
    for b, count in enumerate((4, 1, 3)):
        alone = encoder(select(batch, slice(b, b + 1), slice(0, count)))
        torch.testing.assert_close(alone.pooled_BD[0], full.pooled_BD[b], rtol=0, atol=1e-10)
        torch.testing.assert_close(alone.tokens_BPD[0], full.tokens_BPD[b], rtol=0, atol=1e-10)


def test_even_nan_in_a_padded_channel_does_not_enter(encoder):
    batch = make_batch(2, 3)
    batch.mask_BC[:, 2] = False
    before = encoder(batch).pooled_BD
    batch.signal_BCT[:, 2] = float("nan")
    torch.testing.assert_close(encoder(batch).pooled_BD, before, rtol=0, atol=0)


def test_the_order_of_channels_does_not_matter_but_their_place_does(encoder):
    batch = make_batch(2, 3)
    order = torch.tensor([2, 0, 1])
    turned = select(batch, slice(None), order)
    torch.testing.assert_close(encoder(turned).pooled_BD, encoder(batch).pooled_BD, rtol=0, atol=1e-10)
    turned.anode_BC = batch.anode_BC
    assert not torch.allclose(encoder(turned).pooled_BD, encoder(batch).pooled_BD)


def test_the_channel_pool_runs_for_one_channel(encoder):
    runs = []
    handle = encoder.channel_pool.o.register_forward_hook(lambda *_: runs.append(1))
    encoder(make_batch(2, 1))
    handle.remove()
    assert runs == [1]


def test_time_matters(encoder):
    batch = make_batch(1, 1)
    reversed_patches = batch.signal_BCT.unflatten(-1, (5, 64)).flip(2).flatten(2)
    before = encoder(batch).pooled_BD
    batch.signal_BCT = reversed_patches
    assert not torch.allclose(encoder(batch).pooled_BD, before, atol=1e-3)


def test_amplitude_is_seen(encoder):
    batch = make_batch(1, 1)
    before = encoder(batch).pooled_BD
    batch.signal_BCT = 3 * batch.signal_BCT
    assert not torch.allclose(encoder(batch).pooled_BD, before, atol=1e-2)


def test_a_batch_without_any_channel_runs_every_module_with_zero_conv_gradient(encoder):
    batch = make_batch(2, 1)
    batch.mask_BC[:] = False
    encoder.zero_grad()
    pooled = encoder(batch).pooled_BD
    assert torch.isfinite(pooled).all()
    pooled.sum().backward()
    assert all(not p.grad.any() for p in encoder.temporal_encoder.parameters())


def test_train_equals_eval_without_dropout(encoder):
    batch = make_batch(2, 3)
    torch.testing.assert_close(encoder.train()(batch).pooled_BD, encoder.eval()(batch).pooled_BD, rtol=0, atol=0)


def test_dropout_is_only_in_training():
    encoder = SleepEncoder(TINY.model_copy(update={"dropout": 0.5})).double()
    batch = make_batch(2, 3)
    assert not torch.equal(encoder(batch).pooled_BD, encoder(batch).pooled_BD)
    encoder.eval()
    assert torch.equal(encoder(batch).pooled_BD, encoder(batch).pooled_BD)


def test_encoders_configs_and_dict_agree():
    adapter = TypeAdapter(EncoderConfig)
    assert set(ENCODERS) == set(adapter.json_schema()["discriminator"]["mapping"]) == {"sleep", "univariate"}


@pytest.mark.parametrize("kind", list(ENCODERS))
def test_every_encoder_is_small_without_batch_statistics_buffers_or_0_dim_parameters(kind):
    encoder = build_encoder(TypeAdapter(EncoderConfig).validate_python({"kind": kind}))
    assert sum(parameter.numel() for parameter in encoder.parameters()) < 1_000_000
    assert all(parameter.ndim > 0 for parameter in encoder.parameters())
    assert not any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in encoder.modules())
    assert set(encoder.state_dict()) == {name for name, _ in encoder.named_parameters()}
    assert encoder(to_float(make_batch(2, 2))).pooled_BD.shape == (2, encoder.width)


@pytest.mark.parametrize("kind", list(ENCODERS))
def test_lora_finds_six_linears_per_block(kind):
    encoder = build_encoder(TypeAdapter(EncoderConfig).validate_python({"kind": kind, "depth": 3}))
    names = [n for n, m in encoder.blocks.named_modules() if isinstance(m, torch.nn.Linear)]
    assert sorted(names) == sorted(
        f"{i}.{x}" for i in range(3) for x in ("attn.q", "attn.k", "attn.v", "attn.o", "fc1", "fc2")
    )


def to_float(batch):
    batch.signal_BCT = batch.signal_BCT.float()
    return batch
