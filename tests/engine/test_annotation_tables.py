"""Tables of labels in the forms that corpora publish, and BIDS events."""

from fractions import Fraction
from pathlib import Path

import pytest

from engine.annotation_tables import clock_seconds
from engine.annotations import Labels, read_labels
from engine.recording import Channel, Recording, Segment
from manifests.corpora import Corpus
from manifests.errors import RecordingError

HMC = """\
Date, Time, Recording onset, Duration, Annotation, Linked channel
2000-01-01, 22:31:05, 0, 30, Sleep stage W, 
2000-01-01, 22:31:15, 10.5, 0, Lights off@@EEG F4-A1, EEG F4-A1
2000-01-01, 22:31:35, 30, 30, Sleep stage N1, 
"""  # noqa: W291 - the published files end their rows so
CAP = """\
REMLogic Event Export
Patient:\tn1
Recording Date:\t01/01/2009

Events Included:
SLEEP-S0

Sleep Stage\tPosition\tTime [hh:mm:ss]\tEvent\tDuration[s]\tLocation
W\tUnknown Position\t23:59:00\tSLEEP-S0\t30\tROC-LOC
W\tUnknown Position\t23:59:10\tMCAP-A1\t7\tF4-C4
S2\tUnknown Position\t23:59:30\tSLEEP-S2\t30\tROC-LOC
S4\tUnknown Position\t00:00:00\tSLEEP-S4\t30\tROC-LOC
"""
TUSZ = """\
# version = csv_v1.0.0
# bname = aaaaaajy_s001_t000
# duration = 120.00 secs
#
channel,start_time,stop_time,label,confidence
TERM,0.0000,36.8868,bckg,1.0000
TERM,36.8868,50.3101,seiz,1.0000
FP1-F7,36.8868,40.0000,seiz,1.0000
"""


def corpus(table: dict | None, source: str = "table", **rule: object) -> Corpus:
    block = {"table": table} if table else {}
    return Corpus.model_validate(
        {
            "id": "tiny",
            "title": "t",
            "licence": "CC0",
            "access": "open",
            "reader": "edf",
            "files": ["*"],
            "subject": {"pattern": r"(?P<subject>\w+)\.\w+$"},
            "annotations": {"source": source, **block, **rule},
        }
    )


def read(folder: Path, name: str, text: str | bytes, corpus: Corpus, **extra: str) -> Labels:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    channel = Channel(index=0, label="C3", rate=Fraction(100), unit="uV", prefilter="", num_samples=12000)
    segments = (Segment(start=Fraction(0), duration=Fraction(120)),)
    return read_labels(Recording(path=folder / "a.edf", channels=(channel,), segments=segments, extra=extra), corpus)


def spans(annotations: tuple) -> list[tuple[float, float, str]]:
    return [(float(a.onset), float(a.duration), a.text) for a in annotations]


def hmc(**changes: object) -> Corpus:
    table = {"onset": "Recording onset", "duration": "Duration", "text": "Annotation"}
    words = {"Sleep stage W": "W", "Sleep stage N1": "N1", "Lights off*": None}
    return corpus(table, pattern="{stem}_sleepscoring.txt", **{"map": words, **changes})


def test_hmc_text_scoring(tmp_path: Path) -> None:
    found = read(tmp_path, "a_sleepscoring.txt", HMC, hmc())
    assert spans(found.stages) == [(0, 30, "W"), (30, 30, "N1")]
    assert found.unmapped == {}
    lights = hmc(target="events", map={"Lights off*": "lights_off", "Lights off@@EEG F4-A1": "lights_out"})
    found = read(tmp_path, "a_sleepscoring.txt", HMC, lights)
    assert spans(found.events) == [(10.5, 0, "lights_out")]  # the exact text goes before the prefix
    assert found.unmapped == {"Sleep stage W": 1, "Sleep stage N1": 1}


CAP_TABLE = {
    "header": "Sleep Stage",
    "separator": "\t",
    "onset": "Time",
    "text": "Event",
    "duration": "Duration",
    "unit": "clock",
}
CAP_MAP = {"SLEEP-S0": "W", "SLEEP-S2": "N2", "SLEEP-S4": "N3", "MCAP-A1": None}


@pytest.mark.parametrize(
    ("start", "first"), [("23:59:00", 0), ("23:58:45", 15), ("23.58.45", 15), ("23:59:30", -30), ("00:00:10", -70)]
)
def test_cap_clock_times_pass_midnight(tmp_path: Path, start: str, first: int) -> None:
    rule = corpus(CAP_TABLE, pattern="{stem}.txt", map=CAP_MAP)
    found = read(tmp_path, "a.txt", CAP, rule, start_time=start)
    assert spans(found.stages) == [(first, 30, "W"), (first + 30, 30, "N2"), (first + 60, 30, "N3")]


