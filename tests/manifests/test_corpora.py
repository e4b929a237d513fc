import functools
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from manifests import corpora
from manifests.annotations import STAGES
from manifests.channels import ChannelTag, resolve
from manifests.config import read_yaml, shipped_names
from manifests.corpora import (
    CORPORA_DIR,
    Corpus,
    recording_split,
    split_of,
    subject_hash,
    who_of,
)
from manifests.errors import ConfigError
from manifests.subjects import SPLITS

NAMES = shipped_names(CORPORA_DIR)
load_corpus = functools.cache(corpora.load_corpus)  # frozen; reading all of them takes seconds
SHARED = {
    "cap_sleep": "cap_sleep",
    "challenge2021": "challenge2021_12lead",
    "chapman": "challenge2021_12lead",
    "cpsc2018": "challenge2021_12lead",
    "cpsc2021_af": "cpsc2021_af",
    "dreams_psg": "dreams_spindles",
    "dreams_spindles": "dreams_spindles",
    "eegmmidb": "eegmmidb",
    "eegmmidb_feet": "eegmmidb",
    "g12ec": "challenge2021_12lead",
    "mitdb": "mitdb",
    "openbci_gui": "openbci",
    "sleep_edf_short": "sleep_edf",
    "ucddb_epochs": "ucddb_epochs",
    "ucddb_epochs_mat": "ucddb_epochs",
}


# Paths as the distributions have them, and whose they are.
PATHS = {
    "bids_eeg": ("sub-A1/ses-2/eeg/sub-A1_ses-2_task-rest_run-1_eeg.vhdr", "A1", "2"),
    "ccshs": ("polysomnography/edfs/ccshs-trec-1800001.edf", "1800001", ""),
    "challenge2018": ("training/tr03-0005/tr03-0005.hea", "tr03-0005", ""),
    "chapman": ("WFDBRecords/01/010/JS00001.hea", "JS00001", ""),
    "chbmit": ("chb21/chb21_03.edf", "chb01", ""),
    "cpsc2018": ("training/cpsc_2018/g1/A0001.hea", "A0001", ""),
    "deap": ("data_preprocessed_matlab/s07.mat", "07", ""),
    "dod_h": ("1da3544e-dc5c-5795-adc3-f5068959211f.h5", "1da3544e-dc5c-5795-adc3-f5068959211f", ""),
    "dod_o": ("0d79f4b1-e74f-5e87-8e42-f9dd7112ada5.h5", "0d79f4b1-e74f-5e87-8e42-f9dd7112ada5", ""),
    "dreamer": ("DREAMER.mat#7", "7", ""),
    "dreams_patients": ("DatabasePatients/patient12.edf", "12", ""),
    "dreams_subjects": ("DatabaseSubjects/subject3.edf", "3", ""),
    "g12ec": ("training/georgia/g1/E00001.hea", "E00001", ""),
    "hmc": ("recordings/SN001.edf", "001", ""),
    "isruc": ("subgroupII/3/2/2.rec", "subgroupII/3", "2"),
    "mesa": ("polysomnography/edfs/mesa-sleep-0001.edf", "0001", ""),
    "mros": ("polysomnography/edfs/visit2/mros-visit2-aa0001.edf", "aa0001", "2"),
    "seed": ("Preprocessed_EEG/1_20131027.mat", "1", "20131027"),
    "seed_v": ("EEG_raw/12_3_20180730.cnt", "12", "3"),
    "shhs1": ("polysomnography/edfs/shhs1/shhs1-200001.edf", "200001", ""),
    "shhs2": ("polysomnography/edfs/shhs2/shhs2-200077.edf", "200077", ""),
    "sleep_edf": ("sleep-cassette/SC4001E0-PSG.edf", "00", "1"),
    "sleep_edf_st": ("sleep-telemetry/ST7011J0-PSG.edf", "01", "1"),
    "tuab": ("edf/train/abnormal/01_tcp_ar/aaaaabcd_s004_t000.edf", "aaaaabcd", "004"),
    "tueg": ("edf/000/aaaaaaaa/s001_2015/01_tcp_ar/aaaaaaaa_s001_t000.edf", "aaaaaaaa", "001"),
    "tuev": ("edf/eval/012/gped_012_a_1.edf", "012", ""),
    "tusl": ("edf/aaaaaaju/s005_2010/01_tcp_ar/aaaaaaju_s005_t000.edf", "aaaaaaju", "005"),
    "ucddb": ("ucddb002.rec", "002", ""),
    "wsc": ("polysomnography/wsc-visit2-10119-nsrr.edf", "10119", "2"),
}
# Labels of corpora that the document lists and that no file of these corpora has, by its own words.
NOT_IN_THESE = {
    ("shhs1", "128-REF"),
    ("shhs2", "128-REF"),
    ("sleep_edf_st", "Resp oro-nasal"),
    ("deap", "Status"),
    ("ccshs", "LEFT LEG1/2"),
    ("ccshs", "RIGHT LEG1/2"),
}
IN_DOCUMENT = {
    **{name.upper(): [name] for name in ("mesa", "cfs", "ccshs", "wsc", "hmc", "isruc", "deap")},
    "MrOS": ["mros"],
    "MrOS1": ["mros"],
    "MrOS2": ["mros"],
    "SHHS": ["shhs1", "shhs2"],
    "SHHS1": ["shhs1"],
    "SHHS2": ["shhs2"],
    "CAP": ["cap_sleep"],
    "PC18": ["challenge2018"],
    "DOD": ["dod_h", "dod_o"],
    "DREAMS": ["dreams_subjects", "dreams_patients"],
    "TUH": ["tueg", "tuab", "tuev", "tusl"],
    "SEED": ["seed_v"],
    "Sleep-EDF SC": ["sleep_edf"],
    "Sleep-EDF": ["sleep_edf", "sleep_edf_st"],
    "ST": ["sleep_edf_st"],
    "MIT-BIH Holter": ["mitdb"],
}


