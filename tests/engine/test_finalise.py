import json
import shutil

import pyarrow.parquet as pq
import pytest

from engine.commit import Quarantined, commit_path, sample_schema
from engine.config import ConvertConfig
from engine.finalise import ExitCode, exit_code, finalise, read_samples
from engine.plan import read_plan
from manifests.errors import ContractError
from manifests.shards import SAMPLES_FILE, SNAPSHOT_FILE, load_snapshot


def bad(reason: str) -> Quarantined:
    return Quarantined(corpus="c", recording="r", path="p", reason=reason, message="", command="")


@pytest.mark.parametrize(
    ("reasons", "budget", "code"),
    [
        ([], 0.0, ExitCode.COMPLETE),
        (["TRUNCATED"], 0.1, ExitCode.WITH_QUARANTINE),
        (["TRUNCATED"], 0.05, ExitCode.OVER_BUDGET),
        (["KNOWN_BAD"], 0.0, ExitCode.WITH_QUARANTINE),
    ],
)
def test_exit_codes(reasons: list[str], budget: float, code: ExitCode) -> None:
    assert exit_code([bad(reason) for reason in reasons], 10, budget) is code
    waived = {("c", "p", reason) for reason in reasons}
    assert exit_code([bad(reason) for reason in reasons], 10, 0.0, waived) is (
        ExitCode.WITH_QUARANTINE if reasons else ExitCode.COMPLETE
    )
    assert [int(code) for code in ExitCode] == [0, 3, 4]


def test_snapshot_counts_what_is_in_the_shards(converted: ConvertConfig) -> None:
    snapshot = load_snapshot(converted.output)
    table = read_samples(converted.output)
    assert table.schema.equals(sample_schema())
    assert snapshot.counts["windows"] == len(table) == sum(shard.num_samples for shard in snapshot.shards) == 60
    assert snapshot.counts["seconds"] == 1800
    assert snapshot.counts["subjects"] == 3
    assert snapshot.counts["quarantined"] == 1
    entry = snapshot.corpora["synthetic_psg"]
    assert (entry["recordings"], entry["quarantined"], entry["windows"], entry["seconds"]) == (4, 1, 60, 1800)
    assert [shard.path for shard in snapshot.shards] == sorted(shard.path for shard in snapshot.shards)
    order = list(zip(table["shard"].to_pylist(), table["ordinal"].to_pylist(), strict=True))
    assert order == sorted(order)
    assert set(table["stage"].to_pylist()) <= {"W", "N1", "N2", "N3", "R", None}
    assert not (pq.read_metadata(converted.output / SAMPLES_FILE).metadata or {}).get(b"pandas")


def test_finalise_is_repeatable(converted: ConvertConfig) -> None:
    samples, digest = (converted.output / SAMPLES_FILE).read_bytes(), load_snapshot(converted.output).digest
    for name in (SNAPSHOT_FILE, SAMPLES_FILE):
        (converted.output / name).unlink()
    finalise(converted, read_plan(converted.output))
    assert (converted.output / SAMPLES_FILE).read_bytes() == samples
    assert load_snapshot(converted.output).digest == digest


def test_a_recording_that_is_nowhere_is_an_error(converted: ConvertConfig) -> None:
    units = read_plan(converted.output)
    path = commit_path(converted.output, units[0].id)
    commit = json.loads(path.read_bytes())
    path.write_text(json.dumps({**commit, "inputs": commit["inputs"][:-1]}), encoding="utf-8")
    with pytest.raises(ContractError, match=f"commit of unit {units[0].id}"):
        finalise(converted, units)
    path.unlink()
    with pytest.raises(ContractError, match="run the same kymo convert again"):
        finalise(converted, units)


def test_a_key_that_stands_twice_is_an_error(converted: ConvertConfig) -> None:
    first, second = sorted((converted.output / "commits").glob("samples-*.parquet"))[:2]
    shutil.copy(first, second)
    commit = converted.output / "commits" / second.name.replace("samples", "commit").replace(".parquet", ".json")
    data = json.loads(commit.read_bytes())
    commit.write_text(json.dumps({**data, "samples_bytes": first.stat().st_size}), encoding="utf-8")
    with pytest.raises(ContractError, match="stands twice"):
        finalise(converted, read_plan(converted.output))
