"""Sample counts to seconds: exact rates, and pieces of a recording that a file holds one after another."""

import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from engine.recording import Segment

FLOAT32_TOLERANCE = 2.0**-24  # relative; formats that keep the rate as float32
FLOAT64_TOLERANCE = 1e-12
_MICRO = 1_000_000
_JITTER = 2  # samples by which a clock and a count may differ without a word


def exact_rate(rate_hz: float, tolerance: float = FLOAT64_TOLERANCE) -> Fraction:
    """The simplest fraction that a stored floating-point rate in Hz can stand for.

    >>> exact_rate(333.3333333333333), exact_rate(600.614990234375, FLOAT32_TOLERANCE)
    (Fraction(1000, 3), Fraction(120123, 200))

    Raises:
        ValueError: A rate that is no positive number.
    """
    if not 0 < rate_hz < float("inf"):
        raise ValueError(f"rate {rate_hz} Hz; expected a positive number")
    exact = Fraction(rate_hz)
    small = (exact.limit_denominator(largest) for largest in (1, 10))
    decimals = (Fraction(round(exact * 10**digits), 10**digits) for digits in range(1, 5))
    others = (exact.limit_denominator(largest) for largest in (1000, 10_000, _MICRO))
    for simple in (*small, *decimals, *others):
        if abs(simple - exact) <= exact * Fraction(tolerance):
            return simple
    return exact


def to_micro(value: float) -> Fraction:
    """A floating-point time to six digits behind the point."""
    return Fraction(round(value * _MICRO), _MICRO)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """When the samples of a file were taken.

    Attributes:
        rate: Samples per second.
        num_samples: Samples in all pieces.
        pieces: First sample of each piece and its start in seconds from the recording's start.
    """

    rate: Fraction
    num_samples: int
    pieces: tuple[tuple[int, Fraction], ...]

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The pieces as contiguous segments."""
        firsts = [first for first, _ in self.pieces]
        return tuple(
            Segment(start=start, duration=(stop - first) / self.rate)
            for (first, start), stop in zip(self.pieces, [*firsts[1:], self.num_samples], strict=True)
        )

    def time_of(self, sample: int | Fraction) -> Fraction:
        """Seconds from the recording's start at which a sample of the file was taken."""
        number = max(0, bisect.bisect_right([first for first, _ in self.pieces], sample) - 1)
        first, start = self.pieces[number]
        return start + (sample - first) / self.rate


def timeline(
    rate: Fraction, num_samples: int, breaks: Iterable[tuple[int, Fraction | None]], repairs: list[str]
) -> Timeline:
    """Timeline of a file that is cut before some samples.

    Args:
        rate: Samples per second.
        num_samples: Samples in the file.
        breaks: First sample of a new piece with its start in seconds, or None where the file does not tell the
            length of the gap: the piece then follows at once. A break at 0 or behind the end says nothing.
        repairs: Takes a sentence for a start that lies before the end of the piece before.
    """
    pieces: list[tuple[int, Fraction]] = [(0, Fraction(0))]
    for sample, start in sorted(breaks, key=lambda item: (item[0], item[1] is not None, item[1] or 0)):
        if not 0 < sample < num_samples:
            continue
        if pieces[-1][0] == sample and len(pieces) > 1:
            pieces.pop()
        first, begun = pieces[-1]
        earliest = begun + (sample - first) / rate
        if start is not None and start < earliest - _JITTER / rate:
            repairs.append("a piece begins before the end of the piece before it: placed right behind it")
        pieces.append((sample, earliest if start is None else max(start, earliest)))
    return Timeline(rate=rate, num_samples=num_samples, pieces=tuple(pieces))
