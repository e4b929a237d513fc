"""Whether a snapshot is what its `snapshot.json` says: sizes, hashes, indexes, rows, and on demand every sample.

Shards are checked in threads, which hashing lets run side by side; rows come a shard at a time from samples.parquet.
Memory holds the rows of a few shards and eight bytes for every key.
"""

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.commit import commit_path, read_commit, sample_schema
from engine.files import companions, identity_of
from engine.plan import PLAN_FILE, read_plan
from engine.quarantine import CONFIG_FILE, settings_of
from engine.sandbox import sample_row
from engine.scan import load_sources
from engine.shardwriter import index_name
from manifests.channels import KINDS
from manifests.errors import ConfigError, ContractError
from manifests.shards import (
    SAMPLES_FILE,
    TAR_END,
    ShardEntry,
    Snapshot,
    array_from_npy,
    load_snapshot,
    parse_sample,
)

_BATCH_ROWS = 16384
_BLOCK_BYTES = 1 << 20
_MAX_THREADS = 8
_PLACE = ("shard", "ordinal", "offset", "num_bytes")

Tick = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was checked, each fault as where, what value, which rule, and what to do, once per kind of fault."""

    shards: int
    samples: int
    num_bytes: int
    recordings: int
    problems: tuple[str, ...]
    advice: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        """Nothing wrong was found."""
        return not self.problems


@dataclass(frozen=True, slots=True)
class _Problem:
    """A fault and what kind it is: `shard`, `table`, `content` or `source`."""

    kind: str
    text: str


def _advice(directory: Path, snapshot: Snapshot, kinds: Iterable[str]) -> Iterator[str]:
    """What to do about each kind of fault in this folder."""
    again = f"kymo convert {directory / CONFIG_FILE}"
    is_conversion = (directory / PLAN_FILE).exists()
    for kind in dict.fromkeys(kinds):
        if kind == "content":
            yield "hash and content disagree: the writer was wrong, not the disk; keep the folder and report it"
        elif kind == "source":
            yield f"to take changed recordings as they are now: {again}; else restore them"
        elif is_conversion and kind == "shard":
            yield f"{again} recheck=true; it finds the damaged units and makes them again, byte by byte"
        elif is_conversion:
            yield f"{again}; it writes {SAMPLES_FILE} again from the commits"
        elif "parent" in snapshot.provenance:
            yield f"kymo repack snapshot {snapshot.provenance['parent'][:16]} into a new folder: same bytes"
        else:
            yield "copy the named files again from where the snapshot came from"


def _index_problems(directory: Path, shard: ShardEntry, rows: pa.Table) -> Iterator[str]:
    """Faults of a shard's index and of its rows."""
    index = directory / index_name(shard.path)
    content = index.read_bytes() if index.is_file() else b""
    offsets = np.frombuffer(content[: len(content) // 8 * 8], dtype="<u8").astype(np.int64)
    if offsets.size != shard.num_samples + 1 or offsets[-1] != shard.num_bytes - len(TAR_END):
        yield (
            f"{shard.path}: its .idx has {offsets.size} offsets for {shard.num_samples} samples "
            f"and {shard.num_bytes} bytes"
        )
        return
    columns = {name: rows.column(name).to_numpy() for name in ("ordinal", "offset", "num_bytes")}
    if (
        len(rows) != shard.num_samples
        or (columns["ordinal"] != np.arange(shard.num_samples)).any()
        or (columns["offset"] != offsets[:-1]).any()
        or (columns["num_bytes"] != np.diff(offsets)).any()
    ):
        yield f"{shard.path}: {len(rows)} rows of {SAMPLES_FILE} do not fit its .idx"


def _shard_problems(directory: Path, shard: ShardEntry, rows: pa.Table, tick: Tick) -> Iterator[str]:
    """Size, hash, end mark and index of one shard against its entry and its rows of samples.parquet."""
    path = directory / shard.path
    if not path.is_file():
        yield f"{shard.path}: missing"
        return
    size = path.stat().st_size
    if size != shard.num_bytes:
        yield f"{shard.path}: {size} bytes, snapshot.json says {shard.num_bytes}"
        return
    sha, end = hashlib.sha256(), b""
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            sha.update(block)
            end = (end + block)[-len(TAR_END) :]
            tick(len(block))
    if sha.hexdigest() != shard.sha256:
        yield f"{shard.path}: SHA-256 differs from snapshot.json; a byte has changed"
    if end != TAR_END:
        yield f"{shard.path}: does not end as a tar ends"
    yield from _index_problems(directory, shard, rows)


def _wanted_length(kind: str, meta: Mapping[str, Any], recipe: Mapping[str, Any]) -> int:
    """Samples per channel that recipe and tag promise; a native recipe keeps the rate of the tag."""
    rate = recipe["kinds"][kind]["rate_hz"]
    if isinstance(rate, int):
        return rate * recipe["window_s"]
    return int(Fraction(*meta["rate"]) * recipe["window_s"])


def _label_problems(meta: Mapping[str, Any]) -> Iterator[str]:
    """Labels that are not of the format: stages and classes are texts, events ranges inside the window."""
    labels = meta["labels"]
    if not all(isinstance(text, str) for name in ("stage", "classes") for text in labels.get(name, [])):
        yield "stages and classes must be texts"
    for start, length, text in labels.get("events", []):
        if not isinstance(text, str) or not 0 <= start <= start + length <= meta["length"]:
            yield f"event [{start}, {length}, {text!r}] leaves its window of {meta['length']} samples"


def sample_problems(buffer: bytes, row: Mapping[str, Any], recipe: Mapping[str, Any]) -> Iterator[str]:
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
    arrays = {kind: array_from_npy(kinds[kind]) for kind in meta["ucs"]}
    for kind, tags in meta["ucs"].items():
        wanted = (len(tags), _wanted_length(kind, meta, recipe))
        if arrays[kind].dtype != np.int16 or arrays[kind].shape != wanted or kind not in KINDS:
            yield f"{key}.{kind}: {arrays[kind].dtype} {arrays[kind].shape}, tags and recipe say int16 {wanted}"
        if any(not tag["scale"] > 0 or not np.isfinite(tag["scale"]) for tag in tags):
            yield f"{key}.{kind}: a scale that is not positive"
    yield from (f"{key}: {problem}" for problem in _label_problems(meta))
    expected = sample_row(key, meta)
    expected["quality"] = float(np.float32(expected["quality"]))  # the column is float32
    differs = sorted(name for name, value in expected.items() if row[name] != value)
    if differs:
        yield f"{key}: its JSON differs from its row of {SAMPLES_FILE} in {', '.join(differs)}"


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
            except (ContractError, KeyError, TypeError, ValueError) as error:
                yield f"{shard.path}: sample {row['key']}: {type(error).__name__}: {error}"


def _by_shard(file: pq.ParquetFile, columns: Sequence[str] | None) -> Iterator[tuple[str, pa.Table]]:
    """Rows of samples.parquet, one table per run of rows of the same shard."""
    name, parts = "", list[pa.RecordBatch]()
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns) if columns else None):
        start = 0
        for shard, run in groupby(batch.column("shard").to_pylist()):
            length = sum(1 for _ in run)
            if parts and shard != name:
                yield name, pa.Table.from_batches(parts)
                parts = []
            name = shard
            parts.append(batch.slice(start, length))
            start += length
    if parts:
        yield name, pa.Table.from_batches(parts)


