from pathlib import Path

import pytest
from upath import UPath

from engine.config import Source
from engine.scan import scan
from engine.scan_gaps import absent_channels, label_faults, nearest_text, unknown_units, unmapped_texts
from engine.scan_result import ScanResult
from engine.storage import location
from manifests.corpora import Corpus, load_corpus

STAGES = {"Sleep Stage w": "W", "Sleep stage N1": "N1", "Sleep stage N3": "N3", "Sleep stage R": "R"}
NIGHT = "psg/sub-001/sub-001_psg.edf"


def corpus_of(**annotations: object) -> Corpus:
    plain = load_corpus("synthetic_psg").model_dump(mode="json")
    channels = {"eog(l) ": "eog:E1", "Nasal": "resp:flow", "Chin 9": "emg:chin", "Old": None}
    rule = {"source": "in_file", "target": "stage", "map": STAGES, **annotations}
    return Corpus.model_validate(plain | {"id": "mine", "channels": channels, "annotations": rule})


def survey(root: Path, corpus: Corpus) -> ScanResult:
    path = root / "mine.yaml"
    path.write_text(corpus.model_dump_json(), encoding="utf-8")
    return scan([Source(corpus=str(path), root=root)], survey=True)


@pytest.fixture
def root(tiny_root: Path, tmp_path: Path) -> Path:
    """One night of the corpus, whose first channel tells no unit."""
    data = bytearray((tiny_root / NIGHT).read_bytes())
    place = 256 + (16 + 80) * int(data[252:256])
    data[place : place + 8] = b" " * 8
    (tmp_path / NIGHT).parent.mkdir(parents=True)
    (tmp_path / NIGHT).write_bytes(data)
    return tmp_path


def test_a_survey_tells_what_the_corpus_file_lacks(root: Path) -> None:
    result = survey(root, corpus_of())
    texts = {row["text"]: row for row in unmapped_texts(result)}
    assert texts.keys() >= {"Sleep stage W", "Sleep stage N2"}
    assert not texts.keys() & STAGES.keys()
    assert all(row["corpus"] == "mine" and row["n"] >= row["recordings"] == 1 for row in texts.values())
    assert [row["n"] for row in texts.values()] == sorted((row["n"] for row in texts.values()), reverse=True)
    (unit,) = unknown_units(result)
    assert (unit["corpus"], unit["unit"], unit["recordings"]) == ("mine", "", 1)
    assert unit["symbol"].startswith("eeg:")
    # A label of another case is the same one, and null asks for no channel.
    assert absent_channels(result) == {"mine": ["Nasal", "Chin 9"]}
    assert label_faults(result) == []


def test_a_unit_that_the_corpus_declares_is_known(root: Path) -> None:
    (unit,) = unknown_units(survey(root, corpus_of()))
    assert unknown_units(survey(root, corpus_of().model_copy(update={"units": {unit["label"]: "100 uV"}}))) == []
    (row,) = unknown_units(survey(root, corpus_of().model_copy(update={"units": {unit["label"]: "furlong"}})))
    assert row["unit"] == "furlong"


def test_texts_are_told_where_the_labels_make_no_sense_and_where_there_are_none(root: Path) -> None:
    result = survey(root, corpus_of(map={"Sleep stage W": "W", "Sleep stage N1": "N1"}, epoch_s=20))
    assert {row["text"] for row in unmapped_texts(result)} >= {"Sleep stage N2", "Sleep stage R"}
    result = survey(root, corpus_of(source="edf_file", pattern="{stem}-hypnogram.edf"))
    (fault,) = label_faults(result)
    assert fault["path"] == NIGHT
    assert "0 label files match sub-001_psg-hypnogram.edf" in fault["message"]
    assert len(result.readable) == 1
    assert unmapped_texts(result) == []


def test_the_nearest_text_is_one_of_the_maps() -> None:
    assert nearest_text("sleep stage w", corpus_of()) == "Sleep Stage w"
    assert nearest_text("Sleep stage N2", corpus_of()) in {"Sleep stage N1", "Sleep stage N3"}
    assert nearest_text("lights off", corpus_of()) == ""


def test_a_scan_for_a_conversion_reads_no_labels(root: Path) -> None:
    path = root / "mine.yaml"
    path.write_text(corpus_of(source="edf_file", pattern="none.edf").model_dump_json(), encoding="utf-8")
    result = scan([Source(corpus=str(path), root=root)])
    assert not any(row.unmapped or row.label_fault for row in result.rows)
    assert not result.skipped


@pytest.mark.usefixtures("s3")
def test_a_survey_of_a_store_reads_the_same_labels(root: Path, tmp_path: Path) -> None:
    UPath("s3://bucket").mkdir(exist_ok=True)
    store = location(f"s3://bucket/{tmp_path.name}")
    (store / NIGHT).write_bytes((root / NIGHT).read_bytes())
    (store / NIGHT.replace(".edf", ".txt")).write_bytes(b"0\n7\n0\n7\n")
    for name, rule in (("one", {"pattern": "{stem}.txt"}), ("none", {"pattern": "{stem}.csv"})):
        corpus = corpus_of(source="text_codes", map={"0": "W"}, **rule)
        (tmp_path / f"{name}.yaml").write_text(corpus.model_dump_json(), encoding="utf-8")
    result = scan([Source(corpus=str(tmp_path / "one.yaml"), root=store)], survey=True)
    assert [(row["text"], row["n"]) for row in unmapped_texts(result)] == [("7", 2)]
    (fault,) = label_faults(scan([Source(corpus=str(tmp_path / "none.yaml"), root=store)], survey=True))
    assert fault["message"].startswith(f"{store / NIGHT}: 0 label files match")
