"""What differs between two snapshots: settings, corpora, recordings, samples, labels, splits, counts.

Shards of equal SHA-256 hold equal samples, so only samples outside them are read, each snapshot in the order in
which it lies on the disk, and compared by two digests: one of the signals, one of the tags and labels.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from manifests.errors import ContractError
from manifests.shards import SAMPLES_FILE, Snapshot, load_snapshot, parse_sample

_COLUMNS = ("key", "shard", "offset", "num_bytes", "corpus", "recording", "split", "stage", "classes")
_LABELS = ("stage", "classes")
_DIGEST_BYTES = 16  # 2**-64 that two of a billion samples meet by chance
_UNEQUAL_BY_NATURE = ("shards", "num_bytes")  # counts that a repacked snapshot has otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Two snapshots, the first one being the older.

    Attributes:
        digests: Digests of the two.
        settings: What decides the bytes of samples and is not the same, with both values.
        counts: Counts of `snapshot.json` that are not the same, with both values.
        corpora: One row per corpus: corpus, recordings added, removed and changed, samples added and removed.
        added: Keys of samples that only the second has, sorted.
        removed: Keys of samples that only the first has, sorted.
        signal: Keys of samples whose signals differ.
        tags: Keys of samples whose signals are equal and whose JSON differs.
        splits: Keys of samples that stand in another split.
        labels: Keys of samples whose stage or classes differ.
        num_equal: Samples that are the same byte by byte, wherever they stand.
        num_read: Samples that had to be read for it, of each snapshot.
    """

    digests: tuple[str, str]
    settings: dict[str, tuple[str, str]]
    counts: dict[str, tuple[int, int]]
    corpora: list[dict[str, Any]]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    signal: tuple[str, ...]
    tags: tuple[str, ...]
    splits: tuple[str, ...]
    labels: tuple[str, ...]
    num_equal: int
    num_read: int

    @property
    def is_same(self) -> bool:
        """Whether both hold the same samples made under the same settings; shards may be cut otherwise."""
        changed = (self.settings, self.added, self.removed, self.signal, self.tags, self.splits, self.labels)
        return not any(changed) and set(self.counts) <= set(_UNEQUAL_BY_NATURE)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings as `a.b.c` and value."""
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from _flat(child, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _settings(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "format_version": snapshot.format_version,
        "ucs_version": snapshot.ucs_version,
        "ucs_digest": snapshot.ucs_digest,
        **{f"recipe.{name}": value for name, value in _flat(snapshot.recipe)},
        **{f"corpora.{name}.digest": entry.get("digest", "") for name, entry in snapshot.corpora.items() if entry},
    }


def _unequal(first: Mapping[str, Any], second: Mapping[str, Any], missing: Any) -> dict[str, tuple[Any, Any]]:
    pairs = {name: (first.get(name, missing), second.get(name, missing)) for name in sorted({*first, *second})}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _table(folder: Path, snapshot: Snapshot) -> pa.Table:
    path = folder / SAMPLES_FILE
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != snapshot.samples_sha256:
            raise ContractError(f"{path}: its SHA-256 is not the snapshot's; run kymo verify {folder}")
        file.seek(0)
        return pq.read_table(file, columns=list(_COLUMNS))


def sample_digests(buffer: bytes) -> bytes:
    """Two digests of a sample's tar blocks one after the other: signals, and the JSON of tags and labels."""
    key, members = parse_sample(buffer)
    signal = hashlib.blake2b(key.encode(), digest_size=_DIGEST_BYTES)
    for name in sorted(members.keys() - {"json"}):
        signal.update(name.encode())
        signal.update(members[name])
    return signal.digest() + hashlib.blake2b(members["json"], digest_size=_DIGEST_BYTES).digest()


