"""From commits to a snapshot: every planned recording accounted for, sample rows merged, `snapshot.json` last."""

import hashlib
import io
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from engine.commit import Commit, Quarantined, parquet_bytes, read_commits, sample_schema, samples_path
from engine.config import ENGINE_VERSION, PUBLIC_SALT, ConvertConfig
from engine.history import keep
from engine.plan import Unit
from engine.quarantine import WaiverKey, read_waivers, state_of
from engine.scan import load_sources
from manifests.channels import UCS_VERSION, table_digest
from manifests.config import code_version, digest, write_atomically
from manifests.corpora import Corpus
from manifests.errors import ContractError
from manifests.recipes import load_recipe
from manifests.shards import FORMAT_VERSION, SAMPLES_FILE, SNAPSHOT_FILE, Snapshot


class ExitCode(IntEnum):
    """How a conversion ended; 2 is a bad configuration and 1 a bug, both of which end as exceptions."""

    COMPLETE = 0
    WITH_QUARANTINE = 3
    OVER_BUDGET = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertResult:
    """A finished conversion.

    Attributes:
        exit_code: What the command ends with.
        snapshot: None when the quarantine budget is exceeded: nothing is published.
        quarantine: Every recording that was rejected, those that the operator has waived among them.
        counts: Totals of the snapshot.
        waived: Which of them are waived.
    """

    exit_code: ExitCode
    snapshot: Snapshot | None
    quarantine: tuple[Quarantined, ...]
    counts: dict[str, int]
    waived: Container[WaiverKey] = ()


def _check_complete(units: Sequence[Unit], commits: Sequence[Commit]) -> None:
    """Every planned recording stands in its unit's commit exactly once."""
    for unit, commit in zip(sorted(units, key=lambda unit: unit.id), commits, strict=True):
        planned = sorted((item.corpus, item.path) for item in unit.recordings)
        found = sorted((item.corpus, item.path) for item in commit.inputs)
        if planned != found or commit.unit != unit.id:
            raise ContractError(
                f"commit of unit {unit.id}: {len(found)} recordings where the plan has {len(planned)}; "
                "remove the commit to convert the unit again"
            )


def _merged(output: Path, commits: Sequence[Commit]) -> pa.Table:
    """Sample rows of all units, ordered by shard and ordinal."""
    parts = [pq.read_table(io.BytesIO(samples_path(output, commit.unit).read_bytes())) for commit in commits]
    table = pa.concat_tables(parts).cast(sample_schema()) if parts else sample_schema().empty_table()
    keys = Counter(table.column("key").to_pylist())
    if len(keys) != len(table):
        twice = next(key for key, count in keys.items() if count > 1)
        raise ContractError(
            f"{output}: sample key {twice!r} stands twice; two paths of one corpus lead to the same recording"
        )
    return table


def _counts(commits: Sequence[Commit], table: pa.Table) -> dict[str, int]:
    """Totals of a snapshot; `seconds` is recorded time, `windows` what is in the shards."""
    dropped: Counter[str] = Counter()
    for commit in commits:
        dropped.update(commit.counts.dropped)
    return {
        "recordings": sum(commit.counts.recordings for commit in commits),
        "quarantined": sum(commit.counts.quarantined for commit in commits),
        "subjects": len(set(zip(*(table.column(name).to_pylist() for name in ("corpus", "subject")), strict=True))),
        "windows": len(table),
        "seconds": sum(commit.counts.seconds for commit in commits),
        "shards": sum(len(commit.shards) for commit in commits),
        "num_bytes": sum(shard.num_bytes for commit in commits for shard in commit.shards),
        "unit_suspect": sum(sum(kinds.values()) for commit in commits for kinds in commit.unit_suspect.values()),
        **{f"dropped_{reason}": count for reason, count in sorted(dropped.items())},
    }


