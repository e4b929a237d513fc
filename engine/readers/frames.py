"""Raw samples in a file as blocks of rows, one row per channel, read a few megabytes at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from manifests.errors import RecordingError

_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Frames:
    """Where the samples lie.

    Attributes:
        path: The file.
        offset: Bytes before the first sample.
        dtype: Of a sample, with its byte order.
        num_rows: Channels in the file, event rows counted too.
        num_samples: Samples per channel.
        run: Successive samples of one channel before the next channel's; 1 in most formats.
    """

    path: Path
    offset: int
    dtype: np.dtype
    num_rows: int
    num_samples: int
    run: int = 1


def read_rows(
    frames: Frames, rows: Sequence[int], gains: Sequence[float], offsets: Sequence[float]
) -> list[np.ndarray]:
    """Rows as float32 (num_samples,): stored value × gain + offset, computed in float64.

    Args:
        frames: Where they lie.
        rows: Row numbers in any order.
        gains: Of each row asked for.
        offsets: Of each row asked for, in the unit of the result.

    Raises:
        RecordingError: `TRUNCATED` for a file that has lost bytes since its header was read.
    """
    outputs = [np.empty(frames.num_samples, dtype=np.float32) for _ in rows]
    run_values = frames.num_rows * frames.run
    num_runs = -(-frames.num_samples // frames.run)
    step = max(1, _BLOCK_BYTES // (run_values * frames.dtype.itemsize))
    with frames.path.open("rb") as stream:
        stream.seek(frames.offset)
        for first in range(0, num_runs, step):
            count = min(step, num_runs - first)
            data = np.fromfile(stream, dtype=frames.dtype, count=count * run_values)
            if data.size < count * run_values:
                raise RecordingError(
                    "TRUNCATED", f"{frames.path}: ends early; it has changed since its header was read"
                )
            block = data.reshape(count, frames.num_rows, frames.run)
            start = first * frames.run
            stop = min(frames.num_samples, start + count * frames.run)
            for row, gain, offset, output in zip(rows, gains, offsets, outputs, strict=True):
                values = block[:, row].reshape(-1)[: stop - start].astype(np.float64)
                with np.errstate(invalid="ignore", over="ignore"):  # floats of a damaged file
                    values *= gain
                    values += offset
                    output[start:stop] = values
    return outputs


def whole_frames(path: Path, *, offset: int, frame_bytes: int, promised: int | None, repairs: list[str]) -> int:
    """Samples per channel that are really there, at most those that the header promises.

    Raises:
        RecordingError: `TRUNCATED` where not one is whole.
    """
    size = path.stat().st_size - offset
    held = max(0, size) // frame_bytes
    if promised is None or promised > held:
        if promised is not None:
            repairs.append(f"truncated: {held} of {promised} samples per channel are there")
        elif size > 0 and size % frame_bytes:
            repairs.append("the last sample is incomplete: left out")
        promised = held
    if promised <= 0:
        raise RecordingError("TRUNCATED", f"{path}: not one whole sample of {frame_bytes} bytes; fetch the file again")
    return promised
