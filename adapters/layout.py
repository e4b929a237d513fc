"""The format of a bundle: its files, its manifest, and the check that both agree before anything is trusted.

A bundle is a folder that predicts with nothing else at hand: `bundle.json` (tasks, base, hashes of all files),
`README.md` (model card) with `scores.png`, `base/` (the exported encoder; instead of its weights there may be a
reference to a commit on a hub), `shared/temporal_encoder.safetensors` (which the tasks trained together: an adapter is
valid with this one only), `adapters/TASK/` (stock PEFT files, `head.safetensors`, `task.json`) and
`conformance/TASK.safetensors` (fixed input, expected logits). Tensors are safetensors, never pickles.

The hashes tell damage, not forgery: who needs that pins the commit of the repository.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load

from adapters.config import Card, LoraSpec
from adapters.methods import required_config
from manifests.config import digest
from manifests.errors import ConfigError, ContractError
from manifests.recipes import Recipe
from manifests.tasks import Task, TaskId

FORMAT = "kymo-bundle"
SCHEMA_VERSION = 2
MANIFEST_FILE = "bundle.json"
CARD_FILE = "README.md"
FIGURE_FILE = "scores.png"
BASE_CARD, BASE_WEIGHTS = "base/encoder.json", "base/encoder.safetensors"
SHARED_FILE = "shared/temporal_encoder.safetensors"
RECORD_FILE = "task.json"  # of a task's folder, and of a merged model
LORA_KEY = "lora"  # of rank and scale in the header of an adapter

# What the hub and its client add to a folder; never read.
FOREIGN = re.compile(r"\.gitattributes|\.cache/huggingface/.*")

ModelT = TypeVar("ModelT", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileEntry(_Strict):
    """SHA-256 (hex) and size in bytes of a file."""

    sha256: Sha256
    size: Annotated[int, Field(ge=0)]


class Reference(_Strict):
    """A file on a hub, fixed by its commit."""

    repo_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")]
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    filename: Annotated[str, Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)*\.safetensors$")] = "encoder.safetensors"

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision}:{self.filename}"


def parse_reference(text: str) -> Reference:
    """Reference written as `OWNER/NAME@COMMIT`, with `:FILE` where it is not encoder.safetensors.

    Raises:
        ConfigError: Anything else, also a tag: what a tag names may change.
    """
    place, _, filename = text.partition(":")
    repo_id, _, revision = place.rpartition("@")
    names = {"filename": filename} if filename else {}
    try:
        return Reference.model_validate({"repo_id": repo_id, "revision": revision, **names})
    except ValidationError:
        raise ConfigError(
            f"base {text!r}: give OWNER/NAME@COMMIT[:FILE.safetensors] with all 40 digits of the commit; tags can move"
        ) from None


class Base(_Strict):
    """The base encoder: kind, training steps, SHA-256 of its weights, and where they are if not in the bundle."""

    kind: str
    step: int
    sha256: Sha256
    reference: Reference | None = None


class Manifest(_Strict):
    """`bundle.json`.

    Attributes:
        card: What the model card says that cannot be read off the records.
        temporal: `trained` = the shared encoder differs from the base's; `frozen` = it is the base's.
        files: Every file of the bundle but this one.
        digest: Of all the rest of this file.
    """

    format: str
    schema_version: int
    tasks: Annotated[list[TaskId], Field(min_length=1)]
    card: Card
    base: Base
    temporal: Literal["trained", "frozen"]
    ucs_version: int
    ucs_digest: str
    versions: dict[str, str]
    files: dict[str, FileEntry]
    digest: str = ""

    def content_digest(self) -> str:
        """SHA-256 (hex) over everything but the digest itself."""
        return digest(self.model_dump(mode="json", exclude={"digest"}))


class TaskRecord(_Strict):
    """`task.json`: all that prediction needs to know about a task, and where it comes from.

    Attributes:
        recipe: How its windows are made, complete.
        base_sha256: Of the weights of the base that its adapter was trained on.
        shared_sha256: Of the temporal encoder that its adapter was trained with.
        data: Corpora, snapshot and split digests, counts, channels seen in training, persons that pretraining saw.
        scores: Split to scores; null where there was no window.
        provenance: Code version, seed, steps: of `adapters.provenance.training_facts`.
    """

    task: Task
    lora: LoraSpec
    recipe: Recipe
    base_sha256: Sha256
    shared_sha256: Sha256
    data: dict[str, Any]
    scores: dict[str, Any]
    provenance: dict[str, Any]


def task_files(task: str) -> dict[str, str]:
    """Files of a task by role."""
    return {
        "config": f"adapters/{task}/adapter_config.json",
        "adapter": f"adapters/{task}/adapter_model.safetensors",
        "head": f"adapters/{task}/head.safetensors",
        "record": f"adapters/{task}/{RECORD_FILE}",
        "conformance": f"conformance/{task}.safetensors",
    }


def bundle_files(tasks: Iterable[str], base: Base) -> list[str]:
    """Every file that a bundle of these tasks has, but the manifest. There is no other: this is the allow-list."""
    shared = [CARD_FILE, FIGURE_FILE, BASE_CARD, SHARED_FILE]
    if base.reference is None:
        shared.append(BASE_WEIGHTS)
    return sorted([*shared, *(path for task in tasks for path in task_files(task).values())])


def needed_files(manifest: Manifest, tasks: Sequence[str] | None) -> list[str]:
    """Files but the manifest that must be there to load these tasks; None = all."""
    return bundle_files(chosen_tasks(manifest, tasks), manifest.base)


def read_manifest(path: Path | str) -> Manifest:
    """Manifest of a bundle folder, its list of files checked against the allow-list.

    Raises:
        ConfigError: There is no bundle in the folder.
        ContractError: It is of another format or version, was changed, or lists other files than a bundle has.
    """
    file = Path(path) / MANIFEST_FILE
    if not file.is_file():
        is_merged = (Path(path) / RECORD_FILE).is_file()
        merged = "a merged model is read by adapters.merge.load_merged; " if is_merged else ""
        raise ConfigError(f"{path}: no {MANIFEST_FILE}; {merged}give a folder that kymo adapt --bundle has written")
    content = _content(Path(path), MANIFEST_FILE)
    _check_format(file, content)
    manifest = _parse(Manifest, file, content)
    expected = bundle_files(manifest.tasks, manifest.base)
    if list(manifest.files) != expected:
        odd = sorted(set(manifest.files) ^ set(expected))
        raise ContractError(f"{file}: {', '.join(odd[:4])}: not the files of a bundle with these tasks")
    if manifest.digest != manifest.content_digest():
        raise ContractError(
            f"{file}: changed after it was written (digest {manifest.digest[:12]}); fetch the bundle again"
        )
    return manifest


def _check_format(file: Path, content: bytes) -> None:
    """Name another format or version before anything else is made of it: a newer one may have any keys."""
    try:
        plain = json.loads(content)
        found, version = plain["format"], int(plain["schema_version"])
    except (ValueError, TypeError, KeyError):
        raise ContractError(f"{file}: not the manifest of a bundle; fetch the bundle again") from None
    if found != FORMAT or version != SCHEMA_VERSION:
        hint = "update kymo" if found == FORMAT and version > SCHEMA_VERSION else "write the bundle again"
        raise ContractError(
            f"{file}: format {found!r} version {version}, this kymo reads {FORMAT!r} version {SCHEMA_VERSION}; {hint}"
        )


def verify_bundle(path: Path | str, tasks: Sequence[str] | None = None) -> Manifest:
    """Manifest of a bundle whose files all have their size and SHA-256; with `tasks`, only what those need.

    Raises:
        ContractError: A file is missing, was changed, does not belong into a bundle, or links to somewhere else.
    """
    path = Path(path)
    manifest = read_manifest(path)
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        listed = name == MANIFEST_FILE or name in manifest.files or FOREIGN.fullmatch(name)
        if file.is_symlink() or not (file.is_dir() or listed):
            _check_place(path, name)
        if not (file.is_dir() or listed):
            raise ContractError(f"{file}: a file that bundle.json does not list; remove it")
    for name in needed_files(manifest, tasks):
        verified(path, name, manifest)
    return manifest


def chosen_tasks(manifest: Manifest, tasks: Sequence[str] | None) -> list[str]:
    """Tasks to load, in the order of the manifest; ConfigError when the bundle lacks one."""
    if unknown := [name for name in tasks or () if name not in manifest.tasks]:
        raise ConfigError(f"bundle has no task {unknown[0]!r}; it has {', '.join(manifest.tasks)}")
    return [name for name in manifest.tasks if tasks is None or name in tasks]


def _check_place(path: Path, name: str) -> None:
    """Refuse a link out of the bundle; those of the hub's cache go to `blobs`, the repository's or (Xet) all's."""
    target, root = (path / name).resolve(), path.resolve()
    places = (root, *(folder / "blobs" for folder in root.parents[1:3]))
    if not any(target.is_relative_to(place) for place in places):
        raise ContractError(f"{path / name}: links to {target}, outside the bundle; put the file itself there")


