"""Label files, one function a format: intervals in seconds from the recording's start with the texts of the file.

A function gives texts untouched; an item that states no duration has duration 0, and the corpus file says how long it
lasts. Messages tell the line of a file and never what stands there: a technician's note may name a person.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException, ElementTree

from engine.annotation_tables import duration_seconds, nearest_clock, number_of, start_clock
from engine.label_files import read_bytes, read_text
from engine.readers import edf
from engine.readers.physionet_annotations import read_marks
from engine.recording import Annotation, Recording
from manifests.errors import RecordingError


def second_edf(recording: Recording, path: Path) -> list[Annotation]:
    """Annotations of a second EDF+ file, moved by the difference of both starts, fractions of a second included.

    Its texts are in the encoding that the corpus declares for the recordings, if any.
    """
    declared = {key: value for key, value in recording.layout.items() if key == "encoding"}
    second = edf.read_header(path, declared)
    here, there = start_clock(recording), start_clock(second)
    shift = Fraction(0) if here is None or there is None else nearest_clock(there - here, Fraction(0))
    return [
        Annotation(onset=found.onset + shift, duration=found.duration, text=found.text) for found in second.annotations
    ]


def wfdb_file(recording: Recording, path: Path) -> list[Annotation]:
    """Annotations of a WFDB file.

    A note `(resp_hypopnea` that `resp_hypopnea)` closes is one interval `resp_hypopnea`. A note that opens and is
    never closed is a rhythm, `(AFIB`, and lasts to the next one.

    Source: https://wfdb.io/spec/annotation-files.html.
    """
    marks, stated = read_marks(read_bytes(path), path)
    rate = stated or (recording.channels[0].rate if recording.channels else Fraction(1))
    # CPSC 2021 writes Python's None as the text of a beat without a note.
    texts = [mark.symbol if mark.note in {"", "None"} else mark.note for mark in marks]
    onsets = [mark.sample / rate for mark in marks]
    return _closed(list(zip(onsets, texts, strict=True)), _end(recording))


def text_codes(path: Path, epoch_s: int) -> list[Annotation]:
    """One code per line and `epoch_s` from the recording's start; runs of a code become one interval."""
    lines = [(number, line.strip()) for number, line in enumerate(read_text(path, "latin-1").splitlines(), start=1)]
    codes = [(number, line) for number, line in lines if line and not line.startswith("[")]
    strange = [number for number, code in codes if len(code.split()) != 1]
    if not codes or strange:
        where = f"line {strange[0]} has several words" if strange else "it has none at all"
        raise RecordingError("ANNOTATION_INVALID", f"{path}: expected one code a line; {where}")
    found: list[Annotation] = []
    position = 0
    for code, run in groupby(code for _, code in codes):
        count = len(list(run))
        found.append(Annotation(onset=Fraction(position * epoch_s), duration=Fraction(count * epoch_s), text=code))
        position += count
    return found


def nsrr_xml(path: Path, *, stages: bool) -> list[Annotation]:
    """Stages, or events, of a scoring in XML.

    Compumedics Profusion (`CMPStudyConfig`) lists a code per epoch and events by name; NSRR (`PSGAnnotation`) lists
    both as events, stages with a concept such as `Stage 2 sleep|2`.

    Source: https://github.com/nsrr/edf-editor-translator, https://zzz.bwh.harvard.edu/luna/ref/annotations/.
    """
    try:
        root = ElementTree.fromstring(read_bytes(path))
    except (ParseError, DefusedXmlException, LookupError, ValueError) as error:
        raise RecordingError("ANNOTATION_INVALID", f"{path}: not XML: {type(error).__name__}") from error
    match root.tag:
        case "CMPStudyConfig":
            return _profusion_stages(root, path) if stages else _xml_events(root, path, text="Name")
        case "PSGAnnotation":
            events = _xml_events(root, path, text="EventConcept", stages=stages)
            return [event for event in events if event.text != "Recording Start Time"]
        case _:
            raise RecordingError(
                "ANNOTATION_INVALID", f"{path}: neither a CMPStudyConfig nor a PSGAnnotation; is it another XML?"
            )


def _profusion_stages(root: Element, path: Path) -> list[Annotation]:
    epoch_s = duration_seconds((root.findtext("EpochLength") or "").strip(), path, "EpochLength")
    codes = [(code.text or "").strip() for code in root.iterfind("SleepStages/SleepStage")]
    return [
        Annotation(onset=place * epoch_s, duration=epoch_s, text=code) for place, code in enumerate(codes) if epoch_s
    ]


def _xml_events(root: Element, path: Path, *, text: str, stages: bool | None = None) -> list[Annotation]:
    """Scored events; only stages or only others where `stages` says so."""
    found: list[Annotation] = []
    for number, event in enumerate(root.iterfind("ScoredEvents/ScoredEvent"), start=1):
        is_stage = (event.findtext("EventType") or "").strip().startswith("Stages")
        if stages is not None and is_stage != stages:
            continue
        where = f"ScoredEvent {number}"
        found.append(
            Annotation(
                onset=number_of((event.findtext("Start") or "").strip(), path, where, "Start"),
                duration=duration_seconds((event.findtext("Duration") or "0").strip(), path, where),
                text=(event.findtext(text) or "").strip(),
            )
        )
    return found


def _closed(items: Sequence[tuple[Fraction, str]], end: Fraction) -> list[Annotation]:
    """Items with the intervals that brackets open and close, and rhythms up to the next one."""
    closing = {text[:-1] for _, text in items if text.endswith(")")}
    rhythms = [onset for onset, text in items if text.startswith("(") and text[1:] not in closing]
    ends = dict(zip(rhythms, [*rhythms, end][1:], strict=True))
    opened: dict[str, list[Fraction]] = {}
    found: list[Annotation] = []
    for onset, text in items:
        if text.startswith("(") and text[1:] in closing:
            opened.setdefault(text[1:], []).append(onset)
        elif text.endswith(")") and opened.get(text[:-1]):
            start = opened[text[:-1]].pop()
            found.append(Annotation(onset=start, duration=onset - start, text=text[:-1]))
        else:
            duration = ends[onset] - onset if text.startswith("(") else Fraction(0)
            found.append(Annotation(onset=onset, duration=duration, text=text))
    # What is never closed lasts to the end.
    found += [
        Annotation(onset=onset, duration=max(end - onset, Fraction(0)), text=text)
        for text, onsets in opened.items()
        for onset in onsets
    ]
    return found


def _end(recording: Recording) -> Fraction:
    last = recording.segments[-1]
    return last.start + last.duration