def _key_hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _check_shards(
    directory: Path, snapshot: Snapshot, file: pq.ParquetFile, *, deep: bool, threads: int, tick: Tick
) -> Iterator[_Problem]:
    """Faults of all shards in the order of samples.parquet, then those of shards without rows and of repeated keys."""
    entries = {shard.path: shard for shard in snapshot.shards}
    hashes: list[np.ndarray] = []
    empty = sample_schema().empty_table()

    def check(shard: ShardEntry, rows: pa.Table) -> list[_Problem]:
        found = [_Problem("shard", text) for text in _shard_problems(directory, shard, rows, tick)]
        if deep and not found:
            found = [
                _Problem("content", text)
                for text in _deep_problems(directory, shard, rows.to_pylist(), snapshot.recipe)
            ]
        return found

    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[list[_Problem]]] = deque()
        for name, rows in _by_shard(file, None if deep else ("key", *_PLACE)):
            hashes.append(np.fromiter(map(_key_hash, rows.column("key").to_pylist()), np.uint64, len(rows)))
            shard = entries.pop(name, None)
            if shard is None:
                yield _Problem("table", f"{SAMPLES_FILE}: rows of {name}, which snapshot.json does not name there")
                continue
            running.append(pool.submit(check, shard, rows))
            while len(running) > 2 * threads:  # no more than a few shards' rows in memory
                yield from running.popleft().result()
        running += [pool.submit(check, shard, empty) for shard in entries.values()]
        for future in running:
            yield from future.result()
    yield from _repeated(hashes, file)


