"""Checkpoints of a run that learns tasks: trainable tensors, optimizer moments, best tensors so far.

`step-N.safetensors` is written first and `step-N.json`, which holds the SHA-256 of both, last; each beside its place
and then renamed. Without a JSON that fits there is no checkpoint, so a kill at any moment leaves the one before.
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
from manifests.config import digest, write_atomically
from manifests.errors import ConfigError, ContractError

logger = logging.getLogger(__name__)

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


def save_checkpoint(run_dir: Path, checkpoint: Checkpoint, *, fingerprint: str) -> None:
    """Write a checkpoint and remove all but the newest two."""
    tensors = {f"model/{name}": tensor for name, tensor in checkpoint.weights.items()}
    tensors |= {f"best/{name}": tensor for name, tensor in checkpoint.best.items()}
    for name, state in checkpoint.moments.items():
        tensors |= {f"optimizer/{moment}/{name}": state[moment] for moment in MOMENTS}
    content = save(tensors)
    stem = folder(run_dir) / f"step-{checkpoint.progress.step:07d}"
    write_atomically(stem.with_suffix(".safetensors"), content)
    meta = {**asdict(checkpoint.progress), "fingerprint": fingerprint}
    write_atomically(stem.with_suffix(".json"), json.dumps({**meta, "sha256": _seal(meta, content)}, indent=2) + "\n")
    for old in sorted(folder(run_dir).glob("step-*.json"))[:-KEPT]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)


def find_checkpoint(run_dir: Path, *, fingerprint: str) -> Checkpoint | None:
    """The newest checkpoint that verifies.

    Raises:
        ConfigError: It belongs to another configuration, encoder or snapshot.
    """
    for path in sorted(folder(run_dir).glob("step-*.json"), reverse=True):
        tensor_file = path.with_suffix(".safetensors")
        content = tensor_file.read_bytes() if tensor_file.exists() else b""
        meta = _read_meta(path)
        if meta.pop("sha256", None) != _seal(meta, content):
            logger.warning("%s: it is damaged, or its tensors are; the checkpoint before is taken", path)
            continue
        check_fingerprint(path, meta.pop("fingerprint"), fingerprint)
        sections = _sections(load(content))
        moments: Moments = {}
        for moment in MOMENTS:
            for name, tensor in sections.get(f"optimizer/{moment}", {}).items():
                moments.setdefault(name, {})[moment] = tensor
        return Checkpoint(
            progress=Progress(**meta), weights=sections["model"], best=sections.get("best", {}), moments=moments
        )
    return None


def _seal(meta: Mapping[str, Any], content: bytes) -> str:
    """SHA-256 (hex) of both files of a checkpoint."""
    return digest([dict(meta), hashlib.sha256(content).hexdigest()])


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return meta if isinstance(meta, dict) else {}


def check_fingerprint(path: Path, found: str, expected: str) -> None:
    """ConfigError when a run folder belongs to another run."""
    if found != expected:
        raise ConfigError(
            f"{path}: belongs to another configuration, encoder or snapshot ({found[:12]}, now {expected[:12]}); "
            "set it back or choose another run_dir"
        )


def folder(run_dir: Path) -> Path:
    """Where the checkpoints of a run lie."""
    return run_dir / "checkpoints"


def _sections(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    sections: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        section, _, name = key.rpartition("/")
        sections.setdefault(section, {})[name] = tensor
    return sections
