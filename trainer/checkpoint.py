"""Checkpoints: named ZeRO fragments in safetensors plus JSON, free of the world size, committed by a hash manifest.

    checkpoints/step-000000040-a1/
        zero_00000_of_00002.safetensors   keys `<state>::<parameter>`, 1-D fp32; header: name → [start, numel, step]
        aux.safetensors                   persistent buffers and frozen parameters
        meta.json                         progress, shapes, optimizer groups, configuration
        MANIFEST.json                     file → size, SHA-256; written last

All is written to a folder `.tmp-…` beside and renamed after the manifest, and every start of a run (an attempt)
uses names of its own, so a partial checkpoint is never picked up and two attempts never mix their files.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import distributed

from manifests.errors import ConfigError, ContractError
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
from trainer.zero import gathered

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST_FILE = "MANIFEST.json"
META_FILE = "meta.json"
AUX_FILE = "aux.safetensors"
NAME_PATTERN = re.compile(r"(?:\.tmp-|damaged-)?step-(\d{9})-a(\d+)")
SEPARATOR = "::"


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


def checkpoint_name(step: int, attempt: int) -> str:
    """Folder name, unique for (step, attempt)."""
    return f"step-{step:09d}-a{attempt}"


def next_attempt(folder: Path) -> int:
    """Number of this start of the run: one more than any name in `folder` holds. Same on all ranks."""
    attempts = [int(match[2]) for _, match in _named(folder)]
    return _from_rank_zero(max(attempts, default=0) + 1)


def _named(folder: Path) -> list[tuple[Path, re.Match[str]]]:
    """Folders that carry a checkpoint's name, newest first by step, then by attempt."""
    if not folder.is_dir():
        return []
    found = [(path, match) for path in folder.iterdir() if (match := NAME_PATTERN.fullmatch(path.name))]
    return sorted(found, key=lambda item: (int(item[1][1]), int(item[1][2])), reverse=True)


def _from_rank_zero(value: int) -> int:
    """Rank 0's value on all ranks."""
    if world_size() == 1:
        return value
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor([value], dtype=torch.int64, device=device)
    distributed.broadcast(tensor, src=0)
    return int(tensor.item())


def _barrier() -> None:
    if world_size() > 1:
        distributed.barrier()


def save_checkpoint(folder: Path, model: Any, *, progress: Progress, attempt: int, extra: Mapping[str, Any]) -> Path:
    """Write a checkpoint, all ranks together, and return its folder; after that it survives a power cut.

    Args:
        folder: Folder of all checkpoints of the run.
        model: What `initialise` returned.
        progress: What to write with it.
        attempt: Number of this start of the run.
        extra: Plain data for meta.json.
    """
    name = checkpoint_name(progress.step, attempt)
    temporary, final = folder / f".tmp-{name}", folder / name
    if rank() == 0:
        temporary.mkdir(parents=True)
    _barrier()
    stage = model.zero_optimization_stage()
    _write_fragments(
        temporary / f"zero_{rank():05d}_of_{world_size():05d}.safetensors",
        [fragment.owned(stage=stage) for fragment in held_fragments(model)],
    )
    untrained = untrained_tensors(model)
    _barrier()
    if rank() == 0:
        save_file({key: t.cpu().contiguous() for key, t in untrained.items()}, temporary / AUX_FILE)
        groups = [
            {key: value for key, value in group.items() if isinstance(value, int | float | tuple | list)}
            for group in ({k: v for k, v in g.items() if k != "params"} for g in model.optimizer.param_groups)
        ]
        meta = {
            "format_version": FORMAT_VERSION,
            "world_size": world_size(),
            "zero_stage": stage,
            "shapes": parameter_shapes(model),
            "optimizer_groups": groups,
            "progress": asdict(progress) | {"data": progress.data.to_json()},
            "random": "torch reseeded at every step from (seed, step, rank)",
            **extra,
        }
        (temporary / META_FILE).write_text(json.dumps(meta, indent=1), encoding="utf-8")
        _commit(temporary, final)
    _barrier()
    return final


def _write_fragments(path: Path, fragments: list[Fragment]) -> None:
    tensors = {
        f"{state}{SEPARATOR}{fragment.name}": fragment.tensors[state].detach().cpu().clone()
        for fragment in fragments
        for state in STATES
    }
    header = {f.name: [f.start, f.numel, float(f.adam["step"])] for f in fragments}
    save_file(tensors, path, metadata={"fragments": json.dumps(header)})


