"""The making of a bundle: what goes into it, from a finished run or from another bundle, and how it is written."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save

from adapters.card import card_text
from adapters.config import Card
from adapters.conformance import conformance_bytes
from adapters.figure import draw_records
from adapters.layout import (
    BASE_CARD,
    BASE_WEIGHTS,
    CARD_FILE,
    FIGURE_FILE,
    FORMAT,
    LORA_KEY,
    MANIFEST_FILE,
    SCHEMA_VERSION,
    SHARED_FILE,
    Base,
    FileEntry,
    Manifest,
    Reference,
    TaskRecord,
    bundle_files,
    read_record,
    scale_text,
    task_files,
    verified,
    verify_bundle,
)
from adapters.licences import check_grants
from adapters.methods import peft_config
from adapters.model import SHARED
from adapters.provenance import sources_of, training_facts
from adapters.train import AdaptResult
from manifests.config import write_atomically
from manifests.errors import ConfigError
from manifests.recipes import Recipe
from trainer.export import WEIGHTS_FILE, EncoderCard, load_encoder, read_card

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A bundle that is not written yet.

    Attributes:
        encoder: Card of the base, `sha256` that of its weights' file.
        weights: Content of that file; None where `base` is a reference.
        shared: Content of the shared temporal encoder's file.
        files: Those of the tasks, by path in the bundle.
    """

    card: Card
    base: Base
    encoder: EncoderCard
    weights: bytes | None
    shared: bytes
    temporal: Literal["trained", "frozen"]
    records: dict[str, TaskRecord]
    files: dict[str, bytes]


def draft_of_run(result: AdaptResult, reference: Reference | None = None) -> Draft:
    """Draft of a finished run; with a reference the weights of the base stay on the hub."""
    encoder, weights = base_of(Path(result.config.encoder), keep_header=reference is not None)
    model = result.adapters().cpu().eval()
    shared = save({name: tensor.contiguous() for name, tensor in model.shared.state_dict().items()})
    pretrained = load_encoder(Path(result.config.encoder)).get_submodule(SHARED).state_dict()
    is_frozen = all(torch.equal(tensor, pretrained[name]) for name, tensor in model.shared.state_dict().items())
    records, files = task_parts(result, base_sha256=encoder.sha256, shared=shared)
    return Draft(
        card=result.config.card,
        base=Base(kind=encoder.kind, step=encoder.step, sha256=encoder.sha256, reference=reference),
        encoder=encoder,
        weights=weights if reference is None else None,
        shared=shared,
        temporal="frozen" if is_frozen else "trained",
        records=records,
        files=files,
    )


def base_of(source: Path, *, keep_header: bool) -> tuple[EncoderCard, bytes]:
    """Card for strangers and weights' file of an encoder: without persons, `sha256` that of the whole file.

    Args:
        source: Folder of an exported encoder, or a file of `kymo export`.
        keep_header: Leave such a file as it is, as a copy on a hub is; its header holds the card with all it tells.
    """
    card = read_card(source)
    if source.is_file():
        weights = source.read_bytes() if keep_header else save(load_file(source))
    else:
        weights = (source / WEIGHTS_FILE).read_bytes()
    facts = None if card.pretrained_on is None else card.pretrained_on.without_subjects()
    return card.model_copy(update={"sha256": hashlib.sha256(weights).hexdigest(), "pretrained_on": facts}), weights