@pytest.fixture(scope="session")
def corpus_labels() -> dict[str, list[str]]:
    """Labels that the study of the field quotes, by corpus."""
    return read_yaml(Path(__file__).with_name("corpus_labels.yaml"))


@pytest.fixture(scope="session")
def ecosystem() -> str:
    """The study's text, which lies beside the checkout; its tests skip where it is absent."""
    path = Path(__file__).resolve().parents[3] / "shared" / "research" / "ecosystem.md"
    if not path.is_file():
        pytest.skip(f"no document at {path}")
    return path.read_text(encoding="utf-8")


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
    for rule in load_corpus(name).annotation_rules:
        if rule.target == "stage":
            assert {stage for stage in rule.map.values() if stage} <= set(STAGES)


@pytest.mark.parametrize("name", [name for name in NAMES if load_corpus(name).split.rule in ("hash", "table")])
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
        assert recording_split(corpus, path) in SPLITS
        assert re.fullmatch("[0-9a-f]{12}", subject_hash(corpus, who_of(corpus, path).subject))


@pytest.mark.parametrize("name", NAMES)
def test_open_corpora_tell_their_home(name: str) -> None:
    corpus = load_corpus(name)
    assert name.startswith("synthetic") or corpus.homepage.startswith("https://")
    assert (corpus.access_kind == "open") == (corpus.access.startswith(("open", "made", "as the data set")))
    if corpus.fetch:
        assert corpus.access_kind == "open"
        assert corpus.licence in {"ODC-BY-1.0", "CC-BY-4.0"}


@pytest.mark.parametrize("name", sorted(PATHS))
def test_a_path_of_the_distribution_is_found_and_names_its_person(name: str, tmp_path: Path) -> None:
    corpus = load_corpus(name)
    path, subject, session = PATHS[name]
    file = tmp_path / path.partition("#")[0]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    assert [found for pattern in corpus.files for found in tmp_path.glob(pattern)] == [file]
    who = who_of(corpus, path)
    assert (who.subject, who.session, who.family) == (subject, session, "")
    assert recording_split(corpus, path) in SPLITS
    for published in corpus.published:
        assert recording_split(corpus.with_split(published), path) in (*SPLITS, "unused")


def test_labels_of_the_field_stand_in_the_corpus_files(corpus_labels: dict[str, list[str]]) -> None:
    assert len(corpus_labels) >= 28
    for name, labels in corpus_labels.items():
        channels = load_corpus(name).channels
        assert not [label for label in labels if label not in channels], name


def test_the_table_of_labels_says_what_the_document_says(corpus_labels: dict[str, list[str]], ecosystem: str) -> None:
    for name, labels in corpus_labels.items():
        # TUH: the document lists the sites and says `EEG X-REF`; leads are ranges, `V1..V6`
        texts = [re.sub(r"^EEG (\w+)-REF$", r"\1", label) if name.startswith("tu") else label for label in labels]
        texts = ["V1..V6" if re.fullmatch("V[2-6]", text) else text for text in texts]
        absent = [text for text in texts if not re.search(rf"(?<![\w]){re.escape(text)}(?![\w])", ecosystem)]
        assert not absent, name


