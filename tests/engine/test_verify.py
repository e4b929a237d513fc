import hashlib
import json
import shutil
import threading
from pathlib import Path

import pyarrow as pa
import pytest

from engine.commit import parquet_bytes
from engine.config import ConvertConfig, Source
from engine.convert import convert_all
from engine.finalise import read_samples
from engine.repack import repack
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


def test_threads_find_the_same_in_the_same_order(converted: ConvertConfig) -> None:
    for shard in load_snapshot(converted.output).shards[::2]:
        flip(converted.output / shard.path, 700)
    names: set[str] = set()
    ticks: list[int] = []

    def tick(num_bytes: int) -> None:
        names.add(threading.current_thread().name)
        ticks.append(num_bytes)

    one = verify(converted.output, threads=1)
    four = verify(converted.output, threads=4, tick=tick)
    assert one == four
    assert len(one.problems) == len(load_snapshot(converted.output).shards[::2])
    assert len(names) > 1
    size = sum(shard.num_bytes for shard in load_snapshot(converted.output).shards)
    assert sum(ticks) == size + (converted.output / SAMPLES_FILE).stat().st_size


def publish(folder: Path, rows: list[dict]) -> None:
    """Write other sample rows and a snapshot that says so."""
    content = parquet_bytes(pa.Table.from_pylist(rows, schema=read_samples(folder).schema))
    (folder / SAMPLES_FILE).write_bytes(content)
    counts = load_snapshot(folder).counts | {"windows": len(rows)}
    changes = {"samples_sha256": hashlib.sha256(content).hexdigest(), "counts": counts}
    snapshot = load_snapshot(folder).model_copy(update=changes)
    snapshot = snapshot.model_copy(update={"digest": snapshot.content_digest()})
    (folder / SNAPSHOT_FILE).write_text(snapshot.model_dump_json(), encoding="utf-8")


def test_rows_that_do_not_belong_there_are_found(converted: ConvertConfig) -> None:
    rows = read_samples(converted.output).to_pylist()
    publish(converted.output, [*rows, rows[0] | {"shard": "shards/elsewhere.tar"}])
    problems = verify(converted.output).problems
    assert any("rows of shards/elsewhere.tar" in problem for problem in problems)
    assert any(f"key {rows[0]['key']!r} stands 2 times" in problem for problem in problems)
    publish(converted.output, rows[1:])
    assert any(
        "rows of samples.parquet do not fit its .idx" in problem for problem in verify(converted.output).problems
    )
    publish(converted.output, [row for row in rows if row["shard"] != rows[-1]["shard"]])
    assert any(rows[-1]["shard"] in problem for problem in verify(converted.output).problems)
    publish(converted.output, rows)
    assert verify(converted.output, deep=True).is_sound


@pytest.mark.parametrize(
    ("column", "value"),
    [("stage", "other"), ("symbols", ["eeg:C3"]), ("quality", 0.123), ("length", 7), ("classes", ["x"])],
)
def test_deep_holds_every_column_against_the_json(converted: ConvertConfig, column: str, value: object) -> None:
    rows = read_samples(converted.output).to_pylist()
    publish(converted.output, [rows[0] | {column: value}, *rows[1:]])
    assert verify(converted.output).is_sound
    (problem,) = verify(converted.output, deep=True).problems
    assert problem.endswith(f"in {column}")


@pytest.mark.parametrize(
    ("labels", "words"),
    [({"stage": [3]}, "must be texts"), ({"events": [[-1, 5, "x"]]}, "leaves its window"), ({"events": [[1]]}, "")],
)
def test_deep_reads_the_labels(converted: ConvertConfig, labels: dict, words: str) -> None:
    row = read_samples(converted.output).slice(0, 1).to_pylist()[0]
    with (converted.output / row["shard"]).open("rb") as file:
        key, members = parse_sample(file.read(row["num_bytes"]))
    meta = json.loads(bytes(members["json"]))
    parts = {name: bytes(view) for name, view in members.items()}
    block = tar_sample(key, parts | {"json": json.dumps(meta | {"labels": labels}).encode()})
    try:
        found = list(
            sample_problems(block, row | {"stage": None, "classes": []}, load_snapshot(converted.output).recipe)
        )
    except ValueError:
        found = [""]  # what verify reports as the error of this sample
    assert any(words in problem for problem in found)


def test_the_recordings_behind_a_snapshot(converted: ConvertConfig, tiny_root: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tiny_root, tmp_path / "root"))
    convert_all(converted.model_copy(update={"sources": [Source(corpus="synthetic_psg", root=root)]}))
    assert verify(converted.output, source=True).recordings == 4
    paths = sorted(root.glob("psg/*/*.edf"))
    data = bytearray(paths[0].read_bytes())
    data[len(data) // 3] ^= 1  # where no sampled digest looks
    paths[0].write_bytes(data)
    paths[1].unlink()
    paths[3].write_bytes(b"mended")
    found = verify(converted.output, source=True)
    assert len(found.problems) == 3
    assert "changed since it was converted" in found.problems[0] + found.problems[1] + found.problems[2]
    assert any("is missing" in problem for problem in found.problems)
    assert any("since it was rejected" in problem for problem in found.problems)
    assert "take changed recordings" in found.advice[0]
    assert verify(converted.output).is_sound


def test_the_advice_mends_what_was_found(converted: ConvertConfig, tmp_path: Path) -> None:
    digest = load_snapshot(converted.output).digest
    flip(first_shard(converted), 700)
    (advice,) = verify(converted.output).advice
    assert advice.startswith(f"kymo convert {converted.output / 'config.yaml'} recheck=true")
    convert_all(converted.model_copy(update={"recheck": True}))
    assert verify(converted.output, deep=True).is_sound
    assert load_snapshot(converted.output).digest == digest

    repack(converted.output, tmp_path / "new")
    flip(next((tmp_path / "new/shards").glob("*.tar")), 700)
    assert f"kymo repack snapshot {digest[:16]}" in verify(tmp_path / "new").advice[0]
    with pytest.raises(ConfigError, match=r"no plan\.jsonl"):
        verify(tmp_path / "new", source=True)
    copied = Path(shutil.copytree(converted.output, tmp_path / "copy", ignore=shutil.ignore_patterns("plan.jsonl")))
    (copied / SAMPLES_FILE).unlink()
    assert verify(copied).advice == ("copy the named files again from where the snapshot came from",)
