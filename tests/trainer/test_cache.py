import fcntl
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytest
from upath import UPath

from manifests.errors import ConfigError, ContractError
from trainer import cache
from trainer.cache import CacheConfig, ShardCache, open_cache
from trainer.config import PretrainConfig
from trainer.data import Order
from trainer.filters import SampleFilter
from trainer.loop import pretrain
from trainer.metrics import read_metrics
from trainer.read import SnapshotReader, loaded
from trainer.samples import SnapshotSource, load_streams, open_snapshot
from trainer.storage import location

MakeConfig = Callable[..., PretrainConfig]
ROOMY = 100_000_000


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "RETRY_WAIT_S", 0.01)


@pytest.fixture(scope="module")
def url(s3: None, tiny_snapshot: Path) -> str:
    """The tiny snapshot in a bucket."""
    folder = UPath("s3://shards/psg/tiny")
    folder.fs.mkdir("shards")
    folder.fs.put(f"{tiny_snapshot}/", folder.path, recursive=True)
    return str(folder)


@pytest.fixture
def make(url: str, tmp_path: Path) -> Iterator[Callable[..., ShardCache]]:
    """Makes caches that share one folder."""
    made: list[ShardCache] = []

    def make(max_bytes: int = ROOMY, **changes: Any) -> ShardCache:
        config = CacheConfig(folder=str(tmp_path / "cache"), max_bytes=max_bytes, **changes)
        new = open_cache(config, [SnapshotSource(path=url)])
        assert new is not None
        made.append(new)
        return new

    yield make
    for item in made:
        item.close()


def order_of(path: str) -> Order:
    return Order(load_streams([SnapshotSource(path=path)], split="train", keep=SampleFilter()), seed=5, global_batch=8)


def epoch(path: str, shards: ShardCache | None, *, batches: int = 4) -> list[tuple[str, dict[str, bytes]]]:
    """Keys and content of the windows of an epoch (4 batches of 8)."""
    order = order_of(path)
    reader = SnapshotReader(order.streams, locate=None if shards is None else shards.locate)
    try:
        stream = reader.stream(
            order,
            lambda _, windows: [(w.key, {k: a.tobytes() for k, a in w.arrays.items()}) for w in loaded(windows)],
        )
        return [window for batch in islice(stream, batches) for window in batch]
    finally:
        reader.close()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.tar"))


def test_an_epoch_from_a_store_is_that_from_a_disk_and_a_shard_is_downloaded_once(
    url: str, tiny_snapshot: Path, make: Callable[..., ShardCache]
) -> None:
    shards = make()
    expected = epoch(str(tiny_snapshot), None, batches=8)
    assert epoch(url, shards, batches=8) == expected
    needed = {shard.sha256 for shard in open_snapshot(url).shards[:3]}  # the fourth holds val windows only
    assert files(shards.folder) == sorted(f"{sha}.tar" for sha in needed)
    assert shards.num_downloads == 3
    again = make()
    assert epoch(url, again) == expected[:32]
    assert again.num_downloads == 0


def test_a_cache_smaller_than_the_snapshot_keeps_its_size_and_gives_the_same(
    url: str, tiny_snapshot: Path, make: Callable[..., ShardCache]
) -> None:
    size = open_snapshot(url).shards[0].num_bytes
    shards = make(2 * size + 1000)
    order, largest = order_of(url), 0
    reader = SnapshotReader(order.streams, locate=shards.locate)
    for index in range(4):
        for address in order.batch(index):
            reader.read([address], order=order)
            largest = max(largest, sum(path.stat().st_size for path in shards.folder.iterdir()))
    reader.close()
    assert largest <= 2 * size + 1000
    assert shards.num_downloads > 3
    assert epoch(url, shards) == epoch(str(tiny_snapshot), None)


def test_the_least_recently_used_shard_goes_first_and_one_in_use_never(
    url: str, make: Callable[..., ShardCache]
) -> None:
    a, b, c, d = load_streams([SnapshotSource(path=url)], split="train", keep=SampleFilter())[0].shards
    size = max(shard.num_bytes for shard in open_snapshot(url).shards)
    shards = make(3 * size + 1000)
    paths = [shards.locate(shard) for shard in (a, b, c)]
    for age, path in zip((30, 10, 20), paths, strict=True):
        os.utime(path, ns=(0, path.stat().st_mtime_ns - age * 10**9))
    user = make(3 * size + 1000)
    thread = threading.Thread(target=user.locate, args=(a,))  # in use by another
    thread.start()
    thread.join()
    os.utime(paths[0], ns=(0, 0))
    shards.locate(d)
    assert [path.exists() for path in paths] == [True, True, False]
    user.close()
    shards.locate(c)
    assert [path.exists() for path in paths] == [False, True, True]


def test_with_too_little_room_for_what_is_in_use_the_limit_gives_way_with_a_warning(
    url: str, make: Callable[..., ShardCache], caplog: pytest.LogCaptureFixture
) -> None:
    a, b, *_ = order_of(url).streams[0].shards
    size = max(shard.num_bytes for shard in open_snapshot(url).shards)
    first, second = make(size + 1000), make(size + 1000)
    path = first.locate(a)
    with caplog.at_level(logging.WARNING):
        other = second.locate(b)
    assert path.exists()
    assert other.exists()
    assert "cache.max_bytes" in caplog.text
    with pytest.raises(ConfigError, match="less than the largest shard"):
        make(size - 1)


