import numpy as np
import pytest
import torch

from trainer.models.tokenizers import ArtTokenizer, TimedConv1d, pool_to, stretching


def answer(conv, hz, rate, stretch):
    """Amplitude with which a convolution answers a wave, away from the window's ends."""
    wave = torch.sin(2 * torch.pi * hz * torch.arange(4 * rate, dtype=torch.float64) / rate)
    with torch.no_grad():
        out = conv(wave[None, None], stretch)[0, 0] - conv.bias
    inner = out[len(out) // 4 : -len(out) // 4]
    return float(inner.square().mean().sqrt() * np.sqrt(2))


def make_conv(weights, *, stride=1):
    conv = TimedConv1d(1, 1, len(weights), stride=stride, padding=len(weights) // 2).double()
    with torch.no_grad():
        conv.weight.copy_(torch.tensor(weights, dtype=torch.float64)[None, None])
    return conv


@pytest.mark.parametrize("rate", [100, 200, 256, 500])
@pytest.mark.parametrize("hz", [2.0, 10.0, 20.0])
def test_a_stretched_kernel_answers_a_wave_as_the_plain_one_does(rate, hz):
    conv = make_conv(np.random.default_rng(3).standard_normal(15))
    plain = answer(conv, hz, 128, 1.0)
    assert answer(conv, hz, rate, rate / 128) == pytest.approx(plain, rel=0.05, abs=0.05)


def test_the_same_taps_answer_another_wave_at_another_rate():
    conv = make_conv(np.random.default_rng(3).standard_normal(15))
    assert abs(answer(conv, 10.0, 256, 1.0) / answer(conv, 10.0, 128, 1.0) - 1) > 0.2


def test_a_stretched_kernel_keeps_its_sum_its_centre_and_an_odd_length():
    for taps, stretch in [(15, 200 / 128), (7, 4.0), (5, 0.5), (1, 0.1)]:
        matrix = stretching(taps, stretch)
        torch.testing.assert_close(matrix.sum(dim=1), torch.ones(taps, dtype=torch.float64))
        assert matrix.shape[1] % 2 == 1
        torch.testing.assert_close(matrix, matrix.flip(0, 1))
        assert taps == 1 or abs(matrix.shape[1] / stretch - taps) < 4 / min(1.0, stretch) + 2


def test_what_a_lower_rate_cannot_hold_leaves_the_kernel():
    """Taps in turn up and down see 64 Hz alone; at 64 Hz sampling nothing of it may fold down."""
    taps = np.hanning(17)[1:-1] * (-1.0) ** np.arange(15)
    assert answer(make_conv(taps), 10.0, 128, 1.0) < 0.02
    assert answer(make_conv(taps), 10.0, 64, 0.5) < 0.2
    assert answer(make_conv(taps[::2]), 10.0, 64, 1.0) > 1  # every second tap, which is what it must not do


@pytest.mark.parametrize("rate", [64, 100, 128, 200, 512])
@pytest.mark.parametrize("stride", [1, 2])
def test_lengths_are_those_of_the_rate(rate, stride):
    conv = make_conv(np.ones(7), stride=stride)
    out = conv(torch.ones(1, 1, 4 * rate, dtype=torch.float64), rate / 128)
    assert out.shape[-1] == 4 * rate // stride


def test_kernels_in_time_get_a_gradient_at_another_rate_too():
    torch.manual_seed(0)
    tokenizer = ArtTokenizer(8, channels=(4, 8), kernels=(15, 5), strides=(2, 1), kernel_rate_hz=128)
    tokens = tokenizer(torch.randn(3, 800), 200.0)
    assert tokens.shape == (3, 16, 8)
    tokens.square().sum().backward()
    assert all(parameter.grad.any() for parameter in tokenizer.parameters())


def test_the_compiler_sees_through_the_stretch():
    torch.manual_seed(0)
    tokenizer = ArtTokenizer(8, channels=(4, 8), kernels=(15, 5), strides=(2, 1), kernel_rate_hz=128)
    signal = torch.randn(3, 800)
    compiled = torch.compile(tokenizer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(signal, 200.0), tokenizer(signal, 200.0))


def test_pooling_gives_equal_stretches_of_any_length():
    torch.testing.assert_close(pool_to(torch.arange(12.0)[None, None], 4)[0, 0], torch.tensor([1.0, 4.0, 7.0, 10.0]))
    assert pool_to(torch.ones(1, 2, 5), 16).shape == (1, 2, 16)