def test_cap_without_a_position_column_and_with_dots(tmp_path: Path) -> None:
    text = CAP.replace("Position\t", "", 1).replace("Unknown Position\t", "").replace("23:59:", "23.59.")
    rule = corpus(CAP_TABLE, pattern="{stem}.txt", map=CAP_MAP)
    assert len(read(tmp_path, "a.txt", text, rule, start_time="23:59:00").stages) == 3


def test_clock_times_need_the_recordings_start(tmp_path: Path) -> None:
    rule = corpus(CAP_TABLE, pattern="{stem}.txt", map=CAP_MAP)
    for extra in ({}, {"start_time": ""}):
        with pytest.raises(RecordingError, match="does not say when it began") as caught:
            read(tmp_path, "a.txt", CAP, rule, **extra)
        assert caught.value.reason == "ANNOTATION_INVALID"


def test_tusz_csv_counts_an_event_of_several_channels_once(tmp_path: Path) -> None:
    table = {"comment": "#", "onset": "start_time", "end": "stop_time", "text": "label"}
    rule = {"pattern": "{stem}.csv_bi", "target": "events", "map": {"bckg": "background", "seiz": "seizure"}}
    expected = [(0, 36.8868, "background"), (36.8868, 13.4233, "seizure")]
    text = TUSZ + "TERM,36.8868,50.3101,seiz,1.0000\n"
    found = read(tmp_path, "a.csv_bi", text, corpus({**table, "keep": {"channel": ["TERM"]}}, **rule))
    assert spans(found.events) == expected
    assert len(read(tmp_path, "a.csv_bi", text, corpus(table, **rule)).events) == 3


def test_tse_separated_by_blanks(tmp_path: Path) -> None:
    text = "version = tse_v1.0.0\n\n0.0000 10.2787 bckg 1.0000\n10.2787 100.0000 gnsz 1.0000\n"
    table = {"separator": None, "header": False, "skip_lines": 1, "onset": 1, "end": 2, "text": 3}
    rule = {"pattern": "{stem}.tse", "target": "events", "map": {"bckg": "background", "gnsz": "seizure"}}
    assert spans(read(tmp_path, "a.tse", text, corpus(table, **rule)).events) == [
        (0, 10.2787, "background"),
        (10.2787, 89.7213, "seizure"),
    ]


def test_tuev_rec_by_numbers(tmp_path: Path) -> None:
    table = {"header": False, "onset": 2, "end": 3, "text": 4}
    rule = {"pattern": "{stem}.rec", "target": "events", "map": {"6": "background", "1": "spike"}}
    found = read(tmp_path, "a.rec", "0,90.2,91.2,6\n1,90.2,91.2,6\n4,93,94,1\n", corpus(table, **rule))
    assert spans(found.events) == [(90.2, 1, "background"), (93, 1, "spike")]


def test_wsc_texts_last_to_the_next(tmp_path: Path) -> None:
    text = "22:00:00.00\tSTAGE - W\n22:00:10.00\tDÉSATURATION\n22:01:00.00\tSTAGE - N1\n".encode("latin-1")
    table = {"separator": "\t", "header": False, "encoding": "latin-1", "onset": 1, "text": 2, "unit": "clock"}
    rule = {"pattern": "{stem}.allscore.txt", "lasts": "next", "map": {"STAGE - W": "W", "STAGE - N1": "N1"}}
    found = read(tmp_path, "a.allscore.txt", text, corpus(table, **rule), start_time="22:00:00")
    assert spans(found.stages) == [(0, 60, "W"), (60, 60, "N1")]
    with pytest.raises(RecordingError, match="not text in utf-8-sig"):
        read(tmp_path, "a.allscore.txt", text, corpus({**table, "encoding": "utf-8-sig"}, **rule))


def test_epochs_samples_and_decimal_commas(tmp_path: Path) -> None:
    table = {"separator": "\t", "header": False, "onset": 1, "text": 2, "unit": "epochs"}
    rule = {"pattern": "{stem}.stg.txt", "epoch_s": 20, "map": {"0": "W", "2": "N2"}}
    assert spans(read(tmp_path, "a.stg.txt", "1\t0\n2\t2\n3\t2\n", corpus(table, **rule)).stages) == [
        (0, 20, "W"),
        (20, 40, "N2"),
    ]
    from_zero = corpus({**table, "first_epoch": 0}, **rule)
    assert spans(read(tmp_path, "a.stg.txt", "1\t0\n", from_zero).stages) == [(20, 20, "W")]
    table = {"separator": ";", "header": False, "onset": 1, "duration": 2, "text": 3}
    rule = {"pattern": "{stem}.csv", "target": "events", "map": {"x": "x"}}
    found = read(tmp_path, "a.csv", "1,5;0,25;x\n", corpus({**table, "decimal": ","}, **rule))
    assert spans(found.events) == [(1.5, 0.25, "x")]
    found = read(tmp_path, "a.csv", "150;25;x\n", corpus({**table, "unit": "samples"}, **rule))
    assert spans(found.events) == [(1.5, 0.25, "x")]


