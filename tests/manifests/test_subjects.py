"""Persons, families and splits: the rules, and what they say for the corpora whose published splits leak."""

from pathlib import Path

import pytest

from manifests.config import shipped_names
from manifests.corpora import CORPORA_DIR, load_corpus, recording_split, split_of, who_of
from manifests.errors import ConfigError
from manifests.subjects import SPLITS, PersonTable, SubjectRule, find_who

NAMES = shipped_names(CORPORA_DIR)


@pytest.mark.parametrize("name", [name for name in NAMES if load_corpus(name).published])
def test_published_splits_name_their_source_and_their_leak(name: str) -> None:
    corpus = load_corpus(name)
    assert corpus.with_split("strict") is corpus
    assert corpus.with_split("published").split == next(iter(corpus.published.values()))
    for split in corpus.published.values():
        assert split.source
    with pytest.raises(ConfigError, match="known: strict"):
        corpus.with_split("mine")


def test_mitdb_keeps_its_one_double_person_together() -> None:
    corpus = load_corpus("mitdb")
    assert [who_of(corpus, f"{record}.hea").subject for record in (201, 202, 203)] == ["201", "201", "203"]
    assert recording_split(corpus, "202.hea") == "train"
    with pytest.raises(ConfigError, match=r"split\.table: subject '999' is missing"):
        split_of(corpus, "999")
    official = corpus.with_split("published")
    assert [recording_split(official, f"{record}.hea") for record in (201, 202, 102)] == ["train", "test", "unused"]


def test_chb21_is_chb01_and_the_literature_leaks() -> None:
    corpus = load_corpus("chbmit")
    first, later = "chb01/chb01_03.edf", "chb21/chb21_03.edf"
    assert who_of(corpus, first) == who_of(corpus, later)
    assert recording_split(corpus, first) == recording_split(corpus, later)
    for published in ("biot", "mteeg"):
        splits = {recording_split(corpus.with_split(published), path) for path in (first, later)}
        assert splits == {"train", "val"}
    assert who_of(corpus, "chb17/chb17b_69.edf").subject == "chb17"


def test_both_nights_and_all_visits_are_one_person() -> None:
    for name, one, two in (
        ("sleep_edf", "SC4001E0-PSG.edf", "SC4002E0-PSG.edf"),
        ("sleep_edf_st", "ST7011J0-PSG.edf", "ST7012J0-PSG.edf"),
        ("mros", "visit1/mros-visit1-aa0001.edf", "visit2/mros-visit2-aa0001.edf"),
        ("wsc", "wsc-visit1-10119-nsrr.edf", "wsc-visit4-10119-nsrr.edf"),
        ("isruc", "subgroupII/3/1/1.rec", "subgroupII/3/2/2.rec"),
    ):
        corpus = load_corpus(name)
        assert who_of(corpus, one).subject == who_of(corpus, two).subject
        assert who_of(corpus, one).session != who_of(corpus, two).session
        assert recording_split(corpus, one) == recording_split(corpus, two)
    assert who_of(load_corpus("isruc"), "subgroupI/3/3.rec") != who_of(load_corpus("isruc"), "subgroupIII/3/3.rec")


def test_a_family_of_cfs_is_in_one_split(tmp_path: Path) -> None:
    table = tmp_path / "datasets" / "cfs-visit5-dataset-0.7.0.csv"
    table.parent.mkdir()
    rows = [f"{800000 + number},{number // 5}" for number in range(1, 300)]
    table.write_text("nsrrid,familyi\n" + "\n".join(rows) + "\n", encoding="utf-8")
    corpus = load_corpus("cfs")
    splits: dict[str, set[str]] = {}
    for number in range(1, 300):
        path = f"polysomnography/edfs/cfs-visit5-{800000 + number}.edf"
        splits.setdefault(who_of(corpus, path, tmp_path).family, set()).add(recording_split(corpus, path, tmp_path))
    assert len(splits) == 60
    assert all(len(found) == 1 for found in splits.values())
    assert set.union(*splits.values()) == set(SPLITS)
    with pytest.raises(ConfigError, match="give the root"):
        recording_split(corpus, "cfs-visit5-800001.edf")
    assert corpus.side_files == ("datasets/cfs-visit5-dataset-*.csv",)


