"""The format of a bundle: its files, its manifest, and the check that both agree before anything is trusted.

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
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load

from adapters.config import LoraSpec
from adapters.methods import required_config
from manifests.errors import ConfigError, ContractError
from manifests.recipes import Recipe
from manifests.tasks import Task, TaskId

FORMAT = "kymo-bundle"
SCHEMA_VERSION = 1
MANIFEST_FILE = "bundle.json"
CARD_FILE = "README.md"
BASE_FILES = ("base/encoder.json", "base/encoder.safetensors")
SHARED_FILE = "shared/temporal_encoder.safetensors"

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
        ConfigError: There is no bundle in the folder.
        ContractError: It is of another format or version, or lists other files than a bundle has.
    """
    file = Path(path) / MANIFEST_FILE
    if not file.is_file():
        raise ConfigError(f"{path}: no {MANIFEST_FILE}; give a folder that kymo adapt --bundle has written")
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
    for name in bundle_files(chosen_tasks(manifest, tasks)):
        verified(path, name, manifest)
    return manifest


def chosen_tasks(manifest: Manifest, tasks: Sequence[str] | None) -> list[str]:
    """Tasks to load, in the order of the manifest; ConfigError when the bundle lacks one."""
    if unknown := [name for name in tasks or () if name not in manifest.tasks]:
        raise ConfigError(f"bundle has no task {unknown[0]!r}; it has {', '.join(manifest.tasks)}")
    return [name for name in manifest.tasks if tasks is None or name in tasks]


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ContractError(f"{file}: cannot be read ({error.strerror}); fetch the bundle again") from None


def verified(path: Path, name: str, manifest: Manifest) -> bytes:
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


def read_tensors(path: Path, name: str, manifest: Manifest) -> dict[str, torch.Tensor]:
    """Tensors of a listed file, its size and hash checked."""
    try:
        return load(verified(path, name, manifest))
    except SafetensorError as error:
        raise ContractError(f"{path / name}: not a safetensors file: {error}") from None


def _parse(model: type[ModelT], file: Path, content: bytes) -> ModelT:
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ContractError(f"{file}: {where}: {first['msg']}; made by another kymo or damaged") from None


def read_record(path: Path, name: str, manifest: Manifest) -> TaskRecord:
    """`task.json` of a task, held against the PEFT configuration and the shared encoder beside it."""
    files = task_files(name)
    record = _parse(TaskRecord, path / files["record"], verified(path, files["record"], manifest))
    peft = json.loads(verified(path, files["config"], manifest))
    for key, value in required_config(record.lora).items():
        if peft.get(key) != value:
            raise ContractError(f"{path / files['config']}: {key} is {peft.get(key)!r}, task.json says {value!r}")
    if record.task.id != name:
        raise ContractError(f"{path / files['record']}: task {record.task.id!r} lies in the folder of {name!r}")
    if record.shared_sha256 != manifest.files[SHARED_FILE].sha256:
        raise ContractError(f"{path / files['record']}: trained with another shared temporal encoder; not usable here")
    return record
