"""The sleep encoder, the sizes that ship, and the register of published defects (research: seeds.md, 2.12)."""

import re
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from manifests.config import load_config
from trainer.batches import ChannelBatch
from trainer.config import PretrainConfig
from trainer.models.build import ENCODERS, EncoderConfig, build_encoder
from trainer.models.flops import sleep_flops
from trainer.models.sleep import SleepEncoder, SleepEncoderConfig
from trainer.objectives.build import build_objective
from trainer.objectives.modalities import ModalityBatch
from trainer.zero import initialise, join_processes, train_step

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = SleepEncoderConfig(width=16, depth=1, patch_s=1.0)
STAGES = {"conv_channels": (4, 8, 8), "conv_kernels": (5, 5, 5), "conv_strides": (2, 2, 2), "conv_norm": True}
AS_PUBLISHED = TINY.model_copy(update={"pool": "layer", "position": "s4b_legacy", "patch_slots": 1, **STAGES})

# Published defects of the SleepFM family, and by name the tests that hold them closed here.
DEFECTS = {
    "D1 left equals right": "test_left_differs_from_right_and_all_31_sites_from_each_other",
    "D1 as published, on purpose": "test_the_published_code_cannot_tell_left_from_right",
    "D2 padding enters the mean": "test_pool_ignores_padding_and_batch_mates",
    "D2 and batches change embeddings": "test_padding_and_batch_mates_change_nothing",
    "D3 the layer is skipped for one channel": "test_pool_runs_its_layer_on_a_single_member",
    "D3 in the encoder": "test_the_channel_pool_runs_for_one_channel",
    "D4 batch statistics": "test_train_equals_eval_without_dropout",
    "D4 and no such layer": "test_every_encoder_is_small_without_batch_statistics_buffers_or_0_dim_parameters",
    "D5 all modalities or none": "test_missing_modalities_train",
    "D5 absent: no gradient": "test_absent_modality_has_zero_gradient_through_the_encoder",
    "D6 channels change names": "test_channels_lie_in_the_order_of_kinds_padded_with_a_false_mask",
    "D6 aliases": "test_aliases_are_90_db_down",
    "D7 groups that give each other away": "test_group_maps_hold_each_source_in_one_modality",
    "D8 unknown stage is wake": "test_unscored_epoch_never_becomes_a_class",
    "D8 in the labels": "test_a_window_on_the_remainder_is_unscored_and_the_next_ones_go_by_majority",
    "D9 mask depends on memory layout": "test_time_mask_zeroes_one_stretch_of_the_asked_share",
    "D10 plain accuracy called balanced": "test_binary_balanced_accuracy_is_not_plain_accuracy",
    "D11 split by exam": "test_splits_are_a_pure_function_of_the_subject",
    "D11 no scale": "test_labram_is_hundreds_of_microvolts_also_from_millivolts",
    "D12 weights load in part": "test_weights_that_do_not_fit_are_refused",
}


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


@pytest.fixture(scope="module", params=[TINY, AS_PUBLISHED], ids=["ours", "as_published"])
def encoder(request):
    torch.manual_seed(0)
    return SleepEncoder(request.param).double()


@pytest.mark.parametrize("defect", list(DEFECTS))
def test_every_published_defect_has_its_test(defect):
    start = re.compile(rf"^def {DEFECTS[defect]}\(", re.MULTILINE)
    assert any(start.search(path.read_text()) for path in (REPOSITORY / "tests").rglob("test_*.py"))


def test_the_register_is_whole():
    assert {defect.split()[0] for defect in DEFECTS} == {f"D{number}" for number in range(1, 13)}


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
    layer = encoder.channel_pool.o if encoder.config.pool == "query" else encoder.channel_pool.block.attn
    handle = layer.register_forward_hook(lambda *_: runs.append(1))
    encoder(make_batch(2, 1))
    handle.remove()
    assert runs == [1]


def test_time_matters(encoder):
    batch = make_batch(1, 1)
    reversed_patches = batch.signal_BCT.unflatten(-1, (5, 64)).flip(2).flatten(2)
    before = encoder(batch).pooled_BD
    batch.signal_BCT = reversed_patches
    assert not torch.allclose(encoder(batch).pooled_BD, before, atol=1e-3)


def test_amplitude_is_seen():
    torch.manual_seed(0)
    encoder = SleepEncoder(TINY).double()  # the norms of the published stages take most of it away
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


