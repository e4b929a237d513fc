"""Whether a snapshot is what its `snapshot.json` says: sizes, hashes, indexes, rows, and on demand every sample."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.commit import sample_schema
from engine.finalise import read_samples
from manifests.channels import KINDS
from manifests.errors import ContractError
from manifests.shards import (
    SAMPLES_FILE,
    TAR_END,
    ShardEntry,
    array_from_npy,
    load_snapshot,
    parse_sample,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was checked, and each fault as where, what value, which rule."""

    shards: int
    samples: int
    num_bytes: int
    problems: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        """Nothing wrong was found."""
        return not self.problems


def _shard_problems(directory: Path, shard: ShardEntry, rows: pa.Table) -> Iterator[str]:
    """Size, hash, end mark and index of one shard against its entry and its rows of samples.parquet."""
    path = directory / shard.path
    if not path.is_file():
        yield f"{shard.path}: missing; convert again"
        return
    size = path.stat().st_size
    if size != shard.num_bytes:
        yield f"{shard.path}: {size} bytes, snapshot.json says {shard.num_bytes}"
        return
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            yield f"{shard.path}: SHA-256 differs from snapshot.json; a byte has changed"
        file.seek(-len(TAR_END), 2)
        if file.read() != TAR_END:
            yield f"{shard.path}: does not end as a tar ends"
    index = path.with_suffix(".idx")
    content = index.read_bytes() if index.is_file() else b""
    offsets = np.frombuffer(content[: len(content) // 8 * 8], dtype="<u8").astype(np.int64)
    if offsets.size != shard.num_samples + 1 or offsets[-1] != size - len(TAR_END):
        yield f"{shard.path}: its .idx has {offsets.size} offsets for {shard.num_samples} samples and {size} bytes"
        return
    columns = {name: rows.column(name).to_numpy() for name in ("ordinal", "offset", "num_bytes")}
    if (
        len(rows) != shard.num_samples
        or (columns["ordinal"] != np.arange(shard.num_samples)).any()
        or (columns["offset"] != offsets[:-1]).any()
        or (columns["num_bytes"] != np.diff(offsets)).any()
    ):
        yield f"{shard.path}: {len(rows)} rows of {SAMPLES_FILE} do not fit its .idx"


def sample_problems(buffer: bytes, row: dict[str, Any], recipe: dict[str, Any]) -> Iterator[str]:
    """Faults of one sample: members against tags, tags against its row, lengths against the recipe."""
    key, members = parse_sample(buffer)
    if key != row["key"]:
        yield f"key {key!r} where {SAMPLES_FILE} has {row['key']!r}"
        return
    meta = json.loads(bytes(members.pop("json")))
    kinds = {name.removesuffix(".npy"): buffer for name, buffer in members.items()}
    if list(meta["ucs"]) != row["kinds"] or set(kinds) != set(meta["ucs"]):
        yield f"{key}: members {sorted(kinds)}, tags {list(meta['ucs'])}, row {row['kinds']}"
        return
    for kind, tags in meta["ucs"].items():
        array = array_from_npy(kinds[kind])
        wanted = (len(tags), recipe["kinds"][kind]["rate_hz"] * recipe["window_s"])
        if array.dtype != np.int16 or array.shape != wanted or kind not in KINDS:
            yield f"{key}.{kind}: {array.dtype} {array.shape}, tags and recipe say int16 {wanted}"
        if any(not tag["scale"] > 0 or not np.isfinite(tag["scale"]) for tag in tags):
            yield f"{key}.{kind}: a scale that is not positive"
    symbols = [tag["symbol"] for tags in meta["ucs"].values() for tag in tags]
    same = all(meta[name] == row[name] for name in ("corpus", "subject", "recording", "session", "split", "start"))
    if symbols != row["symbols"] or not same:
        yield f"{key}: its JSON differs from its row of {SAMPLES_FILE}"


def _deep_problems(
    directory: Path, shard: ShardEntry, rows: Sequence[dict[str, Any]], recipe: dict[str, Any]
) -> Iterator[str]:
    with (directory / shard.path).open("rb") as file:
        for row in rows:
            file.seek(row["offset"])
            try:
                yield from (
                    f"{shard.path}: {problem}" for problem in sample_problems(file.read(row["num_bytes"]), row, recipe)
                )
            except (ContractError, KeyError, ValueError) as error:
                yield f"{shard.path}: sample {row['key']}: {error}"


def verify(directory: Path, *, deep: bool = False) -> Verified:
    """Check a snapshot; `deep` also decodes every sample and holds it against its tags.

    Raises:
        ContractError: `snapshot.json` itself is damaged.
        ConfigError: There is none.
    """
    snapshot = load_snapshot(directory)
    samples = directory / SAMPLES_FILE
    if not samples.is_file() or hashlib.sha256(samples.read_bytes()).hexdigest() != snapshot.samples_sha256:
        return Verified(
            shards=0, samples=0, num_bytes=0, problems=(f"{SAMPLES_FILE}: missing, or not the one that was written",)
        )
    table = read_samples(directory)
    problems: list[str] = []
    if table.schema.remove_metadata() != sample_schema():
        problems.append(f"{SAMPLES_FILE}: columns differ from the format: {table.schema.names}")
    if len(table) != snapshot.counts["windows"] or len(set(table.column("key").to_pylist())) != len(table):
        problems.append(f"{SAMPLES_FILE}: {len(table)} rows, snapshot.json counts {snapshot.counts['windows']}")
    for shard in snapshot.shards:
        rows = table.filter(pc.field("shard") == shard.path)
        found = list(_shard_problems(directory, shard, rows))
        if deep and not found:
            found += _deep_problems(directory, shard, rows.to_pylist(), snapshot.recipe)
        problems += found
    return Verified(
        shards=len(snapshot.shards),
        samples=len(table),
        num_bytes=sum(shard.num_bytes for shard in snapshot.shards),
        problems=tuple(problems),
    )
