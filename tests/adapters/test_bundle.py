import hashlib
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from adapters.bundle import load_bundle, write_bundle
from adapters.conformance import read_conformance
from adapters.evaluate import collate_task
from adapters.layout import read_manifest, task_files
from adapters.model import MultiTaskModel
from manifests.errors import ConfigError, ContractError
from trainer.export import load_encoder


@pytest.fixture
def copied(bundle_dir, tmp_path) -> Path:
    return Path(shutil.copytree(bundle_dir, tmp_path / "copy"))


def relist(folder: Path) -> None:
    """Make bundle.json agree with the files, as a forger would."""
    manifest = json.loads((folder / "bundle.json").read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    (folder / "bundle.json").write_text(json.dumps(manifest))


def test_layout_and_manifest(bundle_dir):
    files = {path.relative_to(bundle_dir).as_posix() for path in bundle_dir.rglob("*") if path.is_file()}
    manifest = read_manifest(bundle_dir)
    assert files == {*manifest.files, "bundle.json"}
    assert manifest.tasks == ["sleep_staging", "rhythm"]
    assert {Path(name).suffix for name in files} == {".json", ".safetensors", ".md"}


def test_loaded_bundle_gives_the_trained_logits(adapted, bundle_dir):
    bundle = load_bundle(bundle_dir)
    for name, record in bundle.records.items():
        windows, _ = read_conformance(bundle_dir / task_files(name)["conformance"])
        batch = collate_task(record.task, windows)
        with torch.no_grad():
            expected = adapted.model(name, batch)
            assert expected.abs().max() > 0
            torch.testing.assert_close(bundle.model(name, batch), expected, rtol=0, atol=0)


def test_record_is_complete(bundle_dir):
    record = load_bundle(bundle_dir).records["sleep_staging"]
    assert record.task.labels == ["W", "N1", "N2", "N3", "R"]
    assert record.recipe.kinds["eeg"].rate_hz == 32
    assert record.data["corpora"]["staged"]["mains_hz"] == 50
    assert record.data["splits"]["test"]["windows"] == 40
    assert record.scores["test"]["metrics"]["kappa"]["interval"] is not None
    assert list(record.data["splits"]["train"]["symbols"]) == ["ecg:II", "eeg:C3-M2", "eeg:C4-M1"]


def test_no_subject_of_a_corpus_file_gets_into_a_bundle(bundle_dir):
    for name in read_manifest(bundle_dir).files:
        assert b"Mustermann" not in (bundle_dir / name).read_bytes(), name


def test_same_run_gives_the_same_bytes(adapted, bundle_dir, tmp_path):
    write_bundle(adapted, tmp_path / "again")
    assert (tmp_path / "again" / "bundle.json").read_bytes() == (bundle_dir / "bundle.json").read_bytes()
    write_bundle(adapted, tmp_path / "again")
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_folder_with_other_things_is_not_overwritten(adapted, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="holds no bundle"):
        write_bundle(adapted, tmp_path)


def test_stock_peft_loads_an_adapter_beside_the_shared_encoder(bundle_dir):
    bundle = load_bundle(bundle_dir)
    for name, record in bundle.records.items():
        windows, _ = read_conformance(bundle_dir / task_files(name)["conformance"])
        batch = collate_task(record.task, windows)
        encoder = load_encoder(bundle_dir / "base")
        with torch.no_grad():
            plain = encoder(batch).pooled_BD
        encoder.temporal_encoder.load_state_dict(load_file(bundle_dir / "shared/temporal_encoder.safetensors"))
        stock = peft.PeftModel.from_pretrained(encoder, str(bundle_dir / "adapters" / name)).eval()
        bundle.model.activate(name)
        with torch.no_grad():
            np.testing.assert_array_equal(stock(batch).pooled_BD, bundle.model.peft(batch).pooled_BD)
            assert (stock(batch).pooled_BD - plain).abs().max() > 1e-3


@pytest.mark.parametrize("position", [0, 40, -1])
def test_flipped_bit_is_refused(copied, position):
    for name in read_manifest(copied).files:
        file = copied / name
        content = bytearray(file.read_bytes())
        content[position] ^= 1
        file.write_bytes(content)
        with pytest.raises(ContractError, match=file.name):
            load_bundle(copied)
        content[position] ^= 1
        file.write_bytes(content)
    load_bundle(copied)


def test_damage_in_one_task_leaves_the_others(copied):
    file = copied / "adapters/rhythm/head.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ContractError, match="another SHA-256"):
        load_bundle(copied)
    assert list(load_bundle(copied, ["sleep_staging"]).records) == ["sleep_staging"]


def test_missing_file_is_refused_unless_its_task_is_not_wanted(copied):
    shutil.rmtree(copied / "adapters/rhythm")
    with pytest.raises(ContractError, match="cannot be read"):
        load_bundle(copied)
    load_bundle(copied, ["sleep_staging"])
    with pytest.raises(ConfigError, match="no task 'staging'; it has sleep_staging, rhythm"):
        load_bundle(copied, ["staging"])


@pytest.mark.parametrize("name", ["adapters/rhythm/adapter_model.bin", "extra.pkl", "shared/.hidden"])
def test_file_that_is_not_listed_is_refused(copied, name):
    (copied / name).write_bytes(pickle.dumps({}))
    with pytest.raises(ContractError, match="does not list; remove it"):
        load_bundle(copied)
    with pytest.raises(ContractError):
        load_bundle(copied, ["sleep_staging"])


def test_what_the_hub_adds_is_let_be(copied):
    (copied / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    load_bundle(copied)


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "adapters/rhythm/weights.bin"])
def test_manifest_may_list_only_files_of_a_bundle(copied, name):
    manifest = json.loads((copied / "bundle.json").read_text())
    manifest["files"][name] = {"sha256": "0" * 64, "size": 1}
    (copied / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(ContractError, match="not the files of a bundle"):
        load_bundle(copied)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schema_version", 2, "this kymo reads"),
        ("format", "other", "this kymo reads"),
        ("tasks", ["../evil"], "pattern"),
        ("extra", 1, "not permitted"),
    ],
)
def test_manifest_of_another_make_is_refused(copied, key, value, message):
    manifest = json.loads((copied / "bundle.json").read_text())
    manifest[key] = value
    (copied / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(ContractError, match=message):
        load_bundle(copied)


def test_wrong_tensors_of_the_right_hash_are_refused(copied):
    """Integrity is not enough: PEFT itself would load these without a word."""
    file = copied / "adapters/rhythm/adapter_model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    renamed = {f"{key}x" if key == first else key: value for key, value in tensors.items()}
    save_file(renamed, file)
    relist(copied)
    with pytest.raises(ContractError, match="is missing"):
        load_bundle(copied)
    save_file({key: value + 0.01 for key, value in tensors.items()}, file)
    relist(copied)
    with pytest.raises(ContractError, match="computes other logits"):
        load_bundle(copied)


def test_adapter_of_another_shared_encoder_is_refused(copied):
    file = copied / "shared/temporal_encoder.safetensors"
    save_file({key: value + 1e-6 for key, value in load_file(file).items()}, file)
    relist(copied)
    with pytest.raises(ContractError, match="another shared temporal encoder"):
        load_bundle(copied)


def test_lost_alpha_is_refused(copied):
    file = copied / "adapters/rhythm/adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "lora_alpha": 8}))
    relist(copied)
    with pytest.raises(ContractError, match=r"lora_alpha is 8, task\.json says 16"):
        load_bundle(copied)


def test_card_states_data_scores_and_limits(bundle_dir):
    text = (bundle_dir / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "other"
    assert front["library_name"] == "kymo"
    assert {"eeg", "ecg", "peft", "sleep_staging"} <= set(front["tags"])
    assert front["model-index"][0]["results"][0]["dataset"]["split"] == "test"
    record = load_bundle(bundle_dir).records["sleep_staging"]
    assert "Not for clinical use" in text
    assert record.data["splits"]["test"]["digest"][:16] in text
    assert "licence CC0-1.0" in text
    assert "W, N1, N2, N3, R" in text


def test_tasks_of_one_recipe_are_grouped(bundle_dir):
    bundle = load_bundle(bundle_dir)
    groups = {recipe.id: tasks for recipe, tasks in bundle.by_recipe()}
    assert groups == {"tiny_psg": ["sleep_staging"], "tiny_ecg": ["rhythm"]}
    assert all(recipe.keep == "all" for recipe, _ in bundle.by_recipe())
    assert isinstance(bundle.model, MultiTaskModel)
