"""The samples of snapshots as streams: read from snapshot.json and samples.parquet, on a disk or an object store.

What is read is checked against the snapshot's digests and kept for the life of the process, since a start of a run asks
for it several times. No waveform is touched.
"""

import hashlib
import io
import math
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, cast, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from manifests.errors import ConfigError, ContractError
from manifests.shards import SAMPLES_FILE, ShardEntry, Snapshot, load_snapshot
from trainer.filters import TICKS_PER_HOUR, SampleFilter, key_hash, passes, within_hours
from trainer.storage import answering, is_remote, location, sizes_in

pc: Any = pyarrow.compute  # its functions are made at run time
Shape = Literal["rate", "length", "channels"]
_COLUMNS = frozenset(
    {"key", "shard", "ordinal", "offset", "num_bytes", "split", "num_channels", "length", "rate_num", "rate_den"}
)
_PER_SAMPLE = ("keys", "shard", "offset", "num_bytes", "seconds")
_HASH_BYTES = 1 << 22
_READ_ROWS = 1 << 18
_KEPT_SNAPSHOTS = 128


class SnapshotSource(BaseModel):
    """A snapshot folder or URL and its weight in the mixture (None for all: proportional to size)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    weight: Annotated[float, Field(gt=0)] | None = None


class Keys:
    """Sample keys as one block of bytes, dtype `S` (N,): no Python object per sample. An item is a `str`."""

    def __init__(self, texts: np.ndarray) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, rows: int) -> str: ...
    @overload
    def __getitem__(self, rows: np.ndarray | slice) -> "Keys": ...
    def __getitem__(self, rows: int | np.ndarray | slice) -> "str | Keys":
        found = self.texts[rows]
        return found.decode("ascii") if isinstance(found, bytes) else Keys(found)

    def __iter__(self) -> Iterator[str]:
        return (text.decode("ascii") for text in self.texts.tolist())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stream:
    """One corpus of one snapshot after filters, one split and bucket, sorted by shard and ordinal. N samples.

    Attributes:
        snapshot: Digest of the snapshot.
        shards: Path of every shard of the snapshot; in an object store its URL, see `shard_names`.
        keys: (N,) sample keys.
        shard: (N,) int32 index into `shards`.
        offset: (N,) int64, byte where the sample's tar blocks begin.
        num_bytes: (N,) int64, their length in bytes.
        seconds: (N,) float32, length of each sample.
        weight: Share in the mixture, relative to the other streams.
        bucket: Shape that all samples have, e.g. `128Hz x 3840`; empty without buckets.
        split: train, val or test.
    """

    snapshot: str
    corpus: str
    shards: tuple[Path, ...]
    keys: Keys
    shard: np.ndarray
    offset: np.ndarray
    num_bytes: np.ndarray
    seconds: np.ndarray
    weight: float
    bucket: str = ""
    split: str = ""

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: np.ndarray | slice, *, weight: float) -> "Stream":
        """Stream of some of the samples, in the order of `rows`."""
        columns = {name: getattr(self, name)[rows] for name in ("keys", "shard", "offset", "num_bytes")}
        return replace(
            self, **columns, seconds=self.seconds[rows] if len(self.seconds) else self.seconds, weight=weight
        )


def load_streams(
    sources: Sequence[SnapshotSource], *, split: str, keep: SampleFilter, bucket_by: Sequence[Shape] = ()
) -> list[Stream]:
    """Streams of the snapshots after filters, in the order of the sources, of corpus names and of buckets.

    Raises:
        ConfigError: Nothing is left, or only some snapshots have a weight.
        ContractError: A snapshot or its samples.parquet was changed after it was written.
    """
    if len({source.weight is None for source in sources}) > 1:
        raise ConfigError("snapshots: give a weight to all of them or to none")
    streams: list[Stream] = []
    for source in sources:
        found = [stream for stream in read_streams(source.path, keep, bucket_by=bucket_by) if stream.split == split]
        total = sum(len(stream) for stream in found)
        if source.weight is not None:
            found = [replace(stream, weight=source.weight * len(stream) / total) for stream in found]
        streams += found
    if not streams:
        paths = ", ".join(source.path for source in sources)
        raise ConfigError(
            f"{paths}: no sample of split {split!r} (of train, val, test) passes {keep}; widen the filter"
        )
    return streams


def open_snapshot(path: str) -> Snapshot:
    """Snapshot of a folder or URL, its digest checked and its shards there in the right size. Read once a process."""
    folder = location(path)
    return _open_snapshot(path, _fingerprint(folder / "snapshot.json") if folder.exists() else "")


def read_streams(path: str, keep: SampleFilter, *, bucket_by: Sequence[Shape] = ()) -> tuple[Stream, ...]:
    """All streams of one snapshot, of every split, weighted by their size. Read once a process.

    Raises:
        ContractError: The snapshot, its table or the size of a shard is not what was written.
    """
    snapshot = open_snapshot(path)
    table = location(path) / SAMPLES_FILE
    return _read_streams(path, _fingerprint(table), snapshot.digest, keep.model_dump_json(), tuple(bucket_by))


def shard_names(folder: Path, snapshot: Snapshot) -> tuple[Path, ...]:
    """What each shard of a snapshot is called in a stream.

    In an object store that is the text of its URL, which only the `locate` of a `ShardCache` understands: a `UPath`
    costs 850 µs to make and 40 µs to find in a dict, once per read of a sample.
    """
    if is_remote(folder):
        root = str(folder).rstrip("/")
        return cast("tuple[Path, ...]", tuple(f"{root}/{entry.path}" for entry in snapshot.shards))
    return tuple(folder / entry.path for entry in snapshot.shards)


def _fingerprint(path: Path) -> str:
    """What changes when a file is written anew; empty when there is none."""
    try:
        if is_remote(path):
            url = cast("Any", path)
            return str(url.fs.ukey(url.path))
        stat = path.stat()
    except FileNotFoundError:
        return ""
    return f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns}"


@lru_cache(maxsize=_KEPT_SNAPSHOTS)
def _open_snapshot(path: str, _fingerprint: str) -> Snapshot:
    folder = location(path)
    snapshot = load_snapshot(folder)
    sizes: dict[str, int] = {}
    if is_remote(folder):  # one listing for a thousand shards, where asking for each would be a request each
        for parent in {posixpath.dirname(entry.path) for entry in snapshot.shards}:
            found = sizes_in(folder / parent if parent else folder)
            sizes |= {posixpath.join(parent, name): size for name, size in found.items()}
    else:
        for entry in snapshot.shards:
            with suppress(FileNotFoundError):
                sizes[entry.path] = (folder / entry.path).stat().st_size
    for entry in snapshot.shards:
        if (size := sizes.get(entry.path, -1)) != entry.num_bytes:
            found = f"has {size} bytes" if size >= 0 else "is missing"
            raise ContractError(
                f"{folder / entry.path}: {found}, {entry.num_bytes} were written; run kymo convert again to mend it"
            )
    return snapshot


@lru_cache(maxsize=_KEPT_SNAPSHOTS)
def _read_streams(
    path: str, _fingerprint: str, _digest: str, keep_json: str, bucket_by: tuple[Shape, ...]
) -> tuple[Stream, ...]:
    snapshot, folder = open_snapshot(path), location(path)
    with verified_table(folder / SAMPLES_FILE, snapshot.samples_sha256) as file:
        rows = _read_rows(file, snapshot.shards, SampleFilter.model_validate_json(keep_json), bucket_by, where=folder)
    shards = shard_names(folder, snapshot)
    streams: list[Stream] = []
    for (split, corpus, bucket), part in rows.groups.items():
        own = {name: column[part] for name, column in rows.columns.items()}
        streams.append(
            Stream(
                snapshot=snapshot.digest,
                split=split,
                corpus=corpus,
                bucket=bucket,
                shards=shards,
                weight=float(len(own["shard"])),
                keys=Keys(own.pop("texts")),
                **own,
            )
        )
    return tuple(streams)


def verified_table(path: Path, sha256: str) -> pq.ParquetFile:
    """samples.parquet, its hash checked before a byte of it is believed."""
    try:
        # From a disk it is hashed in pieces and then read a row group at a time; a store is asked only once.
        with answering(path):
            content = io.BytesIO(path.read_bytes()) if is_remote(path) else path.open("rb")
    except OSError as error:
        raise ContractError(f"{path}: cannot be read ({error.strerror}); finalise the snapshot again") from None
    hasher = hashlib.sha256()
    while piece := content.read(_HASH_BYTES):
        hasher.update(piece)
    if hasher.hexdigest() != sha256:
        content.close()
        raise ContractError(f"{path}: its SHA-256 is not the snapshot's; restore the file or finalise again")
    content.seek(0)
    repeating = ["shard", "corpus", "split", "subject", "stage", "kinds.list.element", "symbols.list.element"]
    return pq.ParquetFile(content, read_dictionary=repeating)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Columns of the rows that pass, sorted; `groups` maps (split, corpus, bucket) to its stretch."""

    columns: Mapping[str, np.ndarray]
    groups: Mapping[tuple[str, str, str], slice]