def _commit(temporary: Path, final: Path) -> None:
    """Flush every file, write the manifest, rename."""
    manifest: dict[str, dict[str, Any]] = {}
    for path in sorted(temporary.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        manifest[path.name] = {"num_bytes": path.stat().st_size, "sha256": sha256}
    with (temporary / MANIFEST_FILE).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def step_of(path: Path) -> int:
    """Optimizer steps done at a checkpoint, from its name."""
    match = NAME_PATTERN.fullmatch(path.name)
    if match is None:
        raise ContractError(f"{path}: not the name of a checkpoint")
    return int(match[1])


def newest_checkpoint(folder: Path) -> Path | None:
    """Newest committed checkpoint, without looking into it."""
    return next((path for path, _ in _named(folder) if path.name.startswith("step-")), None)


def verify_checkpoint(path: Path) -> None:
    """Nothing, if every file of a checkpoint has the size and the SHA-256 of its manifest.

    Raises:
        ContractError: A file is missing, too many, short or changed.
    """
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise ContractError(f"{path}: no readable {MANIFEST_FILE} ({error}); it was never committed") from None
    present = {item.name for item in path.iterdir()} - {MANIFEST_FILE}
    if present != manifest.keys():
        raise ContractError(f"{path}: holds {sorted(present ^ manifest.keys())} against its manifest; delete it")
    for name, entry in manifest.items():
        with (path / name).open("rb") as file:
            is_same = os.fstat(file.fileno()).st_size == entry["num_bytes"] and (
                hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
            )
        if not is_same:
            raise ContractError(f"{path / name}: size or SHA-256 is not the manifest's; delete the checkpoint")


def find_checkpoint(folder: Path) -> Path | None:
    """Newest checkpoint that verifies, the same on all ranks; None if there is none.

    A damaged one is renamed to `damaged-…` with a warning, and the one before it is tried.
    """
    index = -1
    committed = [(p, m) for p, m in _named(folder) if p.name.startswith("step-")]
    if rank() == 0:
        for number, (path, _) in enumerate(committed):
            try:
                verify_checkpoint(path)
            except ContractError as error:
                logger.warning("%s; going back to the checkpoint before it", error)
                path.rename(path.with_name(f"damaged-{path.name}"))
            else:
                index = number
                break
    if (step := _from_rank_zero(int(committed[index][1][1]) if index >= 0 else -1)) < 0:
        return None
    attempt = _from_rank_zero(int(committed[index][1][2]) if index >= 0 else -1)
    return folder / checkpoint_name(step, attempt)


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
    with _Pieces(path) as pieces:
        for fragment in held_fragments(model):
            pieces.fill(fragment)
    end_load(model)
    _load_untrained(path, model)
    fields = meta["progress"]
    return Progress(**{**fields, "data": state_from_json(fields["data"])})


class _Pieces:
    """The fragments in the files of a checkpoint, whatever world size wrote them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [safe_open(file, framework="pt") for file in sorted(path.glob("zero_*.safetensors"))]
        self.index: dict[str, list[tuple[Any, int, int, float]]] = {}
        for file in self.files:
            for name, (start, numel, step) in json.loads(file.metadata()["fragments"]).items():
                self.index.setdefault(name, []).append((file, start, numel, step))

    def __enter__(self) -> "_Pieces":
        return self

    def __exit__(self, *_: object) -> None:
        self.index.clear()
        self.files.clear()  # the last reference unmaps the file

    def overlaps(self, name: str, start: int, numel: int) -> Iterator[tuple[Any, slice, slice, float]]:
        """(file, range in its fragment, range in [start, start + numel), Adam's step) that cover the range."""
        for file, piece_start, piece_numel, step in self.index.get(name, ()):
            low, high = max(start, piece_start), min(start + numel, piece_start + piece_numel)
            if low < high:
                yield file, slice(low - piece_start, high - piece_start), slice(low - start, high - start), step

    def fill(self, fragment: Fragment) -> None:
        """Write the files' values into a fragment's views."""
        covered = 0
        for file, there, here, step in self.overlaps(fragment.name, fragment.start, fragment.numel):
            for state in STATES:
                stored = file.get_slice(f"{state}{SEPARATOR}{fragment.name}")[there]
                fragment.tensors[state][here].copy_(stored)
            fragment.adam["step"].fill_(step)
            covered += here.stop - here.start
        if covered != fragment.numel:
            raise ContractError(
                f"{self.path}: {covered} of {fragment.numel} values of {fragment.name} from {fragment.start} on"
            )


def _load_untrained(path: Path, model: Any) -> None:
    stored = load_file(path / AUX_FILE)
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
    weights: dict[str, torch.Tensor] = {}
    try:
        with _Pieces(path) as pieces:
            for name, shape in shapes.items():
                flat = torch.empty(torch.Size(shape).numel())
                covered = 0
                for file, there, here, _ in pieces.overlaps(name, 0, flat.numel()):
                    flat[here] = file.get_slice(f"fp32{SEPARATOR}{name}")[there]
                    covered += here.stop - here.start
                if covered != flat.numel():
                    raise ContractError(f"{path}: {covered} of {flat.numel()} values of {name}")
                weights[name.removeprefix(prefix)] = flat.reshape(shape)
        aux = load_file(path / AUX_FILE)
    except SafetensorError as error:
        raise ContractError(f"{path}: not a readable checkpoint ({error}); delete it") from None
    return weights | {k.removeprefix(prefix): t for k, t in aux.items() if k.startswith(prefix)}


def collect_garbage(folder: Path, *, keep: int, attempt: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what earlier attempts left unfinished (rank 0)."""
    if rank() != 0:
        return
    committed = [path for path, _ in _named(folder) if path.name.startswith("step-")]
    unfinished = [p for p, m in _named(folder) if p.name.startswith(".tmp-") and int(m[2]) < attempt]
    for path in [*committed[keep:], *unfinished]:
        shutil.rmtree(path)
