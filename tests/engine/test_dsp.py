"""harmonise: amplitude, alias, precision, length, drift, edges; units; missing samples."""

import subprocess
import sys
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import dsp
from engine.dsp import design, fill_nan, harmonise, nan_mask, nan_runs, output_length, to_unit, unit_factor
from manifests.errors import RecordingError

RATES = [
    (Fraction(256), 128),
    (Fraction(256), 200),
    (Fraction(500), 128),
    (Fraction(512), 128),
    (Fraction(100), 128),
    (Fraction(32), 128),
    (Fraction(160), 128),
    (Fraction(640000, 3333), 128),
    (Fraction(128), 128),
    (Fraction(512), 500),
    (Fraction(1000, 3), 128),
    (Fraction(17361, 100), 200),
]


def run(signal, rate, target_hz, *, low=None, high=None, notch=None, segments=None):
    return harmonise(
        np.asarray(signal, dtype=np.float32),
        rate=Fraction(rate),
        target_hz=target_hz,
        low_hz=low,
        high_hz=high,
        notch_hz=notch,
        segments_samples=segments or [len(signal)],
    )


def sine(freq_hz, rate, seconds, phase=0.3):
    times = np.arange(int(float(rate) * seconds)) / float(rate)
    return np.sin(2 * np.pi * freq_hz * times + phase)


def interior(signal, rate_hz, seconds=10):
    return signal[int(rate_hz * seconds) : -int(rate_hz * seconds)]


def decibel(signal, reference):
    noise = np.asarray(signal, dtype=np.float64) - reference
    return 10 * np.log10(np.mean(reference**2) / np.mean(noise**2))


@pytest.mark.parametrize(("rate", "target_hz"), RATES)
def test_passband_sine_keeps_amplitude_and_phase(rate, target_hz):
    edge_hz = 0.9 * min(float(rate), target_hz) / 2
    for freq_hz in (1.0, 0.4 * edge_hz, 0.99 * edge_hz):
        out = run(sine(freq_hz, rate, 120), rate, target_hz)
        expected = sine(freq_hz, target_hz, 121)[: len(out)]
        error = interior(out, target_hz) - interior(expected, target_hz)
        assert np.abs(error).max() < 0.01, freq_hz
        assert decibel(interior(out, target_hz), interior(expected, target_hz)) > 70


@pytest.mark.parametrize(("rate", "target_hz"), [pair for pair in RATES if pair[0] > pair[1]])
def test_aliases_are_90_db_down(rate, target_hz):
    for freq_hz in np.linspace(target_hz / 2, float(rate) / 2 * 0.999, 7):
        out = run(sine(freq_hz, rate, 60), rate, target_hz)
        assert 20 * np.log10(np.abs(interior(out, target_hz, 5)).max()) < -90, freq_hz


@pytest.mark.parametrize(("rate", "target_hz"), [(Fraction(100), 128), (Fraction(32), 128), (Fraction(1), 32)])
def test_images_are_90_db_down(rate, target_hz):
    freq_hz = 0.4 * float(rate)
    out = interior(run(sine(freq_hz, rate, 600), rate, target_hz), target_hz, 100)
    spectrum = np.abs(np.fft.rfft(out * np.blackman(len(out))))
    image = spectrum[np.fft.rfftfreq(len(out), 1 / target_hz) > float(rate) / 2].max()
    assert 20 * np.log10(image / spectrum.max()) < -90


@pytest.mark.parametrize(("rate", "target_hz"), [(Fraction(256), 128), (Fraction(256), 200), (Fraction(512), 128)])
def test_float64_direct_convolution_agrees_to_100_db(rate, target_hz):
    band = {"low_hz": 0.3, "high_hz": 35.0, "notch_hz": 50.0}
    signal = np.random.default_rng(1).normal(scale=50, size=int(rate) * 60) + 3000
    reference = signal
    for kernel in design(rate, target_hz, **band):
        reference = np.convolve(reference, kernel, mode="same")
    ratio = Fraction(target_hz) / rate
    fine = np.zeros(len(reference) * ratio.numerator)
    fine[:: ratio.numerator] = reference
    taps = np.arange(-64 * ratio.numerator, 64 * ratio.numerator + 1)
    shape = np.sinc(taps / ratio.numerator) * np.kaiser(len(taps), 14)
    expected = np.convolve(fine, shape, mode="same")[:: ratio.denominator]
    out = run(signal, rate, target_hz, low=0.3, high=35.0, notch=50.0)
    assert decibel(interior(out, target_hz), interior(expected, target_hz)) > 100


