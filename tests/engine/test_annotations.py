"""Labels from every source, mapped by the corpus file, and looked up by time."""

from dataclasses import replace
from datetime import time
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
from edfio import Edf, EdfAnnotation
from hypothesis import given
from hypothesis import strategies as st

from engine.annotations import Labels, read_labels
from engine.commit import read_commits
from engine.config import ConvertConfig
from engine.convert import convert_all
from engine.plan import read_plan
from engine.read import read_header
from engine.recording import Annotation, Channel, Recording, Segment
from engine.synthetic import synthesise
from manifests.annotations import AnnotationRule
from manifests.config import dump_yaml
from manifests.corpora import Corpus, load_corpus
from manifests.errors import ConfigError, RecordingError


def corpus(annotations, pattern=r"(?P<subject>\w+)\.\w+$", reader="edf"):
    return Corpus(
        id="tiny",
        title="t",
        licence="CC0",
        access="open",
        reader=reader,
        files=["*"],
        subject={"pattern": pattern},
        annotations=annotations,
    )


def recording(path: Path, **extra) -> Recording:
    channel = Channel(index=0, label="C3", rate=Fraction(100), unit="uV", prefilter="", num_samples=12000)
    segments = (Segment(start=Fraction(0), duration=Fraction(120)),)
    return Recording(path=path, channels=(channel,), segments=segments, extra=extra)


def spans(annotations):
    return [(float(a.onset), float(a.duration), a.text) for a in annotations]


def interval(onset, duration, text):
    return Annotation(onset=Fraction(onset), duration=Fraction(duration), text=text)


def test_dreams_codes_become_runs_of_stages(shared_data):
    dreams = load_corpus("dreams_psg")
    found = read_labels(read_header(shared_data / "dreams_spindles/excerpt3.edf", "edf"), dreams)
    lines = (shared_data / "dreams_spindles/Hypnogram_excerpt3.txt").read_text().split()[1:]
    for place, code in enumerate(lines):
        expected = dreams.annotations.map[code]
        assert found.stage_at(Fraction(5 * place), 5) == expected
    assert sum(stage.duration for stage in found.stages) == 5 * len(lines) == 1800
    assert found.unmapped == {}
    assert (found.events, found.classes) == ((), ())


def test_stage_codes_of_ucddb_give_one_run_per_change(tmp_path, shared_data):
    text = (shared_data / "ucddb_epochs/ucddb018_stage.txt").read_text()
    (tmp_path / "a_stage.txt").write_text(text)
    stages = dict(zip("012345678", ["W", "R", "N1", "N2", "N3", "N3", "?", "?", "?"], strict=True))
    rule = {"source": "text_codes", "pattern": "{stem}_stage.txt", "map": stages}
    found = read_labels(recording(tmp_path / "a.edf"), corpus(rule))
    codes = [stages[code] for code in text.split()]
    assert sum(stage.duration for stage in found.stages) == 30 * len(codes)
    assert len(found.stages) == 1 + sum(a != b for a, b in pairwise(codes))
    assert found.scoring is not None
    assert found.scoring.scored_s == 120
    assert found.scoring.outside_s == 30 * sum(stage != "?" for stage in codes) - 120


def test_rhythms_of_a_wfdb_file_last_to_the_next(shared_data):
    found = read_labels(read_header(shared_data / "mitdb/200.hea", "wfdb"), load_corpus("mitdb"))
    assert not [text for text in found.unmapped if text.startswith("(")]
    assert len(found.events) == 148
    for first, second in pairwise(found.events):
        assert first.onset + first.duration == second.onset
    assert found.events[-1].onset + found.events[-1].duration == Fraction(650000, 360)


def test_af_episodes_of_cpsc2021_are_events(shared_data):
    corpus_af = load_corpus("cpsc2021_af")
    found = read_labels(read_header(shared_data / "cpsc2021_af/data_101_6.hea", "wfdb"), corpus_af)
    texts = ["normal_rhythm", "atrial_fibrillation"] * 2  # the first one by what the corpus file says of unmarked time
    assert [event.text for event in found.events][:4] == texts
    assert (found.events[0].onset, found.events[0].duration) == (0, Fraction("15.66"))


def test_time_without_an_event_has_the_label_that_the_rule_gives_it(tmp_path):
    rule = {"source": "in_file", "target": "events", "map": {"x": "x", "y": None}, "otherwise": "none"}
    marks = [(10, 5, "x"), (12, 8, "x"), (40, 10, "y"), (110, 30, "x")]
    annotations = tuple(Annotation(onset=Fraction(a), duration=Fraction(b), text=t) for a, b, t in marks)
    halves = tuple(Segment(start=Fraction(start), duration=Fraction(50)) for start in (0, 70))
    given = replace(recording(tmp_path / "a.edf"), annotations=annotations, segments=halves)
    none = [(a, b, t) for a, b, t in spans(read_labels(given, corpus(rule)).events) if t == "none"]
    assert none == [(0, 10, "none"), (20, 30, "none"), (70, 40, "none")]
    assert not [e for e in read_labels(given, corpus({**rule, "otherwise": None})).events if e.text == "none"]
    with pytest.raises(ValueError, match="label of time without events; target is 'stage'"):
        AnnotationRule.model_validate({"source": "in_file", "otherwise": "W"})


