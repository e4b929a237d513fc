"""The ledger of a conversion: one commit per unit, written last; whatever has no valid commit is pending."""

import fcntl
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from engine.heartbeat import BEAT_SUFFIX, PROGRESS_DIR, read_progress
from engine.plan import PLAN_FILE, Unit
from engine.shardwriter import SHARDS_DIR
from manifests.config import write_atomically
from manifests.errors import ConfigError, ContractError
from manifests.shards import SAMPLE_COLUMNS, SNAPSHOT_FILE, ShardEntry

COMMITS_DIR = "commits"
WORK_DIR = "work"
LOCK_FILE = ".lock"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Input(_Strict):
    """One recording that the unit dealt with: recorded seconds, windows made, SHA-256 of each of its files."""

    corpus: str
    recording: str
    path: str
    identity: str
    seconds: int
    windows: int
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
            (reason == "TIMEOUT" and self.time_limit_s > earlier.time_limit_s)
            or (reason == "MEMORY" and self.memory_limit_gb > earlier.memory_limit_gb)
            or (reason == "CRASHED" and self.code != earlier.code)
        )


class Commit(_Strict):
    """`commits/commit-UNIT.json`. `seconds` is the time that the conversion took and the only varying field.

    `unmapped` counts by corpus the annotations whose text its file does not list. The texts stay out: a technician's
    note may name a person.
    """

    unit: str
    inputs: list[Input]
    shards: list[ShardEntry]
    samples_bytes: Annotated[int, Field(ge=0)]
    counts: Counts
    quarantine: list[Quarantined]
    unresolved: list[UnresolvedLabel]
    unmapped: dict[str, int] = {}
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


def read_commit(output: Path, unit: str) -> Commit | None:
    """Commit of a unit if it is valid: its shards, indexes and sample rows stand there with their sizes."""
    path = commit_path(output, unit)
    if not path.exists():
        return None
    try:
        commit = Commit.model_validate_json(path.read_bytes())
    except ValueError as error:
        raise ContractError(
            f"{path}: not a commit of this kymo ({error}); remove it to convert its unit again"
        ) from None
    wanted = {samples_path(output, unit): commit.samples_bytes}
    for shard in commit.shards:
        wanted[output / shard.path] = shard.num_bytes
        wanted[(output / shard.path).with_suffix(".idx")] = 8 * (shard.num_samples + 1)
    if any(not name.is_file() or name.stat().st_size != size for name, size in wanted.items()):
        return None
    return commit


def pending(output: Path, units: Sequence[Unit], limits: Limits) -> list[Unit]:
    """Units of the plan without a valid commit, in plan order.

    A unit also counts as pending when it rejected a recording that higher limits or other code may let pass.
    """
    return [unit for unit in units if _is_pending(read_commit(output, unit.id), limits)]


def _is_pending(commit: Commit | None, limits: Limits) -> bool:
    return commit is None or any(limits.may_change(item.reason, commit.limits) for item in commit.quarantine)


def remove_leftovers(output: Path, units: Sequence[Unit]) -> list[Path]:
    """Remove what no valid commit of the plan stands for, and return it.

    That is temporary files, half-written shards, spool files and whatever superseded units have left. A snapshot
    that names a superseded unit goes first: it is no longer true.
    """
    superseded = {path.name[7:-5] for path in (output / COMMITS_DIR).glob("commit-*.json")} - {
        unit.id for unit in units
    }
    if superseded:
        (output / SNAPSHOT_FILE).unlink(missing_ok=True)
    done = {unit.id for unit in units if read_commit(output, unit.id) is not None}
    removed: list[Path] = []
    for folder in (SHARDS_DIR, COMMITS_DIR, PROGRESS_DIR):
        for path in sorted((output / folder).glob("*")) + sorted((output / folder).glob(".*.tmp")):
            unit = path.stem.removeprefix("commit-").removeprefix("samples-").split("-")[0]
            if path.name.startswith(".") or path.suffix == BEAT_SUFFIX or unit not in done:
                path.unlink(missing_ok=True)
                removed.append(path)
    for path in sorted((output / WORK_DIR).glob("*")):
        shutil.rmtree(path, ignore_errors=True)
        removed.append(path)
    for path in sorted(output.glob(".*.tmp")):
        path.unlink(missing_ok=True)
        removed.append(path)
    return removed


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the output folder for one conversion; the lock ends with the process, however that ends."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / LOCK_FILE).open("a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{output}: another kymo convert is writing here; wait for it or choose another output"
            ) from None
        yield


def read_commits(output: Path, units: Sequence[Unit]) -> list[Commit]:
    """Commits of all units of the plan, in the order of unit ids.

    Raises:
        ContractError: A unit has none.
    """
    commits = {unit.id: read_commit(output, unit.id) for unit in units}
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