def _corpus_entry(corpus: Corpus, commits: Sequence[Commit]) -> dict[str, Any]:
    inputs = [item for commit in commits for item in commit.inputs if item.corpus == corpus.id]
    bad = {item.recording for commit in commits for item in commit.quarantine if item.corpus == corpus.id}
    suspect = sum((Counter(commit.unit_suspect.get(corpus.id, {})) for commit in commits), Counter[str]())
    return {
        "title": corpus.title,
        "licence": corpus.licence,
        "citation": corpus.citation,
        "mains_hz": corpus.mains_hz,
        "digest": digest(corpus.model_dump(mode="json")),
        "recordings": len(inputs),
        "quarantined": len(bad),
        "windows": sum(item.windows for item in inputs),
        "seconds": sum(item.seconds for item in inputs if item.recording not in bad),
        "unit_suspect": dict(sorted(suspect.items())),
    }


def exit_code(
    quarantine: Sequence[Quarantined], num_recordings: int, budget: float, waived: Container[WaiverKey] = ()
) -> ExitCode:
    """Exit code of a conversion.

    Recordings that their corpus lists as known bad do not count against the budget, nor do those that the operator
    has waived. They are missing all the same, so that the conversion is not `COMPLETE`.
    """
    surprises = sum(state_of(item, waived) == "counted" for item in quarantine)
    if surprises > budget * num_recordings:
        return ExitCode.OVER_BUDGET
    return ExitCode.WITH_QUARANTINE if quarantine else ExitCode.COMPLETE


def finalise(config: ConvertConfig, units: Sequence[Unit]) -> ConvertResult:
    """Check all commits against the plan and write `samples.parquet` and `snapshot.json`.

    The bytes do not depend on the order in which units were converted. A snapshot whose content is unchanged is
    left as it is.

    Raises:
        ContractError: A planned recording is neither committed nor quarantined, or a sample key stands twice.
    """
    output = config.output
    commits = read_commits(output, units)
    _check_complete(units, commits)
    quarantine = tuple(item for commit in commits for item in commit.quarantine)
    table = _merged(output, commits)
    counts = _counts(commits, table)
    waived = frozenset(read_waivers(output))
    code = exit_code(quarantine, counts["recordings"], config.quarantine_budget, waived)
    if code is ExitCode.OVER_BUDGET:
        (output / SNAPSHOT_FILE).unlink(missing_ok=True)
        return ConvertResult(exit_code=code, snapshot=None, quarantine=quarantine, counts=counts, waived=waived)
    recipe = load_recipe(config.recipe).model_dump(mode="json")
    content = parquet_bytes(table)
    snapshot = Snapshot(
        format_version=FORMAT_VERSION,
        shards=[shard for commit in commits for shard in commit.shards],
        corpora={
            corpus.id: {**_corpus_entry(corpus, commits), "split_name": corpus.split_name(source.split)}
            for (corpus, _), source in zip(load_sources(config.sources), config.sources, strict=True)
        },
        recipe=recipe,
        recipe_digest=digest(recipe),
        ucs_version=UCS_VERSION,
        ucs_digest=table_digest(),
        samples_sha256=hashlib.sha256(content).hexdigest(),
        counts=counts,
        provenance={
            "engine_version": ENGINE_VERSION,
            "salt": config.salt_fingerprint() or PUBLIC_SALT,
            **code_version(),
        },
    )
    snapshot = snapshot.model_copy(update={"digest": snapshot.content_digest()})
    keep(output, snapshot)
    _write(output, snapshot, content)
    return ConvertResult(exit_code=code, snapshot=snapshot, quarantine=quarantine, counts=counts, waived=waived)


def _write(output: Path, snapshot: Snapshot, content: bytes) -> None:
    samples, path = output / SAMPLES_FILE, output / SNAPSHOT_FILE
    if not samples.exists() or samples.read_bytes() != content:
        write_atomically(samples, content)
    if path.exists():
        try:
            unchanged = Snapshot.model_validate_json(path.read_bytes()).digest == snapshot.digest
        except ValueError:  # whatever stands there is not a snapshot of this version
            unchanged = False
        if unchanged:
            return
    write_atomically(path, snapshot.model_dump_json(indent=1) + "\n")


def read_samples(output: Path) -> pa.Table:
    """Rows of `samples.parquet`."""
    return pq.read_table(io.BytesIO((output / SAMPLES_FILE).read_bytes()))
