"""Uniform, globally mixed shards from an existing snapshot: tar blocks are moved, no signal is decoded.

Every shard gets the same number of samples, drawn from the whole snapshot. The order is a pure function of the
parent's digest and a seed, so a repeated run gives the same bytes. A source that exceeds `spill_bytes` is read once
from front to back and dealt to spool files, each of which is small enough for the page cache when its shards are
written: a disk sees long reads and writes, never one seek per sample. Memory holds rows and one sample, no shard.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from engine.commit import parquet_bytes, sample_schema
from engine.config import ENGINE_VERSION
from engine.finalise import read_samples
from engine.lock import locked
from engine.plan import PLAN_FILE
from engine.shardwriter import SHARDS_DIR, index_name, write_durably
from engine.storage import is_remote, work_folder
from manifests.config import code_version, digest, write_atomically
from manifests.errors import ConfigError, ContractError
from manifests.shards import (
    SAMPLES_FILE,
    SNAPSHOT_FILE,
    TAR_END,
    ShardEntry,
    Snapshot,
    index_bytes,
    load_snapshot,
)

logger = logging.getLogger(__name__)

_MAX_OPEN = 256  # files that are open at once
_BUFFER_BYTES = 1 << 20
_ROOM = 1.05  # free bytes asked for, over those that will be written

Tick = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where every sample goes.

    Attributes:
        name: 16 hex digits: digest of the parent, the seed and the size; the shards are named after it.
        order: Row of the parent's samples.parquet for each place in the new order, shape (N,).
        bounds: First place of each new shard and the end, shape (num_shards + 1,).
    """

    name: str
    order: np.ndarray
    bounds: np.ndarray

    @property
    def num_shards(self) -> int:
        """Number of new shards."""
        return len(self.bounds) - 1

    def shard_path(self, number: int) -> str:
        """Path of a new shard relative to the snapshot."""
        return f"{SHARDS_DIR}/{self.name}-{number:05d}.tar"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Blocks:
    """Where the tar blocks of each row are to be found: its file, offset and size in bytes."""

    paths: tuple[Path, ...]
    path_of: np.ndarray
    offset: np.ndarray
    num_bytes: np.ndarray


def layout_of(snapshot: Snapshot, *, shard_bytes: int, seed: int) -> Layout:
    """The new order: a permutation of all samples, cut into shards of equal numbers of samples (they differ by one)."""
    name = digest({"parent": snapshot.digest, "seed": seed, "shard_bytes": shard_bytes})[:16]
    key = int.from_bytes(hashlib.sha256(f"{snapshot.digest}/{seed}".encode()).digest()[:16], "little")
    num_samples = snapshot.counts["windows"]
    num_bytes = sum(shard.num_bytes for shard in snapshot.shards)
    num_shards = min(num_samples, max(1, round(num_bytes / shard_bytes)))
    return Layout(
        name=name,
        order=np.random.Generator(np.random.Philox(key=key)).permutation(num_samples),
        bounds=np.arange(num_shards + 1) * num_samples // max(1, num_shards),
    )


def _source(folder: Path, snapshot: Snapshot, table: pa.Table) -> _Blocks:
    """Blocks as they lie in the parent's shards."""
    number = {shard.path: i for i, shard in enumerate(snapshot.shards)}
    names = table.column("shard").combine_chunks().dictionary_encode()
    codes = np.array([number[name.as_py()] for name in names.dictionary], dtype=np.int64)
    blocks = _Blocks(
        paths=tuple(folder / shard.path for shard in snapshot.shards),
        path_of=codes[names.indices.to_numpy()] if len(table) else np.empty(0, np.int64),
        offset=table.column("offset").to_numpy(),
        num_bytes=table.column("num_bytes").to_numpy(),
    )
    is_first = np.diff(blocks.path_of, prepend=-1) != 0
    follows = np.where(is_first, 0, np.concatenate(([0], (blocks.offset + blocks.num_bytes)[:-1])))
    if (np.diff(blocks.path_of) < 0).any() or (blocks.offset != follows).any():
        raise ContractError(f"{folder / SAMPLES_FILE}: rows are not in the order of the shards; run kymo verify")
    return blocks