def test_band_and_notch_take_away_what_they_should():
    rate = Fraction(256)
    kept, gone = (1.0, 10.0, 34.0, 20.0), (0.02, 50.0, 60.0)
    for freq_hz in kept:
        assert np.abs(interior(run(sine(freq_hz, rate, 120), rate, 128, low=0.3, high=35, notch=50), 128)).max() > 0.99
    for freq_hz in gone:
        assert np.abs(interior(run(sine(freq_hz, rate, 300), rate, 128, low=0.3, high=35, notch=50), 128)).max() < 0.02
    wide = {"low": 0.5, "high": None, "notch": 50.0}
    for freq_hz in (50.0, 100.0):
        assert np.abs(interior(run(sine(freq_hz, 512, 60), 512, 256, **wide), 256)).max() < 0.002
    for freq_hz in (48.0, 52.0, 90.0):
        assert np.abs(interior(run(sine(freq_hz, 512, 60), 512, 256, **wide), 256)).max() > 0.99


@pytest.mark.parametrize(("rate", "target_hz"), RATES)
def test_an_impulse_does_not_drift(rate, target_hz):
    num_samples = int(rate * 1800)
    for place in (num_samples // 7, num_samples // 2, num_samples - int(rate * 3)):
        signal = np.zeros(num_samples)
        signal[place] = 1.0
        out = run(signal, rate, target_hz, low=0.5)
        assert abs(int(np.argmax(out)) - place * target_hz / float(rate)) <= 0.5 + 1e-9


@settings(max_examples=40, deadline=None)
@given(
    num_samples=st.integers(1, 3000),
    rate=st.sampled_from([Fraction(1), Fraction(25), Fraction(200), Fraction(2000, 3), Fraction(256)]),
    target_hz=st.sampled_from([32, 128, 200]),
)
def test_length_is_the_exact_rational_one_however_short(num_samples, rate, target_hz):
    signal = np.linspace(-1, 1, num_samples) + 5
    out = run(signal, rate, target_hz, high=0.4)
    assert len(out) == output_length(num_samples, rate, target_hz) == -(-num_samples * target_hz // rate)
    assert np.isfinite(out).all()
    assert out.dtype == np.float32
    assert np.abs(out).max() < 9


@pytest.mark.parametrize("rate", [Fraction(256), Fraction(1000, 3), Fraction(17361, 100)])
def test_a_kept_rate_without_a_band_leaves_every_sample_as_it_is(rate):
    signal = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    assert np.array_equal(run(signal, rate, rate), signal)
    assert run(signal, rate, rate).base is not signal
    quiet = run(signal + 100, rate, rate, low=0.1)
    assert len(quiet) == len(signal)
    assert abs(quiet.mean()) < 1


def test_segments_do_not_reach_into_each_other():
    rate, target_hz = Fraction(1000, 3), 128
    first, second = sine(10, rate, 90), 40 + sine(7, rate, 60)
    apart = [run(part, rate, target_hz, low=0.5, notch=50) for part in (first, second)]
    joined = np.concatenate((first, second))
    together = run(joined, rate, target_hz, low=0.5, notch=50, segments=[len(first), len(second)])
    assert np.array_equal(together, np.concatenate(apart))


@pytest.mark.parametrize(("rate", "target_hz"), [(Fraction(256), 200), (Fraction(17361, 100), 200)])
def test_the_edges_follow_the_signal(rate, target_hz):
    out = run(5 + sine(3, rate, 60, phase=0.0), rate, target_hz)
    expected = 5 + sine(3, target_hz, 61, phase=0.0)[: len(out)]
    for edge in (slice(0, target_hz // 2), slice(-target_hz // 2, None)):
        assert np.abs(out[edge] - expected[edge]).max() < 0.15


def test_a_constant_stays_and_a_high_pass_removes_it():
    signal = np.full(5000, 61379.36)
    assert np.array_equal(run(signal, 250, 128), np.full(2560, np.float32(61379.36)))
    assert not run(signal, 250, 128, low=0.5).any()


def test_a_large_offset_costs_no_precision():
    small = run(sine(10, 250, 60), 250, 128, low=0.5)
    large = run(sine(10, 250, 60) * 1 + 65536, 250, 128, low=0.5)
    assert np.abs(small - large).max() < 0.01  # 65536 + x is itself rounded to 1/128


def test_segments_are_filtered_apart():
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=3001), rng.normal(size=777) + 1000
    both = run(np.concatenate([first, second]), 256, 128, low=0.3, segments=[3001, 777])
    apart = [run(first, 256, 128, low=0.3), run(second, 256, 128, low=0.3)]
    assert np.array_equal(both, np.concatenate(apart))
    with pytest.raises(ValueError, match="3778"):
        run(np.zeros(3000), 256, 128, segments=[3001, 777])


def test_a_step_of_the_edge_does_not_ring_into_the_segment():
    ramp = np.linspace(0, 1000, 2560)
    assert np.abs(run(ramp, 256, 128) - ramp[::2]).max() < 0.02


@pytest.mark.parametrize(("rate", "target_hz"), [(256, 200), (200, 128), (100, 128)])
def test_blocks_join_without_a_trace(rate, target_hz, monkeypatch):
    signal = np.random.default_rng(4).normal(size=rate * 120)
    long = run(signal, rate, target_hz)
    monkeypatch.setattr(dsp, "_block_length", lambda _n, pad, down: 2 * pad + 48 * down)
    dsp._plan.cache_clear()
    short = run(signal, rate, target_hz)
    dsp._plan.cache_clear()
    assert decibel(short, long) > 110


def test_bytes_do_not_depend_on_threads(tmp_path):
    code = (
        "import hashlib, numpy as np; from fractions import Fraction; from engine.dsp import harmonise;"
        "x = np.random.default_rng(3).normal(size=100000).astype(np.float32);"
        "y = harmonise(x, rate=Fraction(256), target_hz=200, low_hz=.1, high_hz=75., notch_hz=50.,"
        " segments_samples=[100000]); print(hashlib.sha256(y.tobytes()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env={"OMP_NUM_THREADS": threads, "PYTHONPATH": str(dsp.__file__).rsplit("/engine/", 1)[0]},
        ).stdout
        for threads in ("1", "4")
    }
    assert len(digests) == 1


def test_a_rate_that_cannot_carry_the_band_is_refused():
    with pytest.raises(RecordingError, match="1 Hz cannot carry") as caught:
        run(np.zeros(100), 1, 128, low=10.0)
    assert caught.value.reason == "SIGNAL_INVALID"
    with pytest.raises(RecordingError, match="too large terms"):
        run(np.zeros(100), Fraction(25600001, 100003), 128)


def test_missing_samples_are_interpolated_and_told():
    signal = np.arange(1000, dtype=np.float32)
    signal[[0, 1, 400, 401, 402, 999]] = np.nan
    signal[600] = np.inf
    assert nan_runs(signal).tolist() == [[0, 2], [400, 403], [600, 601], [999, 1000]]
    filled = fill_nan(signal)
    assert filled[:3].tolist() == [2, 2, 2]
    assert filled[398:405].tolist() == [398, 399, 400, 401, 402, 403, 404]
    assert filled[998:].tolist() == [998, 998]
    mask = nan_mask(signal, rate=Fraction(256), target_hz=64, segments_samples=[500, 500])
    assert len(mask) == 250
    assert np.flatnonzero(mask).tolist() == [0, 100, 150, 249]
    assert np.isfinite(run(signal, 256, 64, low=0.5, segments=[500, 500])).all()
    assert not run(np.full(300, np.nan), 256, 128).any()


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), min_size=1, max_size=12))
def test_runs_rebuild_the_missing_samples(parts):
    missing = np.concatenate([np.full(count, flag) for flag, count in parts])
    runs = nan_runs(np.where(missing, np.nan, 1.0))
    rebuilt = np.zeros(len(missing), dtype=bool)
    for start, stop in runs:
        rebuilt[start:stop] = True
    assert np.array_equal(rebuilt, missing)
    assert all(first[1] < second[0] for first, second in pairwise(runs))


