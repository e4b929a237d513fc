import hashlib
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from huggingface_hub import CommitOperationAdd
from safetensors.torch import load_file, save_file

from adapters.bundle import load_bundle, write_bundle
from adapters.conformance import read_conformance
from adapters.evaluate import collate_task
from adapters.hub import Access
from adapters.layout import Reference, parse_reference, read_manifest, task_files
from adapters.model import MultiTaskModel
from adapters.publish import publish
from manifests.config import digest
from manifests.errors import ConfigError, ContractError
from trainer.export import load_encoder, read_card, save_encoder, write_file


@pytest.fixture
def copied(bundle_dir, tmp_path) -> Path:
    return Path(shutil.copytree(bundle_dir, tmp_path / "copy"))


def relist(folder: Path) -> None:
    """Make bundle.json agree with the files, as a forger would."""
    manifest = json.loads((folder / "bundle.json").read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    write_manifest(folder, manifest)


def write_manifest(folder: Path, manifest: dict) -> None:
    manifest["digest"] = digest({key: value for key, value in manifest.items() if key != "digest"})
    (folder / "bundle.json").write_text(json.dumps(manifest))


def edit_manifest(folder: Path, **changes: object) -> None:
    """Other values in bundle.json, its digest made to fit."""
    write_manifest(folder, json.loads((folder / "bundle.json").read_text()) | changes)


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=2))


def test_layout_and_manifest(bundle_dir):
    files = {path.relative_to(bundle_dir).as_posix() for path in bundle_dir.rglob("*") if path.is_file()}
    manifest = read_manifest(bundle_dir)
    assert files == {*manifest.files, "bundle.json"}
    assert manifest.tasks == ["sleep_staging", "rhythm"]
    assert {Path(name).suffix for name in files} == {".json", ".safetensors", ".md", ".png"}


def test_loaded_bundle_gives_the_trained_logits(adapted, bundle_dir):
    bundle = load_bundle(bundle_dir)
    assert repr(bundle) == f"Bundle({str(bundle_dir)!r}, tasks={list(bundle.records)})"
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
    write_manifest(copied, manifest)
    with pytest.raises(ContractError, match="not the files of a bundle"):
        load_bundle(copied)


def test_file_or_folder_that_links_out_of_the_bundle_is_refused(copied, tmp_path):
    """Also with the right content: what lies outside is not the bundle's and may change."""
    for name in ("adapters/rhythm/head.safetensors", "conformance"):
        place, moved = copied / name, tmp_path / f"moved-{Path(name).name}"
        place.rename(moved)
        place.symlink_to(moved)
        with pytest.raises(ContractError, match=r"links to .*, outside the bundle"):
            load_bundle(copied)
        place.unlink()
        moved.rename(place)
    load_bundle(copied)
    (copied / "more").symlink_to(tmp_path)
    with pytest.raises(ContractError, match="outside the bundle"):
        load_bundle(copied)


def test_links_of_the_hubs_cache_are_fine(copied, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(copied, snapshot)
    for number, name in enumerate(read_manifest(snapshot).files):
        (snapshot / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(blobs / str(number))
    load_bundle(snapshot)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schema_version", 99, "update kymo"),
        ("schema_version", 1, "write the bundle again"),
        ("schema_version", "new", "not the manifest of a bundle"),
        ("format", "other", "this kymo reads"),
        ("tasks", ["../evil"], "pattern"),
        ("extra", 1, "not permitted"),
    ],
)
def test_manifest_of_another_make_is_refused(copied, key, value, message):
    edit_manifest(copied, **{key: value})
    with pytest.raises(ContractError, match=message):
        load_bundle(copied)


def test_newer_manifest_says_so_whatever_it_holds(copied):
    (copied / "bundle.json").write_text('{"format": "kymo-bundle", "schema_version": 3, "parts": []}')
    with pytest.raises(ContractError, match="version 3, this kymo reads 'kymo-bundle' version 2; update kymo"):
        load_bundle(copied)
    (copied / "bundle.json").write_text("{")
    with pytest.raises(ContractError, match="not the manifest of a bundle"):
        load_bundle(copied)


