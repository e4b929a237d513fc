import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from manifests.errors import ContractError
from manifests.shards import BLOCK, npy_bytes, tar_sample
from trainer.data import Order
from trainer.filters import SampleFilter
from trainer.read import WHOLE_BYTES, SnapshotReader, Window
from trainer.samples import SnapshotSource, load_streams
from trainer.stored import GAP_BYTES, ArrayReadError, Shards, StoredArray, parse_layout, read_stored
from trainer.tiny import write_tiny_snapshot

EEG = np.arange(600, dtype=np.int16).reshape(2, 300)
RESP = -np.arange(70, dtype=np.int16).reshape(1, 70)
CHECKSUM = range(148, 156)


def sample(key: str = "a-0001", *, text: bytes = b'{"key":1}', resp: np.ndarray = RESP) -> bytes:
    return tar_sample(key, {"eeg.npy": npy_bytes(EEG), "json": text, "resp.npy": npy_bytes(resp)})


def parse(content: bytes):
    return parse_layout(lambda begin, length: content[begin : begin + length], len(content))


def headers_of(content: bytes, spans: Sequence[tuple[int, int]]) -> bytes:
    return b"".join(content[begin : begin + length] for begin, length in spans)


def array_at(content: bytes, shape: tuple[int, int], begin: int) -> np.ndarray:
    return np.frombuffer(content, np.int16, shape[0] * shape[1], begin).reshape(shape)


def test_a_layout_says_where_the_arrays_are() -> None:
    content = sample()
    key, text, layout = parse(content)
    assert (key, text) == ("a-0001", b'{"key":1}')
    assert list(layout.arrays) == ["eeg", "resp"]
    np.testing.assert_array_equal(array_at(content, *layout.arrays["eeg"]), EEG)
    np.testing.assert_array_equal(array_at(content, *layout.arrays["resp"]), RESP)


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_sample_of_the_same_layout_is_known_by_its_headers(is_whole: bool) -> None:
    layout = parse(sample())[2]

    def text_of(content: bytes, key: bytes) -> bytes | None:
        return layout.text_of(key, content if is_whole else headers_of(content, layout.headers), is_whole=is_whole)

    assert text_of(sample("b-0777", text=b'{"key":12}'), b"b-0777") == b'{"key":12}'
    full = b"x" * BLOCK
    assert text_of(sample("b-0777", text=full), b"b-0777") == full
    assert text_of(sample("b-0777"), b"b-0778") is None
    other = sample("b-0777", resp=RESP.reshape(7, 10))  # as long, and of another shape
    assert len(other) == len(sample())
    assert text_of(other, b"b-0777") is None


def test_no_byte_of_a_header_may_differ() -> None:
    content = sample()
    layout = parse(content)[2]
    json_at = next(begin for begin, _ in layout.headers if content[begin:].startswith(b"a-0001.json"))
    for begin, length in layout.headers:
        is_json = begin == json_at
        for place in range(begin, begin + (BLOCK if is_json else length)):
            changed = bytearray(content)
            changed[place] ^= 1
            # The size of the JSON may differ within its blocks; a tar's checksum is nowhere looked at.
            in_size = is_json and 124 <= place - begin < 136
            if place - begin not in CHECKSUM and not in_size:
                assert layout.text_of(b"a-0001", bytes(changed), is_whole=True) is None, place


def test_a_json_of_other_blocks_is_no_match() -> None:
    layout = parse(sample())[2]
    content = bytearray(sample())
    at = bytes(content).index(b"a-0001.json") + 124
    content[at : at + 11] = b"00000001001"  # 513 bytes: a block more than there is
    assert layout.text_of(b"a-0001", bytes(content), is_whole=True) is None


def test_a_sample_that_breaks_the_format_is_refused() -> None:
    whole = sample()
    text = b"{'descr': '<i2', 'fortran_order': False, 'shape': (2, 300), }".ljust(117)
    odd = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + EEG.tobytes()
    for content, match in (
        (whole[:-BLOCK], "ends after its sample"),
        (whole + bytes(BLOCK), "no tar header"),
        (tar_sample("a-1", {"eeg.npy": npy_bytes(EEG)}), "without JSON"),
        (tar_sample("a-1", {"json": b"{}"}), "without arrays"),
        (tar_sample("a-1", {"eeg.npy": npy_bytes(EEG)}) + tar_sample("b-1", {"json": b"{}"}), "members of a-1 and b-1"),
        (tar_sample("a-1", {"eeg.npy": npy_bytes(EEG)[:-2], "json": b"{}"}), "shorter than its shape"),
        (tar_sample("a-1", {"eeg.npy": npy_bytes(EEG.astype(np.float32)), "json": b"{}"}), "float32"),
        (tar_sample("a-1", {"eeg.npy": odd, "json": b"{}"}), "begins at byte 127"),
    ):
        with pytest.raises(ContractError, match=match):
            parse(content)


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
    read_stored([(array, rows, out_CT)], start=0)
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
    read_stored([(array, [0, 1, 4], out_CT)], start=5)
    np.testing.assert_array_equal(out_CT, values[[0, 1, 4], 5:15_005])


def test_an_array_that_ends_early_names_its_sample(stored: tuple[StoredArray, np.ndarray]) -> None:
    array, _ = stored
    os.truncate(array.shard, 150_000)
    with pytest.raises(ArrayReadError, match="the shard ends") as found:
        read_stored([(array, [4], np.empty((1, 20_000), np.int16))])
    assert found.value.key == "a"


@pytest.mark.parametrize("seconds", [4, 400])
def test_what_counts_as_damage_does_not_depend_on_what_was_read_before(tmp_path: Path, seconds: int) -> None:
    """The header of an array that nobody asks for is damaged: a new reader and one that knows the layout agree."""
    folder = tmp_path / "snapshot"
    write_tiny_snapshot(folder, num_subjects=2, windows_per_subject=4, seconds=seconds, num_shards=1, num_held_out=0)
    streams = load_streams([SnapshotSource(path=str(folder))], split="train", keep=SampleFilter())
    order = Order(streams, seed=5, global_batch=8)
    assert (streams[0].num_bytes.max() > WHOLE_BYTES) == (seconds == 400)
    used = SnapshotReader(streams)

    def look(windows: list[Window]) -> list[str]:
        return [window.key for window in windows]

    assert len(set(used.work_on(order.batch(0), look, order=order))) == 8
    whole = shutil.copy(streams[0].shards[0], tmp_path / "whole")
    content = bytearray(Path(whole).read_bytes())
    damaged = int(streams[0].offset[5]) + BLOCK  # the .npy header of its first array
    content[damaged : damaged + 8] = bytes(8)
    streams[0].shards[0].write_bytes(content)
    fresh = SnapshotReader(streams)
    assert used.work_on(order.batch(0), look, order=order) == fresh.work_on(order.batch(0), look, order=order)
    assert used.replaced == fresh.replaced == [streams[0].keys[5]]
