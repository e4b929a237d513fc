"""Which label file or row belongs to a recording, and that it enters the recording's identity."""

from fractions import Fraction
from pathlib import Path

import pytest

from engine.annotations import read_labels
from engine.files import companions, identity_of
from engine.recording import Channel, Recording, Segment
from manifests.corpora import Corpus
from manifests.errors import ConfigError, RecordingError

PTB_XL = """\
ecg_id,patient_id,scp_codes,strat_fold
1,15709.0,"{'NORM': 100.0, 'LVOLT': 0.0, 'SR': 0.0}",3
2,13243.0,"{'NORM': 80.0, 'SBRAD': 0.0}",2
"""


def corpus(rule: dict | list[dict], pattern: str = r"(?P<subject>\w+)\.\w+$") -> Corpus:
    return Corpus.model_validate(
        {
            "id": "tiny",
            "title": "t",
            "licence": "CC0",
            "access": "open",
            "reader": "edf",
            "files": ["*"],
            "subject": {"pattern": pattern},
            "annotations": rule,
        }
    )


def recording(path: Path) -> Recording:
    channel = Channel(index=0, label="II", rate=Fraction(500), unit="mV", prefilter="", num_samples=5000)
    return Recording(path=path, channels=(channel,), segments=(Segment(start=Fraction(0), duration=Fraction(10)),))


def ptb_xl(**changes: object) -> Corpus:
    labels = {"file": "ptbxl_database.csv", "key": "ecg_id", "match": "{subject}", "columns": ["scp_codes"]}
    labels |= {"form": "dict", **changes}
    words = {name: name for name in ("NORM", "LVOLT", "SR", "SBRAD")}
    rule = {"source": "table_file", "target": "classes", "labels": labels, "map": words}
    return corpus(rule, r"(?P<subject>\d{5})_hr\.\w+$")


def test_ptb_xl_classes_come_from_the_corpus_table(tmp_path: Path) -> None:
    (tmp_path / "ptbxl_database.csv").write_text(PTB_XL)
    path = tmp_path / "records500" / "00000" / "00001_hr.edf"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    assert read_labels(recording(path), ptb_xl()).classes == ("NORM", "LVOLT", "SR")
    assert read_labels(recording(path), ptb_xl(threshold=50)).classes == ("NORM",)
    assert ptb_xl().side_files == ("ptbxl_database.csv",)
    with pytest.raises(RecordingError, match="0 rows with ecg_id '7'") as caught:
        read_labels(recording(path.with_name("00007_hr.edf")), ptb_xl())
    assert caught.value.reason == "ANNOTATION_INVALID"
    with pytest.raises(ConfigError, match="no column codes"):
        read_labels(recording(path), ptb_xl(columns=["codes"]))


def test_only_the_recordings_own_row_enters_its_identity(tmp_path: Path) -> None:
    table = tmp_path / "ptbxl_database.csv"
    table.write_text(PTB_XL)
    path = tmp_path / "00001_hr.edf"
    path.write_bytes(b"x")
    before = identity_of(path, "edf", ptb_xl())
    assert before[0] != identity_of(path, "edf")[0]
    table.write_text(PTB_XL.replace("'NORM': 80.0", "'NORM': 15.0").replace("15709.0", "99.0"))
    assert identity_of(path, "edf", ptb_xl()) == before
    table.write_text(PTB_XL.replace("'LVOLT': 0.0", "'LVOLT': 50.0"))
    assert identity_of(path, "edf", ptb_xl()) != before
    table.unlink()
    assert identity_of(path, "edf", ptb_xl()) != before
    with pytest.raises(RecordingError, match="no ptbxl_database"):
        read_labels(recording(path), ptb_xl())


def test_rows_that_stand_twice_and_differ_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ptbxl_database.csv").write_text(PTB_XL + "1,15709.0,{},3\n2,7,\"{'NORM': 80.0, 'SBRAD': 0.0}\",2\n")
    with pytest.raises(RecordingError, match="2 rows"):
        read_labels(recording(tmp_path / "00001_hr.edf"), ptb_xl())
    assert read_labels(recording(tmp_path / "00002_hr.edf"), ptb_xl()).classes == ("NORM", "SBRAD")


@pytest.mark.parametrize("cell", ["NORM", "{'NORM': 'high'}", "[1]", "{", "__import__('os')"])
def test_a_cell_that_is_no_dict_is_refused(tmp_path: Path, cell: str) -> None:
    (tmp_path / "ptbxl_database.csv").write_text(f'ecg_id,scp_codes\n1,"{cell}"\n')
    with pytest.raises(RecordingError, match="no dict of label to likelihood"):
        read_labels(recording(tmp_path / "00001_hr.edf"), ptb_xl())