def test_edited_manifest_is_refused(copied):
    edit_json(copied / "bundle.json", temporal="frozen")
    with pytest.raises(ContractError, match="changed after it was written"):
        load_bundle(copied)


def test_base_of_the_same_shape_is_refused(copied, make_encoder, tmp_path):
    """First alone, then with its card, then with every hash made to fit: the tasks know what they were trained on."""
    other = save_encoder(tmp_path / "other", make_encoder(seed=1), recipes={}, step=7)
    shutil.copy(tmp_path / "other" / "encoder.safetensors", copied / "base")
    with pytest.raises(ContractError, match="another SHA-256"):
        load_bundle(copied)
    relist(copied)
    with pytest.raises(ContractError, match=r"SHA-256 is not the one in encoder\.json"):
        load_bundle(copied)
    shutil.copy(tmp_path / "other" / "encoder.json", copied / "base")
    relist(copied)
    with pytest.raises(ContractError, match="the base was exchanged"):
        load_bundle(copied)
    manifest = json.loads((copied / "bundle.json").read_text())
    edit_manifest(copied, base={**manifest["base"], "sha256": other.sha256})
    with pytest.raises(ContractError, match="trained on another base"):
        load_bundle(copied)
    for task in manifest["tasks"]:
        edit_json(copied / "adapters" / task / "task.json", base_sha256=other.sha256)
    relist(copied)
    with pytest.raises(ContractError, match="computes other logits"):
        load_bundle(copied)


def test_another_channel_table_is_refused(copied):
    edit_json(copied / "base" / "encoder.json", ucs_digest="0" * 64)
    relist(copied)
    with pytest.raises(ContractError, match="ucs_digest is 0000"):
        load_bundle(copied)
    edit_manifest(copied, ucs_digest="0" * 64)
    with pytest.raises(ContractError, match="restore the table"):
        load_bundle(copied)


def test_edited_task_is_refused(copied):
    file = copied / "adapters/rhythm/task.json"
    record = json.loads(file.read_text())
    edit_json(file, task={**record["task"], "labels": record["task"]["labels"][::-1]})
    with pytest.raises(ContractError, match=r"task\.json: .* another SHA-256"):
        load_bundle(copied)
    edit_json(file, **{**record, "lora": {**record["lora"], "alpha": 4}})
    relist(copied)
    with pytest.raises(ContractError, match=r"lora_alpha is 16, task\.json says 4"):
        load_bundle(copied)
    edit_json(file, **{**record, "task": {**record["task"], "id": "other"}})
    relist(copied)
    with pytest.raises(ContractError, match="lies in the folder of 'rhythm'"):
        load_bundle(copied)


def test_wrong_tensors_of_the_right_hash_are_refused(copied):
    """Integrity is not enough: PEFT itself would load these without a word."""
    file = copied / "adapters/rhythm/adapter_model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    renamed = {f"{key}x" if key == first else key: value for key, value in tensors.items()}
    scale = {"lora": '{"alpha": 16, "r": 4}'}
    save_file(renamed, file, scale)
    relist(copied)
    with pytest.raises(ContractError, match="is missing"):
        load_bundle(copied)
    save_file({key: value + 0.01 for key, value in tensors.items()}, file, scale)
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
    file.write_text(json.dumps(config))
    adapter = copied / "adapters/rhythm/adapter_model.safetensors"
    save_file(load_file(adapter), adapter, {"lora": '{"alpha": 8, "r": 4}'})
    relist(copied)
    with pytest.raises(ContractError, match=r'made with .*"alpha": 8.*task\.json says .*"alpha": 16'):
        load_bundle(copied)
    save_file(load_file(adapter), adapter)
    relist(copied)
    with pytest.raises(ContractError, match="made with None"):
        load_bundle(copied)


def test_tasks_of_one_recipe_are_grouped(bundle_dir):
    bundle = load_bundle(bundle_dir)
    groups = {recipe.id: tasks for recipe, tasks in bundle.by_recipe()}
    assert groups == {"tiny_psg": ["sleep_staging"], "tiny_ecg": ["rhythm"]}
    assert all(recipe.keep == "all" for recipe, _ in bundle.by_recipe())
    assert isinstance(bundle.model, MultiTaskModel)