def test_header_codes_tolerate_double_commas_and_repeats(tmp_path):
    rule = {"source": "header_dx", "target": "classes", "map": {"1": "one", "2": "two", "9": None}}
    found = read_labels(recording(tmp_path / "a.hea", Dx="1,,2, 1,9,7"), corpus(rule))
    assert found.classes == ("one", "two")
    assert found.unmapped == {"7": 1}
    with pytest.raises(RecordingError, match="#Dx") as caught:
        read_labels(recording(tmp_path / "a.hea"), corpus(rule))
    assert caught.value.reason == "ANNOTATION_INVALID"


def test_challenge_2021_classes_come_from_the_header(shared_data):
    header = read_header(shared_data / "challenge2021_12lead/Q/Q0010.hea", "wfdb")
    assert read_labels(header, load_corpus("challenge2021")).classes == ("427172004", "164865005")


def test_eegmmidb_events_stand_in_the_file(shared_data):
    header = read_header(shared_data / "eegmmidb/S001/S001R04.edf", "edf")
    found = read_labels(header, load_corpus("eegmmidb"))
    assert spans(found.events)[:2] == [(0.0, 4.2, "rest"), (4.2, 4.1, "right_fist")]
    inside, covering = found.events_in(Fraction(4), 4)
    assert covering == ["rest"]
    assert [(float(a), float(b), text) for a, b, text in inside] == [(0, 0.2, "rest"), (0.2, 3.8, "right_fist")]


def test_a_stage_in_the_file_name_spans_the_recording(tmp_path):
    rule = {"source": "filename", "pattern": "_stage(?P<label>wake|deep)", "map": {"wake": "W", "deep": "N3"}}
    found = read_labels(recording(tmp_path / "ucd002_stagedeep.mat"), corpus(rule))
    assert spans(found.stages) == [(0, 120, "N3")]
    with pytest.raises(RecordingError, match="does not match"):
        read_labels(recording(tmp_path / "other.mat"), corpus(rule))


def test_a_second_edf_file_is_found_by_glob_and_moved_by_its_start(tmp_path, shared_data):
    hypnogram = (shared_data / "sleep_edf/SC4001EC-Hypnogram.edf").read_bytes()
    (tmp_path / "SC4001EC-Hypnogram.edf").write_bytes(hypnogram)
    sleep = load_corpus("sleep_edf")
    path = tmp_path / "SC4001E0-PSG.edf"
    for start, first in (("16:13:00", 0), ("16:12:30", 30), ("16:14:00", -60)):
        found = read_labels(recording(path, start_time=start), sleep)
        assert spans(found.stages)[0] == (first, 30630, "W")
    (tmp_path / "SC4001EH-Hypnogram.edf").write_bytes(hypnogram)
    with pytest.raises(RecordingError, match="2 label files") as caught:
        read_labels(recording(path), sleep)
    assert caught.value.reason == "ANNOTATION_INVALID"


def test_fractions_of_a_second_of_both_starts_count(tmp_path):
    rule = {"source": "edf_file", "pattern": "h.edf", "map": {"Sleep stage W": "W"}}
    note = EdfAnnotation(onset=0, duration=60, text="Sleep stage W")
    for there, onset in (("22:00:00.5", Fraction(1, 4)), ("22:00:01", Fraction(3, 4)), ("22:00:00", Fraction(-1, 4))):
        Edf([], annotations=[note], starttime=time.fromisoformat(there)).write(tmp_path / "h.edf")
        begun = recording(tmp_path / "a.edf", start_time="22:00:00", start_subsecond="1/4")
        assert read_labels(begun, corpus(rule)).stages[0].onset == onset


def test_a_declared_encoding_reaches_the_second_file(tmp_path):
    note = EdfAnnotation(onset=0, duration=60, text="qqqqqq")
    Edf([], annotations=[note]).write(tmp_path / "h.edf")
    data = (tmp_path / "h.edf").read_bytes().replace(b"qqqqqq", "覚醒期".encode("shift_jis"))
    (tmp_path / "h.edf").write_bytes(data)
    rule = {"source": "edf_file", "pattern": "h.edf", "map": {"覚醒期": "W"}}
    plain = recording(tmp_path / "a.edf")
    assert not read_labels(plain, corpus(rule)).stages
    declared = replace(plain, layout={"encoding": "shift_jis", "of_another_reader": 1})
    assert spans(read_labels(declared, corpus(rule)).stages) == [(0, 60, "W")]


def test_midnight_between_both_starts_counts_the_short_way(tmp_path, shared_data):
    data = bytearray((shared_data / "sleep_edf/SC4001EC-Hypnogram.edf").read_bytes())
    data[176:184] = b"00.00.10"
    (tmp_path / "h.edf").write_bytes(bytes(data))
    rule = {"source": "edf_file", "pattern": "h.edf", "map": {"Sleep stage W": "W"}}
    found = read_labels(recording(tmp_path / "a.edf", start_time="23:59:50"), corpus(rule))
    assert found.stages[0].onset == 20