def _checked(path: Path, shard: ShardEntry, sizes: np.ndarray) -> Iterator[bytes]:
    """Samples of a parent's shard from front to back; its SHA-256 is checked at the end.

    Raises:
        ContractError: The shard is not the one that `snapshot.json` names.
    """
    sha = hashlib.sha256()
    with path.open("rb", buffering=_BUFFER_BYTES) as file:
        for size in [*sizes.tolist(), len(TAR_END)]:
            block = file.read(size)
            sha.update(block)
            yield block
        if sha.hexdigest() != shard.sha256 or file.read(1):
            raise ContractError(f"{path}: SHA-256 differs from {SNAPSHOT_FILE}; run kymo verify on the snapshot")


def _deal(source: _Blocks, snapshot: Snapshot, group_of: np.ndarray, spools: tuple[Path, ...], tick: Tick) -> _Blocks:
    """Copy every row to the spool file of its group; group -1 is done already and left out."""
    offset = np.zeros(len(group_of), dtype=np.int64)
    ends = np.zeros(len(spools), dtype=np.int64)
    starts = np.searchsorted(source.path_of, np.arange(len(snapshot.shards) + 1))
    with ExitStack() as stack:
        files = [stack.enter_context(spool.open("wb", buffering=_BUFFER_BYTES)) for spool in spools]
        for number, shard in enumerate(snapshot.shards):
            rows = range(starts[number], starts[number + 1])
            blocks = _checked(source.paths[number], shard, source.num_bytes[rows.start : rows.stop])
            for row, block in zip(rows, blocks, strict=False):
                group = group_of[row]
                if group >= 0:
                    files[group].write(block)
                    offset[row] = ends[group]
                    ends[group] += len(block)
            if next(blocks, TAR_END) != TAR_END:
                raise ContractError(f"{source.paths[number]}: does not end as a tar ends; run kymo verify on it")
            next(blocks, None)  # the check stands behind the last block
            tick(shard.num_bytes)
    return _Blocks(paths=spools, path_of=group_of, offset=offset, num_bytes=source.num_bytes)


def _check_source(source: _Blocks, snapshot: Snapshot, tick: Tick) -> None:
    """Hash the parent's shards, two at a time, which also brings them into the page cache."""

    def check(path: Path, shard: ShardEntry) -> None:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                raise ContractError(f"{path}: SHA-256 differs from {SNAPSHOT_FILE}; run kymo verify on the snapshot")
        tick(shard.num_bytes)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(check, source.paths, snapshot.shards))


def _gathered(blocks: _Blocks, rows: np.ndarray, open_files: dict[int, int]) -> Iterator[bytes]:
    """Tar blocks of rows in their order, then the end of the tar."""
    for row in rows.tolist():
        number, size = int(blocks.path_of[row]), int(blocks.num_bytes[row])
        if number not in open_files:
            open_files[number] = os.open(blocks.paths[number], os.O_RDONLY)
        block = os.pread(open_files[number], size, int(blocks.offset[row]))
        if len(block) != size:
            raise OSError(f"{blocks.paths[number]}: {len(block)} of {size} bytes; run the same kymo repack again")
        yield block
    yield TAR_END


def _receipt(out: Path, number: int) -> Path:
    return work_folder(out) / f"done-{number:05d}.json"


def _written(out: Path, layout: Layout) -> dict[int, ShardEntry]:
    """Shards that an interrupted run of the same layout has finished."""
    found: dict[int, ShardEntry] = {}
    for number in range(layout.num_shards):
        path = out / layout.shard_path(number)
        if _receipt(out, number).exists() and path.exists():
            entry = ShardEntry.model_validate_json(_receipt(out, number).read_bytes())
            if entry.path == layout.shard_path(number) and path.stat().st_size == entry.num_bytes:
                found[number] = entry
    return found


def _write_shard(out: Path, layout: Layout, number: int, blocks: _Blocks, open_files: dict[int, int]) -> ShardEntry:
    """One new shard, its index first, its receipt last."""
    name = layout.shard_path(number)
    rows = layout.order[layout.bounds[number] : layout.bounds[number + 1]]
    offsets = np.concatenate(([0], np.cumsum(blocks.num_bytes[rows]))).tolist()
    write_durably(out / index_name(name), iter([index_bytes(offsets)]), None)
    size, sha = write_durably(out / name, _gathered(blocks, rows, open_files), None)
    entry = ShardEntry(path=name, num_bytes=size, sha256=sha, num_samples=len(rows), unit=layout.name)
    write_atomically(_receipt(out, number), entry.model_dump_json())
    return entry