def _digests(folder: Path, table: pa.Table, wanted: np.ndarray, tick: Callable[[int], None]) -> np.ndarray:
    """Digests of the wanted rows, read in the order of the disk; uint64, shape (rows, 4), signals in the first two."""
    result = np.zeros((len(wanted), 2 * _DIGEST_BYTES // 8), dtype=np.uint64)
    rows = table.select(["shard", "offset", "num_bytes"]).take(pa.array(wanted)).to_pydict()
    order = sorted(range(len(wanted)), key=lambda i: (rows["shard"][i], rows["offset"][i]))
    file, name = None, ""
    try:
        for i in order:
            if file is None or rows["shard"][i] != name:
                if file is not None:
                    file.close()
                name = rows["shard"][i]
                file = (folder / name).open("rb")
            file.seek(rows["offset"][i])
            try:
                result[i] = np.frombuffer(sample_digests(file.read(rows["num_bytes"][i])), dtype=np.uint64)
            except (ContractError, KeyError, ValueError) as error:
                raise ContractError(f"{folder / name}: {error}; run kymo verify {folder}") from None
            tick(1)
    finally:
        if file is not None:
            file.close()
    return result


def _differs(first: pa.Table, second: pa.Table, names: Sequence[str]) -> np.ndarray:
    """Where any of some columns differs in two tables of the same rows; shape (rows,)."""
    result = np.zeros(len(first), dtype=bool)
    for name in names:
        pairs = zip(first.column(name).to_pylist(), second.column(name).to_pylist(), strict=True)
        result |= np.fromiter((a != b for a, b in pairs), dtype=bool, count=len(first))
    return result


def _recordings(table: pa.Table, rows: np.ndarray) -> set[tuple[str, str]]:
    """(corpus, recording) of some rows."""
    names = table.select(["corpus", "recording"]).take(pa.array(rows)).group_by(["corpus", "recording"]).aggregate([])
    return set(zip(names.column("corpus").to_pylist(), names.column("recording").to_pylist(), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sides:
    """Row numbers of two tables: rows only one has, and rows of the same key side by side."""

    only: tuple[np.ndarray, np.ndarray]
    both: tuple[np.ndarray, np.ndarray]


def _aligned(first: pa.Table, second: pa.Table) -> _Sides:
    rows = [
        pa.table({"key": table.column("key"), name: pa.array(np.arange(len(table)))})
        for table, name in ((first, "first"), (second, "second"))
    ]
    joined = rows[0].join(rows[1], keys="key", join_type="full outer")
    in_first, in_second = (joined.column(name).fill_null(-1).to_numpy() for name in ("first", "second"))
    both = (in_first >= 0) & (in_second >= 0)
    order = np.argsort(in_first[both])
    return _Sides(
        only=(np.sort(in_first[in_second < 0]), np.sort(in_second[in_first < 0])),
        both=(in_first[both][order], in_second[both][order]),
    )


def _to_read(snapshots: Sequence[Snapshot], tables: Sequence[pa.Table], sides: _Sides) -> np.ndarray:
    """Which pairs of rows have to be read: all but those at the same place of shards with the same SHA-256."""
    shas = [{shard.path: shard.sha256 for shard in snapshot.shards} for snapshot in snapshots]
    columns = []
    for table, sha, rows in zip(tables, shas, sides.both, strict=True):
        part = table.select(["shard", "offset"]).take(pa.array(rows))
        names = part.column("shard").combine_chunks().dictionary_encode()
        code = np.array([sha.get(name.as_py(), "") for name in names.dictionary], dtype=object)
        columns.append((code[names.indices.to_numpy()], part.column("offset").to_numpy()))
    (sha_a, offset_a), (sha_b, offset_b) = columns
    return (sha_a != sha_b) | (offset_a != offset_b)


def difference(first: Path, second: Path, *, tick: Callable[[int], None] | None = None) -> Difference:
    """What differs between two snapshots.

    Args:
        first: Folder of the older one.
        second: Folder of the other one.
        tick: Called with a number of samples that have been read.

    Raises:
        ConfigError: One of the folders holds no snapshot.
        ContractError: A snapshot that was changed after it was written.
    """
    folders = (first, second)
    snapshots = [load_snapshot(folder) for folder in folders]
    tables = [_table(folder, snapshot) for folder, snapshot in zip(folders, snapshots, strict=True)]
    sides = _aligned(tables[0], tables[1])
    read = _to_read(snapshots, tables, sides)
    unsure = [rows[read] for rows in sides.both]
    digests = [
        _digests(folder, table, rows, tick or (lambda _: None))
        for folder, table, rows in zip(folders, tables, unsure, strict=True)
    ]
    unequal = (digests[0] != digests[1]).reshape(-1, 2, _DIGEST_BYTES // 8).any(axis=2)
    signal = unequal[:, 0]
    tags = unequal[:, 1] & ~signal
    paired = [table.take(pa.array(rows)) for table, rows in zip(tables, sides.both, strict=True)]
    splits = _differs(paired[0], paired[1], ["split"])
    labels = _differs(paired[0], paired[1], _LABELS)

    def keys(side: int, rows: np.ndarray) -> tuple[str, ...]:
        return tuple(sorted(tables[side].column("key").take(pa.array(rows)).to_pylist()))

    changed = unsure[0][signal | tags]
    return Difference(
        digests=(snapshots[0].digest, snapshots[1].digest),
        settings={
            name: (str(a), str(b))
            for name, (a, b) in _unequal(_settings(snapshots[0]), _settings(snapshots[1]), "(not there)").items()
        },
        counts=_unequal(snapshots[0].counts, snapshots[1].counts, 0),
        corpora=_corpus_rows(tables, sides, changed),
        added=keys(1, sides.only[1]),
        removed=keys(0, sides.only[0]),
        signal=keys(0, unsure[0][signal]),
        tags=keys(0, unsure[0][tags]),
        splits=keys(0, sides.both[0][splits]),
        labels=keys(0, sides.both[0][labels]),
        num_equal=len(sides.both[0]) - len(changed),
        num_read=int(read.sum()),
    )


def _corpus_rows(tables: Sequence[pa.Table], sides: _Sides, changed: np.ndarray) -> list[dict[str, Any]]:
    """Recordings and samples that came, went and changed, one row per corpus."""
    whole = [_recordings(table, np.arange(len(table))) for table in tables]
    touched = [_recordings(tables[0], np.concatenate((sides.only[0], changed))), _recordings(tables[1], sides.only[1])]
    moved = (touched[0] | touched[1]) & whole[0] & whole[1]
    added, removed = (
        Counter(table.column("corpus").take(pa.array(rows)).to_pylist())
        for table, rows in ((tables[1], sides.only[1]), (tables[0], sides.only[0]))
    )
    return [
        {
            "corpus": corpus,
            "recordings_added": sum(name == corpus for name, _ in whole[1] - whole[0]),
            "recordings_removed": sum(name == corpus for name, _ in whole[0] - whole[1]),
            "recordings_changed": sum(name == corpus for name, _ in moved),
            "samples_added": added[corpus],
            "samples_removed": removed[corpus],
        }
        for corpus in sorted({name for names in whole for name, _ in names})
    ]