@pytest.mark.parametrize("is_training", [True, False])
def test_blocks_computed_again_change_no_bit_and_only_in_training(is_training):
    batch, results = to_float(make_batch(2, 3)), []
    for checkpoint_blocks in (False, True):
        torch.manual_seed(0)
        config = TINY.model_copy(update={"depth": 3, "dropout": 0.3, "checkpoint_blocks": checkpoint_blocks})
        encoder = SleepEncoder(config).train(is_training)
        runs = []
        encoder.blocks[0].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        torch.manual_seed(1)
        encoder(batch).pooled_BD.square().sum().backward()
        results.append([parameter.grad for parameter in encoder.parameters()])
        assert len(runs) == (2 if checkpoint_blocks and is_training else 1)
    assert all(torch.equal(one, again) for one, again in zip(*results, strict=True))


def test_blocks_computed_again_agree_under_zero_3(tiny_config):
    """There the weights are gone when a block runs again. Wide enough for DeepSpeed to part them at all."""
    groups, losses = tuple(to_float(make_batch(4, channels, seed=channels)) for channels in (2, 3)), []
    batch = ModalityBatch(groups=groups, available_NM=torch.ones(4, 2).bool(), recording_N=torch.arange(4))
    for checkpoint_blocks in (False, True):
        encoder = {"kind": "sleep", "width": 256, "depth": 2, "dropout": 0.2, "checkpoint_blocks": checkpoint_blocks}
        config = tiny_config(encoder=encoder, zero_stage=3, precision="fp32")
        join_processes(config.backend)
        torch.manual_seed(0)
        model = initialise(build_objective(build_encoder(config.encoder), config.objective), config)
        assert model.module.encoder.blocks[0].fc1.weight.numel() == 0
        torch.manual_seed(1)
        steps = [train_step(model, [batch]) for _ in range(2)]
        losses.append([(float(metrics["loss"]), norm) for metrics, norm in steps])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]  # it learned


SIZES = {"": "tiny", "_small": "small", "_base": "base", "_large": "large"}
SHIPPED = ["pretrain_sleepfm", *(f"pretrain_sleep{suffix}" for suffix in SIZES)]


def shipped(name):
    path = REPOSITORY / "jobs/configs" / f"{name}.yaml"
    with torch.device("meta"):  # without memory for weights: the large one takes 1.2 GB
        config = load_config(PretrainConfig, path)
        return path.read_text(), config, build_encoder(config.encoder)


@pytest.mark.parametrize("name", SHIPPED[:1] + SHIPPED[2:])
def test_every_size_that_ships_is_what_its_header_says(name):
    text, config, encoder = shipped(name)
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    count = sum(parameter.numel() for parameter in encoder.parameters())
    stated = re.search(r"Parameters: ([\d.]+) million", header)
    assert stated is not None
    decimals = len(stated[1].partition(".")[2])
    assert f"{count / 1e6:.{decimals}f}" == stated[1]
    gflop = sleep_flops(config.encoder, [6, 3, 1, 2], num_samples=38400, num_patches=60) / 1e9
    assert f"{gflop:.{2 if gflop < 1 else 1 if gflop < 10 else 0}f} GFLOP forward" in header
    for part in ("Cost:", "Expected:", f"Command: kymo pretrain jobs/configs/{name}.yaml", "estimate"):
        assert part in header
    assert all(parameter.is_meta for parameter in encoder.parameters())


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("pretrain_sleep", 0.01e6, 1e6),
        ("pretrain_sleep_small", 0.9 * 4.4e6, 1.1 * 4.83e6),
        ("pretrain_sleepfm", 0.9 * 4.4e6, 1.1 * 4.83e6),
        ("pretrain_sleep_base", 80e6, 100e6),
        ("pretrain_sleep_large", 280e6, 330e6),
    ],
)
def test_sizes_are_those_of_their_names(name, low, high):
    """`small` within 10 % of SleepFM, whose paper says 4.4 million parameters and whose code makes 4.83."""
    assert low < sum(parameter.numel() for parameter in shipped(name)[2].parameters()) < high


def test_the_faithful_run_has_the_published_sizes():
    config = shipped("pretrain_sleepfm")[1]
    encoder, objective = config.encoder, config.objective
    assert (encoder.width, encoder.depth, encoder.num_heads, encoder.dropout) == (128, 6, 8, 0.3)
    assert (encoder.width * encoder.hidden_ratio, encoder.patch_s, encoder.pool) == (2048, 5.0, "layer")
    assert encoder.conv_channels == (4, 8, 16, 32, 64, 128)
    assert (objective.groups, objective.temperature, objective.max_scale) == ("sleepfm", 1.0, None)


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
