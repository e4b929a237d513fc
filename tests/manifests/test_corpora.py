import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from manifests.annotations import STAGES
from manifests.channels import ChannelTag, resolve
from manifests.config import shipped_names
from manifests.corpora import CORPORA_DIR, Corpus, load_corpus, split_of, subject_hash
from manifests.errors import ConfigError
from manifests.subjects import SPLITS

NAMES = shipped_names(CORPORA_DIR)
SHARED = {
    "cap_sleep": "cap_sleep",
    "challenge2021": "challenge2021_12lead",
    "cpsc2021_af": "cpsc2021_af",
    "dreams_psg": "dreams_spindles",
    "dreams_spindles": "dreams_spindles",
    "eegmmidb": "eegmmidb",
    "eegmmidb_feet": "eegmmidb",
    "mitdb": "mitdb",
    "openbci_gui": "openbci",
    "sleep_edf_short": "sleep_edf",
    "ucddb_epochs": "ucddb_epochs",
    "ucddb_epochs_mat": "ucddb_epochs",
}


def changed(**changes: object) -> Corpus:
    return Corpus.model_validate(load_corpus("eegmmidb").model_dump() | changes)


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_corpus_validates_and_says_who_may_use_it(name: str) -> None:
    corpus = load_corpus(name)
    assert corpus.id == name
    assert corpus.title
    assert corpus.licence
    assert corpus.access
    assert corpus.files


@pytest.mark.parametrize("name", NAMES)
def test_every_mapped_label_resolves_to_the_symbol_that_it_is_mapped_to(name: str) -> None:
    corpus = load_corpus(name)
    for label, symbol in corpus.channels.items():
        tag = resolve(label, corpus.channels)
        if symbol is None:
            assert not isinstance(tag, ChannelTag)
        else:
            assert isinstance(tag, ChannelTag), f"{name}: {label!r}: {tag}"
            assert tag.symbol == symbol
            assert tag.rule == "corpus"


@pytest.mark.parametrize("name", NAMES)
def test_stages_are_canonical(name: str) -> None:
    rule = load_corpus(name).annotations
    if rule.target == "stage":
        assert {stage for stage in rule.map.values() if stage} <= set(STAGES)


@pytest.mark.parametrize("name", NAMES)
def test_splits_are_a_pure_function_of_the_subject(name: str) -> None:
    corpus = load_corpus(name)
    subjects = list(corpus.split.table) or [f"{i:03d}" for i in range(400)]
    splits = {subject: split_of(corpus, subject) for subject in subjects}
    again = load_corpus(name)
    assert splits == {subject: split_of(again, subject) for subject in reversed(subjects)}
    assert set(splits.values()) <= set(SPLITS)
    if corpus.split.rule == "hash":
        share = sum(split == "train" for split in splits.values()) / len(splits)
        assert share == pytest.approx(corpus.split.fractions[0], abs=0.08)


@pytest.mark.parametrize("name", sorted(SHARED))
def test_every_shared_file_of_a_corpus_has_a_subject(shared_data: Path, name: str) -> None:
    corpus = load_corpus(name)
    root = shared_data / SHARED[name]
    paths = [path.relative_to(root).as_posix() for pattern in corpus.files for path in root.glob(pattern)]
    assert paths
    for path in paths:
        match = re.search(corpus.subject.pattern, path)
        assert match is not None, path
        assert split_of(corpus, match["subject"]) in SPLITS
        assert re.fullmatch("[0-9a-f]{12}", subject_hash(corpus, match["subject"]))


def test_shared_subjects_share_hash_and_split() -> None:
    for first, second in (
        ("eegmmidb", "eegmmidb_feet"),
        ("ucddb_epochs", "ucddb_epochs_mat"),
        ("dreams_psg", "dreams_spindles"),
        ("sleep_edf", "sleep_edf_short"),
    ):
        one, two = load_corpus(first), load_corpus(second)
        assert subject_hash(one, "007") == subject_hash(two, "007")
        assert split_of(one, "007") == split_of(two, "007")
    assert subject_hash(load_corpus("eegmmidb"), "007") != subject_hash(load_corpus("ucddb_epochs"), "007")


def test_mitdb_keeps_its_one_double_person_together() -> None:
    corpus = load_corpus("mitdb")
    subjects = [re.search(corpus.subject.pattern, f"{record}.hea") for record in (201, 202, 203)]
    assert [match and match["subject"] for match in subjects] == ["20", "20", "203"]
    assert split_of(corpus, "20") == "train"
    with pytest.raises(ConfigError, match=r"split\.table: subject '999' is missing"):
        split_of(corpus, "999")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subject": {"pattern": r"S(\d+)"}}, "named group"),
        ({"subject": {"pattern": r"("}}, "not a regular expression"),
        ({"annotations": {"source": "edf", "map": {"x": "S2"}}}, "not among the stages"),
        ({"annotations": {"source": "text_codes"}}, "needs a pattern"),
        ({"split": {"fractions": [0.5, 0.1, 0.1]}}, "add up to 1"),
        ({"split": {"rule": "table"}}, "needs a table"),
        ({"channels": {"C3": "brain:C3"}}, "kind"),
        ({"colour": "blue"}, "colour"),
    ],
)
def test_a_wrong_corpus_file_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        changed(**changes)


def test_an_unknown_corpus_and_a_wrong_id_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'shhs': not shipped; known: .*eegmmidb"):
        load_corpus("shhs")
    path = tmp_path / "mine.yaml"
    path.write_text((CORPORA_DIR / "eegmmidb.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    assert load_corpus(path).id == "eegmmidb"
