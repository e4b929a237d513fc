"""Where the checkpoints of a run lie, on a disk or in an object store: names, commit, verification, clearing away.

A checkpoint is a folder of files and a `MANIFEST.json` with their sizes and hashes, which is written last. On a disk
all is written to a folder `.tmp-…` beside and renamed; a store cannot rename, and there a folder without a manifest is
no checkpoint. Every start of a run (an attempt) uses names of its own, so a partial checkpoint is never picked up and
two attempts never mix their files.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from torch import distributed

from manifests.errors import ConfigError, ContractError
from trainer.collectives import from_rank_zero, rank, world_size
from trainer.lock import Fence, claim
from trainer.mirror import DAMAGED_FILE, MANIFEST_FILE
from trainer.storage import (
    answering,
    create_exclusively,
    is_remote,
    names_below,
    names_in,
    remove_folder,
    sizes_in,
    sync_folder,
)

logger = logging.getLogger(__name__)

META_FILE = "meta.json"
ATTEMPTS_FOLDER = "attempts"  # beside the folder of checkpoints
_NAME = re.compile(r"(?:\.tmp-|damaged-)?step-(\d{9})-a(\d+)")
State = Literal["committed", "unfinished", "damaged"]


class FileEntry(BaseModel):
    """What the manifest says of a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_bytes: int
    sha256: str


_Manifest = TypeAdapter(dict[str, FileEntry])


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A folder that bears a checkpoint's name.

    Attributes:
        path: Of the folder.
        step: Optimizer steps done.
        attempt: Start of the run that wrote it.
        state: Whether it was committed, was never finished, or did not verify once.
    """

    path: Path
    step: int
    attempt: int
    state: State


def checkpoint_name(step: int, attempt: int) -> str:
    """Folder name, unique for (step, attempt)."""
    return f"step-{step:09d}-a{attempt}"


def step_of(path: Path) -> int:
    """Optimizer steps done at a checkpoint, from its name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ContractError(f"{path}: not the name of a checkpoint")
    return int(match[1])


def stored_checkpoints(folder: Path) -> list[Stored]:
    """Whatever bears a checkpoint's name, newest first by step, then by attempt; by one listing."""
    found: list[Stored] = []
    states: dict[str, State]
    if is_remote(folder):
        states = {name: _state_in_store(files) for name, files in names_below(folder).items()}
    else:
        states = {name: _state_on_disk(name) for name in names_in(folder)}
    for name, state in states.items():
        if match := _NAME.fullmatch(name):
            found.append(Stored(path=folder / name, step=int(match[1]), attempt=int(match[2]), state=state))
    return sorted(found, key=lambda stored: (stored.step, stored.attempt), reverse=True)


def _state_in_store(files: set[str]) -> State:
    if MANIFEST_FILE not in files:
        return "unfinished"
    return "damaged" if DAMAGED_FILE in files else "committed"


def _state_on_disk(name: str) -> State:
    if name.startswith("."):
        return "unfinished"
    return "damaged" if name.startswith("damaged-") else "committed"


def committed_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, newest first, without looking into them."""
    return [stored.path for stored in stored_checkpoints(folder) if stored.state == "committed"]


def newest_checkpoint(folder: Path) -> Path | None:
    """Newest committed checkpoint, without looking into it."""
    return next(iter(committed_checkpoints(folder)), None)


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def claim_attempt(folder: Path) -> Fence:
    """Number of this start of the run whose checkpoints lie in `folder`, the same on all ranks; the earlier ones end.

    Raises:
        ConfigError: The store does not answer, or nothing can be written there.
    """
    claims = folder.parent / ATTEMPTS_FOLDER
    outcome: int | str = 0
    if rank() == 0:
        try:
            with answering(folder):
                highest = max((stored.attempt for stored in stored_checkpoints(folder)), default=0)
                outcome = claim(claims, at_least=highest + 1).attempt
        except ConfigError as error:
            outcome = str(error)
    outcome = from_rank_zero(outcome)
    if isinstance(outcome, str):
        raise ConfigError(outcome)
    return Fence(folder=claims, attempt=outcome)


def file_entry(path: Path) -> FileEntry:
    """Size and hash of a local file, which survives a power cut afterwards."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(num_bytes=os.fstat(file.fileno()).st_size, sha256=sha256)


def working_name(path: Path) -> Path:
    """Where the files of a checkpoint are written before it is committed."""
    return path if is_remote(path) else path.with_name(f".tmp-{path.name}")


def commit(path: Path, entries: Mapping[str, FileEntry]) -> None:
    """Write the manifest of a checkpoint whose files lie under its `working_name`: from now on it counts.

    Raises:
        ConfigError: Not all bytes have arrived, or the checkpoint exists already.
    """
    content = json.dumps({name: entry.model_dump() for name, entry in sorted(entries.items())}, indent=1).encode()
    sizes = {name: entry.num_bytes for name, entry in entries.items()}
    if (arrived := sizes_in(working_name(path))) != sizes:
        raise ConfigError(
            f"{working_name(path)}: holds {arrived} and not {sizes}; on several machines run_dir must be a folder that "
            "all of them share, or storage an object store"
        )
    if not is_remote(path) and path.exists():
        raise ConfigError(f"{path}: exists already; another process has taken this name")
    try:
        create_exclusively(working_name(path) / MANIFEST_FILE, content)
    except FileExistsError:
        raise ConfigError(f"{path}: committed already; another process has taken this name") from None
    if not is_remote(path):
        working_name(path).rename(path)
        sync_folder(path.parent)


