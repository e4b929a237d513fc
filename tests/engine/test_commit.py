from pathlib import Path

import pytest

from engine.commit import (
    Commit,
    Counts,
    Limits,
    Quarantined,
    commit_path,
    parquet_bytes,
    pending,
    read_commit,
    remove_leftovers,
    sample_schema,
    write_commit,
)
from engine.plan import PlanItem, Unit
from engine.shardwriter import Spooled, write_shards
from manifests.errors import ContractError
from manifests.shards import SAMPLE_COLUMNS, SNAPSHOT_FILE, tar_sample

UNIT = Unit(
    id="00000000000000aa",
    recordings=(PlanItem(corpus="c", path="a.edf", identity="1", seconds=30, num_bytes=1),),
)
LIMITS = Limits(time_limit_s=10, memory_limit_gb=1, code="x")


def committed(output: Path, reason: str = "") -> Commit:
    """Write a unit of two samples with its commit."""
    spool = output / "spool.bin"
    blocks = [tar_sample(f"k{i}", {"json": b"{}"}) for i in range(2)]
    output.mkdir(exist_ok=True)
    spool.write_bytes(b"".join(blocks))
    samples = [Spooled(key=f"k{i}", spool=spool, offset=i * len(blocks[0]), num_bytes=len(blocks[0])) for i in range(2)]
    shards, placed = write_shards(samples, output=output, unit=UNIT.id, shard_bytes=1)
    bad = Quarantined(corpus="c", recording="r", path="a.edf", reason=reason, message="m", command="kymo scan a.edf")
    commit = Commit(
        unit=UNIT.id,
        inputs=[],
        shards=shards,
        samples_bytes=0,
        counts=Counts(recordings=1, quarantined=0, windows=2, seconds=30),
        quarantine=[bad] if reason else [],
        unresolved=[],
        limits=LIMITS,
        seconds=1.0,
    )
    write_commit(
        output, commit, [{"key": place.key, "shard": place.shard, "num_bytes": place.num_bytes} for place in placed]
    )
    return commit


def test_a_unit_is_pending_until_its_commit_stands_there(tmp_path: Path) -> None:
    assert pending(tmp_path, [UNIT], LIMITS) == [UNIT]
    committed(tmp_path)
    assert pending(tmp_path, [UNIT], LIMITS) == []


@pytest.mark.parametrize("damage", ["tar", "idx", "parquet"])
def test_a_commit_whose_files_are_gone_or_cut_is_not_valid(tmp_path: Path, damage: str) -> None:
    commit = committed(tmp_path)
    shard = tmp_path / commit.shards[1].path
    paths = {"tar": shard, "idx": shard.with_suffix(".idx")}
    path = paths.get(damage, next((tmp_path / "commits").glob("*.parquet")))
    path.write_bytes(path.read_bytes()[:-1])
    assert pending(tmp_path, [UNIT], LIMITS) == [UNIT]
    committed(tmp_path)
    paths.get(damage, path).unlink()
    assert read_commit(tmp_path, UNIT.id) is None


@pytest.mark.parametrize(
    ("reason", "limits", "again"),
    [
        ("TIMEOUT", LIMITS.model_copy(update={"time_limit_s": 20}), True),
        ("TIMEOUT", LIMITS.model_copy(update={"time_limit_s": 5, "memory_limit_gb": 9}), False),
        ("MEMORY", LIMITS.model_copy(update={"memory_limit_gb": 2}), True),
        ("MEMORY", LIMITS, False),
        ("CRASHED", LIMITS.model_copy(update={"code": "y"}), True),
        ("CRASHED", LIMITS, False),
        ("KILLED", LIMITS, True),
        ("TRUNCATED", Limits(time_limit_s=99, memory_limit_gb=99, code="y"), False),
    ],
)
def test_what_higher_limits_may_let_pass_is_tried_again(
    tmp_path: Path, reason: str, limits: Limits, again: bool
) -> None:
    committed(tmp_path, reason)
    assert bool(pending(tmp_path, [UNIT], limits)) is again


@pytest.mark.parametrize("suffix", [".tar", ".idx", ".parquet"])
def test_damage_that_keeps_the_size_is_found_by_a_recheck(tmp_path: Path, suffix: str) -> None:
    committed(tmp_path)
    assert pending(tmp_path, [UNIT], LIMITS, recheck=True) == []
    path = sorted(path for path in tmp_path.rglob(f"*{suffix}"))[0]
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    assert pending(tmp_path, [UNIT], LIMITS) == []
    assert pending(tmp_path, [UNIT], LIMITS, recheck=True) == [UNIT]


def test_leftovers_go_and_what_is_committed_stays(tmp_path: Path) -> None:
    committed(tmp_path)
    kept = {path for folder in ("shards", "commits") for path in (tmp_path / folder).iterdir()}
    orphans = [
        tmp_path / "shards" / ".00000000000000aa-00000.tar.123.tmp",
        tmp_path / "shards" / "00000000000000bb-00000.tar",
        tmp_path / "commits" / ".commit-00000000000000bb.json.123.tmp",
        tmp_path / "commits" / "samples-00000000000000bb.parquet",
        tmp_path / ".plan.jsonl.99.tmp",
        tmp_path / "progress" / "00000000000000bb.jsonl",
        tmp_path / "progress" / "00000000000000aa.beat",
        tmp_path / "work" / "00000000000000bb-7" / "000000.bin",
    ]
    for path in orphans:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    remove_leftovers(tmp_path, [UNIT])
    assert not any(path.exists() for path in orphans)
    assert all(path.exists() for path in kept)


def test_a_snapshot_that_names_a_superseded_unit_goes(tmp_path: Path) -> None:
    committed(tmp_path)
    (tmp_path / SNAPSHOT_FILE).write_text("{}", encoding="utf-8")
    remove_leftovers(tmp_path, [UNIT])
    assert (tmp_path / SNAPSHOT_FILE).exists()
    remove_leftovers(tmp_path, [])
    assert not (tmp_path / SNAPSHOT_FILE).exists()
    assert not commit_path(tmp_path, UNIT.id).exists()


def test_a_foreign_commit_file_is_refused(tmp_path: Path) -> None:
    committed(tmp_path)
    commit_path(tmp_path, UNIT.id).write_text("{}", encoding="utf-8")
    with pytest.raises(ContractError, match="not a commit of this kymo"):
        read_commit(tmp_path, UNIT.id)


def test_sample_rows_have_the_columns_of_the_format_and_fixed_bytes() -> None:
    schema = sample_schema()
    assert schema.names == list(SAMPLE_COLUMNS)
    assert parquet_bytes(schema.empty_table()) == parquet_bytes(schema.empty_table())
    assert b"pandas" not in parquet_bytes(schema.empty_table())