def _moved(table: pa.Table, layout: Layout) -> pa.Table:
    """Sample rows in the new order with their new places."""
    moved = table.take(pa.array(layout.order))
    counts = np.diff(layout.bounds)
    num_bytes = moved.column("num_bytes").to_numpy()
    ends = np.cumsum(num_bytes)
    bases = np.concatenate(([0], ends))[layout.bounds[:-1]] if len(ends) else np.empty(0, np.int64)
    names = pa.array([layout.shard_path(number) for number in range(layout.num_shards)], type=pa.string())
    new = {
        "shard": names.take(pa.array(np.repeat(np.arange(len(counts)), counts))),
        "ordinal": pa.array((np.arange(len(moved)) - np.repeat(layout.bounds[:-1], counts)).astype(np.int32)),
        "offset": pa.array(ends - num_bytes - np.repeat(bases, counts)),
    }
    for name, column in new.items():
        moved = moved.set_column(moved.schema.get_field_index(name), moved.schema.field(name), column)
    return moved.cast(sample_schema())


def _groups(snapshot: Snapshot, layout: Layout, spill_bytes: int, *, is_local: bool) -> int:
    """Number of spool files; 0 reads the parent's shards as they lie, which then fit into the page cache."""
    total = sum(shard.num_bytes for shard in snapshot.shards)
    if is_local and total <= spill_bytes and len(snapshot.shards) <= _MAX_OPEN:
        return 0
    return max(1, min(_MAX_OPEN, layout.num_shards, -(-total // spill_bytes)))


def _finished(out: Path, layout: Layout) -> Snapshot | None:
    """Snapshot of the same layout that stands in the folder; anything else there is refused."""
    if (out / PLAN_FILE).exists():
        raise ConfigError(f"{out}: holds a conversion ({PLAN_FILE}); choose another --out")
    if not (out / SNAPSHOT_FILE).exists():
        return None
    snapshot = load_snapshot(out)
    if {shard.unit for shard in snapshot.shards} - {layout.name} or "parent" not in snapshot.provenance:
        raise ConfigError(f"{out}: holds another snapshot ({snapshot.digest[:12]}); choose another --out")
    return snapshot


def _prepare(out: Path, layout: Layout, needed: int) -> dict[int, ShardEntry]:
    """Remove what an interrupted run left half done; returns the shards that it finished."""
    (out / SHARDS_DIR).mkdir(parents=True, exist_ok=True)
    (work_folder(out)).mkdir(exist_ok=True)
    done = _written(out, layout)
    kept = {name for number in done for name in (Path(layout.shard_path(number)).stem,)}
    for path in (out / SHARDS_DIR).iterdir():
        if path.name.startswith(".") or path.stem not in kept:
            path.unlink()
    for path in (*out.glob(".*.tmp"), *(work_folder(out)).glob("spool-*"), *(work_folder(out)).glob(".*.tmp")):
        path.unlink()
    missing = needed - sum(entry.num_bytes for entry in done.values())
    free = shutil.disk_usage(out).free
    if free < _ROOM * missing:
        raise ConfigError(
            f"{out}: {free / 1e9:.1f} GB free, {_ROOM * missing / 1e9:.1f} GB are needed for shards and spool files; "
            "make room or choose another disk"
        )
    return done


def repack(
    folder: Path,
    out: Path,
    *,
    shard_bytes: int = 256_000_000,
    seed: int = 0,
    spill_bytes: int = 4_000_000_000,
    tick: Tick | None = None,
) -> Snapshot:
    """A new snapshot in `out` with the samples of `folder` in uniform, globally mixed shards.

    Run the same call again after an interruption: finished shards are kept, the bytes come out the same.

    Args:
        folder: The parent snapshot; it is only read.
        out: Folder of the new one, on a local disk.
        shard_bytes: Wanted size of a shard in bytes.
        seed: Other orders of the same samples.
        spill_bytes: Size up to which the parent (or one spool file) is expected to fit into the page cache.
        tick: Called with numbers of bytes read; they add up to the parent's size (once more for what is written).

    Raises:
        ConfigError: Nothing to read, no room, or the folder `out` holds something else.
        ContractError: The parent is damaged; the new snapshot is not written.
    """
    if shard_bytes <= 0 or spill_bytes <= 0:
        raise ConfigError(f"shard_bytes {shard_bytes} and spill_bytes {spill_bytes}: must be above 0")
    if is_remote(out):
        raise ConfigError(f"{out}: shards are repacked on a local disk; give a local --out and copy it afterwards")
    snapshot = load_snapshot(folder)
    layout = layout_of(snapshot, shard_bytes=shard_bytes, seed=seed)
    with locked(out):
        finished = _finished(out, layout)
        if finished is None:
            finished = _repack(folder, out, snapshot, layout, spill_bytes=spill_bytes, tick=tick or (lambda _: None))
        shutil.rmtree(work_folder(out), ignore_errors=True)
        return finished


def _repack(folder: Path, out: Path, snapshot: Snapshot, layout: Layout, *, spill_bytes: int, tick: Tick) -> Snapshot:
    table = _rows(folder, snapshot)
    source = _source(folder, snapshot, table)
    num_groups = _groups(snapshot, layout, spill_bytes, is_local=not is_remote(folder))
    total = sum(shard.num_bytes for shard in snapshot.shards)
    done = _prepare(out, layout, total * (2 if num_groups else 1))
    edges = np.arange(num_groups + 1) * layout.num_shards // max(1, num_groups)
    if num_groups:
        # Group of each row: of its place, of that place's shard; finished shards are not dealt again.
        group_of_shard = np.repeat(np.arange(num_groups), np.diff(edges))
        group_of_shard[list(done)] = -1
        group_of = np.empty(len(table), dtype=np.int64)
        group_of[layout.order] = np.repeat(group_of_shard, np.diff(layout.bounds))
        spools = tuple(work_folder(out) / f"spool-{group:05d}.bin" for group in range(num_groups))
        blocks = _deal(source, snapshot, group_of, spools, tick)
    else:
        _check_source(source, snapshot, tick)
        blocks, edges = source, np.array([0, layout.num_shards])
    entries: list[ShardEntry] = []
    for group, (first, last) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        open_files: dict[int, int] = {}
        try:
            for number in range(first, last):
                entries.append(done.get(number) or _write_shard(out, layout, number, blocks, open_files))
                tick(entries[-1].num_bytes)
        finally:
            for descriptor in open_files.values():
                os.close(descriptor)
        if num_groups:
            blocks.paths[group].unlink()
    return _publish(out, snapshot, entries, _moved(table, layout), layout)


def _rows(folder: Path, snapshot: Snapshot) -> pa.Table:
    if hashlib.sha256((folder / SAMPLES_FILE).read_bytes()).hexdigest() != snapshot.samples_sha256:
        raise ContractError(f"{folder / SAMPLES_FILE}: its SHA-256 is not the snapshot's; run kymo verify {folder}")
    return read_samples(folder)


def _publish(out: Path, parent: Snapshot, entries: list[ShardEntry], table: pa.Table, layout: Layout) -> Snapshot:
    """Write samples.parquet and, last, snapshot.json."""
    content = parquet_bytes(table)
    counts = parent.counts | {"shards": len(entries), "num_bytes": sum(entry.num_bytes for entry in entries)}
    provenance: dict[str, Any] = {
        "engine_version": ENGINE_VERSION,
        **code_version(),
        "parent": parent.digest,
        "layout": layout.name,
        "made_by": parent.provenance,
    }
    snapshot = parent.model_copy(
        update={
            "shards": entries,
            "counts": counts,
            "samples_sha256": hashlib.sha256(content).hexdigest(),
            "provenance": provenance,
        }
    )
    snapshot = snapshot.model_copy(update={"digest": snapshot.content_digest()})
    write_atomically(out / SAMPLES_FILE, content)
    write_atomically(out / SNAPSHOT_FILE, snapshot.model_dump_json(indent=1) + "\n")
    return snapshot
