"""The ledger of a conversion: one commit per unit, written last; whatever has no valid commit is pending."""

import hashlib
import io
import shutil
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from engine.heartbeat import BEAT_SUFFIX, PROGRESS_DIR, read_progress
from engine.history import forget
from engine.plan import PLAN_FILE, Unit
from engine.shardwriter import SHARDS_DIR, index_name
from engine.storage import is_remote, sizes_in, work_folder
from manifests.config import write_atomically
from manifests.errors import ContractError
from manifests.shards import SAMPLE_COLUMNS, SNAPSHOT_FILE, ShardEntry, index_bytes

COMMITS_DIR = "commits"
_BLOCK_BYTES = 1 << 22


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Input(_Strict):
    """One recording that the unit dealt with: recorded seconds, windows made, SHA-256 of each of its files.

    `labels` has the seconds that are scored and not (`engine.scoring.Scoring.record`), and how many sources of labels
    are missing that the corpus does not require.
    """

    corpus: str
    recording: str
    path: str
    identity: str
    seconds: int
    windows: int
    labels: dict[str, float] = {}
    sha256: dict[str, str] = {}


class Counts(_Strict):
    """Totals of a unit; `seconds` is the recorded time of the recordings that were not quarantined."""

    recordings: int
    quarantined: int
    windows: int
    seconds: int
    dropped: dict[str, int] = {}


class Quarantined(_Strict):
    """One recording that cannot be used, with the command that shows why."""

    corpus: str
    recording: str
    path: str
    reason: str
    message: str
    command: str


class UnresolvedLabel(_Strict):
    """A label that is not in the samples, why, and in how many recordings of the unit."""

    corpus: str
    label: str
    count: int
    reason: str


class Limits(_Strict):
    """What a unit was converted under: the limits of one recording, and the digest of the code."""

    time_limit_s: float
    memory_limit_gb: float
    code: str

    def may_change(self, reason: str, earlier: "Limits") -> bool:
        """Whether a recording that was rejected under `earlier` may pass now."""
        return (
            reason in {"INPUT_CHANGED", "KILLED", "UNREADABLE"}
            or (reason == "TIMEOUT" and self.time_limit_s > earlier.time_limit_s)
            or (reason == "MEMORY" and self.memory_limit_gb > earlier.memory_limit_gb)
            or (reason == "CRASHED" and self.code != earlier.code)
        )


class Commit(_Strict):
    """`commits/commit-UNIT.json`. `seconds` is the time that the conversion took and the only varying field.

    `unmapped` counts by corpus the annotations whose text its file does not list. The texts stay out: a technician's
    note may name a person. `unit_suspect` counts channels by corpus and kind, see `manifests.plausible`.
    """

    unit: str
    inputs: list[Input]
    shards: list[ShardEntry]
    samples_bytes: Annotated[int, Field(ge=0)]
    counts: Counts
    quarantine: list[Quarantined]
    unresolved: list[UnresolvedLabel]
    unmapped: dict[str, int] = {}
    unit_suspect: dict[str, dict[str, int]] = {}
    limits: Limits
    seconds: float


def sample_schema() -> pa.Schema:
    """Arrow schema of samples.parquet."""
    types: dict[str, pa.DataType] = {
        "string": pa.string(),
        "int32": pa.int32(),
        "int64": pa.int64(),
        "float": pa.float32(),
        "list<string>": pa.list_(pa.string()),
    }
    return pa.schema([(name, types[kind]) for name, kind in SAMPLE_COLUMNS.items()])


def parquet_bytes(table: pa.Table) -> bytes:
    """Parquet file of a table: equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", compression_level=3, version="2.6", store_schema=False)
    return sink.getvalue().to_pybytes()


def commit_path(output: Path, unit: str) -> Path:
    """Commit of a unit."""
    return output / COMMITS_DIR / f"commit-{unit}.json"


def samples_path(output: Path, unit: str) -> Path:
    """Sample rows of a unit, in shard order."""
    return output / COMMITS_DIR / f"samples-{unit}.parquet"


def write_commit(output: Path, commit: Commit, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the sample rows, then the commit: from here on the unit is done."""
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=sample_schema())
    content = parquet_bytes(table)
    write_atomically(samples_path(output, commit.unit), content)
    commit = commit.model_copy(update={"samples_bytes": len(content)})
    write_atomically(commit_path(output, commit.unit), commit.model_dump_json(indent=1) + "\n")


def sizes_of(output: Path) -> dict[str, int] | None:
    """Sizes in bytes of shards and commits by their path, by two listings; None on a disk, where asking is free."""
    if not is_remote(output):
        return None
    return {
        f"{folder}/{name}": size
        for folder in (SHARDS_DIR, COMMITS_DIR)
        for name, size in sizes_in(output / folder).items()
    }


def _has_size(output: Path, name: str, size: int, sizes: Mapping[str, int] | None) -> bool:
    if sizes is not None:
        return sizes.get(name) == size
    path = output / name
    return path.is_file() and path.stat().st_size == size


