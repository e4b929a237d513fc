from collections import Counter
from collections.abc import Callable

import pytest

from trainer import data
from trainer.config import PretrainConfig
from trainer.samples import open_snapshot
from trainer.simulate import _Cache, measure_disk, mix_rows, order_of, simulate, windows_per_s
from trainer.tiny import write_tiny_snapshot

MakeConfig = Callable[..., PretrainConfig]


@pytest.fixture(scope="module")
def two_corpora(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Corpus a: 4 training subjects of 8 windows of 8 s in 4 shards; b: 10 of them in 12 shards."""
    folder = tmp_path_factory.mktemp("snapshots")
    write_tiny_snapshot(folder / "a", corpus="a")
    write_tiny_snapshot(folder / "b", corpus="b", num_subjects=12, num_shards=12)
    return [{"path": str(folder / name)} for name in "ab"]


def test_the_mixture_is_what_the_batches_hold(tiny_config: MakeConfig, two_corpora: list[dict[str, str]]) -> None:
    config = tiny_config(
        snapshots=two_corpora,
        global_batch=8,
        steps=20,
        weights={"a": 1.0, "b": 3.0},
        curriculum=[{"from_step": 12, "weights": {"a": 1.0, "b": 0.0}}, {"from_step": 20, "weights": {"a": 1, "b": 1}}],
    )
    order = order_of(config)
    rows = {(row.from_step, row.corpus): row for row in mix_rows(config, order)}
    assert rows.keys() == {(0, "a"), (0, "b"), (12, "a"), (12, "b")}
    for (begin, corpus), row in rows.items():
        drawn = [Counter(order.streams[a.stream].corpus for a in order.batch(b)) for b in range(begin, row.to_step)]
        assert row.repeats * row.samples == pytest.approx(sum(count[corpus] for count in drawn))
        assert row.quota == pytest.approx(sum(count[corpus] for count in drawn) / len(drawn), abs=0.5)
    first, second = rows[0, "b"], rows[12, "b"]
    assert (first.samples, first.hours, first.weight) == (80, pytest.approx(80 * 8 / 3600), 3.0)
    assert (first.share, first.quota, first.to_step) == (0.75, 6.0, 12)
    assert (second.share, second.repeats, second.total_repeats) == (0.0, 0.0, first.repeats)
    assert rows[12, "a"].total_repeats == pytest.approx((12 * 2 + 8 * 8) / 32)


def test_without_weights_every_sample_is_seen_as_often(
    tiny_config: MakeConfig, two_corpora: list[dict[str, str]]
) -> None:
    config = tiny_config(snapshots=two_corpora, global_batch=14, steps=80, bucket_by=["channels"])
    rows = mix_rows(config, order_of(config))
    assert [row.weight for row in rows] == [32.0, 80.0]
    assert sum(row.share for row in rows) == pytest.approx(1.0)
    for row in rows:
        assert row.repeats == pytest.approx(10.0, rel=0.05)


def test_a_cache_of_the_predicted_size_fetches_each_shard_once_and_a_small_one_thrashes(
    tiny_config: MakeConfig, two_corpora: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "BLOCK_SHARDS", 2)
    config = tiny_config(snapshots=two_corpora, global_batch=7, steps=16, block_samples=1)
    order = order_of(config)
    found = simulate(config, order, windows_per_s=70.0)
    size = max(entry.num_bytes for source in config.snapshots for entry in open_snapshot(source.path).shards)
    # A block is two shards of each of the two corpora.
    assert 2 <= found.hot_shards <= 4
    assert found.hot_bytes <= 4 * size
    small, enough, double = found.caches
    assert [cache.cache_bytes for cache in found.caches] == [found.hot_bytes // 2, found.hot_bytes, 2 * found.hot_bytes]
    assert (small.fits, enough.fits) == (False, True)
    assert double.downloads_per_shard == 1.0
    assert small.downloads_per_shard > 1.2
    assert small.hit_rate < double.hit_rate < 1.0
    assert small.download_mb_s > double.download_mb_s
    assert found.step_s == pytest.approx(0.1)
    assert found.read_mb_s == pytest.approx(found.bytes_per_step / 0.1 / 1e6)
    blocks = sum(int(stream.num_bytes.sum()) for stream in order.streams) / 112
    assert found.bytes_per_step == pytest.approx(7 * blocks, rel=0.01)
    wide = simulate(tiny_config(snapshots=two_corpora, global_batch=7, steps=16), order, windows_per_s=70.0, steps=1)
    assert wide.steps == 1


def test_speed_is_given_in_hours_of_signal_too(tiny_config: MakeConfig, two_corpora: list[dict[str, str]]) -> None:
    order = order_of(tiny_config(snapshots=two_corpora))
    assert windows_per_s(order, hours_per_hour=28_800.0) == pytest.approx(3600.0)  # windows of 8 s
    speed = measure_disk(order)
    assert speed is not None
    assert speed > 0


def test_the_shard_that_was_not_used_for_the_longest_time_goes_first() -> None:
    cache = _Cache(250)
    for shard in (1, 2, 1, 3, 1, 2):  # 3 drives out 2, and 2 drives out 3
        cache.use(("s", shard), 100)
    assert (cache.downloads, cache.downloaded) == (4, 400)