def verify_checkpoint(path: Path) -> None:
    """Nothing, if every file of a checkpoint has the size and the SHA-256 of its manifest.

    Raises:
        ContractError: A file is missing, too many, short or changed.
    """
    manifest = _read_manifest(path)
    _check_sizes(path, manifest)
    for name, entry in manifest.items():
        _check_hash(path / name, entry)


def _read_manifest(path: Path) -> dict[str, FileEntry]:
    try:
        return _Manifest.validate_json((path / MANIFEST_FILE).read_bytes())
    except FileNotFoundError:
        raise ContractError(f"{path}: no {MANIFEST_FILE}; it was never committed") from None
    except ValidationError as error:
        raise ContractError(f"{path / MANIFEST_FILE}: not readable: {error.errors()[0]['msg']}; delete it") from None


def _check_sizes(path: Path, manifest: Mapping[str, FileEntry]) -> None:
    """By one listing, before anything is read."""
    sizes = {name: size for name, size in sizes_in(path).items() if name not in {MANIFEST_FILE, DAMAGED_FILE}}
    if missing := sorted(manifest.keys() - sizes.keys()):
        raise ContractError(f"{path}: {', '.join(missing)} of its manifest is missing; delete the checkpoint")
    if extra := sorted(sizes.keys() - manifest.keys()):
        raise ContractError(f"{path}: {', '.join(extra)} is not in its manifest; delete the checkpoint")
    for name, entry in manifest.items():
        if sizes[name] != entry.num_bytes:
            raise ContractError(
                f"{path / name}: {sizes[name]} bytes, {entry.num_bytes} in the manifest; delete the checkpoint"
            )


def _check_hash(path: Path, entry: FileEntry) -> None:
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            raise ContractError(f"{path}: its SHA-256 is not the manifest's; delete the checkpoint")


def find_checkpoint(folder: Path) -> Path | None:
    """Newest checkpoint that verifies, the same on all ranks, each of which reads its share; None if there is none.

    A damaged one is set aside (renamed to `damaged-…`; in a store marked) with a warning, and the one before is tried.
    """
    names = [path.name for path in committed_checkpoints(folder)] if rank() == 0 else []
    for name in from_rank_zero(names):
        path, damage = folder / name, ""
        try:
            manifest = _read_manifest(path)
            _check_sizes(path, manifest)
            for file in sorted(manifest)[rank() :: world_size()]:
                _check_hash(path / file, manifest[file])
        except ContractError as error:
            damage = str(error)
        found = [text for text in gather_objects(damage) if text]
        if not found:
            return path
        if rank() == 0:
            set_aside(path, found[0])
    return None


def set_aside(path: Path, damage: str) -> None:
    """Take a damaged checkpoint out of those that count; of one rank alone."""
    logger.warning("%s; going back to the checkpoint before it", damage)
    if is_remote(path):
        (path / DAMAGED_FILE).write_bytes(damage.encode())
    else:
        path.rename(path.with_name(f"damaged-{path.name}"))


def collect_garbage(
    folder: Path, *, keep: int, attempt: int, keep_every: int | None = None, keep_best: str | None = None
) -> None:
    """Delete what is not kept, and what earlier attempts left unfinished (rank 0).

    Args:
        folder: Folder of all checkpoints of the run.
        keep: So many of the newest stay.
        attempt: Number of this start.
        keep_every: Those of every so many steps stay for good.
        keep_best: Name of a score: the checkpoint with the highest one stays; `-name`: the lowest.
    """
    if rank() != 0:
        return
    stored = stored_checkpoints(folder)
    committed = [item.path for item in stored if item.state == "committed"]
    kept = set(committed[:keep])
    if keep_every is not None:
        kept |= {path for path in committed if step_of(path) % keep_every == 0}
    if keep_best is not None and (best := best_checkpoint(committed, keep_best)) is not None:
        kept.add(best)
    unfinished = [item.path for item in stored if item.state == "unfinished" and item.attempt < attempt]
    for path in [*(path for path in committed if path not in kept), *unfinished]:
        _delete(path)


def best_checkpoint(paths: list[Path], score: str) -> Path | None:
    """Checkpoint with the highest `score` (`-score`: the lowest), the newest of equals; None if none has it."""
    name, sign = score.removeprefix("-"), -1.0 if score.startswith("-") else 1.0
    scores = [
        (sign * value, step_of(path), path) for path in paths if (value := read_scores(path).get(name)) is not None
    ]
    return max(scores, key=lambda item: item[:2])[2] if scores else None


def read_scores(path: Path) -> dict[str, float]:
    """Scores of the evaluation at a checkpoint's step; empty if there was none."""
    try:
        return json.loads((path / META_FILE).read_bytes()).get("scores", {})
    except (OSError, ValueError):
        return {}


def _delete(path: Path) -> None:
    """Delete a checkpoint so that one half deleted counts as unfinished."""
    if is_remote(path):
        (path / MANIFEST_FILE).unlink(missing_ok=True)
    elif not path.name.startswith("."):
        path = path.rename(working_name(path))
    remove_folder(path)
