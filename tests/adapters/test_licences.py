import pytest

from adapters.licences import RESTRICTED, UNKNOWN, Role, Source, check_grants, check_merge, check_publication, terms_of
from manifests.config import shipped_names
from manifests.corpora import CORPORA_DIR, load_corpus
from manifests.errors import ConfigError


def source(licence: str | None, role: Role = "corpus") -> Source:
    return Source(role=role, name="x", licence=licence)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CC0-1.0", "cc0-1.0"),
        ("CC BY 4.0", "cc-by-4.0"),
        ("CC-BY-4.0 (Zenodo), not verified", "cc-by-4.0"),
        ("cc-by-nc-sa-4.0", "cc-by-nc-sa-4.0"),
        ("CC-BY-NC-ND-3.0", "cc-by-nc-nd-3.0"),
        ("ODC-BY-1.0", "odc-by-1.0"),
        ("Apache-2.0", "apache-2.0"),
        ("MIT", "mit"),
        ("mitigated", UNKNOWN),
        ("cc-by-zz-9.0", UNKNOWN),
        ("other", UNKNOWN),
        (None, UNKNOWN),
        ("as the data set's dataset_description.json says", UNKNOWN),
        ("internal", RESTRICTED),
    ],
)
def test_a_licence_is_known_by_its_id(text, expected):
    assert terms_of(text).id == expected


def test_every_shipped_corpus_is_placed_where_its_file_says():
    """A corpus under an agreement is never taken for an open one, and none but BIDS in general is unknown."""
    for name in shipped_names(CORPORA_DIR):
        corpus = load_corpus(name)
        terms = terms_of(corpus.licence)
        if "no redistribution" in corpus.licence or "ask before" in corpus.licence:
            assert terms.id == RESTRICTED, name
        assert terms.id != UNKNOWN or name == "bids_eeg", name


@pytest.mark.parametrize(
    ("ours", "theirs", "why"),
    [
        ("cc-by-4.0", "cc-by-nc-4.0", "commercial"),
        ("mit", "cc-by-sa-4.0", "same licence"),
        ("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "same licence"),
        ("cc0-1.0", "ODC-BY-1.0", "named"),
        ("cc-by-nc-4.0", "CC-BY-NC-ND-3.0", "adapted works"),
        ("cc-by-4.0", "NSRR data use agreement; no redistribution", "adapted works"),
    ],
)
def test_a_bundle_may_not_grant_more_than_its_sources(ours, theirs, why):
    with pytest.raises(ConfigError, match=rf"corpus x .*{why}.*Set card.licence to"):
        check_grants(ours, [source("mit", "base"), source(theirs)])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("cc0-1.0", "CC0-1.0"),
        ("cc-by-4.0", "ODC-BY-1.0"),
        ("cc-by-nc-4.0", "cc-by-4.0"),
        ("cc-by-nc-4.0", "cc-by-nc-4.0"),
        ("cc-by-sa-4.0", "cc-by-sa-3.0"),
        ("other", "CC-BY-NC-ND-3.0"),
    ],
)
def test_a_licence_that_grants_no_more_fits(ours, theirs):
    assert check_grants(ours, [source(theirs)]) == []


def test_the_message_names_licences_that_fit():
    with pytest.raises(ConfigError, match=r"Set card\.licence to cc-by-nc-4\.0 or cc-by-nc-sa-4\.0 or other$"):
        check_grants("mit", [source("cc-by-nc-4.0"), source("cc-by-4.0")])
    with pytest.raises(ConfigError, match=r"Set card\.licence to other$"):
        check_grants("mit", [source("cc-by-nd-4.0")])


def test_terms_that_are_not_known_are_told():
    assert check_grants("mit", [source(None)]) == [
        "corpus x (no licence stated): whether mit grants more than it does cannot be told"
    ]


def publication(*sources: Source, is_base_changed=True, is_public=True, is_confirmed=False) -> list[str]:
    return check_publication(sources, is_base_changed=is_base_changed, is_public=is_public, is_confirmed=is_confirmed)


def test_open_sources_may_be_published():
    assert publication(source("cc-by-nc-4.0", "base"), source("ODC-BY-1.0"), source("cc-by-sa-4.0")) == []


@pytest.mark.parametrize(
    ("licence", "why"),
    [("data use agreement", "an agreement governs"), ("cc-by-nd-4.0", "permits no derivatives"), (None, "not known")],
)
def test_doubtful_corpora_are_published_privately_or_on_the_publishers_word(licence, why):
    with pytest.raises(ConfigError, match=f"not published: corpus x .*{why}.*--confirm-rights"):
        publication(source("mit", "base"), source(licence))
    assert why in publication(source("mit", "base"), source(licence), is_confirmed=True)[0]
    assert why in publication(source("mit", "base"), source(licence), is_public=False)[0]


def test_changed_weights_of_a_base_without_derivatives_are_never_public():
    base = source("CC-BY-NC-ND-4.0", "base")
    with pytest.raises(ConfigError, match="the bundle holds changed weights of it"):
        publication(base, is_confirmed=True)
    publication(base, is_confirmed=True, is_base_changed=False)
    publication(base, is_public=False)


def test_nothing_is_merged_into_a_base_without_derivatives():
    with pytest.raises(ConfigError, match="merged weights are one"):
        check_merge(source("cc-by-nd-4.0", "base"))
    check_merge(source("cc-by-nc-sa-4.0", "base"))
    check_merge(source(None, "base"))
