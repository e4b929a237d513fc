"""Corpus files against files made as the distributions have them: every label resolves, scorings are found and read."""

import datetime
from fractions import Fraction
from pathlib import Path

import edfio
import h5py
import numpy as np
import pytest
import wfdb
from scipy import io

from engine.annotations import Labels, read_labels
from engine.config import Source
from engine.read import read_header
from engine.recording import Annotation, Recording, Segment
from engine.scan import scan
from engine.scan_result import ScanRow
from engine.windows import trial_split, window_recording
from manifests.corpora import load_corpus
from manifests.errors import RecordingError
from manifests.recipes import load_recipe

SECONDS = 120
NSRR_XML = """<?xml version="1.0" encoding="UTF-8"?><PSGAnnotation><EpochLength>30</EpochLength><ScoredEvents>
<ScoredEvent><EventType/><EventConcept>Recording Start Time</EventConcept><Start>0</Start><Duration>120.0</Duration>
<ClockTime>01.01.85 22.00.00</ClockTime></ScoredEvent>
<ScoredEvent><EventType>Respiratory|Respiratory</EventType><EventConcept>Unsure|Unsure</EventConcept>
<Start>65.5</Start><Duration>10.0</Duration></ScoredEvent>
<ScoredEvent><EventType>Respiratory|Respiratory</EventType><EventConcept>Hypopnea|Hypopnea</EventConcept>
<Start>35.5</Start><Duration>10.0</Duration></ScoredEvent>
<ScoredEvent><EventType>Stages|Stages</EventType><EventConcept>Wake|0</EventConcept>
<Start>0.0</Start><Duration>30.0</Duration></ScoredEvent>
<ScoredEvent><EventType>Stages|Stages</EventType><EventConcept>Stage 4 sleep|4</EventConcept>
<Start>30.0</Start><Duration>60.0</Duration></ScoredEvent>
<ScoredEvent><EventType>Stages|Stages</EventType><EventConcept>REM sleep|5</EventConcept>
<Start>90.0</Start><Duration>30.0</Duration></ScoredEvent></ScoredEvents></PSGAnnotation>"""
CAP_TXT = """CAP Sleep Database\n\nSleep Stage\tPosition\tTime [hh:mm:ss]\tEvent\tDuration[s]\tLocation
W\tUnknown Position\t22:00:00\tSLEEP-S0\t30\tROC-LOC
S4\tUnknown Position\t22:00:30\tSLEEP-S4\t30\tROC-LOC
S4\tUnknown Position\t22:00:35\tMCAP-A1\t6\tF4-C4
S4\tUnknown Position\t22:01:00\tSLEEP-S4\t30\tROC-LOC
R\tUnknown Position\t22:01:30\tSLEEP-REM\t30\tROC-LOC
"""
NIGHT = [(0, 30, "W"), (30, 60, "N3"), (90, 30, "R")]
NSRR = "polysomnography/annotations-events-nsrr"
SCORED = [
    # corpus, recording, file of labels beside or above it, its text, events expected
    ("shhs1", "polysomnography/edfs/shhs1/shhs1-200001.edf", f"{NSRR}/shhs1/shhs1-200001-nsrr.xml", NSRR_XML, 1),
    ("shhs2", "polysomnography/edfs/shhs2/shhs2-200077.edf", f"{NSRR}/shhs2/shhs2-200077-nsrr.xml", NSRR_XML, 1),
    ("mesa", "polysomnography/edfs/mesa-sleep-0001.edf", f"{NSRR}/mesa-sleep-0001-nsrr.xml", NSRR_XML, 2),
    (
        "mros",
        "polysomnography/edfs/visit2/mros-visit2-aa0001.edf",
        f"{NSRR}/visit2/mros-visit2-aa0001-nsrr.xml",
        NSRR_XML,
        2,
    ),
    ("ccshs", "polysomnography/edfs/ccshs-trec-1800001.edf", f"{NSRR}/ccshs-trec-1800001-nsrr.xml", NSRR_XML, 1),
    ("cfs", "polysomnography/edfs/cfs-visit5-800002.edf", f"{NSRR}/cfs-visit5-800002-nsrr.xml", NSRR_XML, 1),
    (
        "wsc",
        "polysomnography/wsc-visit2-10119-nsrr.edf",
        "polysomnography/wsc-visit2-10119-nsrr.eannot",
        "wake\nN3\nN3\nREM\n",
        0,
    ),
    ("isruc", "subgroupII/3/2/2.rec", "subgroupII/3/2/2_1.txt", "0\n3\n3\n5\n", 0),
    ("ucddb", "ucddb002.rec", "ucddb002_stage.txt", "0\n5\n4\n1\n", 0),
    ("cap_sleep", "nfle12.edf", "nfle12.txt", CAP_TXT, 1),
    ("dreams_subjects", "subject3.edf", "HypnogramAASM_subject3.txt", "[h]\n" + "5\n" * 6 + "1\n" * 12 + "4\n" * 6, 0),
    ("dreams_patients", "patient3.edf", "HypnogramAASM_patient3.txt", "[h]\n" + "5\n" * 6 + "1\n" * 12 + "4\n" * 6, 0),
]
HYPNOGRAMS = [
    ("sleep_edf", "sleep-cassette/SC4001E0-PSG.edf", "SC4001EC-Hypnogram.edf", "Sleep stage 4"),
    ("sleep_edf_st", "sleep-telemetry/ST7011J0-PSG.edf", "ST7011JP-Hypnogram.edf", "Sleep stage 3"),
    ("hmc", "recordings/SN001.edf", "SN001_sleepscoring.edf", "Sleep stage N3"),
]