def read_commit(output: Path, unit: str, sizes: Mapping[str, int] | None = None) -> Commit | None:
    """Commit of a unit if it is valid: its shards, indexes and sample rows stand there with their sizes.

    `sizes` are those of `sizes_of`, for whoever asks for many units on a store.
    """
    path = commit_path(output, unit)
    try:
        commit = Commit.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ContractError(
            f"{path}: not a commit of this kymo ({error}); remove it to convert its unit again"
        ) from None
    wanted = {f"{COMMITS_DIR}/{samples_path(output, unit).name}": commit.samples_bytes}
    for shard in commit.shards:
        wanted[shard.path] = shard.num_bytes
        wanted[index_name(shard.path)] = 8 * (shard.num_samples + 1)
    return commit if all(_has_size(output, name, size, sizes) for name, size in wanted.items()) else None


def pending(output: Path, units: Sequence[Unit], limits: Limits, *, recheck: bool = False) -> list[Unit]:
    """Units of the plan without a valid commit, in plan order.

    A unit also counts as pending when it rejected a recording that higher limits or other code may let pass, and
    with `recheck` when its files are not those that were committed.
    """
    sizes = sizes_of(output)
    commits = [(unit, read_commit(output, unit.id, sizes)) for unit in units]
    return [
        unit
        for unit, commit in commits
        if commit is None or _may_change(commit, limits) or (recheck and not is_intact(output, commit))
    ]


def _may_change(commit: Commit, limits: Limits) -> bool:
    return any(limits.may_change(item.reason, commit.limits) for item in commit.quarantine)


def is_intact(output: Path, commit: Commit) -> bool:
    """Whether the bytes of a unit are those that were committed: shards by SHA-256, rows and indexes by each other."""
    try:
        table = pq.read_table(io.BytesIO(samples_path(output, commit.unit).read_bytes()))
    except (pa.ArrowException, OSError):
        return False
    if not table.schema.equals(sample_schema()):
        return False
    for shard in commit.shards:
        rows = table.filter(pc.field("shard") == shard.path)
        offsets = np.concatenate(([0], np.cumsum(rows.column("num_bytes").fill_null(0).to_numpy())))
        if (output / index_name(shard.path)).read_bytes() != index_bytes(offsets.tolist()):
            return False
        sha = hashlib.sha256()
        with (output / shard.path).open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                sha.update(block)
        if sha.hexdigest() != shard.sha256:
            return False
    return True


def remove_leftovers(
    output: Path, units: Sequence[Unit], *, work: Path | None = None, done: Set[str] | None = None
) -> list[Path]:
    """Remove what no valid commit of the plan stands for, and return it.

    That is temporary files, half-written shards, heartbeats, spool files (in `work`, see `storage.work_folder`) and
    whatever superseded units have left. Snapshots that name what goes are removed first: they are no longer true.
    `done` are the units with a valid commit, for whoever has read the commits already.
    """
    superseded = {
        name[7:-5] for name in sizes_in(output / COMMITS_DIR) if name.startswith("commit-") and name.endswith(".json")
    } - {unit.id for unit in units}
    if superseded:
        (output / SNAPSHOT_FILE).unlink(missing_ok=True)
    if done is None:
        sizes = sizes_of(output)
        done = {unit.id for unit in units if read_commit(output, unit.id, sizes) is not None}
    removed = [
        output / folder / name
        for folder in (SHARDS_DIR, COMMITS_DIR, PROGRESS_DIR)
        for name in sorted(sizes_in(output / folder))
        if name.startswith(".") or name.endswith(BEAT_SUFFIX) or _unit_of(name) not in done
    ]
    removed += [output / name for name in sorted(sizes_in(output)) if name.startswith(".") and name.endswith(".tmp")]
    forget(output, {f"{SHARDS_DIR}/{path.name}" for path in removed})
    for path in removed:
        path.unlink(missing_ok=True)
    for path in sorted((work or work_folder(output)).glob("*")):
        shutil.rmtree(path, ignore_errors=True)
        removed.append(path)
    return removed


def _unit_of(name: str) -> str:
    """Unit of a file: `commit-UNIT.json`, `samples-UNIT.parquet`, `UNIT-00000.tar`, `UNIT.jsonl`."""
    stem = name.rpartition(".")[0]
    return stem.removeprefix("commit-").removeprefix("samples-").split("-")[0]


def read_commits(output: Path, units: Sequence[Unit]) -> list[Commit]:
    """Commits of all units of the plan, in the order of unit ids.

    Raises:
        ContractError: A unit has none.
    """
    sizes = sizes_of(output)
    commits = {unit.id: read_commit(output, unit.id, sizes) for unit in units}
    missing = sorted(unit for unit, commit in commits.items() if commit is None)
    if missing:
        last = [line for unit in missing for line in progress_errors(output, unit)]
        raise ContractError(
            f"{output / PLAN_FILE}: {len(missing)} of {len(units)} units have no commit ({', '.join(missing[:3])}…); "
            f"run the same kymo convert again. {' '.join(last[:3])}"
        )
    return [commit for _, commit in sorted(commits.items()) if commit is not None]


def progress_errors(output: Path, unit: str) -> list[str]:
    """Errors that a unit's progress file tells."""
    return [row["error"] for row in read_progress(output, unit) if "error" in row]
