import json
import logging
import os
import shutil
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manifests.errors import ContractError
from manifests.shards import BLOCK
from trainer.batches import collate_channels
from trainer.data import Order
from trainer.filters import SampleFilter
from trainer.objectives.modalities import ModalityConfig, collate_modalities
from trainer.read import SnapshotReader, Tags, Window, iterate, loaded, parse_meta, read_rows
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
    """Eight 400-s samples of 3 or 4 channels. Read-only."""
    folder = tmp_path_factory.mktemp("large") / "large"
    write_tiny_snapshot(folder, num_subjects=2, windows_per_subject=4, seconds=400, num_shards=1, num_held_out=0)
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


def test_windows_that_are_kept_stay_as_they_are(tiny_snapshot: Path) -> None:
    batches = iterate(order_of(tiny_snapshot))
    kept = next(batches)
    before = content_of(kept)
    for _ in range(20):
        next(batches)
    assert content_of(kept) == before


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


def test_a_sample_is_the_same_whether_its_place_was_expected_or_not(large_snapshot: Path) -> None:
    order = order_of(large_snapshot)
    reader = SnapshotReader(order.streams)
    first = reader.read(order.batch(0), order=order)
    again = reader.read(order.batch(0), order=order)
    assert content_of(again) == content_of(first)
    assert [window.meta for window in again] == [window.meta for window in first]


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
    assert size - 2000 < reader.num_bytes - before <= size  # all but padding


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


def collated(reader: SnapshotReader, order: Order, **options: Any) -> list[Any]:
    """Tensors of an epoch's batches."""
    found = []
    for index in range(4):
        batch = reader.work_on(
            order.batch(index),
            lambda windows: collate_channels(windows, kinds=("resp", "eeg"), view="zscore", **options),
            order=order,
        )
        found += [batch.stored_RT.clone(), batch.anode_BC, batch.mask_BC, batch.gain_R]
    return found


@pytest.mark.parametrize("channels", [None, ["eeg:C4-M1", "resp:thorax"]])
@pytest.mark.parametrize(
    "other",
    [
        {"ecg": ("ecg:II",), "eeg": ("eeg:C3-M2",), "resp": ("resp:thorax", "resp:abdomen")},  # laid out otherwise
        {"ecg": ("ecg:II",), "eeg": ("eeg:C4-M1", "eeg:C3-M2"), "resp": ("resp:thorax",)},  # other rows are wanted
    ],
)
def test_a_sample_that_is_not_as_expected_is_read_right(
    tmp_path: Path, other: dict[str, tuple[str, ...]], channels: list[str] | None
) -> None:
    """A reader that expects of each sample what those of another snapshot hold, which are of the same size."""
    own = {"ecg": ("ecg:II",), "eeg": ("eeg:C3-M2", "eeg:C4-M1"), "resp": ("resp:thorax",)}
    orders = []
    for name, kinds in (("own", own), ("other", other)):
        write_tiny_snapshot(tmp_path / name, channels=kinds, num_subjects=1, num_held_out=0, num_shards=1)
        orders.append(order_of(tmp_path / name, global_batch=2))
    misled, misleading, fresh = (SnapshotReader(orders[n].streams) for n in (0, 1, 0))
    collated(misleading, orders[1], channels=channels)
    assert (marks := set(misleading._source.outlines)) <= {(0, size) for size in orders[0].streams[0].num_bytes}
    misled._source.outlines.update(misleading._source.outlines)
    before = dict(misled._source.outlines)
    expected = collated(fresh, orders[0], channels=channels)
    for one, two in zip(collated(misled, orders[0], channels=channels), expected, strict=True):
        np.testing.assert_array_equal(one, two)
    assert misled.replaced == []
    assert all(misled._source.outlines[mark] is not before[mark] for mark in marks)


def test_all_threads_may_share_what_is_expected(tiny_snapshot: Path) -> None:
    """Samples of two sizes, by more threads than there are: every batch is that of one thread."""
    order = order_of(tiny_snapshot)
    slow = SnapshotReader(order.streams)
    expected = [content_of(slow.read(order.batch(index), order=order)) for index in range(40)]
    fast = SnapshotReader(order.streams, num_threads=6, prefetch=12)
    stream = fast.stream(order, lambda _, windows: content_of(loaded(windows)))
    assert list(islice(stream, 40)) == expected
    stream.close()


@pytest.mark.parametrize("seconds", [4, 400])
def test_what_counts_as_damage_does_not_depend_on_what_was_read_before(tmp_path: Path, seconds: int) -> None:
    """The header of an array that nobody asks for is damaged: a new reader and one that knows the layout agree."""
    folder = tmp_path / "snapshot"
    write_tiny_snapshot(folder, num_subjects=2, windows_per_subject=4, seconds=seconds, num_shards=1, num_held_out=0)
    streams = load_streams([SnapshotSource(path=str(folder))], split="train", keep=SampleFilter())
    order = Order(streams, seed=5, global_batch=8)
    used = SnapshotReader(streams)

    def look(windows: list[Window]) -> list[str]:
        for window in windows:
            window.open()
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


def test_tags_are_those_of_the_window_also_when_its_recording_changes_them() -> None:
    texts = [b'{"key":"a","recording":"r","ucs":{"eeg":[{"flat":%d}]}}' % n for n in (0, 0, 1, 0)]
    metas = [parse_meta(text) for text in texts]
    assert [meta["ucs"]["eeg"][0]["flat"] for meta in metas] == [0, 0, 1, 0]
    assert metas[0]["ucs"] is metas[1]["ucs"] is metas[3]["ucs"]


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
