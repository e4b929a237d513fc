"""Bundles out of bundles: a task trained beside those of a bundle, tasks of two bundles, one task merged into the base.

A bundle grows without touching what it has: a new task is trained on the base with the bundle's temporal encoder, both
frozen, so the files of the other tasks stay as they are, byte by byte.
"""

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load, load_file, save
from torch import nn

from adapters.assembly import (
    Draft,
    base_of,
    check_place,
    draft_of_bundle,
    record_bytes,
    save_files,
    task_parts,
)
from adapters.bundle import Bundle, load_base, load_bundle, save_draft
from adapters.config import AdaptConfig
from adapters.conformance import TOLERANCE, read_conformance
from adapters.evaluate import collate_task
from adapters.hub import ANYBODY, Access
from adapters.layout import BASE_CARD, RECORD_FILE, SHARED_FILE, TaskRecord, read_tensors, task_files, verify_bundle
from adapters.licences import Source, check_merge
from adapters.model import SHARED, build_head, load_strict
from adapters.provenance import with_corpora_told
from adapters.train import AdaptResult
from manifests.errors import ConfigError, ContractError
from manifests.files import replaced_folder
from manifests.tasks import load_task
from trainer.export import load_encoder, read_card, save_encoder
from trainer.models.build import Encoder
from trainer.pretrained_on import PretrainedOn

BASE_FOLDER = Path(BASE_CARD).parent
HEAD_FILE = "head.safetensors"


def plan_addition(bundle_dir: Path | str, config: AdaptConfig, *, access: Access = ANYBODY) -> AdaptConfig:
    """Run that trains new tasks for a bundle: on its base with its temporal encoder, both frozen.

    Writes that encoder to `encoder` in the run's folder; the same command writes the same bytes, so a run resumes.

    Args:
        bundle_dir: The bundle.
        config: Tasks, steps, optimizer; `encoder` and `temporal` are set here. An `encoder` that is the bundle's base
            tells whom pretraining saw, which the bundle does not.
        access: The hub, for a base that is a reference.

    Raises:
        ConfigError: A task that the bundle has, adapters of another kind than its own, or a run of another bundle.
        ContractError: The bundle is not whole.
    """
    bundle_dir = Path(bundle_dir)
    bundle = load_bundle(bundle_dir, access=access)
    for run in config.tasks:
        if (name := load_task(run.task).id) in bundle.records:
            raise ConfigError(
                f"{bundle_dir}: has a task {name} already; give the new one another id, or another bundle"
            )
    theirs = next(iter(bundle.records.values())).lora
    if (config.lora.kind, config.lora.attn) != (theirs.kind, theirs.attn):
        raise ConfigError(
            f"lora: kind {config.lora.kind}, attn {config.lora.attn}; the tasks of {bundle_dir} have {theirs.kind}, "
            f"{theirs.attn}, and one base carries one kind. Set lora.kind and lora.attn to theirs"
        )
    encoder = load_base(bundle_dir, bundle.manifest, access=access)
    shared = read_tensors(bundle_dir, SHARED_FILE, bundle.manifest)
    load_strict(SHARED_FILE, encoder.get_submodule(SHARED), shared)
    card = read_card(bundle_dir / BASE_FOLDER)
    folder = Path(config.run_dir) / "encoder"
    own = folder.with_name(f".encoder-{os.getpid()}")  # under torchrun every rank plans, and all write the same
    found = save_encoder(
        own,
        encoder,
        recipes=card.recipes,
        step=card.step,
        licence=card.licence,
        pretrained_on=_pretrained_on(Path(config.encoder), bundle.manifest.base.sha256) or card.pretrained_on,
    )
    with suppress(OSError):  # it is there already
        own.rename(folder)
    shutil.rmtree(own, ignore_errors=True)
    if read_card(folder) != found:
        raise ConfigError(f"{folder}: of another bundle; choose another run_dir")
    return AdaptConfig.model_validate({**config.model_dump(), "encoder": str(folder), "temporal": "frozen"})


def _pretrained_on(encoder: Path, base_sha256: str) -> PretrainedOn | None:
    """Whom pretraining saw, persons included, from an encoder that is the base of a bundle; None if it is another.

    The card of a bundle names no persons, since it goes to strangers. The run's own folder does not.
    """
    if not encoder.exists():
        return None
    card, _ = base_of(encoder, keep_header=False)
    is_base = base_sha256 in {card.sha256, base_of(encoder, keep_header=True)[0].sha256}
    return read_card(encoder).pretrained_on if is_base else None


def add_run(bundle_dir: Path | str, result: AdaptResult, directory: Path | str, *, access: Access = ANYBODY) -> Bundle:
    """Bundle with the tasks of a run that `plan_addition` planned; `directory` may be that of the bundle itself.

    Raises:
        ConfigError: The licence of the bundle grants more than a corpus of the new tasks.
        ContractError: The run has another temporal encoder than the bundle.
    """
    draft = draft_of_bundle(bundle_dir)
    trained, kept = result.adapters().cpu().shared.state_dict(), load(draft.shared)
    if trained.keys() != kept.keys() or any(not torch.equal(trained[name], kept[name]) for name in kept):
        raise ContractError(
            f"{result.run_dir}: its temporal encoder is not that of {bundle_dir}; plan the run again from this bundle"
        )
    records, files = task_parts(result, base_sha256=draft.base.sha256, shared=draft.shared)
    return save_draft(_joined(draft, records, files, where=str(result.run_dir)), directory, access=access)