def _repeated(hashes: Sequence[np.ndarray], file: pq.ParquetFile) -> Iterator[_Problem]:
    """Keys that stand twice; hashes find the candidates, the keys themselves decide."""
    values, counts = np.unique(np.concatenate(hashes) if hashes else np.empty(0, np.uint64), return_counts=True)
    twice = set(values[counts > 1].tolist())
    if twice:
        keys = (key for batch in file.iter_batches(columns=["key"]) for key in batch.column("key").to_pylist())
        found = Counter(key for key in keys if _key_hash(key) in twice)
        for key, count in found.items():
            if count > 1:
                yield _Problem("table", f"{SAMPLES_FILE}: key {key!r} stands {count} times")


def _source_problems(directory: Path, tick: Tick) -> Iterator[_Problem | None]:
    """Recordings that are not what was converted; None for each that is.

    Raises:
        ConfigError: The folder holds no conversion.
    """
    if not (directory / PLAN_FILE).exists():
        raise ConfigError(f"{directory}: no {PLAN_FILE}; only the output of a kymo convert knows its recordings")
    sources = {corpus.id: (corpus, root) for corpus, root in load_sources(settings_of(directory).sources)}
    hashes: dict[Path, str] = {}  # a file may hold thousands of recordings
    for unit in read_plan(directory):
        commit = read_commit(directory, unit.id)
        if commit is None:
            yield _Problem("table", f"{commit_path(directory, unit.id).name}: missing, or its shards are not there")
            continue
        for item in commit.inputs:
            corpus, root = sources[item.corpus]
            parts = {part.name: part for part in companions(root / item.path, corpus.reader_of(item.path), corpus)}
            for name, sha in item.sha256.items():
                if name in parts and parts[name] not in hashes:
                    hashes[parts[name]] = _sha256(parts[name], tick)
                if name not in parts or hashes[parts[name]] != sha:
                    state = "missing" if name not in parts else "changed since it was converted"
                    yield _Problem("source", f"{item.corpus}: {item.path}: {name} is {state}")
                    break
            else:
                same = item.sha256 or (
                    parts and identity_of(root / item.path, corpus.reader_of(item.path), corpus)[0] == item.identity
                )
                text = f"{item.corpus}: {item.path}: changed or missing since it was rejected"
                yield None if same else _Problem("source", text)


def _sha256(path: Path, tick: Tick) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            sha.update(block)
            tick(len(block))
    return sha.hexdigest()


def verify(
    directory: Path,
    *,
    deep: bool = False,
    source: bool = False,
    threads: int | None = None,
    tick: Tick | None = None,
) -> Verified:
    """Check a snapshot.

    Args:
        directory: Its folder.
        deep: Also decode every sample and hold it against its tags, its row and the recipe.
        source: Also hash the recordings that it was made from, and hold them against the commits.
        threads: Shards that are checked at once; None takes the cores, at most 8.
        tick: Called from several threads with numbers of bytes that were hashed.

    Raises:
        ContractError: `snapshot.json` itself is damaged.
        ConfigError: There is none.
    """
    snapshot = load_snapshot(directory)
    tick = tick or (lambda _: None)
    problems: list[_Problem] = []
    num_rows = 0
    samples = directory / SAMPLES_FILE
    if not samples.is_file() or _sha256(samples, tick) != snapshot.samples_sha256:
        problems.append(_Problem("table", f"{SAMPLES_FILE}: missing, or not the one that was written"))
    else:
        with samples.open("rb") as stream:
            file = pq.ParquetFile(stream)
            num_rows = file.metadata.num_rows
            if file.schema_arrow.remove_metadata() != sample_schema():
                problems.append(
                    _Problem("table", f"{SAMPLES_FILE}: columns differ from the format: {file.schema_arrow.names}")
                )
            if num_rows != snapshot.counts["windows"]:
                problems.append(
                    _Problem(
                        "table", f"{SAMPLES_FILE}: {num_rows} rows, snapshot.json counts {snapshot.counts['windows']}"
                    )
                )
            count = threads or min(_MAX_THREADS, os.cpu_count() or 1)
            problems += _check_shards(directory, snapshot, file, deep=deep, threads=count, tick=tick)
    checked = list(_source_problems(directory, tick)) if source else []
    problems += [problem for problem in checked if problem is not None]
    return Verified(
        shards=len(snapshot.shards) if num_rows else 0,
        samples=num_rows,
        num_bytes=sum(shard.num_bytes for shard in snapshot.shards) if num_rows else 0,
        recordings=len(checked),
        problems=tuple(problem.text for problem in problems),
        advice=tuple(_advice(directory, snapshot, (problem.kind for problem in problems))),
    )