def _content(path: Path, name: str) -> bytes:
    try:
        return (path / name).read_bytes()
    except OSError as error:
        raise ContractError(f"{path / name}: cannot be read ({error.strerror}); fetch the bundle again") from None


def verified(path: Path, name: str, manifest: Manifest) -> bytes:
    """Content of a listed file whose size and hash fit."""
    entry = manifest.files[name]
    _check_place(path, name)
    content = _content(path, name)
    if len(content) != entry.size or hashlib.sha256(content).hexdigest() != entry.sha256:
        raise ContractError(
            f"{path / name}: {len(content)} bytes with another SHA-256 than bundle.json lists ({entry.size} bytes); "
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
    """`task.json` of a task, held against the adapter, the base and the shared encoder beside it."""
    files = task_files(name)
    where = path / files["record"]
    record = _parse(TaskRecord, where, verified(path, files["record"], manifest))
    peft = json.loads(verified(path, files["config"], manifest))
    for key, value in required_config(record.lora).items():
        if peft.get(key) != value:
            raise ContractError(f"{path / files['config']}: {key} is {peft.get(key)!r}, task.json says {value!r}")
    scale = _header(verified(path, files["adapter"], manifest)).get(LORA_KEY)
    if scale != scale_text(record.lora):
        raise ContractError(f"{path / files['adapter']}: made with {scale}, task.json says {scale_text(record.lora)}")
    if record.task.id != name:
        raise ContractError(f"{where}: task {record.task.id!r} lies in the folder of {name!r}")
    if record.base_sha256 != manifest.base.sha256:
        raise ContractError(f"{where}: trained on another base ({record.base_sha256[:12]}); not usable here")
    if record.shared_sha256 != manifest.files[SHARED_FILE].sha256:
        raise ContractError(f"{where}: trained with another shared temporal encoder; not usable here")
    return record


def scale_text(spec: LoraSpec) -> str:
    """Rank and scale as they stand in the header of an adapter: files that lost them were loaded at a wrong scale."""
    return json.dumps({"alpha": spec.alpha, "r": spec.r})


def _header(content: bytes) -> dict[str, str]:
    """Metadata of a safetensors file; empty for what is none."""
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return dict(header.get("__metadata__") or {})
    except (ValueError, AttributeError, TypeError):
        return {}
