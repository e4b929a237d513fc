"""Rates as fractions, and joined pieces on one time."""

from fractions import Fraction

import numpy as np
import pytest

from engine.readers.timeline import FLOAT32_TOLERANCE, exact_rate, timeline


@pytest.mark.parametrize(
    ("meant", "tolerance"),
    [
        (Fraction(256), 1e-12),
        (Fraction(1000, 3), 1e-12),
        (Fraction(1, 30), 1e-12),
        (Fraction(1_000_000, 3906), 1e-12),
        (Fraction("128.5"), 1e-12),
        (Fraction(1000, 3), FLOAT32_TOLERANCE),
        (Fraction("600.615"), FLOAT32_TOLERANCE),
    ],
)
def test_a_rate_that_was_rounded_on_writing_comes_back(meant, tolerance):
    stored = float(np.float32(float(meant))) if tolerance == FLOAT32_TOLERANCE else float(meant)
    assert exact_rate(stored, tolerance) == meant


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_no_rate_is_no_rate(rate):
    with pytest.raises(ValueError, match="expected a positive number"):
        exact_rate(rate)


def test_pieces_follow_their_clocks_and_samples_follow_their_piece():
    repairs = []
    times = timeline(Fraction(100), 1000, [(0, Fraction(9)), (200, Fraction(12)), (600, None), (2000, None)], repairs)
    assert [(part.start, part.duration) for part in times.segments] == [(0, 2), (12, 4), (16, 4)]
    assert [times.time_of(sample) for sample in (0, 199, 200, 599, 600, 1000)] == [
        0,
        Fraction(199, 100),
        12,
        Fraction(1599, 100),
        16,
        20,
    ]
    assert not repairs


def test_of_two_breaks_at_one_sample_the_dated_one_counts():
    times = timeline(Fraction(1), 10, [(4, Fraction(7)), (4, None)], [])
    assert [(part.start, part.duration) for part in times.segments] == [(0, 4), (7, 6)]


def test_a_clock_may_lag_two_samples_without_a_word_and_never_overlaps():
    repairs = []
    times = timeline(Fraction(100), 1000, [(500, Fraction("4.985"))], repairs)
    assert times.segments[1].start == 5
    assert not repairs
    timeline(Fraction(100), 1000, [(500, Fraction("4.97"))], repairs)
    assert len(repairs) == 1
