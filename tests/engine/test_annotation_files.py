"""Label files in the forms that corpora publish: NSRR and Profusion XML, WFDB notes with brackets."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import wfdb

from engine.annotation_files import nsrr_xml, wfdb_file
from engine.annotations import read_labels
from engine.recording import Annotation, Channel, Recording, Segment
from manifests.corpora import Corpus
from manifests.errors import RecordingError

PROFUSION = """<?xml version="1.0"?>
<CMPStudyConfig>
<EpochLength>30</EpochLength>
<StepChannels/>
<ScoredEvents>
<ScoredEvent><Name>Hypopnea</Name><LowestSpO2>95</LowestSpO2><Start>37.5</Start><Duration>14.3</Duration>\
<Input>ABDO RES</Input></ScoredEvent>
<ScoredEvent><Name>SpO2 artifact</Name><Start>0</Start><Duration>10</Duration><Input>SaO2</Input></ScoredEvent>
</ScoredEvents>
<SleepStages><SleepStage>0</SleepStage><SleepStage>2</SleepStage><SleepStage>2</SleepStage>\
<SleepStage>9</SleepStage></SleepStages>
</CMPStudyConfig>
"""
NSRR = """<?xml version="1.0" encoding="UTF-8"?>
<PSGAnnotation>
<SoftwareVersion>Compumedics</SoftwareVersion>
<EpochLength>30</EpochLength>
<ScoredEvents>
<ScoredEvent><EventType/><EventConcept>Recording Start Time</EventConcept><Start>0</Start><Duration>120.0</Duration>\
<ClockTime>00.00.00 20.51.47</ClockTime></ScoredEvent>
<ScoredEvent><EventType>Respiratory|Respiratory</EventType><EventConcept>Hypopnea|Hypopnea</EventConcept>\
<Start>37.5</Start><Duration>14.3</Duration><SignalLocation>ABDO RES</SignalLocation></ScoredEvent>
<ScoredEvent><EventType>Stages|Stages</EventType><EventConcept>Wake|0</EventConcept><Start>0.0</Start>\
<Duration>30.0</Duration></ScoredEvent>
<ScoredEvent><EventType>Stages|Stages</EventType><EventConcept>Stage 2 sleep|2</EventConcept><Start>30.0</Start>\
<Duration>75.0</Duration></ScoredEvent>
</ScoredEvents>
</PSGAnnotation>
"""
STAGE_MAP = {"0": "W", "2": "N2", "9": "?", "Wake|0": "W", "Stage 2 sleep|2": "N2"}
EVENT_MAP = {"Hypopnea": "hypopnea", "Hypopnea|Hypopnea": "hypopnea", "SpO2 artifact": None}


def corpus(*rules: dict) -> Corpus:
    return Corpus.model_validate(
        {
            "id": "tiny",
            "title": "t",
            "licence": "CC0",
            "access": "open",
            "reader": "edf",
            "files": ["*"],
            "subject": {"pattern": r"(?P<subject>\w+)\.\w+$"},
            "annotations": list(rules),
        }
    )


def recording(path: Path, seconds: int = 120) -> Recording:
    channel = Channel(index=0, label="C3", rate=Fraction(200), unit="uV", prefilter="", num_samples=200 * seconds)
    return Recording(path=path, channels=(channel,), segments=(Segment(start=Fraction(0), duration=Fraction(seconds)),))


def spans(annotations: tuple[Annotation, ...] | list[Annotation]) -> list[tuple[float, float, str]]:
    return [(float(a.onset), float(a.duration), a.text) for a in annotations]


def xml_rules() -> tuple[dict, dict]:
    file = {"source": "nsrr_xml", "pattern": "{stem}-nsrr.xml"}
    return {**file, "map": STAGE_MAP}, {**file, "target": "events", "map": EVENT_MAP}


@pytest.mark.parametrize(
    ("text", "stages", "unscored"),
    [
        (PROFUSION, [(0, 30, "W"), (30, 60, "N2"), (90, 30, "?")], 30),
        (NSRR, [(0, 30, "W"), (30, 60, "N2"), (90, 15, "?")], 30),
    ],
)
def test_stages_and_events_of_one_xml_by_two_rules(
    tmp_path: Path, text: str, stages: list[tuple[float, float, str]], unscored: int
) -> None:
    (tmp_path / "a-nsrr.xml").write_text(text)
    found = read_labels(recording(tmp_path / "a.edf"), corpus(*xml_rules()))
    assert spans(found.stages) == stages
    assert spans(found.events) == [(37.5, 14.3, "hypopnea")]
    assert found.unmapped == {}
    assert found.scoring is not None
    assert found.scoring.unscored_s == unscored
    # A rule for stages alone does not see the events, and one for events does not see the stages.
    assert read_labels(recording(tmp_path / "a.edf"), corpus(xml_rules()[0])).unmapped == {}
    assert read_labels(recording(tmp_path / "a.edf"), corpus(xml_rules()[1])).stages == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not XML"),
        (PROFUSION[:300], "not XML"),
        ("<a/>", "neither a CMPStudyConfig nor a PSGAnnotation"),
        (NSRR.replace("37.5", "soon"), "Start is no number"),
        (NSRR.replace("14.3", "-3"), "negative"),
        (NSRR.replace("37.5", "1e999999999"), "Start is no number"),
        (PROFUSION.replace("<EpochLength>30</EpochLength>", ""), "EpochLength"),
        ('<!DOCTYPE a [<!ENTITY x "y">]><PSGAnnotation>&x;</PSGAnnotation>', "EntitiesForbidden"),
    ],
)
def test_a_broken_xml_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.xml"
    path.write_text(text)
    is_profusion = "CMPStudyConfig" in text
    with pytest.raises(RecordingError, match=message) as caught:
        nsrr_xml(path, stages=is_profusion)
    assert caught.value.reason == "ANNOTATION_INVALID"


def write_arousal(folder: Path, notes: Sequence[tuple[float, str]]) -> Path:
    samples = np.array([round(200 * seconds) for seconds, _ in notes])
    wfdb.wrann(
        "tr03", "arousal", samples, symbol=['"'] * len(notes), aux_note=[note for _, note in notes], fs=200,
        write_dir=str(folder),
    )  # fmt: skip
    return folder / "tr03.hea"


def test_challenge_2018_stages_last_to_the_next_and_brackets_are_intervals(tmp_path: Path) -> None:
    notes = [
        *((30, "W"), (60, "N1"), (70, "(resp_hypopnea"), (85, "resp_hypopnea)"), (150, "N2")),
        *((160, "(arousal_rera"), (200, "(resp_hypopnea"), (210, "arousal_rera)"), (220, "resp_hypopnea)")),
    ]
    path = write_arousal(tmp_path, notes)
    file = {"source": "wfdb", "pattern": "{stem}.arousal"}
    rules = (
        {**file, "lasts": "next", "map": {"W": "W", "N1": "N1", "N2": "N2"}},
        {**file, "target": "events", "map": {"resp_hypopnea": "hypopnea", "arousal_*": "arousal"}},
    )
    found = read_labels(recording(path, 240), corpus(*rules))
    assert spans(found.stages) == [(30, 30, "W"), (60, 90, "N1"), (150, 90, "N2")]
    assert spans(found.events) == [(70, 15, "hypopnea"), (160, 50, "arousal"), (200, 20, "hypopnea")]
    assert found.unmapped == {}
    assert found.scoring is not None
    assert found.scoring.unscored_s == 30  # the first epochs are not annotated
    # One epoch each, where the file marks every epoch.
    found = read_labels(recording(path, 240), corpus({**rules[0], "lasts": "epoch"}))
    assert spans(found.stages) == [(30, 30, "W"), (60, 30, "N1"), (150, 30, "N2")]


def test_an_interval_that_is_never_closed_lasts_to_the_end(tmp_path: Path) -> None:
    notes = [(10.0, "(arousal_rera"), (20.0, "arousal_rera)"), (50.0, "(arousal_rera"), (60.0, "snore)")]
    path = write_arousal(tmp_path, notes)
    found = wfdb_file(recording(path, 100), path.with_suffix(".arousal"))
    assert sorted(spans(found)) == [(10, 10, "arousal_rera"), (50, 50, "arousal_rera"), (60, 0, "snore)")]


def test_a_chb_mit_seizure_lasts_to_its_closing_bracket(tmp_path: Path) -> None:
    samples = np.array([200 * second for second in (10, 25, 60, 70)])
    wfdb.wrann("a", "seizures", samples, symbol=["[", "]", "[", "]"], write_dir=str(tmp_path))
    (tmp_path / "a.seizures").rename(tmp_path / "a.edf.seizures")
    rule = {"source": "wfdb", "pattern": "{stem}.edf.seizures", "lasts": "next", "target": "events", "required": False}
    found = read_labels(recording(tmp_path / "a.edf"), corpus({**rule, "map": {"[": "seizure", "]": None}}))
    assert spans(found.events) == [(10, 15, "seizure"), (60, 10, "seizure")]
    assert read_labels(recording(tmp_path / "b.edf"), corpus(rule)).missing == ("wfdb",)


def test_a_damaged_annotation_file_is_refused(tmp_path: Path) -> None:
    path = write_arousal(tmp_path, [(10.0, "W"), (20.0, "N1")]).with_suffix(".arousal")
    data = path.read_bytes()
    refused = 0
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        try:
            wfdb_file(recording(path.with_suffix(".hea")), path)
        except RecordingError as error:
            assert error.reason == "ANNOTATION_INVALID"  # noqa: PT017 - some bytes may be any
            refused += 1
    assert refused > 5