def store(url: str) -> Any:
    """The file system object that the caches of this process use."""
    return cast("UPath", location(url)).fs


def damage(monkeypatch: pytest.MonkeyPatch, url: str, *, times: int) -> list[str]:
    """Let the first downloads bring a byte that is not the shard's; the list of all downloads."""
    fs = store(url)
    original, calls = fs.get_file, []

    def get_file(remote: str, local: str) -> None:
        original(remote, local)
        calls.append(remote)
        if len(calls) <= times:
            with Path(local).open("r+b") as file:
                file.seek(1000)
                file.write(b"\xff\xff")

    monkeypatch.setattr(fs, "get_file", get_file)
    return calls


def test_a_damaged_download_is_tried_again(
    url: str, tiny_snapshot: Path, make: Callable[..., ShardCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = damage(monkeypatch, url, times=2)
    assert epoch(url, make()) == epoch(str(tiny_snapshot), None)
    assert len(calls) == 5


def test_a_shard_that_stays_damaged_is_refused_and_not_asked_for_again(
    url: str, make: Callable[..., ShardCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = damage(monkeypatch, url, times=99)
    shards = make()
    shard = order_of(url).streams[0].shards[0]
    for _ in range(2):
        with pytest.raises(ContractError, match="SHA-256 is not the snapshot's, 3 times; run kymo verify"):
            shards.locate(shard)
    assert len(calls) == 3
    assert files(shards.folder) == []
    assert not list(shards.folder.glob("*.part"))


def test_a_shard_that_is_gone_from_the_store_stops_the_run(
    url: str, make: Callable[..., ShardCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("no such key")

    monkeypatch.setattr(store(url), "get_file", gone)
    with pytest.raises(ConfigError, match="psg/tiny"):
        make().locate(order_of(url).streams[0].shards[0])


def test_half_a_download_of_a_dead_process_takes_no_room(url: str, make: Callable[..., ShardCache]) -> None:
    a, b, *_ = order_of(url).streams[0].shards
    entries = open_snapshot(url).shards
    shards = make(2 * entries[0].num_bytes + 1000)
    dead, alive = (shards.folder / f"{entry.sha256}.part" for entry in entries[2:4])
    for part in (dead, alive):
        part.write_bytes(bytes(100))
        part.with_suffix(".lock").touch()
    with alive.with_suffix(".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shards.locate(a)
    assert not dead.exists()
    assert alive.exists()
    shards.locate(b)
    assert not alive.exists()


def test_what_is_fetched_ahead_need_not_be_waited_for(url: str, make: Callable[..., ShardCache]) -> None:
    shards = make()
    order = order_of(url)
    soon = order.upcoming_shards(0, limit=2)
    shards.prefetch([*soon, Path("/of/a/snapshot/on/a/disk.tar")])
    shards.prefetch(soon)
    shards._pool.shutdown(wait=True)
    assert shards.num_downloads == 2
    for shard in soon:
        shards.locate(shard)
    assert shards.num_downloads == 2


# Without the reader, whose torch takes a process eight seconds to import.
READER = """
import hashlib, sys
from trainer.cache import CacheConfig, open_cache
from trainer.data import Order
from trainer.filters import SampleFilter
from trainer.samples import SnapshotSource, load_streams
url, folder = sys.argv[1:]
sources = [SnapshotSource(path=url)]
shards = open_cache(CacheConfig(folder=folder, max_bytes=10**8), sources)
order = Order(load_streams(sources, split="train", keep=SampleFilter()), seed=0, global_batch=8)
addresses = [address for index in range(8) for address in order.batch(index)]
wanted = [order.streams[a.stream].shards[order.streams[a.stream].shard[a.row]] for a in addresses]
contents = {hashlib.sha256(shards.locate(shard).read_bytes()).hexdigest() for shard in wanted}
print(shards.num_downloads, len(wanted), *sorted(contents))
"""


def test_two_processes_share_a_cache(url: str, tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", READER, url, str(tmp_path / "cache")],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(cache.__file__).parent.parent,
        )
        for _ in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[0].split() for process in started]
    finally:
        for process in started:
            process.kill()
    assert sum(int(words[0]) for words in said) == 3
    written = sorted(shard.sha256 for shard in open_snapshot(url).shards[:3])
    assert [words[1:] for words in said] == [["64", *written]] * 2


def test_a_pretraining_from_a_store_has_the_losses_of_one_from_a_disk(
    url: str, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    def losses(config: PretrainConfig) -> list[tuple[float, float]]:
        pretrain(config)
        return [(row["loss"], row["grad_norm"]) for row in read_metrics(config.run_dir)]

    local = losses(tiny_config("local", steps=4))
    with pytest.raises(ConfigError, match="give cache"):
        pretrain(tiny_config("remote", steps=4, snapshots=[{"path": url}]))
    remote = tiny_config(
        "remote",
        steps=4,
        snapshots=[{"path": url}],
        cache={"folder": str(tmp_path / "cache"), "max_bytes": ROOMY, "prefetch_shards": 1},
    )
    assert losses(remote) == local
    assert len(files(tmp_path / "cache")) == 4
    assert open_cache(None, [SnapshotSource(path=str(location("/data/psg")))]) is None
