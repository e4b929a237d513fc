"""Bundles: written from a finished run, read back with every check, ready to predict."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors.torch import save

from adapters.card import card_text
from adapters.conformance import check_conformance, conformance_bytes
from adapters.layout import (
    CARD_FILE,
    FORMAT,
    MANIFEST_FILE,
    SCHEMA_VERSION,
    SHARED_FILE,
    Base,
    FileEntry,
    Manifest,
    TaskRecord,
    bundle_files,
    chosen_tasks,
    read_record,
    read_tensors,
    task_files,
    verify_bundle,
)
from adapters.methods import peft_config
from adapters.model import MultiTaskModel, load_strict
from adapters.train import AdaptResult
from manifests.config import write_atomically
from manifests.errors import ConfigError, ContractError
from manifests.recipes import Recipe
from trainer.export import load_encoder, read_card


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle ready to predict, its model in evaluation mode."""

    path: Path
    manifest: Manifest
    model: MultiTaskModel
    records: dict[str, TaskRecord]

    def by_recipe(self) -> list[tuple[Recipe, list[str]]]:
        """Recipes of the bundle, each with the tasks that read its windows; every window is kept."""
        groups: list[tuple[Recipe, list[str]]] = []
        for name, record in self.records.items():
            recipe = record.recipe.model_copy(update={"keep": "all"})
            same = next((tasks for known, tasks in groups if known == recipe), None)
            if same is None:
                groups.append((recipe, [name]))
            else:
                same.append(name)
        return groups


def load_bundle(path: Path | str, tasks: Sequence[str] | None = None) -> Bundle:
    """Bundle ready to predict, its logits on the conformance input checked.

    Args:
        path: Folder of the bundle; files of other tasks than those asked for may be absent.
        tasks: Tasks to load; None = all.

    Raises:
        ContractError: Anything that is not as `bundle.json` says, or logits that differ by more than 1e-4.
    """
    path = Path(path)
    manifest = verify_bundle(path, tasks)
    chosen = chosen_tasks(manifest, tasks)
    if read_card(path / "base").sha256 != manifest.base.sha256:
        raise ContractError(f"{path}: base/encoder.json is not the base that bundle.json names")
    records = {name: read_record(path, name, manifest) for name in chosen}
    model = MultiTaskModel(
        load_encoder(path / "base"),
        {name: len(record.task.labels) for name, record in records.items()},
        lora={name: record.lora for name, record in records.items()},
    ).eval()
    load_strict(SHARED_FILE, model.shared, read_tensors(path, SHARED_FILE, manifest))
    for name in chosen:
        files = task_files(name)
        model.load_adapter(name, read_tensors(path, files["adapter"], manifest))
        load_strict(files["head"], model.heads[name], read_tensors(path, files["head"], manifest))
        check_conformance(model, records[name], path / files["conformance"])
    return Bundle(path=path, manifest=manifest, model=model, records=records)


def write_bundle(result: AdaptResult, directory: Path | str) -> Bundle:
    """Bundle of a finished run, written to `directory` and read back; the same run gives the same bytes.

    It is written beside and renamed. An earlier bundle in its place is replaced.

    Raises:
        ConfigError: There is something else than a bundle in `directory`.
    """
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()) and not (directory / MANIFEST_FILE).exists():
        raise ConfigError(f"{directory}: is not empty and holds no bundle; choose another folder")
    temporary, old = directory.with_name(f".{directory.name}-new"), directory.with_name(f".{directory.name}-old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    manifest = _write_files(result, temporary)
    text = json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n"
    write_atomically(temporary / MANIFEST_FILE, text)
    load_bundle(temporary)  # fail now, not at a stranger's
    if directory.exists():
        directory.rename(old)
    temporary.rename(directory)
    shutil.rmtree(old, ignore_errors=True)
    return load_bundle(directory)


def _write_files(result: AdaptResult, folder: Path) -> Manifest:
    model = result.model.eval()
    encoder_dir = Path(result.config.encoder)
    card = read_card(encoder_dir)
    files = {f"base/{name}": (encoder_dir / name).read_bytes() for name in ("encoder.json", "encoder.safetensors")}
    files[SHARED_FILE] = save({name: t.contiguous() for name, t in model.shared.state_dict().items()})
    shared_sha256 = hashlib.sha256(files[SHARED_FILE]).hexdigest()
    records = {
        name: TaskRecord(
            task=task,
            lora=model.lora[name],
            recipe=Recipe.model_validate(result.data[name]["recipe"]),
            shared_sha256=shared_sha256,
            data={key: value for key, value in result.data[name].items() if key != "recipe"},
            scores=result.scores[name],
        )
        for name, task in result.tasks.items()
    }
    for name, record in records.items():
        roles = task_files(name)
        files[roles["config"]] = _peft_config(result, name)
        files[roles["adapter"]] = _adapter(result, name)
        files[roles["head"]] = save(dict(model.heads[name].state_dict()))
        files[roles["record"]] = (json.dumps(record.model_dump(mode="json"), indent=2) + "\n").encode()
        files[roles["conformance"]] = conformance_bytes(model, record)
    encoder = f"{card.kind}, {card.step} steps of pretraining, `{card.sha256[:16]}`"
    files[CARD_FILE] = card_text(result.config.card, records, encoder=encoder).encode()
    for path, content in files.items():
        write_atomically(folder / path, content)
    return Manifest(
        format=FORMAT,
        schema_version=SCHEMA_VERSION,
        tasks=list(records),
        base=Base(kind=card.kind, step=card.step, sha256=card.sha256),
        ucs_version=card.ucs_version,
        ucs_digest=card.ucs_digest,
        versions={name: metadata.version(name) for name in ("peft", "safetensors", "torch")},
        files={
            path: FileEntry(sha256=hashlib.sha256(files[path]).hexdigest(), size=len(files[path]))
            for path in bundle_files(records)
        },
    )


def _peft_config(result: AdaptResult, task: str) -> bytes:
    config = peft_config(result.model.lora[task])
    config.inference_mode = True
    config.base_model_name_or_path = "../../base"
    return (json.dumps(_plain(config.to_dict()), indent=2, sort_keys=True) + "\n").encode()


def _plain(value: Any) -> Any:
    """Enums and sets of a PEFT configuration as JSON values."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", value)


def _adapter(result: AdaptResult, task: str) -> bytes:
    spec = result.model.lora[task]
    tensors = {name: tensor.detach().contiguous() for name, tensor in result.model.adapter_tensors(task).items()}
    # Rank and alpha stand in the header too: files that lost them were loaded at a wrong scale. One key only, since
    # safetensors writes several in random order.
    return save(tensors, {"lora": json.dumps({"alpha": spec.alpha, "r": spec.r})})