def add_bundle(bundle_dir: Path | str, other: Path | str, directory: Path | str, *, access: Access = ANYBODY) -> Bundle:
    """Bundle with the tasks of two that stand on the same base and the same temporal encoder.

    The card is that of the first one. A task that both have byte by byte is taken once. One whose bundle could not tell
    whom pretraining saw is told where the first one can.

    Raises:
        ConfigError: Another base or temporal encoder, or a task of one name and other content.
        ContractError: A bundle is not whole.
    """
    first, second = draft_of_bundle(bundle_dir), draft_of_bundle(other)
    if first.base.sha256 != second.base.sha256:
        raise ConfigError(
            f"{other}: stands on another base ({second.base.sha256[:12]}, that of {bundle_dir} is "
            f"{first.base.sha256[:12]}); adapters are valid on their own base only"
        )
    if first.shared != second.shared:
        raise ConfigError(
            f"{other}: its tasks were trained with another temporal encoder than those of {bundle_dir}; train them "
            "together, or one after the other with kymo bundle add-task"
        )
    records, files = dict(second.records), dict(second.files)
    for name in records.keys() - first.records.keys():
        told = with_corpora_told(records[name], first.encoder)
        if told != records[name]:
            records[name], files[task_files(name)["record"]] = told, record_bytes(told)
    return save_draft(_joined(first, records, files, where=str(other)), directory, access=access)


def _joined(draft: Draft, records: Mapping[str, TaskRecord], files: Mapping[str, bytes], *, where: str) -> Draft:
    for name in records:
        if name in draft.records and any(draft.files[path] != files[path] for path in task_files(name).values()):
            raise ConfigError(f"{where}: task {name} is in the bundle already, with other content; rename one of them")
    return replace(draft, records={**draft.records, **records}, files={**draft.files, **files})


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """One task as a plain model: `head(encoder(batch).pooled_BD)` gives its logits (B, K). No PEFT."""

    encoder: Encoder
    head: nn.Module
    record: TaskRecord


def merge_task(bundle_dir: Path | str, task: str, directory: Path | str, *, access: Access = ANYBODY) -> Merged:
    """One task's adapter merged into the base, written as a whole encoder and a head, for serving.

    Args:
        bundle_dir: The bundle.
        task: One of its tasks.
        directory: Gets `encoder.safetensors` and `encoder.json`, which `trainer.export.load_encoder` reads, with
            `head.safetensors` and `task.json`.
        access: The hub, for a base that is a reference.

    Raises:
        ConfigError: The licence of the base permits no derivatives, or there are other things in `directory`.
        ContractError: The merged weights give other logits than the adapter.
    """
    bundle_dir, directory = Path(bundle_dir), Path(directory)
    manifest = verify_bundle(bundle_dir, [task])
    card = read_card(bundle_dir / BASE_FOLDER)
    check_merge(Source(role="base", name=f"{card.kind} {card.sha256[:12]}", licence=card.licence))
    check_place(directory, RECORD_FILE, noun="merged model")
    bundle = load_bundle(bundle_dir, [task], access=access)
    head, record = bundle.model.heads[task], bundle.records[task]
    with replaced_folder(directory) as temporary:
        save_encoder(
            temporary,
            load_base(bundle_dir, manifest, access=access),
            state=_split_attention(_merged_state(bundle.model.encoder, task)),
            recipes={record.recipe.id: record.recipe.model_dump(mode="json")},
            step=card.step,
            licence=manifest.card.licence,
            pretrained_on=card.pretrained_on,
        )
        save_files(
            temporary,
            {
                HEAD_FILE: save(dict(head.state_dict())),
                RECORD_FILE: record_bytes(record),
            },
        )
        _check_logits(load_merged(temporary), bundle_dir / task_files(task)["conformance"])
    return load_merged(directory)


def load_merged(directory: Path | str) -> Merged:
    """What `merge_task` wrote, in evaluation mode."""
    directory = Path(directory)
    encoder = load_encoder(directory)
    record = TaskRecord.model_validate_json((directory / RECORD_FILE).read_bytes())
    head = build_head(encoder.width, len(record.task.labels))
    load_strict(HEAD_FILE, head, load_file(directory / HEAD_FILE))
    return Merged(encoder=encoder, head=head.eval(), record=record)


def _check_logits(merged: Merged, file: Path) -> None:
    windows, expected = read_conformance(file)
    with torch.no_grad():
        logits_BK = merged.head(merged.encoder(collate_task(merged.record.task, windows)).pooled_BD)
    if not torch.allclose(logits_BK, torch.from_numpy(expected), rtol=TOLERANCE, atol=TOLERANCE):
        raise ContractError(f"{file}: the merged weights give other logits than the adapter; report this")


def _merged_state(encoder: nn.Module, task: str) -> dict[str, torch.Tensor]:
    """Weights of an encoder with the adapter of a task added to them. PEFT's own `merge_and_unload` wants a config."""
    state = dict(encoder.state_dict())
    for name, layer in encoder.named_modules():
        if isinstance(layer, BaseTunerLayer):
            cast("Any", layer).merge(safe_merge=True, adapter_names=[task])
            state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.")}
            state |= {f"{name}.{key}": tensor for key, tensor in layer.get_base_layer().state_dict().items()}
    return state


def _split_attention(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under the names of the base, where an adapter had q, k and v as one layer."""
    split: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        before, found, after = name.rpartition(".attn.qkv.")
        if found:
            parts = tensor.chunk(3)
            split |= {f"{before}.attn.{part}.{after}": parts[index].clone() for index, part in enumerate("qkv")}
        else:
            split[name] = tensor
    return split
