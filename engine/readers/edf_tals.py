"""Time-stamped annotation lists (TALs) of EDF+ and BDF+: record times, gaps as segments, texts in any encoding.

Source: https://www.edfplus.info/specs/edfplus.html, section 2.2. Texts are UTF-8 by that standard. Bytes that are
not are Latin-1, unless the corpus file declares another encoding: Shift-JIS cannot be told from Latin-1 by looking.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from engine.recording import Annotation, Segment
from manifests.errors import RecordingError

_ONSET = re.compile(rb"[+-]\d{1,12}(?:\.\d{0,12})?")
_DURATION = re.compile(rb"\+?\d{1,12}(?:\.\d{0,12})?")
_MIN_TOLERANCE_S = 1e-3  # by which record times may be off, as they are often rounded to milliseconds
_DRIFT_S = 0.1  # of record times against the sampling rate, above which it is worth a word


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Annotations of one data record; onset is the text of its timekeeping TAL, None without one.

    `num_unread` counts the pieces of its annotation signals that are no list.
    """

    onset: bytes | None
    annotations: tuple[tuple[bytes, bytes, bytes], ...]
    num_unread: int = 0


def parse_record(parts: Iterable[bytes]) -> Record:
    """Lists of one record from the bytes of its annotation signals; what is no list is passed over and counted."""
    onset: bytes | None = None
    num_unread = 0
    found: list[tuple[bytes, bytes, bytes]] = []
    for position, raw in enumerate(parts):
        for place, tal in enumerate(raw.rstrip(b"\0").split(b"\0")):
            stamp, *texts = tal.split(b"\x14")
            start, _, duration = stamp.partition(b"\x15")
            if not texts or not _ONSET.fullmatch(start):
                num_unread += bool(tal)
                continue
            if position == 0 and place == 0 and not texts[0]:
                onset = start
            found.extend((start, duration, text) for text in texts if text)
    return Record(onset=onset, annotations=tuple(found), num_unread=num_unread)


def refuse_unreadable(records: Sequence[Record], kind: str, where: str, repairs: list[str]) -> None:
    """Raise `HEADER_INVALID` if those of an EDF+ hold bytes but not a single list; note where some are none."""
    unread = sum(record.num_unread for record in records)
    if unread and kind.endswith(("C", "D")) and not any(record.onset or record.annotations for record in records):
        raise RecordingError(
            "HEADER_INVALID",
            f"{where}: the annotation signals hold no list at all but other bytes: bytes were lost, added or swapped; "
            "get a sound copy",
        )
    if unread:
        repairs.append(f"{unread} pieces of annotation signals are no lists: left out")


def origin_of(records: Sequence[Record], duration: Fraction) -> Fraction:
    """Time of the first sample by the record times, in seconds from the start time of the header."""
    for index, record in enumerate(records):
        if record.onset is not None:
            return _seconds(record.onset) - index * duration
    return Fraction(0)


def annotations_of(
    records: Sequence[Record], origin: Fraction, encoding: str | None, repairs: list[str]
) -> tuple[Annotation, ...]:
    """Annotations in file order, seconds from the first sample; `encoding` is what the corpus file declares."""
    decoded = {text: decode_text(text, encoding) for record in records for _, _, text in record.annotations}
    foreign = sum(not is_utf8 for _, is_utf8 in decoded.values())
    if foreign:
        repairs.append(f"{foreign} different annotation texts are not UTF-8: read as {encoding or 'latin-1'}")
    return tuple(
        Annotation(
            onset=_seconds(onset) - origin,
            duration=_seconds(duration) if _DURATION.fullmatch(duration) else Fraction(0),
            text=decoded[text][0],
        )
        for record in records
        for onset, duration, text in record.annotations
    )


def decode_text(raw: bytes, encoding: str | None) -> tuple[str, bool]:
    """Text without blanks around it, and whether it is UTF-8; another encoding never fails."""
    try:
        return raw.decode("utf-8").strip(), True
    except UnicodeDecodeError:
        return raw.decode(encoding or "latin-1", errors="replace").strip(), False


def segments_of(
    records: Sequence[Record],
    *,
    duration: Fraction,
    kind: str,
    max_rate: Fraction,
    where: str,
    repairs: list[str],
) -> tuple[Segment, ...]:
    """Runs of records whose times follow each other, in EDF+C as in EDF+D: either may hide a gap.

    Records that overlap by less than one record begin where the one before ends: times move, samples do not.

    Raises:
        RecordingError: `ANNOTATION_INVALID` where an EDF+D record has no time; `HEADER_INVALID` where times go back.
    """
    missing = sum(record.onset is None for record in records)
    if missing and kind.endswith("D"):
        raise RecordingError("ANNOTATION_INVALID", f"{where}: {missing} records of an EDF+D file have no onset")
    if missing:
        repairs.append(f"{missing} of {len(records)} records have no onset: taken to follow the one before")
    origin = origin_of(records, duration)
    times = _times(records, float(origin), float(duration))
    jumps = np.diff(times) - float(duration)
    starts = [0, *(np.flatnonzero(np.abs(jumps) > _tolerance(records, duration, max_rate)) + 1).tolist()]
    segments: list[Segment] = []
    end = Fraction(0)
    overlaps = 0
    for first, stop in itertools.pairwise([*starts, len(records)]):
        start = _seconds(records[first].onset or b"0") - origin if first else Fraction(0)
        if start < end and jumps[first - 1] < 0:
            if end - start >= duration:
                raise RecordingError(
                    "HEADER_INVALID",
                    f"{where}: record {first} begins {float(end - start):g} s before the end of the records before it: "
                    "record times must not go back; get a sound copy",
                )
            overlaps += 1
        start = max(start, end)
        drift = abs(times[stop - 1] - times[first] - (stop - 1 - first) * float(duration))
        if drift > _DRIFT_S:
            repairs.append(f"record times of segment {len(segments)} drift by {drift:.3g} s: placed by sampling rate")
        end = start + (stop - first) * duration
        segments.append(Segment(start=start, duration=(stop - first) * duration))
    if overlaps:
        repairs.append(f"{overlaps} records overlap the one before: they begin where it ends")
    return tuple(segments)


def _times(records: Sequence[Record], origin: float, duration: float) -> np.ndarray:
    """Time of every record in seconds; one without follows the one before."""
    times: list[float] = []
    following = origin
    for record in records:
        times.append(following if record.onset is None else float(record.onset))
        following = times[-1] + duration
    return np.array(times)


def _tolerance(records: Sequence[Record], duration: Fraction, max_rate: Fraction) -> float:
    """Jump in seconds that is no gap: one sample, a millisecond, or what the written decimals cannot express."""
    decimals = max(len((record.onset or b"").partition(b".")[2]) for record in records)
    is_rounded = (duration * 10**decimals).denominator != 1
    return max(_MIN_TOLERANCE_S, 1 / float(max_rate), 10.0**-decimals if is_rounded else 0.0)


def _seconds(raw: bytes) -> Fraction:
    return Fraction(raw.decode("ascii"))
