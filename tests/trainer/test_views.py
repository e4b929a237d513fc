import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import ConfigError
from trainer.views import BLOCK_SAMPLES, VIEWS, dequantise, find_view, scaling

TAG = {"symbol": "eeg:C3-M2", "unit": "uV", "scale": 0.5, "mean": 10.0, "sd": 20.0, "median": 9.0, "mad": 13.0}


def test_zscore_uses_the_recordings_mean_and_sd():
    stored = np.array([[0, 20, 60]], dtype=np.int16)  # 0, 10, 30 uV
    np.testing.assert_allclose(VIEWS["zscore"](stored, [TAG]), [[-0.5, 0.0, 1.0]], atol=1e-6)


def test_zscore_clips_at_8_sd():
    stored = np.array([[30000, -30000]], dtype=np.int16)
    np.testing.assert_array_equal(VIEWS["zscore"](stored, [TAG]), [[8.0, -8.0]])


def test_robust_has_median_0_and_unit_spread_whatever_the_scale():
    stored = np.random.default_rng(0).normal(300, 100, (2, 4001)).astype(np.int16)
    view = VIEWS["robust"](stored, [TAG, TAG | {"scale": 7.0}])
    np.testing.assert_allclose(np.median(view, axis=1), 0, atol=1e-3)
    np.testing.assert_allclose(view.std(axis=1), 1, atol=0.05)


def test_robust_of_a_mostly_constant_window_falls_back_to_the_sd():
    stored = np.zeros((1, 100), dtype=np.int16)
    stored[0, :10] = 50
    assert VIEWS["robust"](stored, [TAG]).max() == pytest.approx(50 / 15, rel=1e-4)


def test_labram_is_hundreds_of_microvolts_also_from_millivolts():
    stored = np.array([[200], [200]], dtype=np.int16)
    view = VIEWS["labram"](stored, [TAG, TAG | {"unit": "mV", "scale": 0.0005}])
    np.testing.assert_allclose(view, [[1.0], [1.0]], rtol=1e-6)


def test_clamp_cuts_at_50_uv_and_divides_by_10():
    stored = np.array([[20, 99, 1000, -1000]], dtype=np.int16)
    np.testing.assert_allclose(VIEWS["clamp"](stored, [TAG]), [[1.0, 4.95, 5.0, -5.0]], rtol=1e-6)


@pytest.mark.parametrize("name", ["labram", "clamp"])
def test_voltage_views_refuse_other_units(name):
    with pytest.raises(ConfigError, match=r"resp:thorax is in 'au'"):
        VIEWS[name](np.zeros((1, 3), np.int16), [TAG | {"unit": "au", "symbol": "resp:thorax"}])


def test_unknown_view_lists_the_known():
    with pytest.raises(ConfigError, match=r"'zcore' does not exist; choose one of zscore"):
        find_view("zcore")


@pytest.mark.parametrize("name", list(VIEWS))
@given(
    sd=st.sampled_from([0.0, 1e-30, 1.0, float("nan"), float("inf"), None]),
    mean=st.sampled_from([0.0, float("nan"), 1e30, None]),
    scale=st.sampled_from([0.0, 1e-9, 1e6, float("nan")]),
    kind=st.sampled_from(["flat", "wild", "edge"]),
)
def test_no_view_gives_nan(name, sd, mean, scale, kind):
    stored = {
        "flat": np.full((1, 16), 7, np.int16),
        "wild": np.array([[-32768, 32767] * 8], np.int16),
        "edge": np.array([[-1, 0, 1, 0] * 4], np.int16),
    }[kind]
    view = VIEWS[name](stored, [TAG | {"sd": sd, "mean": mean, "scale": scale}])
    assert view.dtype == np.float32
    assert np.isfinite(view).all()


def test_flat_recordings_become_zeros():
    stored = np.full((1, 16), 7, np.int16)
    assert not VIEWS["zscore"](stored, [TAG | {"sd": 0.0}]).any()
    assert not VIEWS["robust"](stored, [TAG]).any()


@pytest.mark.parametrize("name", list(VIEWS))
def test_views_leave_the_stored_window_alone(name):
    stored = np.arange(16, dtype=np.int16)[None]
    stored.flags.writeable = False
    VIEWS[name](stored, [TAG])
    np.testing.assert_array_equal(stored[0], np.arange(16))


def reference(name, stored, tags):
    """The views in numpy and double precision."""
    scale, mean, sd = (np.array([[tag[key]] for tag in tags]) for key in ("scale", "mean", "sd"))
    physical = stored * scale
    if name == "zscore":
        return np.clip((physical - mean) / sd, -8, 8)
    if name == "robust":
        centred = physical - np.median(physical, axis=1, keepdims=True)
        return np.clip(centred / (1.4826 * np.median(np.abs(centred), axis=1, keepdims=True)), -20, 20)
    return physical / 100 if name == "labram" else np.clip(physical, -50, 50) / 10


@pytest.mark.parametrize("length", [4000, 4001, BLOCK_SAMPLES // 2 + 1])
@pytest.mark.parametrize("name", list(VIEWS))
def test_a_view_is_that_of_double_precision(name, length):
    rng = np.random.default_rng(1)
    stored = np.clip(rng.standard_t(2, (3, length)) * 900 + [[100], [-3000], [0]], -32768, 32767).astype(np.int16)
    tags = [TAG, TAG | {"scale": 0.03, "mean": -90.0, "sd": 31.0}, TAG | {"scale": 0.001, "mean": 0.2, "sd": 3.0}]
    got = VIEWS[name](stored, tags)
    np.testing.assert_allclose(got, reference(name, stored, tags), rtol=3e-7, atol=3e-7 * np.abs(got).max())


def test_rows_are_written_where_asked():
    gain, shift = map(torch.from_numpy, scaling(VIEWS["zscore"], [TAG, TAG]))
    stored = torch.arange(20, dtype=torch.int16).reshape(2, 10)
    out = torch.empty(2, 10)
    assert dequantise(stored, gain, shift, view=VIEWS["zscore"], out_RT=out) is out
    assert torch.equal(out, dequantise(stored, gain, shift, view=VIEWS["zscore"]))
    assert float(out[1, 9]) == pytest.approx((19 * 0.5 - 10) / 20)
