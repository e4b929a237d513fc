"""Checkpoints: named ZeRO fragments in safetensors plus JSON, free of the world size, committed by a hash manifest.

    checkpoints/step-000000040-a1/
        zero_00000_of_00002.safetensors   keys `<state>::<parameter>`, 1-D fp32; header: name → [start, numel, step]
        aux.safetensors                   persistent buffers and frozen parameters
        meta.json                         progress, scores, shapes, optimizer groups, configuration
        MANIFEST.json                     file → size, SHA-256; written last

See trainer/checkpoint_store.py for names and commits, trainer/fragments.py for where the values come from.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from manifests.errors import ConfigError, ContractError
from trainer.checkpoint_store import (
    META_FILE,
    FileEntry,
    checkpoint_name,
    commit,
    file_entry,
    gather_objects,
    working_name,
)
from trainer.collectives import rank, world_size
from trainer.data import DataState, state_from_json
from trainer.fragments import (
    STATES,
    Fragment,
    begin_load,
    end_load,
    held_fragments,
    parameter_shapes,
    untrained_tensors,
)
from trainer.lock import Fence
from trainer.pieces import SEPARATOR, Pieces
from trainer.storage import answering, is_remote, remove_folder, upload
from trainer.tensor_file import save_tensors
from trainer.zero import gathered

FORMAT_VERSION = 1
AUX_FILE = "aux.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """All that survives a restart, beside weights and moments. Random draws are functions of it, not state.

    Attributes:
        step: Optimizer steps done.
        windows: Windows trained on, over all ranks.
        seconds: Time spent in training steps, over all attempts.
        loss: Loss of the last step, None before the first.
        data: Where the order of samples stands.
        skipped: Steps among them that changed nothing, for their loss or gradient was not finite.
    """

    step: int
    windows: int
    seconds: float
    loss: float | None
    data: DataState
    skipped: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostState:
    """What this rank writes of the model at one step: copies in the host's memory, so that training may go on.

    Attributes:
        tensors: Its fragments, by key of the file.
        header: Parameter → [start, numel, Adam's step] of its fragment.
        untrained: Persistent buffers and frozen parameters; rank 0's.
        meta: Content of meta.json.
        progress: Of the run at that step.
    """

    tensors: dict[str, torch.Tensor]
    header: dict[str, list[float]]
    untrained: dict[str, torch.Tensor]
    meta: dict[str, Any]
    progress: Progress


def copy_to_host(
    model: Any, *, progress: Progress, extra: Mapping[str, Any], earlier: HostState | None = None
) -> HostState:
    """The state of the model now. All ranks together.

    Args:
        model: What `initialise` returned.
        progress: What to write with it.
        extra: Plain data for meta.json.
        earlier: State of the same model that is needed no more: its memory is used again.
    """
    stage = model.zero_optimization_stage()
    fragments = [fragment.owned(stage=stage) for fragment in held_fragments(model)]
    tensors: dict[str, torch.Tensor] = {}
    for fragment in fragments:
        for state in STATES:
            key, source = f"{state}{SEPARATOR}{fragment.name}", fragment.tensors[state].detach()
            # Page-locked memory, from which a GPU copies while the host goes on to the next one.
            kept = earlier.tensors[key] if earlier else torch.empty(source.shape, pin_memory=source.is_cuda)
            tensors[key] = kept.copy_(source, non_blocking=True)
    untrained = {name: tensor.cpu().clone() for name, tensor in untrained_tensors(model).items()}
    meta = {
        "format_version": FORMAT_VERSION,
        "world_size": world_size(),
        "zero_stage": stage,
        "shapes": parameter_shapes(model),
        "optimizer_groups": [_plain_settings(group) for group in model.optimizer.param_groups],
        "progress": asdict(progress) | {"data": progress.data.to_json()},
        "random": "torch reseeded at every step from (seed, step, rank)",
        **extra,
    }
    header = {f.name: [f.start, f.numel, float(f.adam["step"])] for f in fragments}
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return HostState(
        tensors=tensors, header=header, untrained=untrained if rank() == 0 else {}, meta=meta, progress=progress
    )


def _plain_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k != "params" and isinstance(v, int | float | tuple | list)}


def save_checkpoint(
    folder: Path,
    model: Any,
    *,
    progress: Progress,
    attempt: int,
    extra: Mapping[str, Any],
    fence: Fence | None = None,
) -> Path:
    """Write a checkpoint, all ranks together, and return its folder; after that it survives a power cut.

    Args:
        folder: Folder of all checkpoints of the run.
        model: What `initialise` returned.
        progress: What to write with it.
        attempt: Number of this start of the run.
        extra: Plain data for meta.json.
        fence: Keeps a process from saving whose run another one has taken over.

    Raises:
        ConfigError: It cannot be written; the checkpoint before it stands.
    """
    state = copy_to_host(model, progress=progress, extra=extra)
    return write_checkpoint(folder, state, attempt=attempt, fence=fence)


def write_checkpoint(
    folder: Path,
    state: HostState,
    *,
    attempt: int,
    fence: Fence | None = None,
    gather: Callable[[Any], list[Any]] = gather_objects,
) -> Path:
    """As `save_checkpoint`, of a state in memory: in any thread, if `gather` uses a process group of that thread.

    Whatever fails on one rank fails on all.
    """
    path = folder / checkpoint_name(state.progress.step, attempt)

    def write() -> dict[str, FileEntry]:
        if fence is not None and rank() == 0:
            fence.check()
        return _write_files(path, state)

    def finish() -> None:
        if rank() == 0:
            if fence is not None:
                fence.check()
            commit(path, {name: entry for part in parts for name, entry in part.items()})

    try:
        parts = _together(path, write, gather)
        _together(path, finish, gather)
    except Exception:
        if rank() == 0 and not is_remote(path):
            remove_folder(working_name(path))  # a full disk needs the room
        raise
    return path


def _together(path: Path, action: Callable[[], Any], gather: Callable[[Any], list[Any]]) -> list[Any]:
    """What `action` returned on each rank; if it failed on any, an error on all of them."""
    outcome: Any = None
    failure: Exception | None = None
    try:
        with answering(path):
            outcome = action()
    except Exception as error:  # noqa: BLE001 (raised below, when the others know)
        failure = error
    outcomes = gather((outcome, None if failure is None else f"{failure}"))
    if failure is not None:
        raise failure
    for number, (_, text) in enumerate(outcomes):
        if text is not None:
            raise ConfigError(f"rank {number} could not save: {text}")
    return [result for result, _ in outcomes]


def _write_files(path: Path, state: HostState) -> dict[str, FileEntry]:
    """Write this rank's files of a checkpoint and return their entries in the manifest."""
    with _local_folder(path) as local:
        shard = local / f"zero_{rank():05d}_of_{world_size():05d}.safetensors"
        save_tensors(state.tensors, shard, metadata={"fragments": json.dumps(state.header)})
        files = [shard]
        if rank() == 0:
            save_tensors(state.untrained, local / AUX_FILE)
            (local / META_FILE).write_text(json.dumps(state.meta, indent=1), encoding="utf-8")
            files += [local / AUX_FILE, local / META_FILE]
        entries = {file.name: file_entry(file) for file in files}
        if is_remote(path):
            for file in files:
                upload(file, path / file.name)
    return entries


@contextmanager
def _local_folder(path: Path) -> Iterator[Path]:
    """Folder on a disk into which this rank writes its files of a checkpoint; for a store one that is removed."""
    if not is_remote(path):
        working_name(path).mkdir(parents=True, exist_ok=True)
        yield working_name(path)
        return
    prefix = "kymo-upload-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):  # of a process that was killed
        pid = left.name.removeprefix(prefix).partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}-") as name:
        yield Path(name)