def test_every_label_of_the_alias_table_is_known_to_its_corpus(ecosystem: str) -> None:
    section = ecosystem[ecosystem.index("### 2.6") : ecosystem.index("### 2.7")]
    checked, missing = 0, []
    for match in re.finditer(r"((?:`[^`]+`(?:\s*[,/]\s*)?)+)\s*\[([^\]]+)\]", section):
        labels = re.findall(r"`([^`]+)`", match[1])
        if "_Off" in match[1] and "TAG" in labels:
            labels = ["TAG"]  # the flags before it are MESA's
        for word in re.split("[:;]", match[2])[0].split(","):
            heads = [head for head in IN_DOCUMENT if f"{word.strip()} ".startswith(f"{head} ")]
            for name in IN_DOCUMENT[max(heads, key=len)] if heads else []:
                known = load_corpus(name).channels
                missing += [(name, label) for label in labels if label not in known]
                checked += len(labels)
    assert checked > 200
    assert set(missing) - NOT_IN_THESE == set()


def test_ambiguous_labels_differ_by_corpus() -> None:
    symbol = {name: load_corpus(name).channels for name in ("shhs2", "mesa", "cap_sleep", "dod_h")}
    assert symbol["shhs2"]["EEG2"] == "eeg:C3-A2"
    assert symbol["mesa"]["EEG2"] == "eeg:Cz-Oz"
    assert symbol["mesa"]["Flow"] == "resp:nasal_pressure"
    assert symbol["cap_sleep"]["Flow"] == "resp:flow"
    assert symbol["dod_h"]["EOG1"] == "eog:unknown"
    assert symbol["cap_sleep"]["ROC-LOC"] != symbol["cap_sleep"]["LOC-ROC"]


def test_flags_and_envelopes_never_reach_a_model() -> None:
    mesa = load_corpus("mesa").channels
    for label in (label for label in mesa if label.endswith("_Off")):
        tag = resolve(label, mesa)
        assert isinstance(tag, ChannelTag)
        assert tag.role == "flag"
    assert load_corpus("sleep_edf").channels["EMG submental"] is None
    assert load_corpus("sleep_edf_st").channels["EMG submental"] == "emg:chin"


def test_inverted_eeg_is_marked_in_every_spelling() -> None:
    for name in ("shhs1", "cfs", "ccshs"):
        corpus = load_corpus(name)
        eeg = {label for label, symbol in corpus.channels.items() if (symbol or "").startswith("eeg:")}
        assert eeg <= {label for label, polarity in corpus.polarity.items() if polarity == "suspect"}, name
    assert not load_corpus("shhs2").polarity


def _overlaps() -> list[tuple[str, str]]:
    return [(name, other) for name in NAMES for other in load_corpus(name).overlaps]


def test_the_overlaps_of_the_field_are_declared() -> None:
    declared = set(_overlaps())
    assert {("tueg", "tuab"), ("tueg", "tuev"), ("tueg", "tusl"), ("shhs1", "shhs2")} <= declared
    assert {("challenge2021", name) for name in ("cpsc2018", "g12ec", "chapman", "ptbxl")} <= declared


@pytest.mark.parametrize(("name", "other"), _overlaps())
def test_overlaps_are_symmetric_and_linked_persons_share_hash_and_split(name: str, other: str) -> None:
    one, two = load_corpus(name), load_corpus(other)
    here, there = one.overlaps[other], two.overlaps[name]
    inverse = {"subset": "superset", "superset": "subset"}
    assert inverse.get(here.relation, here.relation) == there.relation
    assert here.persons == there.persons
    if here.persons == "unlinked":
        return
    assert one.subject_group == two.subject_group
    subjects = set(one.split.table) & set(two.split.table) or {f"{number:03d}" for number in range(200)}
    assert [subject_hash(one, subject) for subject in subjects] == [subject_hash(two, subject) for subject in subjects]
    assert [split_of(one, subject) for subject in subjects] == [split_of(two, subject) for subject in subjects]


