"""The format of a bundle, and reading one: nothing is trusted before its SHA-256 fits.

A bundle is a folder that predicts with nothing else at hand: `bundle.json` (tasks, base, hashes of all files),
`README.md` (model card), `base/` (the exported encoder), `shared/temporal_encoder.safetensors` (which the tasks trained
together: an adapter is valid with this one only), `adapters/TASK/` (stock PEFT files, `head.safetensors`,
`task.json`) and `conformance/TASK.safetensors` (fixed input, expected logits). Tensors are safetensors, never pickles.

The hashes tell damage, not forgery: who needs that pins the commit of the repository.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load

from adapters.config import LoraSpec
from adapters.evaluate import collate_task
from adapters.model import MultiTaskModel, load_strict
from adapters.tasks import Task, TaskId
from manifests.errors import ContractError
from manifests.recipes import Recipe
from trainer.export import load_encoder, read_card
from trainer.read import Window

FORMAT = "kymo-bundle"
SCHEMA_VERSION = 1
MANIFEST_FILE = "bundle.json"
CARD_FILE = "README.md"
BASE_FILES = ("base/encoder.json", "base/encoder.safetensors")
SHARED_FILE = "shared/temporal_encoder.safetensors"
TOLERANCE = 1e-4  # of conformance logits: another processor's order of summation, and no more

# What the hub and its client add to a folder; never read.
FOREIGN = re.compile(r"\.gitattributes|\.cache/huggingface/.*")

ModelT = TypeVar("ModelT", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Strict):
    """SHA-256 (hex) and size in bytes of a file."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)]


class Base(_Strict):
    """The base encoder: kind, training steps, SHA-256 of its weights."""

    kind: str
    step: int
    sha256: str


class Manifest(_Strict):
    """`bundle.json`. `files` lists every file but itself."""

    format: str
    schema_version: int
    tasks: Annotated[list[TaskId], Field(min_length=1)]
    base: Base
    ucs_version: int
    ucs_digest: str
    versions: dict[str, str]
    files: dict[str, FileEntry]


class TaskRecord(_Strict):
    """`task.json`: all that prediction needs to know about a task, and where it comes from.

    Attributes:
        recipe: How its windows are made, complete.
        shared_sha256: Of the temporal encoder that its adapter was trained with.
        data: Corpora, snapshot and split digests, counts, channels seen in training.
        scores: Split to scores; null where there was no window.
    """

    task: Task
    lora: LoraSpec
    recipe: Recipe
    shared_sha256: str
    data: dict[str, Any]
    scores: dict[str, Any]


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


def task_files(task: str) -> dict[str, str]:
    """Files of a task by role."""
    return {
        "config": f"adapters/{task}/adapter_config.json",
        "adapter": f"adapters/{task}/adapter_model.safetensors",
        "head": f"adapters/{task}/head.safetensors",
        "record": f"adapters/{task}/task.json",
        "conformance": f"conformance/{task}.safetensors",
    }


def bundle_files(tasks: Iterable[str]) -> list[str]:
    """Every file that a bundle of these tasks has, but the manifest. There is no other: this is the allow-list."""
    shared = [CARD_FILE, *BASE_FILES, SHARED_FILE]
    return sorted([*shared, *(path for task in tasks for path in task_files(task).values())])


def read_manifest(path: Path | str) -> Manifest:
    """Manifest of a bundle folder, its list of files checked against the allow-list.

    Raises:
        ContractError: It is missing, of another format or version, or lists other files than a bundle has.
    """
    file = Path(path) / MANIFEST_FILE
    manifest = _parse(Manifest, file, _content(file))
    if manifest.format != FORMAT or manifest.schema_version != SCHEMA_VERSION:
        raise ContractError(
            f"{file}: format {manifest.format!r} version {manifest.schema_version}, "
            f"this kymo reads {FORMAT!r} version {SCHEMA_VERSION}"
        )
    if list(manifest.files) != bundle_files(manifest.tasks):
        odd = sorted(set(manifest.files) ^ set(bundle_files(manifest.tasks)))
        raise ContractError(f"{file}: {', '.join(odd[:4])}: not the files of a bundle with these tasks")
    return manifest