@pytest.fixture
def access(hub: Any) -> Access:
    return Access(endpoint=hub.url, token=hub.TOKEN)


def put_base(access: Access, file: Path) -> Reference:
    """An encoder in a repository of its own."""
    api = access.api()
    api.create_repo("lab/sleep", exist_ok=True)
    commit = api.create_commit(
        "lab/sleep", [CommitOperationAdd("encoder.safetensors", str(file))], commit_message="The encoder"
    )
    return Reference(repo_id="lab/sleep", revision=commit.oid)


def test_base_on_the_hub_is_fetched_by_its_commit_once(hub, access, adapted, bundle_dir, tmp_path):
    reference = put_base(access, bundle_dir / "base/encoder.safetensors")
    written = write_bundle(adapted, tmp_path / "bundle", base=reference, access=access)
    assert not (written.path / "base/encoder.safetensors").exists()
    publish(written.path, "lab/tasks", tag="v1", access=access)
    put_base(access, bundle_dir / "shared/temporal_encoder.safetensors")  # its main moves on
    stranger = Access(endpoint=hub.url, token=hub.TOKEN, cache_dir=tmp_path / "cache")
    bundle = load_bundle("lab/tasks@v1", access=stranger)
    record = bundle.records["rhythm"]
    windows, _ = read_conformance(bundle_dir / task_files("rhythm")["conformance"])
    batch = collate_task(record.task, windows)
    with torch.no_grad():
        whole = load_bundle(bundle_dir).model("rhythm", batch)
        torch.testing.assert_close(bundle.model("rhythm", batch), whole, rtol=0, atol=0)
    hub.log.clear()
    load_bundle("lab/tasks@v1", access=stranger)
    assert hub.log == []
    text = (bundle.path / "README.md").read_text()
    assert "base_model: lab/sleep" in text
    assert "base_model_relation: adapter" in text


def test_another_file_under_the_reference_is_refused(access, adapted, make_encoder, tmp_path):
    save_encoder(tmp_path / "other", make_encoder(seed=1), recipes={}, step=7)
    reference = put_base(access, tmp_path / "other" / "encoder.safetensors")
    with pytest.raises(ContractError, match="SHA-256 is not the one"):
        write_bundle(adapted, tmp_path / "bundle", base=reference, access=access)
    assert not (tmp_path / "bundle").exists()


def test_an_exported_file_is_a_base_too_in_the_bundle_and_on_the_hub(access, adapted, encoder_dir, tmp_path):
    """In the bundle without its header, which tells persons; on the hub it is what its holder has put there."""
    file = tmp_path / "sleep.safetensors"
    write_file(file, load_file(encoder_dir / "encoder.safetensors"), read_card(encoder_dir))
    result = replace(adapted, config=adapted.config.model_copy(update={"encoder": str(file)}))
    bundle = write_bundle(result, tmp_path / "whole")
    facts = read_card(file).pretrained_on
    assert facts is not None
    assert facts.subjects is not None
    person = facts.subjects["staged"][0].encode()
    assert person in file.read_bytes()
    assert not any(person in (bundle.path / name).read_bytes() for name in bundle.manifest.files)
    referring = write_bundle(result, tmp_path / "referring", base=put_base(access, file), access=access)
    assert referring.manifest.base.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_bundle_tells_no_persons_of_the_pretraining(bundle_dir):
    facts = read_card(bundle_dir / "base").pretrained_on
    assert facts is not None
    assert facts.subjects is None
    assert facts.corpora["staged"]["subjects"] == 4


def test_a_reference_is_a_commit_and_a_file():
    commit = "c0ffee" + "0" * 34
    assert parse_reference(f"lab/sleep@{commit}") == Reference(repo_id="lab/sleep", revision=commit)
    assert parse_reference(f"lab/sleep@{commit}:a/b.safetensors").filename == "a/b.safetensors"
    for text in (
        "lab/sleep",
        "lab/sleep@v1",
        "lab@main",
        f"lab/sleep@{commit}:x.bin",
        f"lab/sleep@{commit}:../x.safetensors",
    ):
        with pytest.raises(ConfigError, match="give OWNER/NAME@COMMIT"):
            parse_reference(text)
