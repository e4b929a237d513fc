"""Samples of WFDB formats read straight from the file: spans, damage, scaling and sums."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from engine.readers import physionet_samples
from engine.readers.physionet_samples import read_samples, scale_samples, sum_16
from manifests.errors import RecordingError


def test_a_span_with_an_offset_is_the_same_part_of_the_whole(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, 5 + 24 * 8, dtype=np.uint8)
    data.tofile(tmp_path / "a.dat")
    for name in sorted(physionet_samples.DIRECT):
        count = int(24 * 8 / physionet_samples.SAMPLE_BYTES[name])
        whole = read_samples(tmp_path / "a.dat", name, offset=5, first=0, count=count)
        part = read_samples(tmp_path / "a.dat", name, offset=5, first=4, count=7)
        assert np.array_equal(part, whole[4:11])
        bits = physionet_samples.BITS[name]
        assert -(1 << (bits - 1)) <= whole.min() < 0 < whole.max() < 1 << (bits - 1)
        with pytest.raises(RecordingError) as caught:
            read_samples(tmp_path / "a.dat", name, offset=5, first=4, count=count)
        assert caught.value.reason == "TRUNCATED"


@pytest.mark.parametrize("gain", [200.0, -2.5, 4880.0, 0.1, 1000.3, 1e-3])
@pytest.mark.parametrize("baseline", [0, -7, 1 << 24])
@pytest.mark.parametrize("name", ["16", "24", "32", "8"])
def test_every_value_is_the_exact_quotient_rounded_once(gain: float, baseline: int, name: str) -> None:
    bits = physionet_samples.BITS.get(name, 32)
    digital = np.random.default_rng(0).integers(-(1 << (bits - 1)), 1 << (bits - 1), 500).astype(np.int32)
    digital[:2] = -(1 << (bits - 1))
    out = np.empty(500, dtype=np.float32)
    scale_samples(digital, out, name=name, gain=gain, baseline=baseline)
    expected = np.array([np.float32(float(Fraction(int(x) - baseline) / Fraction(gain))) for x in digital])
    if name != "8":
        expected[:2] = np.nan
    assert np.array_equal(out, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [np.int8, "<i2", ">i2", np.int32])
def test_a_sum_wraps_around(dtype: str) -> None:
    digital = np.full(100_001, 127, dtype=dtype)
    assert sum_16(digital) == 127 * 100_001 % 65536
    assert sum_16(-digital) == -127 * 100_001 % 65536
