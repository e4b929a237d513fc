import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import ray

from engine import pipeline
from engine.config import ConvertConfig
from engine.convert import ProgressRow, prepare
from manifests.errors import ContractError
from manifests.shards import SAMPLES_FILE, load_snapshot


@pytest.fixture(scope="module", autouse=True)
def _ray() -> object:
    """One Ray for all tests of this module: starting it costs more than they do."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_the_same_bytes_with_one_cpu_two_four_and_without_ray(
    tiny_config: ConvertConfig, converted: ConvertConfig, tmp_path: Path
) -> None:
    expected = load_snapshot(converted.output)
    for num_cpus in (1, 2, 4):
        rows: list[ProgressRow] = []
        config = tiny_config.model_copy(update={"output": tmp_path / f"ray{num_cpus}", "num_cpus": num_cpus})
        result = pipeline.run(config, progress=rows.append)
        assert int(result.exit_code) == 3
        snapshot = load_snapshot(config.output)
        assert snapshot.digest == expected.digest
        assert snapshot.shards == expected.shards
        for name in (SAMPLES_FILE, *(shard.path for shard in snapshot.shards)):
            assert (config.output / name).read_bytes() == (converted.output / name).read_bytes()
        assert rows[-1].hours_done == rows[-1].hours_total
        assert rows[-1].recordings_done == rows[-1].recordings_total == 4
    assert ray.is_initialized()


def test_nothing_pending_starts_no_work(converted: ConvertConfig) -> None:
    marks = {path: path.stat().st_ctime_ns for path in (converted.output / "shards").iterdir()}
    assert int(pipeline.run(converted).exit_code) == 3
    assert {path: path.stat().st_ctime_ns for path in (converted.output / "shards").iterdir()} == marks


def test_a_failing_unit_is_told_and_the_others_are_kept(tiny_config: ConvertConfig) -> None:
    """A folder where a shard belongs is no recording's fault: no quarantine, and no snapshot."""
    config = tiny_config.model_copy(update={"unit_bytes": 1})
    config.output.mkdir()
    _, units = prepare(config)
    (unit,) = [unit for unit in units if "003" in unit.recordings[0].path]
    (config.output / f"shards/{unit.id}-00000.tar").mkdir(parents=True)
    with pytest.raises(ContractError, match="IsADirectoryError"):
        pipeline.run(config)
    assert len(list((config.output / "commits").glob("commit-*.json"))) >= 2
    assert not list((config.output / "work").glob("*/*"))


def test_only_small_rows_cross_ray(tiny_config: ConvertConfig) -> None:
    tiny_config.output.mkdir()
    _, units = prepare(tiny_config)
    actor = pipeline.ConvertActor(tiny_config.model_dump(mode="json"))
    rows = actor({"unit": np.array([json.dumps(asdict(units[0]))])})
    assert rows["unit"].tolist() == [units[0].id]
    assert sum(column.nbytes for column in rows.values()) < 200