class _Names:
    """Numbers of names, the same over all row groups of a file."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def encode(self, column: pa.ChunkedArray) -> np.ndarray:
        """Number of each row's name, int32 (N,)."""
        parts = [np.zeros(0, dtype=np.int32)]
        for chunk in column.chunks:
            coded = chunk if isinstance(chunk, pa.DictionaryArray) else chunk.dictionary_encode()
            known = [self.numbers.setdefault(str(name), len(self.numbers)) for name in coded.dictionary.to_pylist()]
            parts.append(np.asarray(known, dtype=np.int32)[coded.indices.to_numpy()])
        return np.concatenate(parts)


def _read_rows(
    file: pq.ParquetFile, shards: Sequence[ShardEntry], keep: SampleFilter, bucket_by: Sequence[Shape], *, where: Path
) -> _Rows:
    names = {name: _Names() for name in ("shard", "corpus", "split", "subject", "bucket")}
    columns: dict[str, np.ndarray] = {}
    filled = 0
    for batch in file.iter_batches(batch_size=_READ_ROWS, columns=sorted(_COLUMNS | keep.columns())):
        rows = pa.Table.from_batches([batch])
        rows = rows.filter(pa.array(passes(rows, keep)))
        part = {name: names[name].encode(rows[name]) for name in names if name in rows.column_names}
        part |= {name: rows[name].to_numpy() for name in ("ordinal", "offset", "num_bytes")}
        part["texts"] = _fixed_width(rows["key"])
        part["ticks"] = rows["length"].to_numpy() * rows["rate_den"].to_numpy() * (TICKS_PER_HOUR // 3600)
        part["ticks"] //= rows["rate_num"].to_numpy()
        part["bucket"] = _bucket(rows, bucket_by, names["bucket"])
        for name, values in part.items():
            if name not in columns:  # room for all rows at once: pages that stay empty take no memory
                columns[name] = np.empty(file.metadata.num_rows, dtype=values.dtype)
            elif columns[name].itemsize < values.itemsize:
                columns[name] = columns[name].astype(values.dtype)
            columns[name][filled : filled + len(rows)] = values
        filled += len(rows)
    if not filled:
        return _Rows(columns={}, groups={})
    columns = {name: column[:filled] for name, column in columns.items()}
    listed = {entry.path: index for index, entry in enumerate(shards)}
    if unknown := names["shard"].numbers.keys() - listed.keys():
        raise ContractError(f"{where}: {SAMPLES_FILE} names shard {min(unknown)!r}, which the snapshot lacks")
    columns["shard"] = np.array([listed[name] for name in names["shard"].numbers], dtype=np.int32)[columns["shard"]]
    return _sorted(_capped(columns, keep), names)


def _bucket(rows: pa.Table, bucket_by: Sequence[Shape], names: _Names) -> np.ndarray:
    """Number of the shape of each row, int32 (N,)."""
    if not bucket_by:
        return np.full(len(rows), names.numbers.setdefault("", 0), dtype=np.int32)
    channels = rows["num_channels"].to_numpy()
    columns = {
        "rate": (rows["rate_num"].to_numpy(), rows["rate_den"].to_numpy()),
        "length": (rows["length"].to_numpy(),),
        "channels": (2 ** np.ceil(np.log2(np.maximum(channels, 1))).astype(np.int64),),
    }
    shapes = np.stack(
        [column for name in ("rate", "length", "channels") if name in bucket_by for column in columns[name]]
    )
    distinct, inverse = np.unique(shapes, axis=1, return_inverse=True)
    labels = pa.array([_label(shape.tolist(), bucket_by) for shape in distinct.T], type=pa.string())
    return names.encode(pa.chunked_array([pa.DictionaryArray.from_arrays(pa.array(inverse.ravel()), labels)]))


def _label(shape: list[int], bucket_by: Sequence[Shape]) -> str:
    """`128Hz x 3840 x 16ch`: 16 channels stand for 9 to 16, the next power of two."""
    left = list(shape)
    parts: list[str] = []
    if "rate" in bucket_by:
        numerator, denominator = left.pop(0), left.pop(0)
        parts.append(f"{numerator}Hz" if denominator == 1 else f"{numerator}/{denominator}Hz")
    if "length" in bucket_by:
        parts.append(str(left.pop(0)))
    if "channels" in bucket_by:
        parts.append(f"{left.pop(0)}ch")
    return " x ".join(parts)


def _capped(columns: dict[str, np.ndarray], keep: SampleFilter) -> dict[str, np.ndarray]:
    """Columns without the samples above the caps in hours."""
    for group, hours in (("subject", keep.subject_hours), ("corpus", keep.corpus_hours)):
        if hours is not None:
            code = columns[group].astype(np.int64) * (int(columns["split"].max(initial=0)) + 1) + columns["split"]
            mask = within_hours(hours, ticks=columns["ticks"], group=code, chance=key_hash(columns["texts"]))
            columns = {name: column[mask] for name, column in columns.items()}
    return columns


def _sorted(columns: dict[str, np.ndarray], names: Mapping[str, _Names]) -> _Rows:
    """Rows by split, corpus, bucket, shard and ordinal."""
    kinds = ("split", "corpus", "bucket")
    labels = [sorted(names[kind].numbers) for kind in kinds]
    sizes = [len(label) for label in labels]
    # Names are numbered as they came; groups stand by the alphabet.
    group = np.zeros(len(columns["shard"]), dtype=np.int32)
    for kind, label, size in zip(kinds, labels, sizes, strict=True):
        alphabetic = np.array([label.index(name) for name in names[kind].numbers], dtype=np.int32)
        group = group * size + alphabetic[columns[kind]]
    place = columns["shard"].astype(np.int64) << 32 | columns["ordinal"]
    order = np.arange(len(place)) if (np.diff(place) > 0).all() else np.argsort(place, kind="stable")
    if math.prod(sizes) < 2**15:
        group = group.astype(np.int16)  # sorted by radix, in a tenth of the time
    order = order[np.argsort(group[order], kind="stable")]
    group = group[order]
    columns["seconds"] = (columns.pop("ticks") / (TICKS_PER_HOUR / 3600)).astype(np.float32)
    kept = {name: columns.pop(name)[order] for name in ("shard", "offset", "num_bytes", "seconds", "texts")}
    begins = np.flatnonzero(np.diff(group, prepend=-1)).tolist()
    groups: dict[tuple[str, str, str], slice] = {}
    for begin, end in zip(begins, [*begins, len(group)][1:], strict=True):
        split, corpus, bucket = np.unravel_index(group[begin], sizes)
        groups[labels[0][split], labels[1][corpus], labels[2][bucket]] = slice(begin, end)
    return _Rows(columns=kept, groups=groups)


def _fixed_width(keys: pa.ChunkedArray) -> np.ndarray:
    """Keys as bytes of the width of the longest, dtype `S` (N,): no Python object per sample."""
    lengths = pc.binary_length(keys)
    width = max(pc.max(lengths).as_py() or 1, 1)
    if len(keys) == 0:
        return np.zeros(0, dtype=f"S{width}")
    if pc.min(lengths).as_py() < width:
        keys = pc.ascii_rpad(keys, width, padding="\0")
    array = pa.concat_arrays(keys.chunks)
    offsets, data = array.buffers()[1:]
    first = np.frombuffer(offsets, dtype=np.int32)[array.offset]
    return np.frombuffer(data, dtype=f"S{width}", count=len(array), offset=int(first))