def test_a_shared_group_is_a_declared_overlap() -> None:
    groups: dict[str, set[str]] = {}
    for name in NAMES:
        groups.setdefault(load_corpus(name).subject_group or name, set()).add(name)
    for members in groups.values():
        reached, new = set[str](), {min(members)}
        while new:
            reached |= new
            new = {other for name in new for other in load_corpus(name).overlaps} & members - reached
        assert reached == members
    assert subject_hash(load_corpus("eegmmidb"), "007") != subject_hash(load_corpus("ucddb_epochs"), "007")


def test_a_bad_recording_is_known_by_the_end_of_its_path() -> None:
    corpus = load_corpus("mros")
    assert corpus.bad_reason("polysomnography/edfs/visit1/mros-visit1-aa2033.edf") == "wrong staging (NSRR)"
    assert corpus.bad_reason("polysomnography/edfs/visit2/mros-visit2-aa2033.edf") is None
    assert load_corpus("g12ec").bad_reason("training/georgia/g8/E07510.hea")
    starred = changed(known_bad={"S001/*R02.edf": "x"})
    assert starred.bad_reason("S001/S001R02.edf") == "x"
    assert starred.bad_reason("S002/S002R02.edf") is None


def test_a_corpus_of_several_formats_has_a_reader_for_each() -> None:
    corpus = load_corpus("bids_eeg")
    names = ("sub-1_eeg.edf", "sub-1_eeg.BDF", "sub-1_eeg.vhdr", "sub-1_eeg.set")
    assert [corpus.reader_of(name) for name in names] == ["edf", "edf", "brainvision", "eeglab"]
    assert load_corpus("code15").reader_of("exams_part0.hdf5#123") == "arrays"


def test_terms_and_totals_decide_no_sample() -> None:
    before = changed().decisive()
    assert changed(citation="x", licence="y", known_bad={"a.edf": "z"}, published={}, expected={}).decisive() == before
    assert changed(mains_hz=50).decisive() != before
    assert changed(units={"C3": "mV"}).decisive() != before
    assert changed(split={"rule": "hash", "fractions": [1, 0, 0]}).decisive() != before


def test_a_corpus_inherits_a_table_and_adds_to_it() -> None:
    seed, seed_v = load_corpus("seed").channels, load_corpus("seed_v").channels
    assert set(seed_v) - set(seed) == {"M1", "M2", "VEO", "HEO"}
    assert load_corpus("g12ec").annotations == load_corpus("challenge2021").annotations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subject": {"pattern": r"S(\d+)"}}, "named group"),
        ({"subject": {"pattern": r"("}}, "not a regular expression"),
        ({"annotations": {"source": "edf", "map": {"x": "S2"}}}, "not among the stages"),
        ({"annotations": {"source": "text_codes"}}, "needs a pattern"),
        ({"split": {"fractions": [0.5, 0.1, 0.1]}}, "add up to 1"),
        ({"split": {"rule": "table"}}, "needs a table"),
        ({"split": {"rule": "path", "map": {"a": "train"}}}, "needs a pattern"),
        ({"split": {"rule": "path", "pattern": "(a)", "map": {"a": "train"}}}, "named group"),
        ({"split": {"rule": "trials"}}, "go together"),
        ({"split": {"rule": "column", "map": {"1": "train"}}}, "needs column"),
        ({"subject": {"pattern": "(?P<subject>x)", "persons": {"a": "b", "b": "c"}}}, "name the last person"),
        ({"subject": {"pattern": "(?P<subject>x)", "table": {"file": "f.csv", "key": "k"}}}, "neither a column"),
        ({"published": {"strict": {}}}, "name of a choice"),
        ({"fetch": {"base_url": "https://example.org/data"}}, "base_url"),
        ({"fetch": {"base_url": "https://example.org/", "checksums": None}}, "nothing could be checked"),
        ({"access_kind": "agreement"}, "only an open corpus"),
        ({"subject_group": None}, "need a subject_group"),
        ({"channels": {"C3": "brain:C3"}}, "kind"),
        ({"colour": "blue"}, "colour"),
    ],
)
def test_a_wrong_corpus_file_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        changed(**changes)


def test_an_unknown_corpus_and_a_wrong_id_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'shhs': not shipped; did you mean .*shhs1"):
        load_corpus("shhs")
    with pytest.raises(ConfigError, match=r"'zzz': not shipped; known: .*eegmmidb"):
        load_corpus("zzz")
    path = tmp_path / "mine.yaml"
    path.write_text((CORPORA_DIR / "eegmmidb.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    assert load_corpus(path).id == "eegmmidb"
