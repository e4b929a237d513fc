from fractions import Fraction

import numpy as np
import pytest

from engine.quality import Faults, clipped_samples, flat_samples, quantise, runs_of, statistics


@pytest.mark.parametrize("outlier", [1.0, 30.0, 1000.0])
def test_quantisation_noise_stays_70_db_below_the_signal(outlier: float) -> None:
    signal = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    signal[500] = outlier
    steps, scale, saturated = quantise(signal, float(signal.std()), float(np.abs(signal).max()))
    kept = np.abs(signal) <= 32767 * scale
    noise = (steps * scale - signal)[kept]
    assert 10 * np.log10(signal[kept].var() / noise.var()) >= 70
    assert steps.max() <= 32767
    assert steps.min() >= -32767
    assert (0 if saturated is None else saturated.total) == (~kept).sum() == (outlier > 100)


def test_a_silent_channel_has_a_scale_and_no_values() -> None:
    steps, scale, saturated = quantise(np.zeros(10, dtype=np.float32), 0.0, 0.0)
    assert (steps == 0).all()
    assert scale == 1.0
    assert saturated is None


def test_statistics_of_a_known_signal() -> None:
    signal = (5 + np.tile([-1.0, 0.0, 0.0, 1.0], 50_000)).astype(np.float32)
    found = statistics(signal)
    assert found.mean == pytest.approx(5)
    assert found.sd == pytest.approx(np.sqrt(0.5), rel=1e-4)
    assert found.median == 5
    assert found.mad in {0.0, 1.0}
    assert found.peak == 6


def test_a_large_offset_leaves_the_statistics_right() -> None:
    noise = np.random.default_rng(0).normal(scale=0.1, size=300_000)
    found = statistics((37 + noise).astype(np.float32))
    assert found.sd == pytest.approx(noise.std(), rel=1e-3)
    assert found.mean == pytest.approx(37 + noise.mean(), abs=1e-5)


def test_only_constant_seconds_of_electrical_signals_are_flat() -> None:
    signal = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    signal[250:520] = 1.0
    flat = flat_samples(signal, Fraction(100), "eeg")
    assert flat is not None
    assert (flat.total, flat.between(300, 500)) == (200, 200)
    assert flat_samples(signal, Fraction(100), "spo2") is None
    assert flat_samples(signal, Fraction(1), "eeg") is None


def test_only_runs_at_the_extremes_are_clipped() -> None:
    signal = np.sin(np.arange(1000, dtype=np.float32))
    assert clipped_samples(signal, "eeg") is None
    signal[100:110] = 2.0
    signal[500] = 2.0
    clipped = clipped_samples(signal, "eeg")
    assert clipped is not None
    assert clipped.total == 10
    assert clipped_samples(signal, "spo2") is None
    long = np.resize(signal, 200_000)
    long[100:110], long[500] = 0.0, 0.0
    long[65_535:65_538] = -3.0  # a run across two blocks
    found = clipped_samples(np.minimum(long, 1.5), "eeg")
    assert found is not None
    assert found.between(65_530, 65_540) == 3
    assert clipped_samples(np.ones(100, dtype=np.float32), "eeg") is None


def test_shares_of_a_stretch() -> None:
    flags = np.zeros(100, dtype=bool)
    assert runs_of(flags) is None
    flags[10:20] = True
    faults = Faults(flat=runs_of(flags), clipped=None, nan=None, saturated=runs_of(flags))
    assert not faults.is_clean
    assert faults.shares((0, 20), (10, 15)) == (0.5, 1.0, 0.0)
    assert Faults(flat=None, clipped=None, nan=None, saturated=None).is_clean


def test_runs_count_as_the_flags_do() -> None:
    rng = np.random.default_rng(0)
    for share in (0.02, 0.5, 1.0):
        flags = rng.random(300) < share
        runs = runs_of(flags)
        assert runs is not None
        assert (runs.total, runs.size) == (flags.sum(), 300)
        for first, last in np.sort(rng.integers(0, 301, size=(200, 2)), axis=1).tolist():
            assert runs.between(first, last) == flags[first:last].sum()
    lonely = runs_of(np.arange(10) == 9)
    assert lonely is not None
    assert [lonely.between(0, place) for place in (0, 9, 10)] == [0, 0, 1]
    assert runs_of(np.zeros(5, dtype=bool)) is None