def verify_bundle(path: Path | str, tasks: Sequence[str] | None = None) -> Manifest:
    """Manifest of a bundle whose files all have their size and SHA-256; with `tasks`, only what those need.

    Raises:
        ContractError: A file is missing, was changed, or does not belong into a bundle.
    """
    path = Path(path)
    manifest = read_manifest(path)
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        listed = name == MANIFEST_FILE or name in manifest.files or FOREIGN.fullmatch(name)
        if not file.is_dir() and not listed:
            raise ContractError(f"{file}: a file that bundle.json does not list; remove it")
    for name in bundle_files(_chosen(manifest, tasks)):
        _verified(path, name, manifest)
    return manifest


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
    chosen = _chosen(manifest, tasks)
    if read_card(path / "base").sha256 != manifest.base.sha256:
        raise ContractError(f"{path}: base/encoder.json is not the base that bundle.json names")
    records = {name: _read_record(path, name, manifest) for name in chosen}
    model = MultiTaskModel(
        load_encoder(path / "base"),
        {name: len(record.task.labels) for name, record in records.items()},
        lora={name: record.lora for name, record in records.items()},
    ).eval()
    load_strict(SHARED_FILE, model.shared, _tensors(path, SHARED_FILE, manifest))
    for name in chosen:
        files = task_files(name)
        model.load_adapter(name, _tensors(path, files["adapter"], manifest))
        load_strict(files["head"], model.heads[name], _tensors(path, files["head"], manifest))
    bundle = Bundle(path=path, manifest=manifest, model=model, records=records)
    for name in chosen:
        _check_conformance(bundle, name)
    return bundle


def _chosen(manifest: Manifest, tasks: Sequence[str] | None) -> list[str]:
    if unknown := [name for name in tasks or () if name not in manifest.tasks]:
        raise ContractError(f"bundle has no task {unknown[0]!r}; it has {', '.join(manifest.tasks)}")
    return [name for name in manifest.tasks if tasks is None or name in tasks]


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ContractError(f"{file}: cannot be read ({error.strerror}); fetch the bundle again") from None


def _verified(path: Path, name: str, manifest: Manifest) -> bytes:
    """Content of a listed file whose size and hash fit."""
    entry = manifest.files[name]
    file = path / name
    content = _content(file)
    if len(content) != entry.size or hashlib.sha256(content).hexdigest() != entry.sha256:
        raise ContractError(
            f"{file}: {len(content)} bytes with another SHA-256 than bundle.json lists ({entry.size} bytes); "
            "fetch the bundle again"
        )
    return content


def _tensors(path: Path, name: str, manifest: Manifest) -> dict[str, torch.Tensor]:
    try:
        return load(_verified(path, name, manifest))
    except SafetensorError as error:
        raise ContractError(f"{path / name}: not a safetensors file: {error}") from None


def _parse(model: type[ModelT], file: Path, content: bytes) -> ModelT:
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ContractError(f"{file}: {where}: {first['msg']}; made by another kymo or damaged") from None


def _read_record(path: Path, name: str, manifest: Manifest) -> TaskRecord:
    """`task.json` of a task, held against the PEFT configuration and the shared encoder beside it."""
    files = task_files(name)
    record = _parse(TaskRecord, path / files["record"], _verified(path, files["record"], manifest))
    peft = json.loads(_verified(path, files["config"], manifest))
    expected = {
        "peft_type": "LORA",
        "r": record.lora.r,
        "lora_alpha": record.lora.alpha,
        "target_modules": record.lora.targets,
        "modules_to_save": None,
        "bias": "none",
    }
    for key, value in expected.items():
        if peft.get(key) != value:
            raise ContractError(f"{path / files['config']}: {key} is {peft.get(key)!r}, task.json says {value!r}")
    if record.task.id != name:
        raise ContractError(f"{path / files['record']}: task {record.task.id!r} lies in the folder of {name!r}")
    if record.shared_sha256 != manifest.files[SHARED_FILE].sha256:
        raise ContractError(f"{path / files['record']}: trained with another shared temporal encoder; not usable here")
    return record


def read_conformance(file: Path) -> tuple[list[Window], np.ndarray]:
    """Windows and expected logits (W, K) of a conformance file."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            metas = json.loads(tensors.metadata()["windows"])
            windows = [
                Window(
                    key=meta["key"],
                    position=index,
                    epoch=0,
                    corpus=meta["corpus"],
                    recording=meta["recording"],
                    meta=meta,
                    arrays={kind: tensors.get_tensor(f"{index}.{kind}") for kind in meta["ucs"]},
                )
                for index, meta in enumerate(metas)
            ]
            return windows, tensors.get_tensor("logits")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ContractError(f"{file}: not a conformance file: {error}") from None


def _check_conformance(bundle: Bundle, name: str) -> None:
    file = bundle.path / task_files(name)["conformance"]
    windows, expected = read_conformance(file)
    with torch.no_grad():
        logits = bundle.model(name, collate_task(bundle.records[name].task, windows)).numpy()
    if logits.shape != expected.shape or not np.abs(logits - expected).max() <= TOLERANCE:
        raise ContractError(
            f"{file}: this machine computes other logits than the bundle's maker (limit {TOLERANCE:g}); "
            "update kymo, or report this with both versions"
        )
