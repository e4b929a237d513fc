"""Checkpoints of a run that learns tasks: trainable tensors, optimizer moments, best tensors so far.

They lie, are committed, verified and cleared away as those of pretraining (trainer/checkpoint_store.py), on a disk or
in an object store: `step-000000040-a1/` with `tensors.safetensors`, `meta.json` and a manifest, which is written last.
Nothing in them depends on the number of ranks or on who splits the optimizer among them; the first rank does it all.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from adapters.model import TaskModel
from adapters.update import MOMENTS, Moments
from manifests.config import write_atomically
from manifests.errors import ConfigError, ContractError
from trainer.checkpoint_store import (
    META_FILE,
    FileEntry,
    checkpoint_name,
    collect_garbage,
    commit,
    committed_checkpoints,
    newest_checkpoint,
    set_aside,
    verify_checkpoint,
    working_name,
)
from trainer.config import differences
from trainer.lock import Fence
from trainer.storage import answering, is_remote, remove_folder

logger = logging.getLogger(__name__)

Identity = Mapping[str, Any]
"""Everything that decides the trained numbers of a run, plain data by dotted key."""

TENSORS_FILE = "tensors.safetensors"
KEPT = 2


@dataclass(slots=True, kw_only=True)
class Progress:
    """What survives a restart beside the tensors.

    Attributes:
        step: Optimizer steps done. Every random draw is a function of it, so this is all of the data's state too.
        best_step: Step with the highest score.
        best_score: Mean of the tasks' primary metrics on `val` there.
        skipped: Steps among them that changed nothing, for their gradient was not finite.
    """

    step: int = 0
    best_step: int = 0
    best_score: float | None = None
    skipped: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint in memory: `weights` and `best` (empty before there is one) by parameter, `moments` as AdamW's."""

    progress: Progress
    weights: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor]
    moments: Moments


def copy_trainable(model: TaskModel) -> dict[str, torch.Tensor]:
    """Copies of the trainable tensors on the host, by name."""
    return {name: parameter.detach().cpu().clone() for name, parameter in model.trainable().items()}


def put_trainable(model: TaskModel, tensors: Mapping[str, torch.Tensor], *, where: str) -> None:
    """Copy tensors into the trainable parameters; ContractError when names or shapes differ."""
    parameters = model.trainable()
    if parameters.keys() != tensors.keys() or any(p.shape != tensors[n].shape for n, p in parameters.items()):
        raise ContractError(f"{where}: holds other tensors than this model trains; start in another run_dir")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, fence: Fence, identity: Identity) -> Path:
    """Commit a checkpoint and remove all but the newest two; returns its folder. Of one rank alone.

    Raises:
        ConfigError: It cannot be written, or a later start has claimed the run; the checkpoint before it stands.
    """
    tensors = {f"model/{name}": tensor for name, tensor in checkpoint.weights.items()}
    tensors |= {f"best/{name}": tensor for name, tensor in checkpoint.best.items()}
    for name, state in checkpoint.moments.items():
        tensors |= {f"optimizer/{moment}/{name}": state[moment] for moment in MOMENTS}
    meta = {"progress": asdict(checkpoint.progress), "identity": identity}
    files = {TENSORS_FILE: save(tensors), META_FILE: json.dumps(meta, indent=1).encode()}
    path = folder / checkpoint_name(checkpoint.progress.step, fence.attempt)
    try:
        with answering(path):
            fence.check()
            for name, content in files.items():
                write_atomically(working_name(path) / name, content)
            fence.check()
            commit(path, {name: _entry(content) for name, content in files.items()})
            collect_garbage(folder, keep=KEPT, attempt=fence.attempt)
    except Exception:
        if not is_remote(path):
            remove_folder(working_name(path))  # a full disk needs the room
        raise
    return path


def find_checkpoint(folder: Path, *, identity: Identity) -> Checkpoint | None:
    """The newest checkpoint that verifies; a damaged one is set aside. Of one rank alone.

    Raises:
        ConfigError: It belongs to another configuration, encoder or snapshot.
    """
    with answering(folder):
        for path in committed_checkpoints(folder):
            try:
                verify_checkpoint(path)
            except ContractError as error:
                set_aside(path, str(error))
                continue
            meta = json.loads((path / META_FILE).read_bytes())
            check_identity(path, meta["identity"], identity)
            return _read(path, Progress(**meta["progress"]))
    return None


def _read(path: Path, progress: Progress) -> Checkpoint:
    sections = _sections(load((path / TENSORS_FILE).read_bytes()))
    moments: Moments = {}
    for moment in MOMENTS:
        for name, tensor in sections.get(f"optimizer/{moment}", {}).items():
            moments.setdefault(name, {})[moment] = tensor
    return Checkpoint(progress=progress, weights=sections["model"], best=sections.get("best", {}), moments=moments)


def check_owner(folder: Path, *, identity: Identity) -> None:
    """ConfigError when the newest checkpoint is another run's: who is not its owner may not even claim it."""
    with answering(folder):
        path = newest_checkpoint(folder)
        if path is None:
            return
        try:
            found = dict(json.loads((path / META_FILE).read_bytes())["identity"])
        except (OSError, ValueError, KeyError, TypeError):
            return  # damaged: `find_checkpoint` says so
    check_identity(path, found, identity)


def _entry(content: bytes) -> FileEntry:
    return FileEntry(num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def check_identity(path: Path, found: Identity, expected: Identity) -> None:
    """ConfigError with the keys that differ when a run folder belongs to another run."""
    if keys := differences(found, expected):
        raise ConfigError(
            f"{path}: belongs to another configuration, encoder or snapshot ({'; '.join(keys)}); set it back, or "
            "choose another run_dir and storage"
        )


def _sections(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    sections: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        section, _, name = key.rpartition("/")
        sections.setdefault(section, {})[name] = tensor
    return sections
