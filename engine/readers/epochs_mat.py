"""MATLAB files that hold cut-out epochs as rows, such as the UCDDB cuts: every row is a segment of its own."""

import zlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy import io

from engine.readers.text import parse_layout
from engine.recording import Channel, Recording, Segment
from manifests.errors import RecordingError

_SCIPY_ERRORS = (ValueError, TypeError, KeyError, OSError, EOFError, zlib.error, io.matlab.MatReadError)


class EpochsLayout(BaseModel):
    """`layout` of a corpus with `reader: epochs_mat`.

    Attributes:
        variable: Name of the matrix (epochs, samples); `{stem}` stands for the file's stem.
        label: Label of the one channel.
        rate_hz: Sampling rate in Hz.
        epoch_samples: Samples of a row.
        unit: Unit of the values, blank where nobody knows it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    variable: str = "{stem}"
    label: str
    rate_hz: Annotated[int, Field(gt=0)]
    epoch_samples: Annotated[int, Field(gt=0)]
    unit: str = ""


def read_header(path: Path, layout: Mapping[str, object]) -> Recording:
    """One channel, and a segment per row. Rows are placed end to end: when they were recorded is not known.

    Raises:
        ConfigError: The layout breaks its schema.
        RecordingError: `NOT_A_RECORDING`, `FORMAT_UNSUPPORTED` or `HEADER_INVALID`.
    """
    rules = parse_layout(EpochsLayout, layout, "epochs_mat")
    name = rules.variable.format(stem=path.stem)
    shapes = {found: shape for found, shape, _ in _variables(path)}
    if name not in shapes:
        raise RecordingError("HEADER_INVALID", f"{path}: no variable {name!r}; it holds {sorted(shapes)}")
    shape = shapes[name]
    if len(shape) != 2 or shape[1] != rules.epoch_samples or not shape[0]:
        raise RecordingError("HEADER_INVALID", f"{path}: {name} is {shape}, expected (epochs, {rules.epoch_samples})")
    rate, duration = Fraction(rules.rate_hz), Fraction(rules.epoch_samples, rules.rate_hz)
    return Recording(
        path=path,
        channels=(
            Channel(
                index=0,
                label=rules.label,
                rate=rate,
                unit=rules.unit,
                prefilter="",
                num_samples=shape[0] * shape[1],
            ),
        ),
        segments=tuple(Segment(start=row * duration, duration=duration) for row in range(shape[0])),
        layout=dict(layout),
    )


def read_signals(recording: Recording, indices: Sequence[int]) -> list[np.ndarray]:
    """Rows one after another, float32 (epochs × samples,), for each index asked (there is only 0)."""
    rules = parse_layout(EpochsLayout, recording.layout, "epochs_mat")
    name = rules.variable.format(stem=recording.path.stem)
    try:
        matrix = io.loadmat(recording.path, variable_names=[name])[name]
    except _SCIPY_ERRORS as error:
        raise RecordingError("SIGNAL_INVALID", f"{recording.path}: {type(error).__name__}: {error}") from error
    return [np.ascontiguousarray(matrix, dtype=np.float32).reshape(-1) for _ in indices]


def _variables(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and class of each variable, without reading the values."""
    try:
        return io.whosmat(path)
    except NotImplementedError:
        raise RecordingError("FORMAT_UNSUPPORTED", f"{path}: MATLAB 7.3 (HDF5); save it as version 7") from None
    except _SCIPY_ERRORS as error:
        raise RecordingError("NOT_A_RECORDING", f"{path}: not a MATLAB file: {error}") from error
