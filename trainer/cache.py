"""A node's cache of whole shards from an object store, shared by all processes of the node.

A shard is one file, named by its SHA-256, that appears whole and checked or not at all. Locks belong to the kernel, so
a process that is killed leaves none behind. There are three kinds: one per shard, while it is downloaded; one of the
folder, while room is made; and a shared one on the shard itself, held by every thread that reads it, which keeps it
from eviction.
"""

import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field

from manifests.errors import ConfigError, ContractError
from manifests.shards import ShardEntry, Snapshot
from trainer.samples import SnapshotSource, open_snapshot, shard_names
from trainer.storage import answering, is_remote, location

logger = logging.getLogger(__name__)

NUM_ATTEMPTS = 3
RETRY_WAIT_S = 1.0  # doubled before each further attempt
_HASH_BYTES = 1 << 22
_FRESH_S = 1.0  # a use is noted on the file at most so often


class CacheConfig(BaseModel):
    """Where a node keeps shards of `s3://` and `gs://` snapshots; a fast local disk, the same for all its workers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str
    max_bytes: Annotated[int, Field(ge=1)]  # kymo simulate tells how much is needed
    prefetch_shards: Annotated[int, Field(ge=0)] = 4  # downloaded before their first sample is due


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where a shard comes from: the folder of its snapshot, and its entry there."""

    folder: Path
    entry: ShardEntry


