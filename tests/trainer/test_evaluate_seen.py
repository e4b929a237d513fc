import pandas as pd

from manifests.corpora import load_corpus, subject_hash
from trainer.evaluation.seen import Pretraining, overlap_of, pretrain_seen, pretraining_of, sentence
from trainer.pretrained_on import read_pretrained_on


def windows_of(corpus: str, *subjects: str) -> pd.DataFrame:
    return pd.DataFrame({"corpus": [corpus] * len(subjects), "subject": list(subjects)})


def trained(**subjects: set[str]) -> Pretraining:
    return Pretraining(subjects={name: frozenset(found) for name, found in subjects.items()}, unknown=())


def test_persons_of_the_same_corpus_count_only_if_they_were_in_the_trained_split() -> None:
    seen = pretrain_seen(trained(ucddb={"a", "b"}), windows_of("ucddb", "b", "c", "c"))
    assert seen["corpora"] == ["ucddb"]
    assert (seen["subjects"], seen["subjects_seen"]) == (2, 1)
    assert seen["rows"][0]["relation"] == "same corpus"
    assert sentence(seen) == "1 of the 2 tested persons were in pretraining (without labels)."


def test_persons_are_found_under_another_corpus() -> None:
    """UCDDB's epochs and its reassembled recording name the same persons, so their hashes agree."""
    person = subject_hash(load_corpus("ucddb_epochs"), "002")
    assert person == subject_hash(load_corpus("ucddb_epochs_mat"), "002")
    seen = pretrain_seen(trained(ucddb_epochs_mat={person}), windows_of("ucddb_epochs", person))
    assert seen["corpora"] == []
    assert seen["subjects_seen"] == 1
    assert seen["rows"][0]["relation"] == "shares"
    assert seen["rows"][0]["note"] == "the same persons"


def test_corpora_whose_persons_cannot_be_joined_are_told() -> None:
    seen = pretrain_seen(trained(ptbxl={"x"}), windows_of("challenge2021", "y"))
    assert seen["rows"][0]["subjects_seen"] is None
    assert "persons shared with ptbxl cannot be told apart" in sentence(seen)


def test_overlaps_hold_whichever_corpus_declares_them() -> None:
    assert overlap_of("challenge2021", "ptbxl") == overlap_of("ptbxl", "challenge2021")
    assert overlap_of("challenge2021", "mitdb") is None


def test_what_is_unrelated_leaves_no_row() -> None:
    seen = pretrain_seen(trained(mitdb={"m"}), windows_of("eegmmidb", "e"))
    assert seen["rows"] == []
    assert seen["subjects_seen"] == 0


def test_a_card_tells_the_persons_of_the_split_that_was_trained_on(tiny_config) -> None:
    facts = read_pretrained_on(tiny_config())
    found = pretraining_of(facts)
    assert len(found.subjects["tiny"]) == 4  # of 6, two are val
    person = min(found.subjects["tiny"])
    assert pretrain_seen(found, windows_of("tiny", person, "stranger"))["subjects_seen"] == 1


def test_what_a_card_does_not_tell_is_called_unknown(tiny_config) -> None:
    facts = read_pretrained_on(tiny_config())
    for card in (None, facts.without_subjects()):
        seen = pretrain_seen(pretraining_of(card), windows_of("tiny", "a"))
        assert sentence(seen).startswith("Not known: the encoder's card ")
    half = pretraining_of(facts.model_copy(update={"unknown": ["snapshot s is gone"]}))
    assert sentence(pretrain_seen(half, windows_of("tiny", "a"))).endswith("; snapshot s is gone.")