def write_edf(path: Path, labels: list[str], annotations: tuple[tuple[float, float | None, str], ...] = ()) -> None:
    noise = np.random.default_rng(0).normal(scale=20, size=SECONDS * 32)
    signals = [
        edfio.EdfSignal(noise, 32, label=label, physical_dimension="uV", physical_range=(-200, 200)) for label in labels
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    marks = [edfio.EdfAnnotation(*mark) for mark in annotations]
    edfio.Edf(signals, annotations=marks or None, starttime=datetime.time(22)).write(path)


def read(name: str, root: Path, path: str) -> tuple[ScanRow, Labels]:
    """The scan's row of the one recording under a root, and its labels."""
    (row,) = scan([Source(corpus=name, root=root)]).rows
    corpus = load_corpus(name)
    file = root / path
    return row, read_labels(read_header(file, corpus.reader_of(file), corpus.layout), corpus)


def intervals(found: tuple[Annotation, ...]) -> list[tuple[float, float, str]]:
    return [(float(item.onset), float(item.duration), item.text) for item in found]


def assert_no_label_is_unknown(name: str, row: ScanRow) -> None:
    channels = load_corpus(name).channels
    assert row.reason == ""
    assert not [item for item in row.unresolved if not item[1].startswith(("excluded by corpus", "role "))]
    assert len(row.channels) + len(row.unresolved) == len(channels)


@pytest.mark.parametrize("case", SCORED, ids=[item[0] for item in SCORED])
def test_a_night_is_read_with_its_scoring(case: tuple[str, str, str, str, int], tmp_path: Path) -> None:
    name, path, scoring, text, num_events = case
    write_edf(tmp_path / path, list(load_corpus(name).channels))
    (tmp_path / scoring).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / scoring).write_text(text, encoding="utf-8")
    if name == "cfs":
        (tmp_path / "datasets").mkdir()
        (tmp_path / "datasets/cfs-visit5-dataset-0.7.0.csv").write_text("nsrrid,familyi\n800002,9\n", encoding="utf-8")
    row, labels = read(name, tmp_path, path)
    assert_no_label_is_unknown(name, row)
    assert intervals(labels.stages) == NIGHT
    assert len(labels.events) == num_events
    assert not labels.unmapped


@pytest.mark.parametrize(("name", "path", "scoring", "deep"), HYPNOGRAMS, ids=[item[0] for item in HYPNOGRAMS])
def test_a_night_is_read_with_its_hypnogram_in_edf(
    name: str, path: str, scoring: str, deep: str, tmp_path: Path
) -> None:
    write_edf(tmp_path / path, list(load_corpus(name).channels))
    marks = ((0, 30, "Sleep stage W"), (30, 60, deep), (90, 30, "Sleep stage R"))
    lights = ((5, None, "Lights off@@EEG F4-A1"),) if name == "hmc" else ()
    write_edf((tmp_path / path).parent / scoring, [], marks + lights)
    row, labels = read(name, tmp_path, path)
    assert_no_label_is_unknown(name, row)
    assert intervals(labels.stages) == NIGHT
    assert not labels.unmapped


