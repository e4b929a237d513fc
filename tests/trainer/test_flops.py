"""The analytic count against torch's own counter of dispatched operations."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trainer.batches import ChannelBatch
from trainer.models.build import build_encoder
from trainer.models.flops import encoder_flops, training_flops
from trainer.models.sleep import SleepEncoderConfig
from trainer.models.univariate import UnivariateEncoderConfig
from trainer.objectives.modalities import ModalityBatch

STAGES = {"conv_channels": (4, 8, 16), "conv_kernels": (5, 5, 5), "conv_strides": (2, 2, 2), "conv_norm": True}
ENCODERS = {
    "sleep": SleepEncoderConfig(width=32, depth=3, patch_s=1.0),
    "sleep_as_published": SleepEncoderConfig(
        width=32, depth=2, hidden_ratio=16, patch_s=2.0, pool="layer", position="s4b_legacy", **STAGES
    ),
    "univariate": UnivariateEncoderConfig(width=32, depth=2, channel_code=True, rate_code=True),
}


def make_batch(num_windows, num_channels):
    shape = (num_windows, num_channels)
    ids = [torch.randint(1, 60, shape) for _ in range(2)]
    return ChannelBatch(
        signal_BCT=torch.randn(*shape, 640),
        mask_BC=torch.ones(shape, dtype=torch.bool),
        anode_BC=ids[0],
        cathode_BC=ids[1],
        kind_BC=torch.zeros(shape, dtype=torch.int64),
        rate_hz=64.0,
    )


def counted(run):
    # Only the plain attention is made of products that the counter knows on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", list(ENCODERS))
def test_forward_agrees_with_torch_within_two_percent(name):
    encoder = build_encoder(ENCODERS[name])
    batch = make_batch(3, 5)
    assert encoder_flops(encoder, batch) == pytest.approx(counted(lambda: encoder(batch)), rel=0.02)


def test_training_is_three_times_forward_within_two_percent():
    """Less what the first convolution need not send back to the signal."""
    encoder = build_encoder(SleepEncoderConfig(width=128, depth=6, num_heads=8, hidden_ratio=4, patch_s=1.0))
    batch = make_batch(2, 3)
    groups = ModalityBatch(groups=(batch, batch), available_NM=torch.ones(2, 2), recording_N=torch.arange(2))
    measured = counted(lambda: [encoder(group).pooled_BD.sum().backward() for group in groups.groups])
    assert training_flops(encoder, groups) == pytest.approx(measured, rel=0.02)


def test_padding_does_not_count():
    encoder = build_encoder(ENCODERS["sleep"])
    padded = make_batch(3, 5)
    padded.mask_BC[:, 2:] = False
    assert encoder_flops(encoder, padded) == encoder_flops(encoder, make_batch(3, 2))


def test_twice_the_windows_are_twice_the_work():
    encoder = build_encoder(ENCODERS["sleep_as_published"])
    assert encoder_flops(encoder, make_batch(4, 2)) == 2 * encoder_flops(encoder, make_batch(2, 2))
