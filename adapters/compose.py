"""Writing a bundle from a finished run."""

import hashlib
import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save as save_arrays
from safetensors.torch import save

from adapters.bundle import (
    CARD_FILE,
    FORMAT,
    MANIFEST_FILE,
    SCHEMA_VERSION,
    SHARED_FILE,
    Base,
    Bundle,
    FileEntry,
    Manifest,
    TaskRecord,
    bundle_files,
    load_bundle,
    task_files,
)
from adapters.card import card_text
from adapters.evaluate import collate_task
from adapters.model import lora_config
from adapters.tasks import Task
from adapters.train import AdaptResult
from manifests.channels import UCS_VERSION, ChannelTag, resolve
from manifests.config import write_atomically
from manifests.errors import ConfigError, ContractError
from manifests.recipes import Recipe
from trainer.export import read_card
from trainer.read import Window

CONFORMANCE_WINDOWS = 2
CHANNELS_PER_KIND = 2
SCALE = 0.1  # physical units per bit of the conformance input


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
        files[roles["conformance"]] = _conformance(result, record)
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
    config = lora_config(result.model.lora[task])
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


def _conformance(result: AdaptResult, record: TaskRecord) -> bytes:
    """Noise (no one's recording) in the shape of the task's windows, and the logits it gives."""
    windows = conformance_windows(record)
    with torch.no_grad():
        logits = result.model(record.task.id, collate_task(record.task, windows)).numpy()
    arrays = {f"{index}.{kind}": array for index, window in enumerate(windows) for kind, array in window.arrays.items()}
    metas = json.dumps([window.meta for window in windows])
    return save_arrays({**arrays, "logits": np.ascontiguousarray(logits)}, {"windows": metas})


def conformance_windows(record: TaskRecord) -> list[Window]:
    """Windows of seeded noise with the channels that training saw most often."""
    symbols = list(record.data["splits"]["train"]["symbols"])
    return [_noise_window(record.task, record.recipe, symbols, index) for index in range(CONFORMANCE_WINDOWS)]


def _noise_window(task: Task, recipe: Recipe, symbols: list[str], index: int) -> Window:
    generator = np.random.default_rng(index)
    arrays: dict[str, np.ndarray] = {}
    ucs: dict[str, list[dict[str, Any]]] = {}
    for kind in (kind for kind in task.kinds if kind in recipe.kinds):
        chosen = [symbol for symbol in symbols if symbol.startswith(f"{kind}:")][:CHANNELS_PER_KIND]
        if not chosen:
            continue
        rate_hz = recipe.kinds[kind].rate_hz
        noise_CT = 50 * generator.standard_normal((len(chosen), rate_hz * recipe.window_s))
        arrays[kind] = np.round(noise_CT / SCALE).astype(np.int16)
        ucs[kind] = [_noise_tag(symbol, rate_hz) for symbol in chosen]
    rate_hz = next(iter(ucs.values()))[0]["rate"][0]
    meta = {
        "key": f"conformance-{index}",
        "corpus": "conformance",
        "recording": "noise",
        "recipe": recipe.id,
        "start": index * rate_hz * recipe.window_s,
        "length": rate_hz * recipe.window_s,
        "rate": [rate_hz, 1],
        "ucs_version": UCS_VERSION,
        "ucs": ucs,
    }
    return Window(
        key=meta["key"], position=index, epoch=0, corpus="conformance", recording="noise", meta=meta, arrays=arrays
    )


def _noise_tag(symbol: str, rate_hz: int) -> dict[str, Any]:
    tag = resolve(symbol)
    if not isinstance(tag, ChannelTag):
        raise ContractError(f"channel {symbol!r} of the training data does not resolve: {tag.reason}")
    return {
        "symbol": tag.symbol,
        "kind": tag.kind,
        "anode": tag.anode,
        "cathode": tag.cathode,
        "anode_id": tag.anode_id,
        "cathode_id": tag.cathode_id,
        "role": "signal",
        "unit": tag.unit,
        "scale": SCALE,
        "rate": [rate_hz, 1],
        "mean": 0.0,
        "sd": 50.0,
        "median": 0.0,
        "mad": 33.7,
    }