def test_the_temple_corpora_are_read_with_their_events(tmp_path: Path) -> None:
    labels = [label for label in load_corpus("tueg").channels if not label.split("-")[0].split()[-1].isdecimal()]
    for name, path in (
        ("tuab", "edf/train/abnormal/01_tcp_ar/aaaaabcd_s004_t000.edf"),
        ("tuev", "edf/eval/012/gped_012_a_1.edf"),
        ("tusl", "edf/aaaaaaju/s005_2010/01_tcp_ar/aaaaaaju_s005_t000.edf"),
    ):
        write_edf(tmp_path / name / path, labels)
    (tmp_path / "tuev/edf/eval/012/gped_012_a_1.rec").write_text("3,10.0,11.0,2\n4,10.0,11.0,2\n1,50.0,130.0,6\n")
    table = "# version = csv_v1.0.0\nchannel,start_time,stop_time,label,confidence\nF7-T3,10.0,20.0,slow,1.0\n"
    (tmp_path / "tusl/edf/aaaaaaju/s005_2010/01_tcp_ar/aaaaaaju_s005_t000.csv").write_text(table)
    row, found = read("tuab", tmp_path / "tuab", "edf/train/abnormal/01_tcp_ar/aaaaabcd_s004_t000.edf")
    assert found.classes == ("abnormal",)
    assert {channel.symbol for channel in row.channels} >= {"eeg:Fp1-common", "eeg:Fp1-linked_ears", "eog:E1-common"}
    assert not [item for item in row.unresolved if not item[1].startswith(("excluded by corpus", "role "))]
    _, found = read("tuev", tmp_path / "tuev", "edf/eval/012/gped_012_a_1.edf")
    assert [text for _, _, text in intervals(found.events)] == ["generalised_periodic_discharges", "background"]
    _, found = read("tusl", tmp_path / "tusl", "edf/aaaaaaju/s005_2010/01_tcp_ar/aaaaaaju_s005_t000.edf")
    assert intervals(found.events) == [(10, 10, "slowing")]


def test_chb_mit_is_read_with_its_seizures_and_its_double_channel(tmp_path: Path) -> None:
    labels = [label for label in load_corpus("chbmit").channels if label.count("-") == 1][:20]
    write_edf(tmp_path / "chb01/chb01_03.edf", [*labels, "T8-P8", "-"])
    wfdb.wrann("chb01_03", "seizures", np.array([960, 1600]), symbol=["[", "]"], write_dir=str(tmp_path / "chb01"))
    (tmp_path / "chb01/chb01_03.seizures").rename(tmp_path / "chb01/chb01_03.edf.seizures")
    row, found = read("chbmit", tmp_path, "chb01/chb01_03.edf")
    assert [channel.symbol for channel in row.channels].count("eeg:T8-P8") == 2
    assert intervals(found.events) == [(0, 30, "no_seizure"), (30, 20, "seizure"), (50, 70, "no_seizure")]
    write_edf(tmp_path / "chb01/chb01_04.edf", labels)
    corpus = load_corpus("chbmit")
    without = read_labels(read_header(tmp_path / "chb01/chb01_04.edf", "edf"), corpus)
    assert intervals(without.events) == [(0, SECONDS, "no_seizure")]
    assert without.missing == ("wfdb",)