def test_the_noxturnal_export_of_a_real_night(tmp_path: Path, shared_data: Path) -> None:
    data = (shared_data / "nox_a1_psg/noxturnal_events_example_unicode_2.csv").read_bytes()
    table = {
        "encoding": "utf-16",
        "comment": "[]",
        "onset": "Heure de début",
        "end": "Heure de fin",
        "text": "Événement",
        "unit": "clock",
    }
    words = {"Éveil": "W", "N1": "N1", "N2": "N2", "N3": "N3", "SP": "R"}
    rule = {"pattern": "{stem}.csv", "map": words}
    found = read(tmp_path, "a.csv", data, corpus(table, **rule), start_time="23:45:40")
    assert spans(found.stages)[0][:1] == (20,)
    assert found.stages[0].text == "W"
    assert found.scoring is not None
    lines = data.decode("utf-16").splitlines()
    epochs = sum(line.split(",")[2] in words for line in lines[2:])
    assert sum(stage.duration for stage in found.stages if stage.text != "?") == 30 * epochs > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HMC.replace("10.5", "soon"), "line 3: time is no number"),
        (HMC.replace("30, 30", "30, -30"), "line 4: duration -30 is negative"),
        (HMC.replace("2000-01-01, 22:31:35, 30", "30"), "line 4 has"),
        (HMC.replace("Annotation", "Note"), "0 columns are called 'Annotation'"),
        (HMC.replace("10.5", "9e99999999"), "line 3: time is no number"),
        (b"\xff\xfe\x00", "not text"),
        ("", "0 columns"),
    ],
)
def test_a_broken_table_is_refused_and_its_texts_stay_out_of_the_message(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(RecordingError, match=message) as caught:
        read(tmp_path, "a_sleepscoring.txt", text, hmc())
    assert caught.value.reason == "ANNOTATION_INVALID"
    assert "soon" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"onset": "a", "text": 1, "header": False}, "give numbers"),
        ({"onset": 1, "text": 2, "duration": 3, "end": 4}, "keep one"),
        ({"onset": 1, "text": 2, "decimal": ","}, "separator and decimal"),
        ({"onset": 1, "text": 2, "encoding": "klingon"}, "klingon"),
        (None, "go together"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(table: dict | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        corpus(table, pattern="{stem}.txt")


BIDS = "onset\tduration\ttrial_type\tvalue\n0.5\t1.0\tleft\t1\n\n2.5\tn/a\tn/a\t2\n4\t1\tn/a\tn/a\n"


def test_bids_events_are_found_by_the_entities_of_the_name(tmp_path: Path) -> None:
    words = {"left": "left_fist", "2": "button", "n/a": None}
    rule = corpus(None, "bids_events", target="events", map=words)
    path = tmp_path / "sub-01_ses-1_task-rest_run-2_eeg.edf"
    (tmp_path / "sub-01_ses-1_task-rest_run-2_events.tsv").write_text(BIDS)
    channel = Channel(index=0, label="C3", rate=Fraction(100), unit="uV", prefilter="", num_samples=1200)
    header = Recording(path=path, channels=(channel,), segments=(Segment(start=Fraction(0), duration=Fraction(12)),))
    found = read_labels(header, rule)
    assert spans(found.events) == [(0.5, 1, "left_fist"), (2.5, 0, "button")]
    assert found.unmapped == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BIDS.replace("0.5", "n/a"), "line 2: onset is no number"),
        ("duration\tvalue\n1\t2\n", "columns onset"),
        ("", "columns onset"),
    ],
)
def test_broken_bids_events_are_refused(tmp_path: Path, text: str, message: str) -> None:
    rule = corpus(None, "bids_events", target="events", pattern="{stem}.tsv", map={})
    with pytest.raises(RecordingError, match=message):
        read(tmp_path, "a.tsv", text, rule)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("22:31:05", 81065), ("22.31.05,5", Fraction("81065.5")), ("25/07/2018 23:45:40", 85540),
        ("10:31:05 PM", 81065), ("12:00:00 AM", 0), ("24:00:00", None), ("22:61:00", None), ("soon", None), ("", None),
        ("25.07.2018 23:45:40", 85540),
    ],
)  # fmt: skip
def test_clock_times(text: str, seconds: int | Fraction | None) -> None:
    assert clock_seconds(text) == seconds


def test_times_of_day_count_from_the_first_sample_and_not_from_the_whole_second(tmp_path: Path) -> None:
    table = {"onset": 1, "text": 2, "separator": ",", "unit": "clock", "header": False}
    rows = corpus(table, pattern="a.csv", target="events", map={"x": "arousal"})
    found = read(tmp_path, "a.csv", "22:00:01.5,x\n", rows, start_time="22:00:00", start_subsecond="1/3")
    assert [event.onset for event in found.events] == [Fraction(7, 6)]
