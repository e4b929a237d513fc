"""DICOM waveform objects (12-lead and ambulatory ECG), decoded by pydicom; nothing about the patient is read.

Source: DICOM PS3.3 C.10.9 "Waveform Module".
"""

import logging
import math
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from pydicom import dcmread
from pydicom.config import IGNORE, settings
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian

from engine.readers.text import parse_layout
from engine.recording import Channel, Recording, Segment
from manifests.errors import RecordingError

_LIBRARY_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    OSError,
    EOFError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    struct.error,
    BytesLengthException,
)
# Warnings about values would print them, names among them.
settings.reading_validation_mode = IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL)

_WAVEFORM_SEQUENCE = 0x54000100
_DTYPES = {"SB": "i1", "UB": "u1", "SS": "i2", "US": "u2", "SL": "i4", "UL": "u4", "SV": "i8", "UV": "u8"}
_UNITS = {"mm[Hg]": "mmHg"}  # spellings of UCUM codes that differ from ours


class DicomLayout(BaseModel):
    """`layout` of a corpus with `reader: dicom`.

    Attributes:
        groups: Multiplex groups to read, counted from 0; empty: all but those that are derived, such as median beats.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    groups: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """A multiplex group: channels that were sampled together."""

    start: Fraction
    rate: Fraction
    num_samples: int
    dtype: np.dtype
    padding: int | None
    labels: tuple[str, ...]
    units: tuple[str, ...]
    filters: tuple[str, ...]
    gains: tuple[tuple[float, float] | None, ...]
    data: bytes


def read_header(path: Path, layout: Mapping[str, object]) -> Recording:
    """Channels of the multiplex groups; groups one after the other with equal channels become segments.

    Raises:
        ConfigError: The layout breaks its schema.
        RecordingError: `NOT_A_RECORDING`, `FORMAT_UNSUPPORTED`, `HEADER_INVALID` or `TRUNCATED`.
    """
    parts = _arranged(_groups(path, parse_layout(DicomLayout, layout, "dicom")), path)
    origin = min(group.start for group in parts[0])
    described = [
        (number, group, *texts)
        for number, group in enumerate(parts[0])
        for texts in zip(group.labels, group.units, group.filters, group.gains, strict=True)
    ]
    channels = [
        Channel(
            index=index,
            label=label,
            rate=group.rate,
            unit=unit,
            prefilter=filters,
            num_samples=sum(part[number].num_samples for part in parts),
            calibrated=gain is not None,
        )
        for index, (number, group, label, unit, filters, gain) in enumerate(described)
    ]
    return Recording(
        path=path,
        channels=tuple(channels),
        segments=tuple(
            Segment(start=part[0].start - origin, duration=part[0].num_samples / part[0].rate) for part in parts
        ),
        layout=dict(layout),
    )


def read_signals(recording: Recording, indices: Sequence[int]) -> list[np.ndarray]:
    """Channels as float32 (num_samples,): value × sensitivity × correction + baseline, NaN at padding."""
    rules = parse_layout(DicomLayout, recording.layout, "dicom")
    parts = _arranged(_groups(recording.path, rules), recording.path)
    where = [(number, row) for number, group in enumerate(parts[0]) for row in range(len(group.labels))]
    return [
        np.concatenate([_decoded(part[number], row) for part in parts]) for number, row in (where[i] for i in indices)
    ]


def _decoded(group: _Group, row: int) -> np.ndarray:
    raw = np.frombuffer(group.data, dtype=group.dtype).reshape(-1, len(group.labels))[: group.num_samples, row]
    gain, baseline = group.gains[row] or (1.0, 0.0)
    signal = (raw * gain + baseline).astype(np.float32)
    if group.padding is not None:
        signal[raw == group.padding] = np.nan
    return signal


def _groups(path: Path, rules: DicomLayout) -> list[_Group]:
    """The multiplex groups that the layout asks for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _read_groups(path, rules)


def _read_groups(path: Path, rules: DicomLayout) -> list[_Group]:
    try:
        # Deflated files inflate as a whole, at whatever ratio: none is opened.
        syntax = read_file_meta_info(path).get("TransferSyntaxUID", "")
        if syntax == DeflatedExplicitVRLittleEndian:
            raise RecordingError("FORMAT_UNSUPPORTED", f"{path}: deflated DICOM; rewrite it without compression")
        dataset = dcmread(path, specific_tags=[_WAVEFORM_SEQUENCE])
        order = ">" if syntax == ExplicitVRBigEndian else "<"
        items = list(dataset.get("WaveformSequence") or [])
    except (InvalidDicomError, *_LIBRARY_ERRORS) as error:
        # Never the error's text: pydicom puts what it stumbles over into it, which may be a name.
        raise RecordingError("NOT_A_RECORDING", f"{path}: no readable DICOM file ({type(error).__name__})") from None
    wanted = rules.groups or [
        number for number, item in enumerate(items) if item.get("WaveformOriginality", "ORIGINAL") != "DERIVED"
    ]
    if not wanted or max(wanted) >= len(items):
        raise RecordingError("NOT_A_RECORDING", f"{path}: {len(items)} waveform groups, none of those asked for")
    try:
        return [_group(items[number], order, path) for number in wanted]
    except _LIBRARY_ERRORS as error:
        raise RecordingError("HEADER_INVALID", f"{path}: waveform not as PS3.3 asks ({type(error).__name__})") from None