def write_record(folder: Path, name: str, labels: list[str], *, rate: int, seconds: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    signals = np.random.default_rng(0).normal(scale=0.5, size=(rate * seconds, len(labels)))
    wfdb.wrsamp(
        name,
        fs=rate,
        units=["mV"] * len(labels),
        sig_name=labels,
        p_signal=signals,
        fmt=["16"] * len(labels),
        write_dir=str(folder),
    )


def test_ptbxl_takes_person_fold_and_diagnoses_from_its_table(tmp_path: Path) -> None:
    write_record(tmp_path / "records500/00000", "00012_hr", list(load_corpus("ptbxl").channels), rate=500, seconds=10)
    text = "ecg_id,patient_id,scp_codes,strat_fold\n12,15709.0,\"{'NORM': 100.0, 'SR': 0.0}\",10\n"
    (tmp_path / "ptbxl_database.csv").write_text(text, encoding="utf-8")
    row, labels = read("ptbxl", tmp_path, "records500/00000/00012_hr.hea")
    assert_no_label_is_unknown("ptbxl", row)
    assert row.split == "test"
    assert labels.classes == ("NORM", "SR")


def test_challenge_2018_is_read_with_stages_and_events(tmp_path: Path) -> None:
    folder = tmp_path / "training/tr03-0005"
    write_record(folder, "tr03-0005", list(load_corpus("challenge2018").channels), rate=200, seconds=SECONDS)
    wfdb.wrann(
        "tr03-0005",
        "arousal",
        np.array([6000, 7000, 8000, 12000, 18000]),
        symbol=['"'] * 5,
        aux_note=["W", "(resp_hypopnea", "resp_hypopnea)", "N3", "R"],
        write_dir=str(folder),
    )
    row, labels = read("challenge2018", tmp_path, "training/tr03-0005/tr03-0005.hea")
    assert_no_label_is_unknown("challenge2018", row)
    assert intervals(labels.events) == [(35, 5, "hypopnea")]
    assert intervals(labels.stages) == [(30, 30, "W"), (60, 30, "N3"), (90, 30, "R")]


def test_dod_is_read_with_its_hypnogram(tmp_path: Path) -> None:
    name = "1da3544e-dc5c-5795-adc3-f5068959211f.h5"
    for corpus in ("dod_h", "dod_o"):
        (tmp_path / corpus).mkdir()
        kinds = {"EOG1": "eog", "EOG2": "eog", "EMG": "emg", "ECG": "ecg"}
        with h5py.File(tmp_path / corpus / name, "w") as file:
            for label in load_corpus(corpus).channels:
                group = file.require_group(f"signals/{kinds.get(label, 'eeg')}")
                group.attrs["fs"], group.attrs["unit"] = 250, "µV"
                group[label] = np.zeros(250 * SECONDS, np.float32)
            file["hypnogram"] = np.array([0, 3, 3, 4])
        row, labels = read(corpus, tmp_path / corpus, name)
        assert_no_label_is_unknown(corpus, row)
        assert intervals(labels.stages) == NIGHT


def test_code15_knows_the_person_of_an_exam(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "exams_part0.hdf5", "w") as file:
        file["exam_id"] = np.array([11, 12, 0])
        tracings = np.zeros((3, 4096, 12), np.float32)
        tracings[:2, 48:-48] = np.random.default_rng(0).normal(size=(2, 4000, 12))
        file["tracings"] = tracings
    flags = "1dAVb,RBBB,LBBB,SB,ST,AF,normal_ecg"
    (tmp_path / "exams.csv").write_text(
        f"exam_id,patient_id,{flags}\n11,7,False,True,False,False,False,True,False\n12,7,{'False,' * 6}True\n"
    )
    rows = scan([Source(corpus="code15", root=tmp_path)]).rows
    assert [row.path for row in rows] == ["exams_part0.hdf5#11", "exams_part0.hdf5#12"]
    assert rows[0].subject == rows[1].subject
    assert {row.duration for row in rows} == {Fraction(10)}
    corpus = load_corpus("code15")
    first = read_header(tmp_path / "exams_part0.hdf5#11", "arrays", corpus.layout)
    assert read_labels(first, corpus).classes == ("right_bundle_branch_block", "atrial_fibrillation")


def test_seed_and_deap_are_read_clip_by_clip(tmp_path: Path) -> None:
    (tmp_path / "seed").mkdir()
    clips = {f"djc_eeg{number}": np.ones((62, 200 * (60 + number))) for number in range(1, 16)}
    io.savemat(tmp_path / "seed/1_20131027.mat", clips)
    io.savemat(tmp_path / "seed/label.mat", {"label": np.zeros((1, 15))})
    row, labels = read("seed", tmp_path / "seed", "1_20131027.mat")
    assert_no_label_is_unknown("seed", row)
    assert [text for _, _, text in intervals(labels.events)][:5] == [
        "positive",
        "neutral",
        "negative",
        "negative",
        "neutral",
    ]
    (tmp_path / "deap").mkdir()
    ratings = np.tile([[6.0, 2.0, 5.0, 5.0]], (40, 1))
    io.savemat(tmp_path / "deap/s01.mat", {"data": np.ones((40, 40, 8064), np.float32), "labels": ratings})
    row, labels = read("deap", tmp_path / "deap", "s01.mat")
    assert_no_label_is_unknown("deap", row)
    assert row.duration == 40 * 60
    assert {text for _, _, text in intervals(labels.events)} == {"high_valence", "low_arousal"}


def test_seed_v_takes_its_clips_from_the_corpus_file() -> None:
    whole = Segment(start=Fraction(0), duration=Fraction(3400))
    corpus = load_corpus("seed_v")
    for session, first in (("1", (30, 72, "happy")), ("2", (30, 237, "sad")), ("3", (30, 291, "sad"))):
        recording = Recording(path=Path(f"EEG_raw/1_{session}_20180804.cnt"), channels=(), segments=(whole,))
        found = intervals(read_labels(recording, corpus).events)
        assert len(found) == 15
        assert found[0] == first
        assert sorted(text for _, _, text in found) == sorted(["disgust", "fear", "sad", "neutral", "happy"] * 3)
    narrow = corpus.annotation_rules[0].model_copy(update={"intervals": {"2": [(0, 1, "0")]}})
    first_session = Recording(path=Path("EEG_raw/1_1_20180804.cnt"), channels=(), segments=(whole,))
    with pytest.raises(RecordingError, match="lists no intervals for session '1'"):
        read_labels(first_session, corpus.model_copy(update={"annotations": narrow}))


def test_the_published_split_of_seed_cuts_between_clips(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(scale=20, size=(62, 200 * 70))
    clips = {f"djc_eeg{number}": noise for number in range(1, 16)}
    io.savemat(tmp_path / "1_20131027.mat", clips)
    path = tmp_path / "1_20131027.mat"
    recipe = load_recipe("eeg200")
    strict, published = [
        [
            (sample.meta["start"] / 200, sample.meta["split"])
            for sample in window_recording(path, corpus=corpus, recipe=recipe, root=tmp_path)
        ]
        for corpus in (load_corpus("seed"), load_corpus("seed").with_split("within_session"))
    ]
    assert len(strict) == len(published) == 15 * (70 // recipe.window_s)
    assert len({split for _, split in strict}) == 1
    assert {split for start, split in published if start < 9 * 120} == {"train"}
    assert {split for start, split in published if start >= 9 * 120} == {"test"}


def test_a_window_across_trials_is_in_no_split() -> None:
    events = [Annotation(onset=Fraction(onset), duration=Fraction(20), text="x") for onset in (0, 20, 60)]
    labels = Labels(events=tuple(events))
    splits = [
        trial_split(labels, ("train", "val", "test"), Fraction(start), window_s=10)
        for start in (0, 10, 15, 30, 45, 60, 75)
    ]
    assert splits == ["train", "train", "unused", "val", "unused", "test", "unused"]


def test_dreamer_is_read_person_by_person(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)

    def clips(rate: int, channels: int) -> np.ndarray:
        films = np.empty((18, 1), object)
        for number in range(18):
            films[number, 0] = noise.normal(scale=20, size=(rate * 65, channels))
        return films

    persons = np.empty((1, 2), object)
    for number in range(2):
        persons[0, number] = {
            "EEG": {"stimuli": clips(128, 14)},
            "ECG": {"stimuli": clips(256, 2)},
            **{f"Score{name}": np.full((18, 1), 1.0 + 2 * number) for name in ("Valence", "Arousal", "Dominance")},
        }
    io.savemat(tmp_path / "DREAMER.mat", {"DREAMER": {"Data": persons}})
    rows = scan([Source(corpus="dreamer", root=tmp_path)]).rows
    assert [(row.path, row.reason) for row in rows] == [("DREAMER.mat#1", ""), ("DREAMER.mat#2", "")]
    assert_no_label_is_unknown("dreamer", rows[0])
    corpus = load_corpus("dreamer")
    texts = [
        {
            text
            for _, _, text in intervals(
                read_labels(read_header(tmp_path / row.path, "arrays", corpus.layout), corpus).events
            )
        }
        for row in rows
    ]
    assert texts == [{"low_valence", "low_arousal"}, {"high_valence", "high_arousal"}]
    samples = window_recording(tmp_path / "DREAMER.mat#1", corpus=corpus, recipe=load_recipe("eeg200"), root=tmp_path)
    assert sum(1 for _ in samples) == 18 * (65 // 4)


def test_a_bids_data_set_is_read_with_its_events(tmp_path: Path) -> None:
    folder = tmp_path / "sub-A1/ses-2/eeg"
    write_edf(folder / "sub-A1_ses-2_task-rest_run-1_eeg.edf", ["Fp1", "Fp2", "Oz"])
    events = "onset\tduration\ttrial_type\n10.0\t5.0\tblink\n"
    (folder / "sub-A1_ses-2_task-rest_run-1_events.tsv").write_text(events, encoding="utf-8")
    row, labels = read("bids_eeg", tmp_path, "sub-A1/ses-2/eeg/sub-A1_ses-2_task-rest_run-1_eeg.edf")
    assert [channel.symbol for channel in row.channels] == ["eeg:Fp1", "eeg:Fp2", "eeg:Oz"]
    assert labels.unmapped == {"blink": 1}


@pytest.mark.parametrize(("name", "count"), [("cpsc2018", 4), ("g12ec", 45), ("chapman", 20)])
def test_real_records_of_the_challenge_are_read_by_their_source(name: str, count: int, shared_data: Path) -> None:
    root, corpus = shared_data / "challenge2021_12lead", load_corpus(name)
    rows = scan([Source(corpus=name, root=root)]).rows
    assert len(rows) >= count
    for row in rows:
        if row.reason == "KNOWN_BAD":
            assert row.path == "E/E07510.hea"
            continue
        assert_no_label_is_unknown(name, row)
        labels = read_labels(read_header(root / row.path, "wfdb"), corpus)
        assert labels.classes
        assert not labels.unmapped