def test_ptbxl_takes_persons_and_folds_from_its_table(tmp_path: Path) -> None:
    text = "ecg_id,patient_id,strat_fold,filename_hr\n1,15709.0,3,x\n2,15709.0,3,x\n3,17014.0,9,x\n4,13619.0,10,x\n"
    (tmp_path / "ptbxl_database.csv").write_text(text, encoding="utf-8")
    corpus = load_corpus("ptbxl")
    paths = [f"records500/00000/{number:05d}_hr.hea" for number in (1, 2, 3, 4)]
    assert [who_of(corpus, path, tmp_path).subject for path in paths] == ["15709", "15709", "17014", "13619"]
    assert [recording_split(corpus, path, tmp_path) for path in paths] == ["train", "train", "val", "test"]
    with pytest.raises(ConfigError, match=r"no row with ecg_id '5'"):
        recording_split(corpus, "records500/00000/00005_hr.hea", tmp_path)


def test_tuab_keeps_eval_for_the_test_and_whole_patients_for_val() -> None:
    corpus = load_corpus("tuab").with_split("official")
    letters = "abcdefghij"
    names = [f"aaaaa{a}{b}{c}" for a in letters for b in letters for c in letters][:400]
    path = "edf/{}/normal/01_tcp_ar/{}_s001_t000.edf"
    assert {recording_split(corpus, path.format("eval", name)) for name in names} == {"test"}
    train = [recording_split(corpus, path.format("train", name)) for name in names]
    assert train.count("val") / len(train) == pytest.approx(0.2, abs=0.06)
    assert set(train) == {"train", "val"}
    later = [recording_split(corpus, path.format("train", name).replace("s001_t000", "s009_t003")) for name in names]
    assert later == train


def test_tuev_puts_its_nameless_eval_files_into_test() -> None:
    corpus, tueg = load_corpus("tuev"), load_corpus("tueg")
    assert recording_split(corpus, "edf/eval/000/bckg_000_a_.edf") == "test"
    for name in ("aaaaaaar", "aaaaaabs", "aaaaaacz"):
        assert recording_split(corpus, f"edf/train/{name}/{name}_00000001.edf") == split_of(tueg, name)


def _rule(**changes: str | None) -> SubjectRule:
    table = {"file": "t*.csv", "key": "exam", "person": "who", "family": "kin"} | changes
    return SubjectRule(pattern=r"^(?P<subject>\d+)\.edf$", table=PersonTable.model_validate(table))


def test_numbers_of_a_table_compare_by_value_and_names_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("exam,who,kin\n1,15.0, F1 \n007,b-02,\n", encoding="utf-8")
    first = find_who(_rule(), "0001.edf", tmp_path, where="x.yaml")
    assert (first.subject, first.family) == ("15", "F1")
    second = find_who(_rule(), "7.edf", tmp_path, where="x.yaml")
    assert (second.subject, second.family) == ("b-02", "")
    assert find_who(_rule(person=None), "7.edf", tmp_path, where="x.yaml").subject == "7"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exam,who,kin\n2,a,f\n", "no row with exam '1'"),
        ("exam,who\n1,a\n", r"no column kin; it has exam, who"),
        ("exam,who,kin\n1,a,f\n01,b,f\n", "stands twice"),
        ("exam,who,kin\n1,,f\n", "empty subject"),
    ],
)
def test_a_table_that_does_not_know_the_person_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        find_who(_rule(), "1.edf", tmp_path, where="x.yaml")


def test_a_table_that_is_missing_or_doubled_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"x\.yaml: subject\.table: 0 files match t\*\.csv"):
        find_who(_rule(), "1.edf", tmp_path, where="x.yaml")
    for name in ("t1.csv", "t2.csv"):
        (tmp_path / name).write_text("exam,who,kin\n1,a,f\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="2 files match"):
        find_who(_rule(), "1.edf", tmp_path, where="x.yaml")


def test_a_table_that_changed_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("exam,who,kin\n1,a,f\n", encoding="utf-8")
    assert find_who(_rule(), "1.edf", tmp_path, where="x.yaml").subject == "a"
    file.write_text("exam,who,kin\n1,another,f\n", encoding="utf-8")
    assert find_who(_rule(), "1.edf", tmp_path, where="x.yaml").subject == "another"


def test_a_split_that_needs_the_recording_says_so() -> None:
    with pytest.raises(ConfigError, match="needs the path of a recording"):
        split_of(load_corpus("tuev"), "aaaaaaar")
    with pytest.raises(ConfigError, match="is not in the map"):
        recording_split(load_corpus("tuev"), "edf/dev/aaaaaaar/aaaaaaar_00000001.edf")
