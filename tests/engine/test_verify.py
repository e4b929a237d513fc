import json
from pathlib import Path

import pytest

from engine.config import ConvertConfig
from engine.finalise import read_samples
from engine.verify import sample_problems, verify
from manifests.errors import ConfigError, ContractError
from manifests.shards import SAMPLES_FILE, SNAPSHOT_FILE, load_snapshot, parse_sample, tar_sample


def first_shard(config: ConvertConfig) -> Path:
    return config.output / load_snapshot(config.output).shards[0].path


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_sound_snapshot(converted: ConvertConfig) -> None:
    found = verify(converted.output, deep=True)
    assert found.is_sound
    assert found.samples == 60
    assert found.shards == len(load_snapshot(converted.output).shards)


@pytest.mark.parametrize("position", [600, -1100])
def test_one_changed_bit_is_found(converted: ConvertConfig, position: int) -> None:
    flip(first_shard(converted), position)
    (problem,) = verify(converted.output).problems
    assert "SHA-256 differs" in problem


def test_a_cut_a_missing_or_an_unindexed_shard_is_found(converted: ConvertConfig) -> None:
    shards = [converted.output / shard.path for shard in load_snapshot(converted.output).shards]
    shards[0].write_bytes(shards[0].read_bytes()[:-512])
    shards[1].unlink()
    shards[2].with_suffix(".idx").write_bytes(bytes(16))
    cut, missing, index = verify(converted.output).problems
    assert "snapshot.json says" in cut
    assert "missing" in missing
    assert ".idx has 2 offsets" in index


def test_changed_rows_and_a_changed_snapshot_are_found(converted: ConvertConfig, tmp_path: Path) -> None:
    flip(converted.output / SAMPLES_FILE, 100)
    assert "samples.parquet" in verify(converted.output).problems[0]
    path = converted.output / SNAPSHOT_FILE
    path.write_text(path.read_text(encoding="utf-8").replace('"windows": 60', '"windows": 61', 1), encoding="utf-8")
    with pytest.raises(ContractError, match="digest"):
        verify(converted.output)
    with pytest.raises(ConfigError, match=r"no snapshot\.json"):
        verify(tmp_path)


def test_deep_holds_every_sample_against_its_tags(converted: ConvertConfig) -> None:
    snapshot = load_snapshot(converted.output)
    row = read_samples(converted.output).slice(0, 1).to_pylist()[0]
    with (converted.output / row["shard"]).open("rb") as file:
        buffer = file.read(row["num_bytes"])
    assert list(sample_problems(buffer, row, snapshot.recipe)) == []

    key, members = parse_sample(buffer)
    parts = {name: bytes(view) for name, view in members.items()}
    meta = json.loads(parts["json"])
    meta["ucs"]["eeg"] = meta["ucs"]["eeg"][:-1]
    fewer_tags = tar_sample(key, parts | {"json": json.dumps(meta).encode()})
    assert any("eeg: int16" in problem for problem in sample_problems(fewer_tags, row, snapshot.recipe))
    del parts["eeg.npy"]
    no_member = tar_sample(key, parts)
    assert any("members" in problem for problem in sample_problems(no_member, row, snapshot.recipe))
    assert any("key" in problem for problem in sample_problems(buffer, row | {"key": "x"}, snapshot.recipe))
    assert any("differs" in problem for problem in sample_problems(buffer, row | {"split": "x"}, snapshot.recipe))