def task_parts(
    result: AdaptResult, *, base_sha256: str, shared: bytes
) -> tuple[dict[str, TaskRecord], dict[str, bytes]]:
    """Records and files of the tasks of a run."""
    facts = training_facts(result.config, result.run_dir, kept_step=result.kept_step)
    model = result.adapters()
    records: dict[str, TaskRecord] = {}
    files: dict[str, bytes] = {}
    for name, task in result.tasks.items():
        record = records[name] = TaskRecord(
            task=task,
            lora=model.lora[name],
            recipe=Recipe.model_validate(result.data[name]["recipe"]),
            base_sha256=base_sha256,
            shared_sha256=hashlib.sha256(shared).hexdigest(),
            data={key: value for key, value in result.data[name].items() if key != "recipe"},
            scores=result.scores[name],
            provenance=facts,
        )
        roles = task_files(name)
        tensors = {key: tensor.detach().contiguous() for key, tensor in model.adapter_tensors(name).items()}
        files[roles["config"]] = _peft_config(result, name)
        # One key only, since safetensors writes several in random order.
        files[roles["adapter"]] = save(tensors, {LORA_KEY: scale_text(record.lora)})
        files[roles["head"]] = save(dict(model.heads[name].state_dict()))
        files[roles["record"]] = record_bytes(record)
        files[roles["conformance"]] = conformance_bytes(model, record)
    return records, files


def record_bytes(record: TaskRecord) -> bytes:
    """Content of a record's file."""
    return (json.dumps(record.model_dump(mode="json"), indent=2) + "\n").encode()


def _peft_config(result: AdaptResult, task: str) -> bytes:
    config = peft_config(result.adapters().lora[task])
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


def draft_of_bundle(path: Path | str) -> Draft:
    """Draft of a bundle that exists, all its files checked; written again it has the same bytes.

    Raises:
        ContractError: The bundle is not whole.
    """
    path = Path(path)
    manifest = verify_bundle(path)
    records = {name: read_record(path, name, manifest) for name in manifest.tasks}
    names = [name for task in manifest.tasks for name in task_files(task).values()]
    return Draft(
        card=manifest.card,
        base=manifest.base,
        encoder=read_card(path / Path(BASE_CARD).parent),
        weights=verified(path, BASE_WEIGHTS, manifest) if manifest.base.reference is None else None,
        shared=verified(path, SHARED_FILE, manifest),
        temporal=manifest.temporal,
        records=records,
        files={name: verified(path, name, manifest) for name in names},
    )


def write_draft(draft: Draft, folder: Path) -> Manifest:
    """Write a draft into a folder that is not there yet.

    Raises:
        ConfigError: The licence of its card grants more than those of base and corpora.
    """
    sources = sources_of(draft.encoder, draft.records)
    for doubt in check_grants(draft.card.licence, sources):
        logger.warning("%s", doubt)
    files = {
        **draft.files,
        BASE_CARD: (draft.encoder.model_dump_json(indent=1) + "\n").encode(),
        SHARED_FILE: draft.shared,
        FIGURE_FILE: draw_records(draft.records),
    }
    if draft.weights is not None:
        files[BASE_WEIGHTS] = draft.weights
    files[CARD_FILE] = card_text(
        draft.card, draft.records, base=draft.base, encoder=draft.encoder, sizes={n: len(c) for n, c in files.items()}
    ).encode()
    save_files(folder, files)
    manifest = Manifest(
        format=FORMAT,
        schema_version=SCHEMA_VERSION,
        tasks=list(draft.records),
        card=draft.card,
        base=draft.base,
        temporal=draft.temporal,
        ucs_version=draft.encoder.ucs_version,
        ucs_digest=draft.encoder.ucs_digest,
        versions={name: metadata.version(name) for name in ("peft", "safetensors", "torch")},
        files={
            path: FileEntry(sha256=hashlib.sha256(files[path]).hexdigest(), size=len(files[path]))
            for path in bundle_files(draft.records, draft.base)
        },
    )
    manifest = manifest.model_copy(update={"digest": manifest.content_digest()})
    write_atomically(folder / MANIFEST_FILE, json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n")
    return manifest


def save_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files by their path in a folder."""
    for path, content in files.items():
        write_atomically(folder / path, content)


def check_place(directory: Path, marker: str, *, noun: str) -> None:
    """ConfigError where `directory` holds something else than what has the file `marker`: it would be replaced."""
    if directory.exists() and any(directory.iterdir()) and not (directory / marker).exists():
        raise ConfigError(f"{directory}: is not empty and holds no {noun}; choose another folder")
