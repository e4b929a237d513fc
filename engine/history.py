"""Earlier snapshots of a folder that grew: `snapshots/DIGEST/`, as long as all their shards are there.

Appending recordings adds shards and replaces `snapshot.json`. The replaced one still says the truth about its own
shards, so it is kept: hard links to its two files and a symbolic link to the shards, no copy. Such a folder is a
snapshot like any other, and a training run that began on it goes on with its path.
"""

import hashlib
import os
import shutil
from collections.abc import Set
from pathlib import Path

from engine.shardwriter import SHARDS_DIR
from engine.storage import is_remote
from manifests.errors import ConfigError, ContractError
from manifests.shards import SAMPLES_FILE, SNAPSHOT_FILE, Snapshot, load_snapshot

HISTORY_DIR = "snapshots"
NAME_DIGITS = 16


def history_path(output: Path, digest: str) -> Path:
    """Folder of an earlier snapshot."""
    return output / HISTORY_DIR / digest[:NAME_DIGITS]


def _shards(snapshot: Snapshot) -> Set[tuple[str, str]]:
    return {(shard.path, shard.sha256) for shard in snapshot.shards}


def sound_snapshot(folder: Path) -> Snapshot | None:
    """Snapshot of a folder; None for none, for a damaged one and for one of another version."""
    try:
        snapshot = load_snapshot(folder)
        samples = hashlib.sha256((folder / SAMPLES_FILE).read_bytes()).hexdigest()
    except (ConfigError, ContractError, FileNotFoundError):
        return None
    return snapshot if samples == snapshot.samples_sha256 else None


def earlier(output: Path) -> list[Snapshot]:
    """Earlier snapshots that are kept, the smallest first."""
    if is_remote(output):
        return []
    found = [sound_snapshot(folder) for folder in sorted((output / HISTORY_DIR).glob("[!.]*"))]
    return sorted((item for item in found if item is not None), key=lambda item: item.counts.get("windows", 0))


def forget(output: Path, shards: Set[str]) -> None:
    """Remove every snapshot, the current one and earlier ones, that names a shard which is about to go."""
    folders = [output] if is_remote(output) else [output, *(output / HISTORY_DIR).glob("*")]
    for folder in folders:
        try:
            named = {shard.path for shard in load_snapshot(folder).shards}
        except (ConfigError, ContractError):  # none there, or a damaged one, which no reader takes either
            continue
        if named & shards:
            (folder / SNAPSHOT_FILE).unlink(missing_ok=True)


def refuse_repacked(output: Path) -> None:
    """Keep a conversion out of a folder whose shards it does not know and would remove.

    Raises:
        ConfigError: `kymo repack` has written the folder.
    """
    if (output / SNAPSHOT_FILE).exists() and "parent" in load_snapshot(output).provenance:
        raise ConfigError(f"{output}: holds a repacked snapshot; choose another output, and repack that one again")


def keep(output: Path, new: Snapshot) -> None:
    """Keep the snapshot that `new` is about to replace, and drop earlier ones whose shards are not all in `new`.

    Does nothing on a store, which has no links. Call it before either file is replaced.
    """
    if is_remote(output):
        return
    shards = _shards(new)
    for folder in (output / HISTORY_DIR).glob("*"):
        kept = None if folder.name.startswith(".") else sound_snapshot(folder)
        if kept is None or not _shards(kept) <= shards:
            shutil.rmtree(folder)
    old = sound_snapshot(output)
    if old is None or old.digest == new.digest or not _shards(old) <= shards:
        return
    target = history_path(output, old.digest)
    if target.exists():
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    for name in (SNAPSHOT_FILE, SAMPLES_FILE):
        (temporary / name).hardlink_to(output / name)
    (temporary / SHARDS_DIR).symlink_to(Path("..") / ".." / SHARDS_DIR, target_is_directory=True)
    temporary.rename(target)
