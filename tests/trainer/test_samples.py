import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifests.errors import ConfigError, ContractError
from trainer import samples
from trainer.filters import SampleFilter
from trainer.samples import SnapshotSource, Stream, load_streams
from trainer.tiny import write_tiny_snapshot


def test_filters_choose_from_the_table(tiny_snapshot: Path) -> None:
    source = SnapshotSource(path=str(tiny_snapshot))

    def count(split: str = "train", **keep: Any) -> int:
        streams = load_streams([source], split=split, keep=SampleFilter.model_validate(keep))
        return sum(len(item) for item in streams)

    assert count() == 32
    assert count("val") == 16
    assert count(kinds=["resp"]) == 24  # one training subject has no belt
    assert count(kinds=["ecg", "resp"], min_kinds=2) == 24
    assert count(labelled=True) == 32
    refused: list[dict[str, Any]] = [{"min_quality": 1.0, "corpora": ["other"]}, {"min_kinds": 4}]
    for keep in refused:
        with pytest.raises(ConfigError, match="widen the filter"):
            count(**keep)


def test_a_changed_table_or_snapshot_is_refused(tmp_path: Path) -> None:
    write_tiny_snapshot(tmp_path)
    source = SnapshotSource(path=str(tmp_path))
    table = tmp_path / "samples.parquet"
    content = table.read_bytes()
    table.write_bytes(content[:-1] + b"x")
    with pytest.raises(ContractError, match="SHA-256"):
        load_streams([source], split="train", keep=SampleFilter())
    table.write_bytes(content)
    assert load_streams([source], split="train", keep=SampleFilter())


def test_weights_are_given_to_all_snapshots_or_to_none(tiny_snapshot: Path) -> None:
    sources = [SnapshotSource(path=str(tiny_snapshot), weight=1.0), SnapshotSource(path=str(tiny_snapshot))]
    with pytest.raises(ConfigError, match="all of them or to none"):
        load_streams(sources, split="train", keep=SampleFilter())


def test_a_shard_of_another_size_stops_before_training(tiny_snapshot: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_snapshot, copy)
    shard = next(copy.rglob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ContractError, match="were written"):
        load_streams([SnapshotSource(path=str(copy))], split="train", keep=SampleFilter())
    shard.unlink()
    with pytest.raises(ContractError, match="is missing"):
        load_streams([SnapshotSource(path=str(copy))], split="train", keep=SampleFilter())


def test_streams_hold_the_rows_of_the_table(tiny_snapshot: Path) -> None:
    [stream] = load_streams([SnapshotSource(path=str(tiny_snapshot))], split="train", keep=SampleFilter())
    rows = [row for row in pq.read_table(tiny_snapshot / "samples.parquet").to_pylist() if row["split"] == "train"]
    assert [*stream.keys] == [row["key"] for row in rows]
    assert [stream.shards[n].name for n in stream.shard] == [row["shard"] for row in rows]
    assert stream.offset.tolist() == [row["offset"] for row in rows]
    assert stream.num_bytes.tolist() == [row["num_bytes"] for row in rows]
    assert stream.seconds.tolist() == [8.0] * 32
    assert isinstance(stream.keys[3], str)
    few = stream.take(np.array([3, 1]), weight=2.0)
    assert [*few.keys] == [rows[3]["key"], rows[1]["key"]]
    assert (len(few), few.weight, few.corpus, few.split) == (2, 2.0, "tiny", "train")


def rows_of(table: pa.Table, *, bucket_by: tuple[samples.Shape, ...] = ()) -> dict[tuple[str, str, str], list[str]]:
    """Keys by (split, corpus, bucket) of a table in memory, two row groups, shards `b`, `a` in this order."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=3)
    shards = [
        samples.ShardEntry(path=path, num_bytes=1, sha256="", num_samples=1, unit="") for path in ("b.tar", "a.tar")
    ]
    file = pq.ParquetFile(sink.getvalue(), read_dictionary=["shard", "corpus"])
    rows = samples._read_rows(file, shards, SampleFilter(), bucket_by, where=Path("here"))
    return {group: [*samples.Keys(rows.columns["texts"][part])] for group, part in rows.groups.items()}


def table_of(**changes: list[object]) -> pa.Table:
    columns: dict[str, list[object]] = {
        "key": ["k5", "k4", "k3", "k22", "k1"],
        "shard": ["a.tar", "b.tar", "a.tar", "b.tar", "b.tar"],
        "ordinal": [1, 2, 0, 1, 0],
        "offset": [0] * 5,
        "num_bytes": [1] * 5,
        "corpus": ["z", "z", "a", "a", "z"],
        "split": ["train"] * 5,
        "kinds": [["eeg"]] * 5,
        "num_channels": [1, 3, 4, 5, 16],
        "length": [3840, 3840, 7680, 3840, 3840],
        "rate_num": [128, 128, 128, 256, 128],
        "rate_den": [1, 1, 1, 3, 1],
        "quality": [1.0] * 5,
    }
    return pa.table({**columns, **changes})


def test_rows_stand_by_corpus_shard_of_the_snapshot_and_ordinal() -> None:
    assert rows_of(table_of()) == {("train", "a", ""): ["k22", "k3"], ("train", "z", ""): ["k1", "k4", "k5"]}
    assert rows_of(table_of(split=["val", "train", "train", "val", "val"])) == {
        ("train", "a", ""): ["k3"],
        ("train", "z", ""): ["k4"],
        ("val", "a", ""): ["k22"],
        ("val", "z", ""): ["k1", "k5"],
    }


def test_buckets_are_named_by_rate_length_and_the_next_power_of_two_of_channels() -> None:
    assert {(g[1], g[2]) for g in rows_of(table_of(), bucket_by=("rate", "length"))} == {
        ("z", "128Hz x 3840"),
        ("a", "128Hz x 7680"),
        ("a", "256/3Hz x 3840"),
    }
    by_channels = rows_of(table_of(), bucket_by=("channels",))
    assert {g[2]: keys for g, keys in by_channels.items() if g[1] == "z"} == {
        "1ch": ["k5"],
        "4ch": ["k4"],
        "16ch": ["k1"],
    }
    assert {g[2] for g in by_channels if g[1] == "a"} == {"4ch", "8ch"}


def test_a_shard_that_the_snapshot_lacks_is_refused() -> None:
    with pytest.raises(ContractError, match=r"here: samples.parquet names shard 'c.tar'"):
        rows_of(table_of(shard=["a.tar", "b.tar", "c.tar", "b.tar", "b.tar"]))


def test_a_table_is_read_once_a_process_and_anew_when_it_was_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_snapshot(tmp_path)
    original, reads = samples._read_rows, []
    monkeypatch.setattr(samples, "_read_rows", lambda *a, **k: reads.append(1) or original(*a, **k))

    def load(split: str) -> list[Stream]:
        return load_streams([SnapshotSource(path=str(tmp_path))], split=split, keep=SampleFilter())

    assert len(load("train")[0]) == 32
    assert len(load("val")[0]) == 16
    assert load("train")[0].keys is load("train")[0].keys
    assert len(reads) == 1
    write_tiny_snapshot(tmp_path, num_subjects=7)
    assert len(load("train")[0]) == 40
    assert len(reads) == 2
