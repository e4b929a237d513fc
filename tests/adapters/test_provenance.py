from dataclasses import replace

import pytest

from adapters.assembly import draft_of_bundle
from adapters.bundle import load_bundle, save_draft, write_bundle
from adapters.layout import read_manifest
from adapters.provenance import check_rights, hours_of, seen_in_pretraining, sources_of
from adapters.train import adapt, load_data
from manifests.errors import ConfigError
from trainer.export import read_card


def test_persons_that_the_base_saw_are_counted_by_split(make_config, encoder_dir):
    data = load_data(make_config())["sleep_staging"]
    card = read_card(encoder_dir)
    seen = seen_in_pretraining(card, data)
    assert {split: (found["subjects"], found["subjects_seen"]) for split, found in seen.items()} == {
        "val": (2, 1),
        "test": (2, 1),
    }
    assert seen["test"]["corpora"] == ["staged"]
    assert seen["test"]["sentence"].startswith("1 of the 2 tested persons")


@pytest.mark.parametrize("knows", ["numbers only", "nothing", "no person at all"])
def test_what_the_card_does_not_tell_is_unknown_and_not_zero(make_config, encoder_dir, knows):
    data = load_data(make_config())["sleep_staging"]
    card = read_card(encoder_dir)
    facts = card.pretrained_on
    assert facts is not None
    told = {
        "numbers only": facts.without_subjects(),
        "nothing": None,
        "no person at all": facts.model_copy(update={"subjects": {}, "corpora": {}}),
    }[knows]
    seen = seen_in_pretraining(card.model_copy(update={"pretrained_on": told}), data)
    assert seen["test"]["subjects_seen"] == (0 if knows == "no person at all" else None)
    assert seen["test"]["sentence"].startswith("Not known") == (knows != "no person at all")


def test_code_seed_and_step_stand_in_the_record_and_no_path(bundle_dir, adapted):
    record = load_bundle(bundle_dir).records["rhythm"]
    made = record.provenance
    assert set(made["code"]) == {"kymo", "code_digest", "git", "python"}
    assert made["kept_step"] == adapted.kept_step
    assert made["settings"]["seed"] == 0
    assert made["settings"]["steps"] == 80
    assert hours_of(record) == {"train": 0.21, "val": 0.11, "test": 0.11}
    for name in read_manifest(bundle_dir).files:
        assert str(adapted.run_dir.parent).encode() not in (bundle_dir / name).read_bytes(), name


def test_sources_are_the_base_its_corpora_and_those_of_the_tasks(bundle_dir):
    draft = draft_of_bundle(bundle_dir)
    found = [(source.role, source.licence) for source in sources_of(draft.encoder, draft.records)]
    assert found == [
        ("base", "CC-BY-4.0"),
        ("pretraining corpus", "CC0-1.0"),
        ("corpus", "CC0-1.0"),
        ("corpus", "CC0-1.0"),
    ]


def test_a_bundle_of_open_sources_may_be_published(bundle_dir):
    assert check_rights(bundle_dir, read_manifest(bundle_dir), is_public=True, is_confirmed=False) == []


def test_rights_depend_on_what_training_changed(bundle_dir, make_config, tmp_path):
    """A base without derivatives: its changed temporal encoder never goes public, adapters on a frozen one may."""
    encoder = draft_of_bundle(bundle_dir).encoder.model_copy(update={"licence": "CC-BY-ND-4.0"})
    trained = save_draft(replace(draft_of_bundle(bundle_dir), encoder=encoder), tmp_path / "trained")
    assert trained.manifest.temporal == "trained"
    with pytest.raises(ConfigError, match="the bundle holds changed weights of it"):
        check_rights(trained.path, trained.manifest, is_public=True, is_confirmed=True)
    config = make_config(steps=1, keep="last", temporal="frozen")
    write_bundle(adapt(config), tmp_path / "frozen")
    frozen = save_draft(replace(draft_of_bundle(tmp_path / "frozen"), encoder=encoder), tmp_path / "frozen")
    assert frozen.manifest.temporal == "frozen"
    with pytest.raises(ConfigError, match="--confirm-rights"):
        check_rights(frozen.path, frozen.manifest, is_public=True, is_confirmed=False)
    assert "no derivatives" in check_rights(frozen.path, frozen.manifest, is_public=True, is_confirmed=True)[0]


def test_a_card_that_grants_more_than_the_base_is_not_written(adapted, tmp_path):
    card = adapted.config.card.model_copy(update={"licence": "cc0-1.0"})
    result = replace(adapted, config=adapted.config.model_copy(update={"card": card}))
    with pytest.raises(ConfigError, match=r"cc0-1\.0 grants more .* base sleep .* asks to be named"):
        write_bundle(result, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    card = card.model_copy(update={"licence": "cc-by-4.0"})
    write_bundle(replace(result, config=result.config.model_copy(update={"card": card})), tmp_path / "bundle")
