import numpy as np
import pytest
import torch

from manifests.errors import ConfigError
from trainer.augment import AugmentConfig
from trainer.batches import generator
from trainer.data import Order
from trainer.filters import SampleFilter
from trainer.models.univariate import UnivariateEncoder, UnivariateEncoderConfig
from trainer.objectives.build import build_objective
from trainer.objectives.crops import CropConfig, draw_crops, pack_crops
from trainer.objectives.nt_xent import NtXentConfig
from trainer.read import SnapshotReader, Window
from trainer.samples import SnapshotSource, load_streams
from trainer.tiny import write_tiny_snapshot
from trainer.views import VIEWS

RATES = {"eeg": 200, "ecg": 128, "resp": 32}
PLAIN = AugmentConfig(
    crop=(1.0, 1.0), amplitude=(1.0, 1.0), noise=(0.0, 0.0), time_mask_probability=0.0, sign_flip_probability=0.0
)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Order:
    """Sixteen 300-s samples whose kinds have a rate each. Read-only."""
    folder = tmp_path_factory.mktemp("native") / "native"
    write_tiny_snapshot(folder, num_subjects=4, windows_per_subject=4, rate_hz=RATES, seconds=300, num_held_out=0)
    streams = load_streams([SnapshotSource(path=str(folder))], split="train", keep=SampleFilter())
    return Order(streams, seed=0, global_batch=16)


def windows_of(order: Order) -> list[Window]:
    return SnapshotReader(order.streams).read(order.batch(0), order=order)


def test_channels_of_several_rates_in_one_window_are_grouped_by_rate(native: Order) -> None:
    config = CropConfig(rates_hz=(32.0, 128.0, 200.0), crops_per_window=4)
    batch = pack_crops([crop for window in windows_of(native) for crop in draw_crops(window, config, seed=0)], config)
    assert sum(batch.counts) == 64 == len(batch.channel_N)
    assert min(batch.counts) > 0
    assert [group.signal_BCT.shape for group in batch.groups] == [
        (2 * count, 1, 4 * rate) for count, rate in zip(batch.counts, (32, 128, 200), strict=True)
    ]
    kinds = [set(group.kind_BC.flatten().tolist()) for group in batch.groups]
    assert all(len(kind) == 1 for kind in kinds)
    assert len(set.union(*kinds)) == 3


def test_nt_xent_trains_on_several_rates(native: Order) -> None:
    encoder = UnivariateEncoder(UnivariateEncoderConfig(width=16, depth=1, conv_channels=(4, 8, 8)))
    objective = build_objective(encoder, NtXentConfig(rates_hz=(32.0, 128.0, 200.0), projection=8, crops_per_window=2))
    loss, metrics = objective(objective.collate(windows_of(native), seed=0).to("cpu"))
    loss.backward()
    assert torch.isfinite(loss)
    assert float(metrics["anchors"]) == 2 * 2 * 16
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in objective.parameters())


def test_a_crop_is_a_stretch_of_its_channel_at_its_time(native: Order) -> None:
    config = CropConfig(rates_hz=(32.0, 128.0, 200.0), crops_per_window=8, augment=PLAIN, view="zscore")
    seen = set()
    for window in windows_of(native)[:4]:
        for crop in draw_crops(window, config, seed=0):
            start = round((crop.start_ms / 1000 - window.meta["start"] / 200) * crop.rate_hz)
            kind, row = next(
                (kind, row)
                for kind, tags in window.meta["ucs"].items()
                for row, tag in enumerate(tags)
                if (tag["anode_id"], tag["cathode_id"]) == crop.ids[:2]
            )
            stored = np.asarray(window.arrays[kind])[row : row + 1, start : start + int(4 * crop.rate_hz)]
            expected = VIEWS["zscore"](stored, window.meta["ucs"][kind][row : row + 1])[0]
            np.testing.assert_allclose(crop.views_2T[0], expected, atol=1e-6)
            seen.add((window.key, kind, row, start))
    assert len(seen) == 32


def test_a_crop_reads_only_its_bytes_and_is_the_same_as_from_memory(native: Order) -> None:
    config = CropConfig(rates_hz=(32.0, 128.0, 200.0))
    addresses = native.batch(0)
    reader = SnapshotReader(native.streams)
    drawn = reader.work_on(
        addresses, lambda windows: [draw_crops(window, config, seed=3) for window in windows], order=native
    )
    crops = [crop for (crop,) in drawn]
    signal = sum(2 * round(4 * crop.rate_hz) for crop in crops)
    headers = len(crops) * 6000  # tar and npy headers, and the tags
    assert signal < reader.num_bytes < signal + headers
    assert reader.num_bytes < native.streams[0].num_bytes.sum() / 20
    for crop, window in zip(crops, windows_of(native), strict=True):
        (expected,) = draw_crops(window, config, seed=3)
        np.testing.assert_array_equal(crop.views_2T, expected.views_2T)
        assert (crop.ids, crop.start_ms) == (expected.ids, expected.start_ms)


def test_more_crops_of_a_window_leave_the_first_one_as_it_is(native: Order) -> None:
    one, three = (CropConfig(rates_hz=(32.0, 128.0, 200.0), crops_per_window=n) for n in (1, 3))
    for window in windows_of(native):
        (alone,), crops = draw_crops(window, one, seed=0), draw_crops(window, three, seed=0)
        np.testing.assert_array_equal(alone.views_2T, crops[0].views_2T)
        assert len({crop.views_2T.tobytes() for crop in crops}) == 3


def test_the_draws_of_channel_and_crop_are_fixed(native: Order) -> None:
    """A resume after an upgrade must draw the same ones."""
    window = windows_of(native)[0]
    (alone,) = draw_crops(window, CropConfig(rates_hz=(32.0, 128.0, 200.0)), seed=0)
    rng = generator(0, window.epoch, window.key, "crop")
    rows = [(kind, row) for kind in ("eeg", "ecg", "resp") for row in range(len(window.meta["ucs"].get(kind, ())))]
    kind, _ = rows[int(rng.integers(len(rows)))]
    start = int(rng.integers((300 - 4) * RATES[kind] + 1))
    assert alone.rate_hz == RATES[kind]
    assert alone.start_ms == round(1000 * window.meta["start"] / 200 + 1000 * start / RATES[kind])


def test_a_rate_that_is_not_listed_is_refused(native: Order) -> None:
    with pytest.raises(ConfigError, match=r"has a channel at \d+ Hz, listed are 999; add the rate"):
        draw_crops(windows_of(native)[0], CropConfig(rates_hz=(999.0,)), seed=0)
    assert draw_crops(windows_of(native)[0], CropConfig(kinds=("emg",)), seed=0) == []
