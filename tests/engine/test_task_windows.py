"""Shipped tasks on files made as the distributions have them: what each window becomes, from the file to the class."""

import datetime
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import edfio
import numpy as np
import pytest
import wfdb

from engine import windows
from engine.annotations import read_labels
from engine.recording import Recording, Segment
from engine.rows import Losses
from engine.windows import trial_split, window_recording
from manifests.config import shipped_names
from manifests.corpora import load_corpus
from manifests.recipes import load_recipe
from manifests.tasks import TASKS_DIR, load_task, window_labels

RATE = 40
LEADS = ["I", "II", "III", "aVR", "aVL", "aVF", *(f"V{n}" for n in range(1, 7))]
TUH = [f"EEG {site}-REF" for site in (
    "FP1", "FP2", "F3", "F4", "C3", "C4", "P3", "P4", "O1", "O2", "F7", "F8", "T3", "T4", "T5", "T6", "A1", "A2", "FZ",
    "CZ", "PZ", "T1", "T2",
)]  # fmt: skip
Found = tuple[list[tuple[float, str, set[str] | None]], Losses]


def write_edf(path: Path, labels: Sequence[str], seconds: int, marks: Sequence[tuple[float, float, str]] = ()) -> None:
    noise = np.random.default_rng(0).normal(scale=20, size=seconds * RATE)
    signals = [
        edfio.EdfSignal(noise, RATE, label=label, physical_dimension="uV", physical_range=(-200, 200))
        for label in labels
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = [edfio.EdfAnnotation(*mark) for mark in marks]
    edfio.Edf(signals, annotations=notes or None, starttime=datetime.time(22)).write(path)


def write_ecg(path: Path, labels: Sequence[str], seconds: int, comments: Sequence[str] = ()) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    signals = np.random.default_rng(0).normal(scale=0.5, size=(RATE * seconds, len(labels)))
    wfdb.wrsamp(
        path.stem,
        fs=RATE,
        units=["mV"] * len(labels),
        sig_name=list(labels),
        p_signal=signals,
        fmt=["16"] * len(labels),
        comments=list(comments),
        write_dir=str(path.parent),
    )


@pytest.fixture
def find(tmp_path: Path) -> Callable[..., Found]:
    """Function that gives (start in s, split, classes) of each window that the task can read, and what was lost."""

    def found(name: str, path: str, corpus_id: str | None = None) -> Found:
        task = load_task(name)
        corpus_id = corpus_id or next(iter(task.corpora))
        corpus = load_corpus(corpus_id).with_split(task.corpora[corpus_id] or "strict")
        losses, rows = Losses(), []
        recipe = load_recipe(str(task.recipe))
        for sample in window_recording(tmp_path / path, corpus=corpus, recipe=recipe, root=tmp_path, losses=losses):
            symbols = {tag["symbol"] for kind in task.kinds for tag in sample.meta["ucs"].get(kind, ())}
            assert set(task.channels or ()) <= symbols
            assert all(len(sample.meta["ucs"][kind]) >= least for kind, least in task.min_channels.items())
            marks = sample.meta["labels"]
            labels = window_labels(task, stage=(marks.get("stage") or [None])[0], classes=marks.get("classes", ()))
            start = float(sample.meta["start"] / Fraction(*sample.meta["rate"]))
            rows.append((start, sample.meta["split"], None if labels is None else set(labels)))
        return rows, losses

    return found


def test_tuab_has_the_label_of_the_folder(find: Callable[..., Found], tmp_path: Path) -> None:
    for path in ("train/abnormal/01_tcp_ar/aaaaaaab_s001_t000.edf", "eval/normal/01_tcp_ar/aaaaaaac_s001_t000.edf"):
        write_edf(tmp_path / path, TUH, 25)
    rows, _ = find("tuab", "train/abnormal/01_tcp_ar/aaaaaaab_s001_t000.edf")
    assert [(start, labels) for start, _, labels in rows] == [(0, {"abnormal"}), (10, {"abnormal"})]
    assert {split for _, split, _ in rows} <= {"train", "val"}
    rows, _ = find("tuab", "eval/normal/01_tcp_ar/aaaaaaac_s001_t000.edf")
    assert rows == [(0, "test", set()), (10, "test", set())]


def test_tuev_has_a_window_around_each_event(find: Callable[..., Found], tmp_path: Path) -> None:
    path = tmp_path / "edf/eval/012/gped_012_a_1.edf"
    write_edf(path, TUH, 60)
    # channel, from, to, kind: one instant on two channels, one with two kinds, one at the edge
    path.with_suffix(".rec").write_text("3,10,11,2\n4,10,11,2\n1,50,51,6\n2,50,51,1\n5,0,1,4\n")
    rows, losses = find("tuev", "edf/eval/012/gped_012_a_1.edf")
    both = {"background", "spike_and_slow_wave"}
    assert rows == [(8, "test", {"generalised_periodic_discharges"}), (48, "test", both)]
    assert losses.dropped["partial"] == 1


def test_chb_mit_has_seizures_and_the_time_between_them(find: Callable[..., Found], tmp_path: Path) -> None:
    channels = [label for label in load_corpus("chbmit").channels if label.count("-") == 1 and label != "-"][:18]
    folder = tmp_path / "chb02"
    for run in ("01", "02"):
        write_edf(folder / f"chb02_{run}.edf", channels, 60)
    wfdb.wrann("x", "seizures", np.array([27 * RATE, 45 * RATE]), symbol=["[", "]"], write_dir=str(folder))
    (folder / "x.seizures").rename(folder / "chb02_01.edf.seizures")
    rows, _ = find("chbmit", "chb02/chb02_01.edf")
    yes = [30]  # 20-30 and 40-50 lie in it for three and five seconds: no more than half
    assert rows == [(start, "train", {"seizure"} if start in yes else set()) for start in range(0, 60, 10)]
    rows, losses = find("chbmit", "chb02/chb02_02.edf")
    assert [labels for _, _, labels in rows] == [set()] * 6
    assert losses.labels["missing"] == 1


def test_an_epoch_without_a_stage_or_with_movement_is_no_class(find: Callable[..., Found], tmp_path: Path) -> None:
    path = "sleep-cassette/SC4001E0-PSG.edf"
    write_edf(tmp_path / path, ["EEG Fpz-Cz", "EEG Pz-Oz"], 150)
    texts = ["Sleep stage W", "Sleep stage 4", "Movement time", "Sleep stage ?", "Sleep stage R"]
    marks = [(30 * place, 30, text) for place, text in enumerate(texts)]
    write_edf(tmp_path / "sleep-cassette/SC4001EC-Hypnogram.edf", [], 0, marks)
    rows, _ = find("sleep_edf", path)
    assert [labels for _, _, labels in rows] == [{"W"}, {"N3"}, None, None, {"R"}]
    assert {split for _, split, _ in rows} == {"train"}


def test_physionet_mi_has_a_window_per_trial_of_imagined_runs(find: Callable[..., Found], tmp_path: Path) -> None:
    marks = [(0, 4.2, "T0"), (4.2, 4.1, "T2"), (8.3, 4.2, "T0"), (12.5, 4.1, "T1"), (16.6, 2.0, "T0")]
    for run in ("03", "04", "06"):
        write_edf(tmp_path / f"S001/S001R{run}.edf", list(load_corpus("eegmmidb").channels), 19, marks)
    rows, losses = find("physionet_mi", "S001/S001R04.edf", "eegmmidb")
    assert [labels for _, _, labels in rows] == [{"rest"}, {"right"}, {"rest"}, {"left"}]
    assert [start for start, _, _ in rows] == [0, 4.2, 8.3, 12.5]
    assert losses.dropped["partial"] == 1  # the last trial ends with the recording, after two seconds
    rows, _ = find("physionet_mi", "S001/S001R06.edf", "eegmmidb_feet")
    assert [labels for _, _, labels in rows] == [{"rest"}, {"feet"}, {"rest"}, {"fists"}]
    rows, _ = find("physionet_mi", "S001/S001R03.edf", "eegmmidb")
    assert {split for _, split, _ in rows} == {"unused"}  # executed, not imagined


def test_tusl_has_a_window_per_event(find: Callable[..., Found], tmp_path: Path) -> None:
    path = "edf/aaaaaaju/s005_2010/01_tcp_ar/aaaaaaju_s005_t000.edf"
    write_edf(tmp_path / path, TUH, 60)
    lines = ["# version = csv_v1.0.0", "channel,start_time,stop_time,label,confidence"]
    lines += ["F7-T3,12.5,22.5,slow,1.0", "F8-T4,12.5,22.5,slow,1.0", "F8-T4,30,40,seiz,1.0", "F8-T4,45,55,bckg,1.0"]
    (tmp_path / path).with_suffix(".csv").write_text("\n".join(lines) + "\n")
    rows, _ = find("tusl", path)
    assert [(start, labels) for start, _, labels in rows] == [
        (12.5, {"slowing"}), (30, {"seizure"}), (45, {"background"}),
    ]  # fmt: skip


def test_ptbxl_takes_diagnoses_to_superclasses(find: Callable[..., Found], tmp_path: Path) -> None:
    codes = {1: "{'NORM': 100.0, 'SR': 0.0}", 2: "{'IMI': 0.0, 'LVH': 50.0}", 3: "{'SR': 0.0}"}
    cells = [f'{number},{number},"{text}",9' for number, text in codes.items()]
    (tmp_path / "ptbxl_database.csv").write_text("\n".join(["ecg_id,patient_id,scp_codes,strat_fold", *cells]))
    for number, expected in zip(codes, ({"NORM"}, {"MI", "HYP"}, None), strict=True):
        path = f"records500/00000/{number:05d}_hr.hea"
        write_ecg(tmp_path / path, list(load_corpus("ptbxl").channels), 10)
        assert find("ptbxl", path)[0] == [(0, "val", expected)]


@pytest.mark.parametrize(
    ("task", "codes", "expected"),
    [
        ("g12ec", "733534002,426783006", {"lbbb"}),
        ("g12ec", "270492004,713427006", {"first_degree_block", "rbbb"}),
        ("g12ec", "426783006", set()),
        ("g12ec", "999", None),
        ("cpsc2018", "164889003,59118001", {"af", "rbbb"}),
        ("cpsc2018", "429622005", set()),
    ],
)
def test_findings_come_from_the_codes_of_the_header(
    find: Callable[..., Found], tmp_path: Path, task: str, codes: str, expected: set[str] | None
) -> None:
    name = {"g12ec": "E00001", "cpsc2018": "A0001"}[task]
    write_ecg(tmp_path / f"{name}.hea", LEADS, 21, [f"Dx: {codes}"])
    assert [labels for _, _, labels in find(task, f"{name}.hea")[0]] == [expected] * 2


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ([(12, "(AFIB"), (27, "(N")], [set(), {"af"}, {"af"}, set()]),
        ([], [set()] * 4),
        ([(0, "(AFL"), (39, "(N")], [{"af"}] * 4),
    ],
)
def test_af_is_what_fills_most_of_a_window(
    find: Callable[..., Found], tmp_path: Path, marks: list[tuple[int, str]], expected: list[set[str]]
) -> None:
    write_ecg(tmp_path / "data_1_1.hea", ["I", "II"], 40)
    times = np.array([5 * RATE, *(second * RATE for second, _ in marks)])  # a beat, then the rhythms
    order = np.argsort(times, kind="stable")
    notes = ["", *(text for _, text in marks)]
    wfdb.wrann(
        "data_1_1",
        "atr",
        times[order],
        symbol=[["N", *"+" * len(marks)][n] for n in order],
        aux_note=[notes[n] for n in order],
        write_dir=str(tmp_path),
    )
    assert [labels for _, _, labels in find("af", "data_1_1.hea")[0]] == expected


