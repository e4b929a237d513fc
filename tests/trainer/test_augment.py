import numpy as np
import pytest

from trainer.augment import AugmentConfig, augment, resized_crop
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
