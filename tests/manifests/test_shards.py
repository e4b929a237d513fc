"""Bytes of the shard format: npy, tar blocks, index, snapshot digest."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import ConfigError, ContractError
from manifests.shards import (
    SNAPSHOT_FILE,
    TAR_END,
    ShardEntry,
    Snapshot,
    array_from_npy,
    index_bytes,
    load_snapshot,
    npy_bytes,
    parse_sample,
    tar_sample,
)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=3), st.sampled_from(["int16", "float32", "int64"]))
def test_npy_round_trips_and_numpy_reads_it(shape: list[int], dtype: str) -> None:
    array = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    data = npy_bytes(array)
    assert data[10 : 10 + int.from_bytes(data[8:10], "little")].endswith(b"\n")
    for back in (array_from_npy(data), np.load(io.BytesIO(data))):
        np.testing.assert_array_equal(back, array)
        assert back.dtype == array.dtype


def test_npy_data_start_at_a_multiple_of_64() -> None:
    data = npy_bytes(np.zeros((3, 3840), np.int16))
    assert (len(data) - 3 * 3840 * 2) % 64 == 0


def test_array_from_npy_refuses_foreign_bytes() -> None:
    with pytest.raises(ContractError, match=r"not a .npy member"):
        array_from_npy(b"RIFF" + bytes(200))


def test_tarfile_reads_a_sample_and_its_bytes_never_change() -> None:
    members = {"json": b"{}", "eeg.npy": npy_bytes(np.ones((2, 5), np.int16))}
    sample = tar_sample("psg-0a1b-000030", members)
    assert sample == tar_sample("psg-0a1b-000030", dict(reversed(members.items())))
    with tarfile.open(fileobj=io.BytesIO(sample + TAR_END)) as tar:
        assert tar.getnames() == ["psg-0a1b-000030.eeg.npy", "psg-0a1b-000030.json"]
        info = tar.getmembers()[0]
        assert (info.mtime, info.uid, info.gid, info.mode) == (0, 0, 0, 0o644)
        assert tar.extractfile("psg-0a1b-000030.json").read() == b"{}"  # type: ignore[union-attr]


def test_parse_sample_is_the_inverse_of_tar_sample() -> None:
    members = {"ecg.npy": bytes(range(256)) * 5, "json": b'{"a": 1}', "eeg.npy": b""}
    key, parsed = parse_sample(tar_sample("k-1", members))
    assert key == "k-1"
    assert {name: bytes(view) for name, view in parsed.items()} == members


@pytest.mark.parametrize("key", ["a.b", "A", "", "x" * 97, "ü", "a/b"])
def test_keys_outside_the_grammar_are_refused(key: str) -> None:
    with pytest.raises(ContractError, match="must match"):
        tar_sample(key, {"json": b""})


def test_parse_sample_refuses_two_keys_and_garbage() -> None:
    with pytest.raises(ContractError, match="the index is wrong"):
        parse_sample(tar_sample("a", {"json": b""}) + tar_sample("b", {"json": b""}))
    with pytest.raises(ContractError, match="no tar header"):
        parse_sample(bytes(1024))


def test_index_is_little_endian_uint64() -> None:
    assert index_bytes([0, 258]) == bytes(8) + b"\x02\x01" + bytes(6)


def _snapshot() -> Snapshot:
    shard = ShardEntry(path="shards/a.tar", num_bytes=10, sha256="0" * 64, num_samples=1, unit="u")
    snapshot = Snapshot(
        format_version=1,
        shards=[shard],
        corpora={},
        recipe={},
        recipe_digest="r",
        ucs_version=1,
        ucs_digest="u",
        samples_sha256="s",
        counts={"windows": 1},
        provenance={"git": "abc"},
    )
    return snapshot.model_copy(update={"digest": snapshot.content_digest()})


def test_load_snapshot_accepts_its_own_and_refuses_a_changed_one(tmp_path: Path) -> None:
    path = tmp_path / SNAPSHOT_FILE
    text = _snapshot().model_dump_json()
    path.write_text(text)
    assert load_snapshot(tmp_path).counts == {"windows": 1}
    path.write_text(text.replace('"windows":1', '"windows":2'))
    with pytest.raises(ContractError, match="does not fit its content"):
        load_snapshot(tmp_path)


def test_provenance_does_not_change_the_digest() -> None:
    snapshot = _snapshot()
    assert snapshot.model_copy(update={"provenance": {"git": "def"}}).content_digest() == snapshot.digest
    assert snapshot.model_copy(update={"ucs_version": 2}).content_digest() != snapshot.digest


def test_a_folder_without_snapshot_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kymo convert"):
        load_snapshot(tmp_path)