def test_seed_v_has_the_emotion_and_the_split_of_the_clip() -> None:
    task = load_task("seed_v")
    corpus = load_corpus("seed_v").with_split(str(task.corpora["seed_v"]))
    segment = Segment(start=Fraction(0), duration=Fraction(3400))
    recording = Recording(path=Path("EEG_raw/1_1_20180804.cnt"), channels=(), segments=(segment,))
    labels = read_labels(recording, corpus)
    seen: dict[str, set[str]] = {}
    for second in range(3400):
        marks = windows.window_labels(labels, Fraction(second), window_s=1, rate_hz=200)
        split = trial_split(labels, corpus.split.trials, Fraction(second), window_s=1)
        found = window_labels(task, stage=None, classes=marks.get("classes", ()))
        assert (found is None) == (split == "unused")
        seen.setdefault(split, set()).update(found or ())
    assert {split: len(found) for split, found in seen.items()} == {"train": 5, "val": 5, "test": 5, "unused": 0}


def test_every_task_on_a_corpus_that_is_not_at_hand_is_tested_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    at_hand = {"motor_imagery", "rhythm", "wake_deep"}  # on real recordings, tests/jobs/test_real_tasks.py
    named = {name for name in shipped_names(TASKS_DIR) if load_task(name).corpora}
    assert not [name for name in named - at_hand if f'"{name}"' not in source]