def test_cpsc_2018_reference_and_code15_flags(tmp_path: Path) -> None:
    (tmp_path / "REFERENCE.csv").write_text("Recording,First_label,Second_label,Third_label\nA0001,5,,\nA0002,1,8,\n")
    columns = ["First_label", "Second_label", "Third_label"]
    labels = {"file": "REFERENCE.csv", "key": "Recording", "columns": columns}
    rule = {"source": "table_file", "target": "classes", "labels": labels, "map": {"1": "normal", "8": "std"}}
    assert read_labels(recording(tmp_path / "A0002.edf"), corpus(rule)).classes == ("normal", "std")
    assert read_labels(recording(tmp_path / "A0001.edf"), corpus(rule)).unmapped == {"5": 1}
    (tmp_path / "exams.csv").write_text("exam_id,age,1dAVb,AF\n1169160,38,False,True\n1169161,40,False,maybe\n")
    labels = {"file": "exams.csv", "key": "exam_id", "match": "{member}", "columns": ["1dAVb", "AF"], "form": "flags"}
    rule = {"source": "table_file", "target": "classes", "labels": labels, "map": {"AF": "atrial_fibrillation"}}
    code15 = corpus(rule, r"(?P<subject>\w+)$")
    found = read_labels(recording(tmp_path / "exams_part0.hdf5#1169160"), code15)
    assert found.classes == ("atrial_fibrillation",)
    with pytest.raises(RecordingError, match="neither true nor false"):
        read_labels(recording(tmp_path / "exams_part0.hdf5#1169161"), code15)


def test_labels_that_are_not_required_may_be_absent_but_not_broken(tmp_path: Path) -> None:
    rules = [
        {"source": "text_codes", "pattern": "{stem}.txt", "map": {"0": "W"}, "required": False, "epoch_s": 5},
        {"source": "nsrr_xml", "pattern": "{stem}.xml", "map": {}, "target": "events", "required": False},
    ]
    found = read_labels(recording(tmp_path / "a.edf"), corpus(rules))
    assert (found.stages, found.events, found.missing, found.scoring) == ((), (), ("text_codes", "nsrr_xml"), None)
    (tmp_path / "a.txt").write_text("0\n0\n")
    assert read_labels(recording(tmp_path / "a.edf"), corpus(rules)).missing == ("nsrr_xml",)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(RecordingError, match="none at all"):
        read_labels(recording(tmp_path / "a.edf"), corpus(rules))
    assert read_labels(recording(tmp_path / "00009_hr.edf"), corpus([])).missing == ()


def test_every_label_file_enters_the_identity(tmp_path: Path) -> None:
    rules = [
        {"source": "nsrr_xml", "pattern": "../xml/{stem}-nsrr.xml", "map": {}},
        {"source": "table", "pattern": "{stem}.csv", "map": {}, "target": "events", "table": {"onset": 1, "text": 2}},
        {"source": "bids_events", "target": "events"},
    ]
    path = tmp_path / "edf" / "sub-1_eeg.edf"
    files = [
        tmp_path / "xml" / "sub-1_eeg-nsrr.xml", path.with_name("sub-1_eeg.csv"), path.with_name("sub-1_events.tsv")
    ]  # fmt: skip
    for file in [path, *files]:
        file.parent.mkdir(exist_ok=True)
        file.write_text("x")
    assert set(companions(path, "edf", corpus(rules))) == {path, *files}
    before = identity_of(path, "edf", corpus(rules))
    for file in files:
        file.write_text("y")
        after = identity_of(path, "edf", corpus(rules))
        assert after != before
        before = after


def test_marks_of_a_glob_in_a_name_are_taken_as_they_are(tmp_path: Path) -> None:
    rule = {"source": "text_codes", "pattern": "{stem}*.txt", "map": {"0": "W"}, "epoch_s": 5}
    for name in ("a[1].txt", "a1.txt"):
        (tmp_path / name).write_text("0\n")
    found = read_labels(recording(tmp_path / "a[1].edf"), corpus(rule, r"(?P<subject>.+)\.\w+$"))
    assert found.stages[0].duration == 5


def test_a_label_in_a_folders_name_is_the_one_nearest_to_the_file(tmp_path: Path) -> None:
    rule = {
        "source": "filename",
        "target": "classes",
        "pattern": "/(?P<label>normal|abnormal)/",
        "map": {"normal": "normal", "abnormal": "abnormal"},
    }
    path = tmp_path / "normal" / "train" / "abnormal" / "01_tcp_ar" / "a.edf"
    assert read_labels(recording(path), corpus(rule)).classes == ("abnormal",)


def test_two_hypnograms_are_refused() -> None:
    rule = {"source": "text_codes", "pattern": "{stem}.txt", "map": {"0": "W"}}
    with pytest.raises(ValueError, match="one hypnogram"):
        corpus([rule, {**rule, "pattern": "{stem}_2.txt"}])
