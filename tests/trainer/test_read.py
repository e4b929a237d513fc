import logging
import shutil
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest

from manifests.errors import ContractError
from trainer.data import Order
from trainer.filters import SampleFilter
from trainer.read import SnapshotReader, Window, iterate
from trainer.samples import SnapshotSource, load_streams


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