class ShardCache:
    """Local files of the shards of remote snapshots.

    `max_bytes` is kept except by shards in use: with too little room for those, a warning is logged and the limit
    exceeded, since ranks that wait for each other must not wait for room as well.

    Args:
        config: Folder and limits.
        snapshots: (folder, snapshot) of each.

    Raises:
        ConfigError: `max_bytes` is under the size of a shard.
    """

    def __init__(self, config: CacheConfig, snapshots: Sequence[tuple[Path, Snapshot]]) -> None:
        self.folder = Path(config.folder).absolute()
        self.prefetch_shards = config.prefetch_shards
        self.num_downloads = 0  # by this process
        self._max_bytes = config.max_bytes
        self._sources = {
            name: _Source(folder=folder, entry=entry)
            for folder, snapshot in snapshots
            for name, entry in zip(shard_names(folder, snapshot), snapshot.shards, strict=True)
        }
        largest = max((source.entry.num_bytes for source in self._sources.values()), default=0)
        if largest > config.max_bytes:
            raise ConfigError(
                f"cache.max_bytes: {config.max_bytes:,} is less than the largest shard ({largest:,} bytes); raise it"
            )
        with answering(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._pins: dict[int, tuple[Path, int, float]] = {}  # thread → shard, descriptor with a lock, time of the note
        self._refused: dict[Path, str] = {}
        self._ahead: set[Path] = set()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="prefetch")

    def locate(self, shard: Path) -> Path:
        """Local file of a shard, which stays there until the same thread locates another one.

        Raises:
            ContractError: What the store gives is not the shard that was written.
            ConfigError: The store does not answer, or the disk is full.
        """
        source = self._sources.get(shard)
        if source is None:  # of a snapshot on a disk
            return shard
        path = self._path(source.entry)
        thread, now = threading.get_ident(), time.monotonic()
        held = self._pins.get(thread)
        if held is not None and held[0] == shard and now - held[2] < _FRESH_S:
            return path
        self._unpin(thread)
        descriptor = _pin(path)
        while descriptor is None:
            descriptor = self._download(shard, source) or _pin(path)
        os.utime(descriptor)
        with self._lock:
            self._pins[thread] = (shard, descriptor, now)
        return path

    def prefetch(self, shards: Sequence[Path]) -> None:
        """Begin to download those of the shards that are not here; whoever locates one meanwhile waits for it."""
        with self._lock:
            wanted = [shard for shard in shards if shard in self._sources and shard not in self._ahead]
            self._ahead.update(wanted)
        for shard in wanted:
            self._pool.submit(self._fetch_ahead, shard)

    def _fetch_ahead(self, shard: Path) -> None:
        source = self._sources[shard]
        try:
            descriptor = None if self._path(source.entry).exists() else self._download(shard, source)
            if descriptor is not None:
                os.close(descriptor)
        except (ConfigError, ContractError, OSError) as error:
            logger.warning("%s: not fetched ahead (%s)", shard, error)  # it is tried again when it is needed
        finally:
            with self._lock:
                self._ahead.discard(shard)

    def close(self) -> None:
        """Let go of all shards and stop fetching ahead."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for thread in list(self._pins):
            self._unpin(thread)

    def _path(self, entry: ShardEntry) -> Path:
        return self.folder / f"{entry.sha256}.tar"

    def _unpin(self, thread: int) -> None:
        with self._lock:
            held = self._pins.pop(thread, None)
        if held is not None:
            os.close(held[1])

    def _download(self, shard: Path, source: _Source) -> int | None:
        """Bring a shard here, pinned by the descriptor; None if another thread or process did so first."""
        path = self._path(source.entry)
        if shard in self._refused:  # each of its samples asks again
            raise ContractError(self._refused[shard])
        with answering(self.folder), _locked(path.with_suffix(".lock")):
            if path.exists():
                return None
            part = path.with_suffix(".part")
            try:
                self._reserve(part, source.entry.num_bytes)
                self._try_often(shard, source, part)
                descriptor = _pin(part)  # a moment later it might be evicted already
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        with self._lock:
            self.num_downloads += 1
        return descriptor

    def _try_often(self, shard: Path, source: _Source, part: Path) -> None:
        store = cast("Any", source.folder)
        for attempt in range(1, NUM_ATTEMPTS + 1):
            try:
                with answering(source.folder):
                    store.fs.get_file(f"{store.path.rstrip('/')}/{source.entry.path}", str(part))
                _check(part, source.entry)
            except (ConfigError, ContractError) as error:
                logger.warning("%s: attempt %d of %d: %s", shard, attempt, NUM_ATTEMPTS, error)
                if attempt == NUM_ATTEMPTS:
                    if isinstance(error, ContractError):
                        self._refused[shard] = f"{shard}: {error}, {attempt} times; run kymo verify on the snapshot"
                        raise ContractError(self._refused[shard]) from None
                    raise
                time.sleep(RETRY_WAIT_S * 2 ** (attempt - 1))
            else:
                return

    def _reserve(self, part: Path, num_bytes: int) -> None:
        """Make room for a shard and take it, with the shards that were not used for the longest time."""
        with _locked(self.folder / "cache.lock"):
            files = []
            for item in self.folder.iterdir():
                with suppress(FileNotFoundError):  # a download that ended meanwhile
                    stat = item.stat()
                    if item.suffix != ".part" or not _remove_abandoned(item):
                        files.append((stat.st_mtime_ns, stat.st_size, item))
            total = sum(size for _, size, _ in files)
            for _, size, item in sorted(files):
                if total + num_bytes <= self._max_bytes:
                    break
                if item.suffix == ".tar" and _evict(item):
                    total -= size
            if total + num_bytes > self._max_bytes:
                logger.warning(
                    "cache.max_bytes: %s bytes of shards are in use, %s are allowed; raise it",
                    f"{total + num_bytes:,}",
                    f"{self._max_bytes:,}",
                )
            with part.open("wb") as file:
                os.truncate(file.fileno(), num_bytes)  # counted by others as taken from now on


def open_cache(config: CacheConfig | None, sources: Sequence[SnapshotSource]) -> ShardCache | None:
    """Cache of a run; None where all snapshots are on a disk.

    Raises:
        ConfigError: A snapshot is in an object store, and the configuration has no cache.
    """
    remote = [source.path for source in sources if is_remote(location(source.path))]
    if not remote:
        return None
    if config is None:
        raise ConfigError(
            f"{remote[0]}: shards of an object store are read through a cache on each node; give cache: "
            "{folder: /fast/disk, max_bytes: …} (kymo simulate tells how much is needed)"
        )
    return ShardCache(config, [(location(path), open_snapshot(path)) for path in remote])


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _pin(path: Path) -> int | None:
    """Descriptor whose shared lock keeps a file from eviction; None where there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if os.fstat(descriptor).st_nlink:
        return descriptor
    os.close(descriptor)  # evicted between the two calls
    return None


def _evict(path: Path) -> bool:
    """Remove a shard that no thread of any process holds."""
    with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    return False


def _remove_abandoned(part: Path) -> bool:
    """Remove half a download whose process has died."""
    with suppress(FileNotFoundError, BlockingIOError), part.with_suffix(".lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        part.unlink()
        return True
    return False


def _check(path: Path, entry: ShardEntry) -> None:
    """ContractError when a download is not the shard that was written."""
    if (size := path.stat().st_size) != entry.num_bytes:
        raise ContractError(f"{size:,} of {entry.num_bytes:,} bytes came")
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_HASH_BYTES):
            hasher.update(piece)
    if hasher.hexdigest() != entry.sha256:
        raise ContractError("its SHA-256 is not the snapshot's")
