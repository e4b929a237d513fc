import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from trainer.layout import GAP_BYTES
from trainer.stored import SampleReadError, Shards, StoredArray


@pytest.fixture
def stored(tmp_path: Path) -> tuple[StoredArray, np.ndarray]:
    """An array in a file, behind 64 other bytes."""
    values = np.arange(5 * 20_000, dtype=np.int16).reshape(5, 20_000)
    (tmp_path / "shard").write_bytes(bytes(64) + values.tobytes())
    array = StoredArray(key="a", shape=(5, 20_000), shards=Shards(None), shard=tmp_path / "shard", offset=64)
    return array, values


@pytest.mark.parametrize(("width", "num_calls"), [(20_000, 2), (15_000, 2), (20_000 - GAP_BYTES // 2 - 1, 3)])
def test_rows_that_lie_near_each_other_are_read_together(
    stored: tuple[StoredArray, np.ndarray], monkeypatch: pytest.MonkeyPatch, width: int, num_calls: int
) -> None:
    array, values = stored
    calls: list[int] = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: calls.append(1) or preadv(*arguments))
    rows = [0, 1, 3]  # a whole row lies between the last two
    out_CT = np.empty((len(rows), width), np.int16)
    array.read(rows, out_CT, start=0)
    np.testing.assert_array_equal(out_CT, values[rows, :width])
    assert len(calls) == num_calls


def test_calls_that_are_cut_short_go_on(
    stored: tuple[StoredArray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    array, values = stored
    preadv = os.preadv

    def short(descriptor: int, parts: Sequence[memoryview], offset: int) -> int:
        return preadv(descriptor, [parts[0][:777]], offset)

    monkeypatch.setattr(os, "preadv", short)
    out_CT = np.empty((3, 15_000), np.int16)
    array.read([0, 1, 4], out_CT, start=5)
    np.testing.assert_array_equal(out_CT, values[[0, 1, 4], 5:15_005])


def test_an_array_that_ends_early_names_its_sample(stored: tuple[StoredArray, np.ndarray]) -> None:
    array, _ = stored
    os.truncate(array.shard, 150_000)
    with pytest.raises(SampleReadError, match="the shard ends") as found:
        array.read([4], np.empty((1, 20_000), np.int16), start=0)
    assert found.value.key == "a"