def test_promised_labels_that_are_missing_or_garbled_are_refused(tmp_path):
    rule = {"source": "text_codes", "pattern": "{stem}.txt", "map": {"0": "W"}}
    with pytest.raises(RecordingError, match="0 label files"):
        read_labels(recording(tmp_path / "a.edf"), corpus(rule))
    (tmp_path / "a.txt").write_text("0\n1 2\n")
    with pytest.raises(RecordingError, match="line 2"):
        read_labels(recording(tmp_path / "a.edf"), corpus(rule))
    with pytest.raises(ConfigError, match="session"):
        read_labels(recording(tmp_path / "a.edf"), corpus({**rule, "pattern": "{session}.txt"}))
    with pytest.raises(ValueError, match="scorer"):
        corpus({**rule, "pattern": "{scorer}.txt"})


def test_texts_that_are_not_listed_are_counted_and_null_is_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("[Hypnogram]\n0\n0\n1\n8\n0\n")
    rule = {"source": "text_codes", "pattern": "{stem}.txt", "map": {"0": "W", "1": None}, "epoch_s": 20}
    found = read_labels(recording(tmp_path / "a.edf"), corpus(rule))
    assert spans(found.stages) == [(0, 40, "W"), (80, 20, "W")]
    assert found.unmapped == {"8": 1}
    assert read_labels(recording(tmp_path / "a.edf"), corpus({"source": "none"})) == Labels()


def test_a_stage_needs_half_of_the_epoch():
    labels = Labels(
        stages=(interval(0, 10, "W"), interval(10, 5, "N1"), interval(15, 14, "W"), interval(60, 15, "R")),
    )
    assert labels.stage_at(Fraction(0), 30) == "W"
    assert labels.stage_at(Fraction(30), 30) == "?"
    assert labels.stage_at(Fraction(60), 30) == "R"
    assert labels.stage_at(Fraction(61), 30) == "?"


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), max_size=12),
    st.integers(0, 80),
    st.integers(1, 30),
)
def test_events_of_a_window_are_those_that_touch_it(pairs, start, window_s):
    events = tuple(interval(onset, duration, f"{i}") for i, (onset, duration) in enumerate(sorted(pairs)))
    inside, covering = Labels(events=events).events_in(Fraction(start), window_s)
    stop = start + window_s
    touching = [e for e in events if (e.onset < stop and e.onset + e.duration > start) or start <= e.onset < stop]
    assert [text for _, _, text in inside] == [e.text for e in touching]
    assert covering == [e.text for e in events if e.onset <= start < e.onset + e.duration]
    for onset, duration, text in inside:
        event = events[int(text)]
        assert start + onset == max(start, event.onset)
        assert start + onset + duration == min(stop, event.onset + event.duration)


@pytest.mark.parametrize(("record", "num_rhythms"), [("data_21_7", 1), ("data_84_1", 2), ("data_101_6", 9)])
def test_records_without_rhythm_marks_and_with_empty_notes(shared_data: Path, record: str, num_rhythms: int) -> None:
    corpus = load_corpus("cpsc2021_af")
    path = shared_data / "cpsc2021_af" / f"{record}.hea"
    recording = read_header(path, corpus.reader, corpus.layout)
    found = read_labels(recording, corpus)
    assert len(found.events) == num_rhythms
    assert not found.unmapped


def test_a_commit_tells_of_each_recording_what_is_scored(tmp_path: Path) -> None:
    root = tmp_path / "recordings"
    synthesise(root, num_subjects=2, num_ecg=0, night_minutes=10)
    nights = sorted((root / "psg").rglob("*_psg.edf"))
    rule = {"source": "text_codes", "pattern": "{stem}.txt", "map": {"0": "W"}, "required": False}
    scored = load_corpus("synthetic_psg").model_copy(update={"annotations": AnnotationRule.model_validate(rule)})
    nights[0].with_suffix(".txt").write_text("0\n" * 18)
    (tmp_path / "scored.yaml").write_text(dump_yaml({**scored.model_dump(mode="json"), "id": "scored"}))
    source = {"corpus": str(tmp_path / "scored.yaml"), "root": str(root)}
    settings = {"output": str(tmp_path / "out"), "recipe": "sleep128", "sources": [source], "quarantine_budget": 1}
    result = convert_all(ConvertConfig.model_validate(settings))
    assert result.snapshot is not None
    commits = read_commits(tmp_path / "out", read_plan(tmp_path / "out"))
    told = {found.path: found.labels for commit in commits for found in commit.inputs if found.windows}
    first, second = (told[night.relative_to(root).as_posix()] for night in nights[:2])
    assert first == {
        "scored_s": 540, "unscored_s": 60, "remainder_s": 0, "contradicted_s": 0, "outside_s": 0
    }  # fmt: skip
    assert second == {"missing": 1}