def _group(item: Any, order: str, path: Path) -> _Group:
    kind = str(item.WaveformSampleInterpretation)
    if kind not in _DTYPES:
        raise RecordingError("FORMAT_UNSUPPORTED", f"{path}: samples {kind!r}, expected one of {', '.join(_DTYPES)}")
    dtype = np.dtype(f"{order}{_DTYPES[kind]}")
    definitions = list(item.ChannelDefinitionSequence)
    num_samples, num_channels = int(item.NumberOfWaveformSamples), int(item.NumberOfWaveformChannels)
    rate = Fraction(str(item.SamplingFrequency))
    data = bytes(item.WaveformData)
    if (
        rate <= 0
        or num_channels != len(definitions)
        or not num_channels
        or int(item.WaveformBitsAllocated) != 8 * dtype.itemsize
    ):
        raise RecordingError(
            "HEADER_INVALID",
            f"{path}: {num_channels} channels with {len(definitions)} definitions at {rate} Hz, "
            f"{item.WaveformBitsAllocated} bits of {kind}: these contradict each other",
        )
    size = num_samples * num_channels * dtype.itemsize
    if num_samples <= 0 or len(data) < size:
        raise RecordingError("TRUNCATED", f"{path}: {len(data)} bytes of samples, its header declares {size}")
    padding = item.get("WaveformPaddingValue")
    return _Group(
        start=Fraction(str(item.get("MultiplexGroupTimeOffset") or 0)) / 1000,
        rate=rate,
        num_samples=num_samples,
        dtype=dtype,
        padding=_padding(padding, dtype),
        labels=tuple(_label(definition, number) for number, definition in enumerate(definitions, start=1)),
        units=tuple(_unit(definition) for definition in definitions),
        filters=tuple(_filters(definition) for definition in definitions),
        gains=tuple(_gain(definition) for definition in definitions),
        data=data[:size],
    )


def _padding(value: object, dtype: np.dtype) -> int | None:
    if value is None:
        return None
    return int(np.frombuffer(value, dtype=dtype)[0]) if isinstance(value, bytes) else int(str(value))


def _label(definition: Any, number: int) -> str:
    """Meaning of the lead's code, else the label that the device gives."""
    source = definition.get("ChannelSourceSequence")
    meaning = str(source[0].get("CodeMeaning") or "") if source else ""
    return meaning.strip() or str(definition.get("ChannelLabel") or f"channel {number}").strip()


def _unit(definition: Any) -> str:
    units = definition.get("ChannelSensitivityUnitsSequence")
    code = str(units[0].get("CodeValue") or "").strip() if units else ""
    return _UNITS.get(code, code)


def _gain(definition: Any) -> tuple[float, float] | None:
    """Factor, and baseline in the unit; None where a channel states no sensitivity and so has no unit."""
    sensitivity = definition.get("ChannelSensitivity")
    if sensitivity is None:
        return None
    factor = float(sensitivity) * float(definition.get("ChannelSensitivityCorrectionFactor", 1) or 1)
    return (factor, float(definition.get("ChannelBaseline", 0) or 0)) if factor and math.isfinite(factor) else None


def _filters(definition: Any) -> str:
    names = {"HP": "FilterLowFrequency", "LP": "FilterHighFrequency", "N": "NotchFilterFrequency"}
    values = {short: definition.get(name) for short, name in names.items()}
    return " ".join(f"{short}:{float(value):g}Hz" for short, value in values.items() if value)


def _arranged(groups: Sequence[_Group], path: Path) -> list[list[_Group]]:
    """Segments in time order, each with its groups: all at one time, or equal ones after another."""
    parts = sorted({group.start for group in groups})
    arranged = [[group for group in groups if group.start == start] for start in parts]
    first = [(group.rate, group.labels, group.units) for group in arranged[0]]
    end = parts[0]
    for part in arranged:
        lasts = {group.num_samples / group.rate for group in part}
        equal = [(group.rate, group.labels, group.units) for group in part] == first
        if len(lasts) > 1 or not equal or part[0].start < end:
            raise RecordingError(
                "HEADER_INVALID",
                f"{path}: {len(groups)} multiplex groups differ in length or channels, or overlap; "
                "choose some with layout.groups",
            )
        end = part[0].start + lasts.pop()
    return arranged
