"""Samples of WFDB formats with a fixed number of bytes, straight from the signal file into numpy.

Source: https://wfdb.io/spec/signal-files.html.
"""

from fractions import Fraction
from pathlib import Path

import numpy as np

from manifests.errors import RecordingError

# Bytes of one sample, by format; compressed formats have none.
SAMPLE_BYTES = {
    "8": Fraction(1),
    "16": Fraction(2),
    "24": Fraction(3),
    "32": Fraction(4),
    "61": Fraction(2),
    "80": Fraction(1),
    "160": Fraction(2),
    "212": Fraction(3, 2),
    "310": Fraction(4, 3),
    "311": Fraction(4, 3),
}
# Bits of one sample: the lowest number they hold means "no valid sample". Format 8 has no such code.
BITS = {"16": 16, "24": 24, "32": 32, "61": 16, "80": 8, "160": 16, "212": 12, "310": 10, "311": 10}
BITS |= {"508": 8, "516": 16, "524": 24}
_BYTES = {"16": "<i2", "24": "<u1", "32": "<i4", "61": ">i2", "80": "<u1", "160": "<u2", "212": "<u1"}
_EXACT = 1 << 24  # whole numbers up to here are float32 numbers

_FLAC_SAMPLES_PER_BYTE = 6000  # of one channel: a frame of 65,535 equal samples takes a dozen bytes

DIRECT = frozenset(_BYTES)
"""Formats that `read_samples` knows."""


def read_samples(path: Path, name: str, *, offset: int, first: int, count: int) -> np.ndarray:
    """Digital values of samples `first` to `first + count` of a signal file, all its signals in turn, shape (count,).

    Args:
        path: The signal file.
        name: Format, one of `DIRECT`.
        offset: Bytes before the first sample.
        first: Even for format 212, which packs two samples into three bytes.
        count: Number of samples, of all signals.

    Raises:
        RecordingError: `TRUNCATED` for a file that ends early.
        OSError: It cannot be read.
    """
    dtype = np.dtype(_BYTES[name])
    # Items of `dtype` for two samples
    per_two = {"24": 6, "212": 3}.get(name, 2)
    raw_count = (count * per_two + 1) // 2
    raw = np.fromfile(path, dtype=dtype, count=raw_count, offset=offset + first * per_two // 2 * dtype.itemsize)
    if len(raw) != raw_count:
        raise RecordingError("TRUNCATED", f"{path}: ends within {count} samples from sample {first}")
    match name:
        case "80":
            return (raw ^ np.uint8(0x80)).view(np.int8)
        case "160":
            return (raw ^ np.uint16(0x8000)).view(np.int16)
        case "24":
            wide = np.zeros((count, 4), dtype=np.uint8)
            for byte in range(3):  # one copy of rows of three bytes takes several times as long
                wide[:, byte + 1] = raw[byte::3]
            return wide.view("<i4")[:, 0] >> 8  # the sign comes along
        case "212":
            return _pairs(raw, count)
        case _:
            return raw


def _pairs(raw: np.ndarray, count: int) -> np.ndarray:
    """Samples of 12 bits: moved to the top of 16 and back, so that the sign comes along."""
    triples = np.pad(raw, (0, -len(raw) % 3)).reshape(-1, 3).astype(np.uint16)
    pairs = np.empty((len(triples), 2), dtype=np.uint16)
    pairs[:, 0] = triples[:, 1] << 12 | triples[:, 0] << 4
    pairs[:, 1] = (triples[:, 1] & 0xF0) << 8 | triples[:, 2] << 4
    return (pairs.view(np.int16) >> 4).reshape(-1)[:count]


def scale_samples(digital: np.ndarray, out: np.ndarray, *, name: str, gain: float, baseline: int) -> None:
    """Write (digital - baseline) / gain to `out`, float32 of the same shape, and NaN for the code of no sample.

    Computed in float32 where its two operands are exact, as they mostly are: the quotient is then rounded once, which
    gives the same number as a division in float64 that is rounded to float32.
    """
    bits = BITS.get(name, 32)
    if (1 << (bits - 1)) + abs(baseline) <= _EXACT and float(np.float32(gain)) == gain:
        np.subtract(digital, np.float32(baseline), out=out, dtype=np.float32, casting="unsafe")
        np.divide(out, np.float32(gain), out=out)
    else:
        out[:] = (digital.astype(np.float64) - baseline) / gain
    lowest = -(1 << (bits - 1))
    if name in BITS and digital.size and digital.min() == lowest:
        out[digital == lowest] = np.nan


def sum_16(digital: np.ndarray) -> int:
    """Sum of the values modulo 65536, which is what a header's checksum states; sums of integers wrap around."""
    return int(np.sum(digital, dtype=np.promote_types(digital.dtype.newbyteorder("="), np.int16))) % 65536


def flac_length(signal_path: Path, path: Path) -> int:
    """Samples of one channel of a FLAC file as its STREAMINFO block states them; `path` is the record, for messages.

    Raises:
        RecordingError: `SIGNAL_INVALID` for another file, or more samples than its bytes can hold.
    """
    with signal_path.open("rb") as stream:
        start = stream.read(26)
    if start[:4] != b"fLaC" or len(start) < 26:
        raise RecordingError("SIGNAL_INVALID", f"{path}: signal file {signal_path.name} is no FLAC file")
    total = int.from_bytes(start[18:26], "big") & ((1 << 36) - 1)  # samples by the STREAMINFO block
    if total > _FLAC_SAMPLES_PER_BYTE * signal_path.stat().st_size:
        raise RecordingError(
            "SIGNAL_INVALID", f"{path}: {signal_path.name} claims {total} samples, more than its bytes can hold"
        )
    return total