def read_meta(path: Path) -> dict[str, Any]:
    """meta.json of a checkpoint."""
    try:
        meta = json.loads((path / META_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise ContractError(f"{path / META_FILE}: not readable ({error}); delete the checkpoint") from None
    if meta["format_version"] != FORMAT_VERSION:
        raise ContractError(f"{path}: format {meta['format_version']}, this kymo reads {FORMAT_VERSION}")
    return meta


def load_checkpoint(path: Path, model: Any) -> Progress:
    """Fill weights, moments and buffers of an initialised model, at any world size; return the progress.

    Raises:
        ConfigError: The model has other parameters than the checkpoint.
        ContractError: The files do not cover a parameter.
    """
    meta = read_meta(path)
    now = parameter_shapes(model)
    if now != meta["shapes"]:
        names = sorted(k for k in now.keys() | meta["shapes"].keys() if now.get(k) != meta["shapes"].get(k))
        raise ConfigError(f"{path}: other parameters or shapes than the model: {', '.join(names[:5])}")
    begin_load(model)
    with Pieces(path) as pieces:
        for fragment in held_fragments(model):
            _fill(fragment, pieces)
    end_load(model)
    _load_untrained(path, model)
    fields = meta["progress"]
    return Progress(**{**fields, "data": state_from_json(fields["data"])})


def _fill(fragment: Fragment, pieces: Pieces) -> None:
    """Ask for the stored values of a fragment; they are in its views when `pieces` is left."""
    for state in STATES:
        step = pieces.want(state, fragment.name, fragment.start, fragment.tensors[state])
        fragment.adam["step"].fill_(step)


def _load_untrained(path: Path, model: Any) -> None:
    stored = load((path / AUX_FILE).read_bytes())
    frozen = [(name, p) for name, p in model.module.named_parameters() if not p.requires_grad]
    buffers = {name: buffer for name, buffer in model.module.named_buffers() if name in stored}
    expected = {name for name, _ in frozen} | buffers.keys()
    if expected != stored.keys():
        raise ConfigError(f"{path}: other buffers than the model: {sorted(expected ^ stored.keys())[:5]}")
    with torch.no_grad(), gathered(model, [parameter for _, parameter in frozen], is_written=True):
        for name, tensor in [*frozen, *buffers.items()]:
            tensor.copy_(stored[name])


def read_weights(path: Path, *, prefix: str = "") -> dict[str, torch.Tensor]:
    """fp32 weights and buffers of a checkpoint whose names begin with `prefix`, which is cut off."""
    shapes = {k: v for k, v in read_meta(path)["shapes"].items() if k.startswith(prefix)}
    weights = {name: torch.empty(torch.Size(shape)) for name, shape in shapes.items()}
    try:
        with Pieces(path) as pieces:
            for name, tensor in weights.items():
                pieces.want("fp32", name, 0, tensor.view(-1))
        aux = load((path / AUX_FILE).read_bytes())
    except SafetensorError as error:
        raise ContractError(f"{path}: not a readable checkpoint ({error}); delete it") from None
    return {k.removeprefix(prefix): t for k, t in (weights | aux).items() if k.startswith(prefix)}
