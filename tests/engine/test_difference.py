import hashlib
import json
import shutil
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pytest

from engine.commit import parquet_bytes
from engine.config import ConvertConfig
from engine.convert import convert_all
from engine.difference import Difference, difference, sample_digests
from engine.finalise import read_samples
from engine.repack import repack
from manifests.config import digest
from manifests.errors import ConfigError, ContractError
from manifests.shards import SNAPSHOT_FILE, load_snapshot, parse_sample, tar_sample


def first_sample(folder: Path) -> tuple[dict, bytes]:
    row = read_samples(folder).slice(0, 1).to_pylist()[0]
    with (folder / row["shard"]).open("rb") as file:
        return row, file.read(row["num_bytes"])


def put(folder: Path, row: dict, block: bytes) -> None:
    """Replace a sample by one of the same size and let `snapshot.json` say so."""
    path = folder / row["shard"]
    data = bytearray(path.read_bytes())
    assert len(block) == row["num_bytes"]
    data[row["offset"] : row["offset"] + len(block)] = block
    path.write_bytes(data)
    sha = hashlib.sha256(data).hexdigest()
    snapshot = load_snapshot(folder)
    shards = [
        shard.model_copy(update={"sha256": sha}) if shard.path == row["shard"] else shard for shard in snapshot.shards
    ]
    publish(folder, shards=shards)


def publish(folder: Path, table: pa.Table | None = None, **changes: object) -> None:
    """Write a changed snapshot whose digests fit."""
    if table is not None:
        content = parquet_bytes(table)
        (folder / "samples.parquet").write_bytes(content)
        changes["samples_sha256"] = hashlib.sha256(content).hexdigest()
    snapshot = load_snapshot(folder).model_copy(update=changes)
    snapshot = snapshot.model_copy(update={"digest": snapshot.content_digest()})
    (folder / SNAPSHOT_FILE).write_text(snapshot.model_dump_json(), encoding="utf-8")


def changed(found: Difference) -> set[str]:
    """Names of the parts that differ."""
    names = {field.name for field in fields(Difference)} - {"digests", "num_equal", "num_read", "corpora"}
    return {name for name in names if getattr(found, name)}


@pytest.fixture
def other(converted: ConvertConfig, tmp_path: Path) -> Path:
    """A copy of the snapshot."""
    return Path(shutil.copytree(converted.output, tmp_path / "other"))


def test_a_copy_is_the_same_and_no_sample_is_read(converted: ConvertConfig, other: Path) -> None:
    found = difference(converted.output, other)
    assert found.is_same
    assert changed(found) == set()
    assert (found.num_equal, found.num_read) == (60, 0)


def test_a_repacked_snapshot_holds_the_same_samples(converted: ConvertConfig, tmp_path: Path) -> None:
    repack(converted.output, tmp_path / "new", shard_bytes=300_000)
    ticks: list[int] = []
    found = difference(converted.output, tmp_path / "new", tick=ticks.append)
    assert found.is_same
    assert changed(found) == {"counts"}
    assert found.digests[0] != found.digests[1]
    assert (found.num_equal, found.num_read, sum(ticks)) == (60, 60, 120)


def test_changed_signals_and_changed_tags_are_told_apart(converted: ConvertConfig, other: Path) -> None:
    row, block = first_sample(other)
    key, members = parse_sample(block)
    parts = {name: bytes(view) for name, view in members.items()}
    signal = parts | {"eeg.npy": parts["eeg.npy"][:-1] + bytes([parts["eeg.npy"][-1] ^ 1])}
    put(other, row, tar_sample(key, signal))
    found = difference(converted.output, other)
    assert changed(found) == {"signal"}
    assert (found.signal, found.tags, found.num_equal) == ((key,), (), 59)
    assert found.num_read < 60
    assert found.corpora[0]["recordings_changed"] == 1

    tags = json.loads(parts["json"])
    tags["quality"] = 0.1 if len(str(tags["quality"])) == 3 else 0.1234
    text = json.dumps(tags, separators=(",", ":")).encode().ljust(len(parts["json"]))
    put(other, row, tar_sample(key, parts | {"json": text}))
    assert changed(difference(converted.output, other)) == {"tags"}


def test_splits_and_labels_that_moved(converted: ConvertConfig, other: Path) -> None:
    table = read_samples(other)
    rows = table.to_pylist()
    rows[3]["split"] = "elsewhere"
    rows[4]["stage"] = None if rows[4]["stage"] else "W"
    rows[5]["classes"] = ["x"]
    publish(other, pa.Table.from_pylist(rows, schema=table.schema))
    found = difference(converted.output, other)
    assert changed(found) == {"splits", "labels"}
    assert found.splits == (rows[3]["key"],)
    assert found.labels == tuple(sorted((rows[4]["key"], rows[5]["key"])))
    assert not found.is_same


def test_samples_that_came_and_went(converted: ConvertConfig, other: Path) -> None:
    table = read_samples(other)
    gone = table.column("recording").to_pylist()[0]
    kept = [row for row in table.to_pylist() if row["recording"] != gone]
    publish(
        other, pa.Table.from_pylist(kept, schema=table.schema), counts=load_snapshot(other).counts | {"windows": 40}
    )
    found = difference(converted.output, other)
    assert changed(found) == {"removed", "counts"}
    assert (len(found.removed), found.counts["windows"]) == (20, (60, 40))
    assert found.corpora == [
        {
            "corpus": "synthetic_psg",
            "recordings_added": 0,
            "recordings_removed": 1,
            "recordings_changed": 0,
            "samples_added": 0,
            "samples_removed": 20,
        }
    ]
    back = difference(other, converted.output)
    assert (back.added, back.removed) == (found.removed, ())


def test_another_recipe_and_another_channel_table_are_named(converted: ConvertConfig, other: Path) -> None:
    recipe = json.loads(json.dumps(load_snapshot(other).recipe))
    recipe["window_s"] = 15
    publish(other, recipe=recipe, recipe_digest=digest(recipe), ucs_version=99)
    found = difference(converted.output, other)
    assert found.settings == {"recipe.window_s": ("30", "15"), "ucs_version": (found.settings["ucs_version"][0], "99")}


def test_shards_cut_otherwise_hold_the_same_samples(converted: ConvertConfig, tmp_path: Path) -> None:
    again = converted.model_copy(update={"output": tmp_path / "again", "shard_bytes": 500_000})
    convert_all(again)
    found = difference(converted.output, again.output)
    assert found.is_same
    assert found.num_equal == 60


def test_what_is_no_snapshot_is_refused(converted: ConvertConfig, other: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no snapshot\.json"):
        difference(converted.output, tmp_path)
    (other / "samples.parquet").write_bytes(b"x")
    with pytest.raises(ContractError, match="kymo verify"):
        difference(converted.output, other)


def test_digests_tell_signal_from_tags() -> None:
    one = sample_digests(tar_sample("k", {"eeg.npy": b"1", "json": b"{}"}))
    two = sample_digests(tar_sample("k", {"eeg.npy": b"1", "json": b"[]"}))
    three = sample_digests(tar_sample("k", {"ecg.npy": b"1", "json": b"{}"}))
    assert one[:16] == two[:16] != three[:16]
    assert one[16:] == three[16:] != two[16:]