@pytest.mark.parametrize("unit", ["uV", "UV", "uv", "µV", "μV", "µv", " uV ", "microV", "uVolt", "\xc2\xb5V"])
def test_microvolt_in_any_spelling(unit):
    assert unit_factor(unit, "uV") == 1
    assert unit_factor(unit, "mV") == 1e-3


@pytest.mark.parametrize(
    ("raw", "canonical", "factor"),
    [
        ("mV", "uV", 1e3),
        ("MV", "uV", 1e3),
        ("V", "uV", 1e6),
        ("nV", "uV", 1e-3),
        ("uV", "mV", 1e-3),
        ("mv", "mV", 1),
        ("DegC", "degC", 1),
        ("°C", "degC", 1),
        ("BPM", "bpm", 1),
        ("", "%", 1),
        ("ML", "au", 1),
        ("mV", "au", 1),
    ],
)
def test_units_convert(raw, canonical, factor):
    assert unit_factor(raw, canonical) == pytest.approx(factor)
    assert to_unit(np.float32([2]), raw, canonical)[0] == pytest.approx(2 * factor)


@pytest.mark.parametrize("raw", ["", "-", "uV-mrs", "%", "ADU", "mmHg"])
def test_an_electrical_channel_without_a_known_unit_is_refused(raw):
    with pytest.raises(RecordingError) as caught:
        unit_factor(raw, "uV")
    assert caught.value.reason == "UNIT_UNKNOWN"
    assert repr(raw) in str(caught.value)
