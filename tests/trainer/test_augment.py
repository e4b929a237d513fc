import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.augment import AugmentConfig, augment, phase_surrogate, resized_crop
from trainer.batches import generator

NOTHING = AugmentConfig(
    crop=(1.0, 1.0),
    amplitude=(1.0, 1.0),
    noise=(0.0, 0.0),
    time_mask_probability=0.0,
    sign_flip_probability=0.0,
)
WAVE = np.sin(np.arange(512) / 9).astype(np.float32)


def changed(**options):
    return NOTHING.model_copy(update=options)


def test_nothing_asked_nothing_changed():
    np.testing.assert_allclose(augment(WAVE, generator(0), NOTHING), WAVE, atol=1e-6)


def test_the_draws_alone_decide():
    first = augment(WAVE, generator(1, "key", 0), AugmentConfig())
    np.testing.assert_array_equal(first, augment(WAVE, generator(1, "key", 0), AugmentConfig()))
    assert np.abs(first - augment(WAVE, generator(1, "key", 1), AugmentConfig())).max() > 0.1
    assert first.dtype == np.float32
    assert first.shape == WAVE.shape


def test_resized_crop_stretches_its_stretch():
    ramp = np.arange(101, dtype=np.float32)
    np.testing.assert_allclose(resized_crop(ramp, share=0.5, start=0.0), np.linspace(0, 50, 101), atol=1e-4)
    np.testing.assert_allclose(resized_crop(ramp, share=0.5, start=1.0), np.linspace(50, 100, 101), atol=1e-4)


def test_resized_crop_of_one_sample_is_that_sample():
    np.testing.assert_array_equal(resized_crop(np.ones(1, np.float32), share=0.5, start=0.3), [1.0])


def test_sign_flip():
    np.testing.assert_allclose(augment(WAVE, generator(0), changed(sign_flip_probability=1.0)), -WAVE, atol=1e-6)


def test_time_mask_zeroes_one_stretch_of_the_asked_share():
    out = augment(WAVE + 5, generator(3), changed(time_mask_probability=1.0, time_mask=(0.25, 0.25)))
    zeros = np.flatnonzero(out == 0)
    assert len(zeros) == 128
    assert zeros[-1] - zeros[0] == 127


@pytest.mark.parametrize("seed", range(20))
def test_amplitude_stays_in_its_range(seed):
    ratio = np.abs(augment(WAVE, generator(seed), changed(amplitude=(0.5, 2.0)))).max() / np.abs(WAVE).max()
    assert 0.5 <= ratio <= 2.0


def test_noise_is_relative_to_the_window():
    out = augment(100 * WAVE, generator(0), changed(noise=(0.2, 0.2)))
    assert (out - 100 * WAVE).std() == pytest.approx(0.2 * 100 * WAVE.std(), rel=0.15)


@given(st.integers(0, 2**32), st.integers(2, 600))
def test_a_surrogate_keeps_the_amplitude_spectrum_and_the_mean_and_little_else(seed, length):
    rng = np.random.default_rng(seed)
    signal = rng.standard_normal(length).astype(np.float32) + 3
    out = phase_surrogate(signal, turns=rng.random(length // 2 + 1))
    assert out.dtype == np.float32
    assert out.shape == signal.shape
    np.testing.assert_allclose(
        np.abs(np.fft.rfft(out.astype(np.float64))), np.abs(np.fft.rfft(signal.astype(np.float64))), atol=1e-3
    )
    assert out.mean() == pytest.approx(signal.mean(), abs=1e-4)
    if length > 50:
        assert abs(np.corrcoef(out, signal)[0, 1]) < 0.7


def test_no_turn_is_the_same_window():
    np.testing.assert_allclose(phase_surrogate(WAVE, turns=np.zeros(257)), WAVE, atol=1e-6)


def test_a_surrogate_is_drawn_with_its_probability_and_within_its_range():
    half = [
        np.abs(augment(WAVE, generator(seed), changed(surrogate_probability=0.5)) - WAVE).max() > 1e-5
        for seed in range(200)
    ]
    assert 0.4 < np.mean(half) < 0.6
    small = changed(surrogate_probability=1.0, surrogate=(0.05, 0.05))
    for seed in range(20):
        spectrum, turned = np.fft.rfft(WAVE), np.fft.rfft(augment(WAVE, generator(seed), small))
        strong = np.abs(spectrum) > 1
        phase = np.angle(turned[strong] / spectrum[strong]) / (2 * np.pi)
        assert phase.min() > -1e-4
        assert phase.max() < 0.0501


FULL = AugmentConfig(surrogate_probability=1.0)
ONE_CHANGED = {
    "crop": (1.0, 1.0),
    "amplitude": (1.0, 1.0),
    "noise": (0.0, 0.0),
    "time_mask": (0.2, 0.2),
    "time_mask_probability": 0.0,
    "sign_flip_probability": 0.0,
    "surrogate": (0.0, 0.0),
    "surrogate_probability": 0.5,
}


@pytest.mark.parametrize("name", AugmentConfig.model_fields)
def test_a_change_of_one_range_reshuffles_no_other(name):
    """After every augmentation the generator stands at the same place."""
    first, second = generator(5), generator(5)
    augment(WAVE, first, FULL)
    augment(WAVE, second, FULL.model_copy(update={name: ONE_CHANGED[name]}))
    assert first.random() == second.random()


@given(st.integers(0, 2**32))
def test_what_each_augmentation_preserves(seed):
    signal = np.random.default_rng(seed).standard_normal(128).astype(np.float32)
    cropped = augment(signal, generator(seed), changed(crop=(0.5, 1.0)))
    assert signal.min() - 1e-6 <= cropped.min() <= cropped.max() <= signal.max() + 1e-6
    scaled = augment(signal, generator(seed), changed(amplitude=(0.5, 2.0)))
    assert np.corrcoef(scaled, signal)[0, 1] > 1 - 1e-6
    flipped = augment(signal, generator(seed), changed(sign_flip_probability=0.5))
    np.testing.assert_allclose(np.abs(flipped), np.abs(signal), atol=1e-6)
    masked = augment(signal, generator(seed), changed(time_mask_probability=1.0))
    kept = masked != 0
    np.testing.assert_allclose(masked[kept], signal[kept], atol=1e-6)
    assert 0.6 * 128 - 1 <= kept.sum() <= 0.9 * 128 + 1


def test_windows_without_a_surrogate_are_those_of_earlier_versions():
    """Digits of the first release: a run that goes on must see the same views."""
    out = augment(WAVE, generator(1, "key", 0), AugmentConfig())
    np.testing.assert_allclose(out[[0, 100, 511]], [-0.3831936, 0.2633401, -0.1407402], rtol=1e-5)
