import numpy as np
import torch

from adapters.augment import drop_channels
from manifests.tasks import load_task
from trainer.batches import KIND_IDS, ChannelBatch, generator


def batch(num_windows: int = 200) -> ChannelBatch:
    kinds = torch.tensor([KIND_IDS[kind] for kind in ("eeg", "eeg", "eog", "emg")]).expand(num_windows, 4)
    mask = torch.ones(num_windows, 4, dtype=torch.bool)
    mask[0, 1:] = False
    return ChannelBatch(
        signal_BCT=torch.ones(num_windows, 4, 8) * mask[:, :, None],
        mask_BC=mask,
        anode_BC=torch.ones_like(kinds),
        cathode_BC=torch.zeros_like(kinds),
        kind_BC=kinds,
        rate_hz=32.0,
    )


def per_window(seed: int, num_windows: int = 200) -> list[np.random.Generator]:
    return [generator(seed, window) for window in range(num_windows)]


def test_needed_channels_stay_and_every_number_occurs():
    task = load_task("sleep_staging").model_copy(update={"channel_dropout": 1.0})
    dropped = drop_channels(task, batch(), per_window(0))
    counts = dropped.mask_BC.sum(dim=1)
    assert dropped.mask_BC[:, :2].any(dim=1).all()  # one eeg at least
    assert set(counts.tolist()) == {1, 2, 3, 4}
    assert not dropped.mask_BC[0, 1:].any()  # padding never becomes real
    assert dropped.signal_BCT[~dropped.mask_BC].abs().max() == 0


def test_share_of_windows_and_repeatability():
    task = load_task("sleep_staging").model_copy(update={"channel_dropout": 0.5})
    first, again = (drop_channels(task, batch(), per_window(0)) for _ in range(2))
    assert torch.equal(first.mask_BC, again.mask_BC)
    untouched = (first.mask_BC.sum(dim=1)[1:] == 4).float().mean()
    assert 0.5 < untouched < 0.75  # half, and a quarter of the other half keeps all four
    other = drop_channels(task, batch(), per_window(1))
    assert not np.array_equal(first.mask_BC, other.mask_BC)


def test_a_window_loses_the_same_channels_in_any_part_of_a_batch():
    task = load_task("sleep_staging").model_copy(update={"channel_dropout": 0.5})
    whole = drop_channels(task, batch(), per_window(0)).mask_BC
    part = drop_channels(task, batch(120), per_window(0)[:120]).mask_BC
    assert torch.equal(whole[:120], part)
