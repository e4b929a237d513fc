"""Annotation files: labelled intervals as an EDF+ file without signals."""

import datetime
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import edfio

from manifests.errors import ContractError


def write_annotations(
    path: Path | str,
    rows: Sequence[tuple[Fraction, Fraction, str]],
    start: datetime.datetime | datetime.time | None = None,
) -> None:
    """Write an annotation-only EDF+C file beside its place and rename it.

    Args:
        path: File to write, usually `NAME.edf` beside the recording.
        rows: (onset, duration, text), both in seconds from the recording's start.
        start: Start of the recording, or its time of day alone; None = unknown.

    Raises:
        ContractError: No row, an onset before the start, a negative duration, or an empty text.
    """
    path = Path(path)
    if not rows:
        raise ContractError(f"{path}: no annotation to write; EDF+ has no file without signals and annotations")
    for onset, duration, text in rows:
        if onset < 0 or duration < 0 or not text.strip():
            raise ContractError(
                f"{path}: annotation ({onset}, {duration}, {text!r}): onset and duration must be 0 s or more, the "
                "text not empty"
            )
    date = start.date() if isinstance(start, datetime.datetime) else None
    edf = edfio.Edf(
        signals=[],
        recording=edfio.Recording(startdate=date, equipment_code="kymo"),
        starttime=start.time() if isinstance(start, datetime.datetime) else start,
        annotations=[
            edfio.EdfAnnotation(onset=float(onset), duration=float(duration), text=text)
            for onset, duration, text in rows
        ],
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    edf.write(temporary)
    temporary.replace(path)
