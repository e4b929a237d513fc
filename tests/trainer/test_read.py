import json
import logging
import os
import shutil
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest

from manifests.errors import ContractError
from trainer.data import Order
from trainer.filters import SampleFilter
from trainer.objectives.modalities import ModalityConfig, collate_modalities
from trainer.read import WHOLE_BYTES, SnapshotReader, Tags, Window, iterate, loaded, parse_meta, read_rows
from trainer.samples import SnapshotSource, load_streams
from trainer.tiny import write_tiny_snapshot


def order_of(folder: Path, *, global_batch: int = 6) -> Order:
    streams = load_streams([SnapshotSource(path=str(folder))], split="train", keep=SampleFilter())
    return Order(streams, seed=5, global_batch=global_batch)


@pytest.fixture
def damaged(tiny_snapshot: Path, tmp_path: Path) -> Path:
    """The tiny snapshot with the tar header of one training sample overwritten."""
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_snapshot, folder)
    stream = order_of(folder).streams[0]
    shard = stream.shards[stream.shard[3]]
    content = bytearray(shard.read_bytes())
    content[stream.offset[3] : stream.offset[3] + 512] = bytes(512)
    shard.write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def large_snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight 400-s samples of 3 or 4 channels, which are not read whole. Read-only."""
    folder = tmp_path_factory.mktemp("large") / "large"
    write_tiny_snapshot(folder, num_subjects=2, windows_per_subject=4, seconds=400, num_shards=1, num_held_out=0)
    assert order_of(folder).streams[0].num_bytes.min() > WHOLE_BYTES
    return folder


def content_of(windows: list[Window]) -> list[tuple]:
    return [(w.key, w.position, w.epoch, {k: a.tobytes() for k, a in w.arrays.items()}) for w in windows]


def test_a_window_holds_its_arrays_and_its_tag(tiny_snapshot: Path) -> None:
    window = next(iterate(order_of(tiny_snapshot)))[0]
    assert window.arrays["eeg"].dtype == np.int16
    assert window.arrays["eeg"].shape == (2, 512)
    assert not window.arrays["eeg"].flags.writeable
    assert window.meta["key"] == window.key
    assert window.recording == window.meta["recording"]
    assert window.meta["ucs"]["eeg"][0]["symbol"] == "eeg:C3-M2"


def test_reading_ahead_and_threads_do_not_change_the_stream(tiny_snapshot: Path) -> None:
    order = order_of(tiny_snapshot)
    slow = SnapshotReader(order.streams)
    expected = [content_of(slow.read(order.batch(index), order=order)) for index in range(3, 12)]
    ahead = [content_of(windows) for windows in islice(iterate(order, start_batch=3), 9)]
    assert ahead == expected
    ranks = [islice(iterate(order, rank=rank, world=4, start_batch=3), 9) for rank in range(4)]
    parts = [[content_of(windows) for windows in rank] for rank in ranks]
    assert [list(chain(*batch)) for batch in zip(*parts, strict=True)] == expected


def test_windows_that_are_kept_survive_the_reuse_of_buffers(tiny_snapshot: Path) -> None:
    order = order_of(tiny_snapshot)
    batches = iterate(order)
    kept = next(batches)
    before = content_of(kept)
    for _ in range(20):
        next(batches)
    assert content_of(kept) == before


def test_a_buffer_is_used_again_when_its_windows_are_gone(tiny_snapshot: Path) -> None:
    order = order_of(tiny_snapshot)
    reader = SnapshotReader(order.streams, prefetch=1, num_threads=1)
    for index in range(20):
        reader.read(order.batch(index), order=order)
    assert len(reader._buffers._lent) <= 2  # one more when a later batch is larger; 3 without reuse


def test_a_sample_that_fails_is_replaced_by_the_next_and_reported(
    tiny_snapshot: Path, damaged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = order_of(tiny_snapshot), order_of(damaged)
    lost = good.streams[0].keys[3]
    reader = SnapshotReader(bad.streams)
    for index in range(6):
        expected = SnapshotReader(good.streams).read(good.batch(index), order=good)
        with caplog.at_level(logging.WARNING):
            got = reader.read(bad.batch(index), order=bad)
        assert [w.position for w in got] == [w.position for w in expected]
        for before, after in zip(expected, got, strict=True):
            if before.key != lost:
                assert content_of([before]) == content_of([after])
                continue
            following = good.address(0, before.position + 1)
            assert after.key == good.streams[0].keys[following.row]
    assert reader.replaced == [lost]
    assert str(lost) in caplog.text


def test_too_many_failures_stop_the_run(damaged: Path) -> None:
    order = order_of(damaged)
    reader = SnapshotReader(order.streams, max_replaced=0)
    everything = [address for index in range(6) for address in order.batch(index)]
    with pytest.raises(ContractError, match="kymo verify"):
        reader.read(everything, order=order)


def test_a_shard_that_is_gone_or_short_is_a_failed_read(tiny_snapshot: Path, tmp_path: Path) -> None:
    folder = tmp_path / "short"
    shutil.copytree(tiny_snapshot, folder)
    order = order_of(folder)
    order.streams[0].shards[0].unlink()
    with pytest.raises(ContractError, match="cannot be read"):
        SnapshotReader(order.streams, max_replaced=0).read(order.batch(0) + order.batch(1), order=order)
    short = order.streams[0].shards[1]
    short.write_bytes(short.read_bytes()[:2000])
    with pytest.raises(ContractError, match="cannot be read"):
        SnapshotReader(order.streams, max_replaced=5).read([a for b in range(6) for a in order.batch(b)], order=order)


def test_a_large_sample_is_the_same_whether_read_whole_or_by_rows(large_snapshot: Path) -> None:
    order = order_of(large_snapshot)
    reader = SnapshotReader(order.streams)
    whole = reader.read(order.batch(0), order=order)
    by_rows = reader.work_on(order.batch(0), loaded, order=order)
    assert content_of(by_rows) == content_of(whole)
    assert [window.meta for window in by_rows] == [window.meta for window in whole]


@pytest.mark.parametrize("rows", [[0, 1], [1]])
@pytest.mark.parametrize(("start", "width"), [(0, 25_600), (0, 100), (777, 1000)])
def test_rows_and_stretches_are_those_of_the_whole_array(
    large_snapshot: Path, rows: list[int], start: int, width: int
) -> None:
    order = order_of(large_snapshot)
    reader = SnapshotReader(order.streams)
    (window,) = reader.read(order.batch(0)[:1], order=order)
    expected = np.asarray(window.arrays["eeg"])[rows, start : start + width]

    def take(windows: list[Window]) -> tuple[np.ndarray, ...]:
        outs = np.empty((len(rows), width), np.int16), np.empty((len(rows), width), np.int16)
        read_rows(windows[0].arrays["eeg"], rows, outs[0], start=start)
        read_rows(window.arrays["eeg"], rows, outs[1], start=start)
        return outs

    for got in reader.work_on(order.batch(0)[:1], take, order=order):
        np.testing.assert_array_equal(got, expected)


def test_a_stretch_reads_only_its_bytes(large_snapshot: Path) -> None:
    order = order_of(large_snapshot)
    reader = SnapshotReader(order.streams)
    batch = order.batch(0)[:1]
    config = ModalityConfig(groups={"BAS": ("eeg",), "EKG": ("ecg",)}, window_s=60.0)
    reader.work_on(batch, lambda windows: collate_modalities(windows, config, seed=0), order=order)
    signal = 3 * 60 * 64 * 2
    size = int(order.streams[0].num_bytes[batch[0].row])
    assert signal < reader.num_bytes < signal + 8000 < size / 4  # the rest: headers and tags
    before = reader.num_bytes
    reader.read(batch, order=order)
    assert reader.num_bytes - before == size


def test_threads_do_not_change_a_stream_of_stretches(large_snapshot: Path) -> None:
    order = order_of(large_snapshot)
    config = ModalityConfig(groups={"BAS": ("eeg",), "EKG": ("ecg",)}, window_s=60.0)
    batches = []
    for num_threads in (1, 3):
        reader = SnapshotReader(order.streams, num_threads=num_threads)
        stream = reader.stream(order, lambda _, windows: collate_modalities(windows, config, seed=0))
        batches.append([group.to("cpu").signal_BCT for batch in islice(stream, 6) for group in batch.groups])
        stream.close()
    for one, three in zip(*batches, strict=True):
        np.testing.assert_array_equal(one, three)


def test_a_signal_that_cannot_be_read_is_replaced_too(large_snapshot: Path, tmp_path: Path) -> None:
    """Headers and tags of the last sample are there, the end of its last array is not."""
    folder = tmp_path / "cut"
    shutil.copytree(large_snapshot, folder)
    good, bad = order_of(large_snapshot), order_of(folder)
    stream = bad.streams[0]
    last = int(np.argmax(stream.offset))
    os.truncate(stream.shards[0], int(stream.offset[last] + stream.num_bytes[last]) - 4096)
    reader = SnapshotReader(bad.streams, max_replaced=3)
    batch = next(batch for batch in map(bad.batch, range(9)) if [a.row for a in batch].count(last) == 1)
    (place,) = [i for i, address in enumerate(batch) if address.row == last]
    got = reader.work_on(batch, loaded, order=bad)
    expected = SnapshotReader(good.streams).read(batch, order=good)
    assert reader.replaced == [stream.keys[last]]
    for i, (before, after) in enumerate(zip(expected, got, strict=True)):
        assert after.position == before.position
        assert (content_of([before]) == content_of([after])) == (i != place)
    following = bad.address(0, batch[place].position + 1)
    assert got[place].key == stream.keys[following.row]


def test_shards_are_read_from_where_they_are_located(tiny_snapshot: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(tiny_snapshot, folder)
    order = order_of(folder)
    expected = content_of(SnapshotReader(order.streams).read(order.batch(0), order=order))
    (tmp_path / "elsewhere").mkdir()
    for shard in order.streams[0].shards:
        shard.rename(tmp_path / "elsewhere" / shard.name)
    reader = SnapshotReader(order.streams, locate=lambda shard: tmp_path / "elsewhere" / shard.name)
    assert content_of(reader.read(order.batch(0), order=order)) == expected


def test_few_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.stored.MAX_OPEN_SHARDS", 2)
    write_tiny_snapshot(tmp_path / "many", num_shards=12)
    order = order_of(tmp_path / "many")
    reader = SnapshotReader(order.streams)
    for index in range(6):
        reader.read(order.batch(index), order=order)
    names = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    assert sum(str(tmp_path) in name for name in names) == 2
    reader.close()
    names = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    assert not any(str(tmp_path) in name for name in names)


def test_windows_of_a_recording_share_their_tags(tiny_snapshot: Path) -> None:
    order = order_of(tiny_snapshot)
    windows = SnapshotReader(order.streams).read([a for b in range(3) for a in order.batch(b)], order=order)
    assert len({id(window.meta["ucs"]) for window in windows}) == 2  # subject 1 lacks a kind
    assert len({str(window.meta["ucs"]) for window in windows}) == 2


@pytest.mark.parametrize(
    "text",
    [
        b'{"key":"a","labels":{"text":"x,\\"ucs\\":"},"ucs":{"eeg":[{"scale":0.5}]}}',
        b'{"key":"a","ucs":{"eeg":[{"scale":0.5}]},"start":3}',
        b'{"key": "a", "ucs": {"eeg": [{"scale": 0.5}]}}',
        b'{"labels":{"a":1,"ucs":{"x":[]}},"ucs":{"eeg":[]}}',
    ],
)
def test_the_json_of_a_sample_is_read_as_it_stands(text: bytes) -> None:
    meta = parse_meta(text)
    assert meta == json.loads(text)
    assert isinstance(meta["ucs"], Tags)


def test_a_sample_without_sound_json_is_refused() -> None:
    for text in (b"", b'{"key":"a","ucs":{"eeg":[}}', b'{"key":"a"'):
        with pytest.raises(ValueError, match=r"line 1 column"):
            parse_meta(text)
