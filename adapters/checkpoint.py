"""Checkpoints of a run that learns tasks: trainable tensors, optimizer moments, best tensors so far.

`step-N.safetensors` is written first and `step-N.json`, which holds its SHA-256, last; each beside its place and then
renamed. Without a JSON that fits there is no checkpoint, so a kill at any moment leaves the one before.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save

from adapters.model import TaskModel
from manifests.config import write_atomically
from manifests.errors import ConfigError, ContractError

logger = logging.getLogger(__name__)

KEPT = 2
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(slots=True, kw_only=True)
class Progress:
    """What survives a restart beside the tensors. `best_score` is a mean of primary metrics on `val`."""

    step: int = 0
    best_step: int = 0
    best_score: float | None = None


def copy_trainable(model: TaskModel) -> dict[str, torch.Tensor]:
    """Copies of the trainable tensors by name."""
    return {name: parameter.detach().clone() for name, parameter in model.trainable().items()}


def put_trainable(model: TaskModel, tensors: Mapping[str, torch.Tensor], *, where: str) -> None:
    """Copy tensors into the trainable parameters; ContractError when names or shapes differ."""
    parameters = model.trainable()
    if parameters.keys() != tensors.keys() or any(p.shape != tensors[n].shape for n, p in parameters.items()):
        raise ContractError(f"{where}: holds other tensors than this model trains; start in another run_dir")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def save_checkpoint(
    run_dir: Path,
    *,
    model: TaskModel,
    optimizer: torch.optim.Optimizer,
    best: Mapping[str, torch.Tensor],
    progress: Progress,
    fingerprint: str,
) -> None:
    """Write a checkpoint and remove all but the newest two."""
    tensors = {f"model/{name}": tensor for name, tensor in copy_trainable(model).items()}
    tensors |= {f"best/{name}": tensor for name, tensor in best.items()}
    for name, parameter in model.trainable().items():
        for moment in MOMENTS:
            if moment in optimizer.state[parameter]:
                tensors[f"optimizer/{moment}/{name}"] = optimizer.state[parameter][moment].detach().clone()
    content = save(tensors)
    stem = folder(run_dir) / f"step-{progress.step:07d}"
    write_atomically(stem.with_suffix(".safetensors"), content)
    meta = {**asdict(progress), "fingerprint": fingerprint, "sha256": hashlib.sha256(content).hexdigest()}
    write_atomically(stem.with_suffix(".json"), json.dumps(meta, indent=2) + "\n")
    for old in sorted(folder(run_dir).glob("step-*.json"))[:-KEPT]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)


def resume(
    run_dir: Path, *, model: TaskModel, optimizer: torch.optim.Optimizer, fingerprint: str
) -> tuple[Progress, dict[str, torch.Tensor]]:
    """State of the newest checkpoint that verifies, put in place; a fresh state where there is none.

    Raises:
        ConfigError: The checkpoint belongs to another configuration, encoder or snapshot.
    """
    for path in sorted(folder(run_dir).glob("step-*.json"), reverse=True):
        meta = json.loads(path.read_text())
        tensor_file = path.with_suffix(".safetensors")
        content = tensor_file.read_bytes() if tensor_file.exists() else b""
        if hashlib.sha256(content).hexdigest() != meta.pop("sha256"):
            logger.warning("%s: its tensors are damaged or missing; the checkpoint before is taken", path)
            continue
        check_fingerprint(path, meta.pop("fingerprint"), fingerprint)
        sections = _sections(load(content))
        put_trainable(model, sections["model"], where=str(tensor_file))
        for name, parameter in model.trainable().items():
            state = {m: sections[f"optimizer/{m}"][name] for m in MOMENTS}
            # AdamW counts its steps on the CPU, wherever the moments lie.
            optimizer.state[parameter] = {m: x if m == "step" else x.to(parameter.device) for m, x in state.items()}
        progress = Progress(**meta)
        logger.info("%s: continuing after step %d", run_dir, progress.step)
        return progress, sections.get("best", {})
    return Progress(), {}


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
