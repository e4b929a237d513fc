"""Shards of one unit: windows in an order drawn from the unit's id, in tars that are written beside and renamed."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.storage import make_folder, upload
from manifests.shards import TAR_END, ShardEntry, index_bytes

SHARDS_DIR = "shards"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spooled:
    """Tar blocks of one sample in a spool file: where they stand and how many bytes they are."""

    key: str
    spool: Path
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Where a sample ended: shard path relative to the snapshot, ordinal in it, byte offset, size in bytes."""

    key: str
    shard: str
    ordinal: int
    offset: int
    num_bytes: int


def permuted(samples: Sequence[Spooled], unit: str) -> list[Spooled]:
    """Samples in an order that the unit's id alone decides, so that a shard mixes the unit's subjects."""
    generator = np.random.Generator(np.random.Philox(int(unit, 16)))
    order = generator.permutation(len(samples))
    return [samples[i] for i in order]


def _cut(samples: Sequence[Spooled], shard_bytes: int) -> Iterator[list[Spooled]]:
    """Groups of consecutive samples; a group ends with the sample that reaches `shard_bytes`."""
    group: list[Spooled] = []
    size = 0
    for sample in samples:
        group.append(sample)
        size += sample.num_bytes
        if size >= shard_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group


def index_name(shard: str) -> str:
    """Path of the index of a shard, relative to the snapshot as the shard's."""
    return f"{shard.removesuffix('.tar')}.idx"


def write_durably(path: Path, content: Iterator[bytes], staging: Path | None) -> tuple[int, str]:
    """Write to a temporary name, flush to the disk, rename; returns the size in bytes and the SHA-256.

    For a store: write to the local folder `staging`, then upload.
    """
    # Named after the process: an orphan of a killed run may still write the same bytes to its own file.
    name = f".{path.name}.{os.getpid()}.tmp"
    temporary = path.with_name(name) if staging is None else staging / name
    sha = hashlib.sha256()
    size = 0
    try:
        with temporary.open("wb") as file:
            for block in content:
                file.write(block)
                sha.update(block)
                size += len(block)
            file.flush()
            if staging is None:
                os.fsync(file.fileno())
        if staging is None:
            temporary.replace(path)
        else:
            upload(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk needs the room
    return size, sha.hexdigest()


def _blocks(group: Sequence[Spooled]) -> Iterator[bytes]:
    """Tar blocks of the samples from their spool files, then the end of the tar."""
    open_files: dict[Path, int] = {}
    try:
        for sample in group:
            if sample.spool not in open_files:
                open_files[sample.spool] = os.open(sample.spool, os.O_RDONLY)
            block = os.pread(open_files[sample.spool], sample.num_bytes, sample.offset)
            if len(block) != sample.num_bytes:
                raise OSError(
                    f"{sample.spool}: {len(block)} of {sample.num_bytes} bytes at {sample.offset}; disk full?"
                )
            yield block
    finally:
        for descriptor in open_files.values():
            os.close(descriptor)
    yield TAR_END


def write_shards(
    samples: Sequence[Spooled], *, output: Path, unit: str, shard_bytes: int, staging: Path | None = None
) -> tuple[list[ShardEntry], list[Placed]]:
    """Shards of a unit and the place of every sample, both in writing order.

    Tars are named after the unit, so that a repeated run overwrites its own files; `.idx` is renamed before the
    tar that it belongs to. An output on a store needs `staging`, a local folder for one shard at a time.
    """
    make_folder(output / SHARDS_DIR)
    entries: list[ShardEntry] = []
    placed: list[Placed] = []
    for number, group in enumerate(_cut(permuted(samples, unit), shard_bytes)):
        name = f"{SHARDS_DIR}/{unit}-{number:05d}.tar"
        offsets = np.concatenate(([0], np.cumsum([sample.num_bytes for sample in group]))).tolist()
        write_durably(output / index_name(name), iter([index_bytes(offsets)]), staging)
        size, sha = write_durably(output / name, _blocks(group), staging)
        entries.append(ShardEntry(path=name, num_bytes=size, sha256=sha, num_samples=len(group), unit=unit))
        placed += [
            Placed(key=sample.key, shard=name, ordinal=ordinal, offset=offset, num_bytes=sample.num_bytes)
            for ordinal, (sample, offset) in enumerate(zip(group, offsets, strict=False))
        ]
    return entries, placed
