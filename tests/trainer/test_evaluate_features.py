from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from manifests.config import digest
from manifests.errors import ConfigError, ContractError
from manifests.tasks import load_task
from trainer.batches import collate_channels
from trainer.evaluation.channelwise import BANDS_HZ, band_power, describe_signal, extractor_of
from trainer.evaluation.config import TaskEvaluation
from trainer.evaluation.features import EncoderFeatures, Reading, cut, features_of, random_encoder, reading_of
from trainer.evaluation.windows import load_labelled, read_windows, spread
from trainer.models.sleep import SleepEncoderConfig
from trainer.models.univariate import UnivariateEncoderConfig
from trainer.objectives.leave_one_out import LeaveOneOutConfig
from trainer.objectives.nt_xent import NtXentConfig

SLEEP = SleepEncoderConfig(width=16, depth=1)
UNIVARIATE = UnivariateEncoderConfig(width=16, depth=1)


@pytest.fixture(scope="module")
def labelled(tiny_snapshot) -> tuple[Any, Any, list[str]]:
    """Task, table and digests of the tiny snapshot, all splits."""
    task = load_task("sleep_staging")
    rows, _, snapshots = load_labelled(
        task, TaskEvaluation(task="sleep_staging", snapshots=[str(tiny_snapshot)], folds="subjects")
    )
    return task, rows, [item.digest for item in snapshots]


@pytest.fixture(scope="module")
def windows(labelled) -> list[Any]:
    return next(read_windows(labelled[1], batch=6))


def test_the_table_holds_labelled_windows_of_all_splits_and_counts_the_rest(tiny_snapshot) -> None:
    settings = TaskEvaluation(task="wake_deep", snapshots=[str(tiny_snapshot)], folds="subjects")
    rows, left_out, _ = load_labelled(load_task("wake_deep"), settings)
    assert set(rows["target"]) == {0, 1}
    assert set(rows["split"]) == {"train", "val"}
    assert len(rows) + left_out["no label of the task"] == 48  # N1, N2 and R are no class of this task
    assert all(symbol.startswith("eeg:") for symbols in rows["symbols"] for symbol in symbols)


def test_no_test_split_is_told_with_the_way_out(tiny_snapshot) -> None:
    settings = TaskEvaluation(task="wake_deep", snapshots=[str(tiny_snapshot)])
    with pytest.raises(ConfigError, match="folds: subjects"):
        load_labelled(load_task("wake_deep"), settings)


def test_windows_are_those_of_the_table_and_a_wrong_offset_is_told(labelled) -> None:
    _, rows, _ = labelled
    read = [window for part in read_windows(rows, batch=7) for window in part]
    assert [window.key for window in read] == list(rows["key"])
    assert [window.meta["subject"] for window in read] == list(rows["subject"])
    wrong = rows.copy()
    wrong.loc[0, "offset"] = rows["offset"][1]
    with pytest.raises(ContractError, match="stands at the offset"):
        next(read_windows(wrong, batch=1))


def test_thinning_keeps_every_recording(labelled) -> None:
    _, rows, _ = labelled
    few = spread(rows, 12)
    assert len(few) <= 14
    assert set(few["recording"]) == set(rows["recording"])


def test_the_reading_is_that_of_the_pretraining() -> None:
    task = load_task("sleep_staging")
    sleep = reading_of(task, LeaveOneOutConfig(view="robust"))
    assert sleep == Reading(groups={"BAS": ("eeg", "eog"), "EMG": ("emg",)}, view="robust", segment_s=None)
    univariate = reading_of(task, NtXentConfig(rates_hz=(128.0,), crop_s=2.0))
    assert univariate.segment_s == 2.0
    assert univariate.groups == {"eeg": ("eeg",), "eog": ("eog",), "emg": ("emg",)}
    assert reading_of(task, None) == Reading(groups={"all": ("eeg", "eog", "emg")}, view="zscore", segment_s=None)


def test_a_missing_modality_is_a_block_of_zeros_and_hidden_channels_do_not_matter(windows) -> None:
    reading = Reading(groups={"BAS": ("eeg",), "EKG": ("ecg",)}, view="zscore", segment_s=None)
    extract = EncoderFeatures(random_encoder(SLEEP, seed=0), reading, identity="x")
    whole, part = extract(windows), extract(windows, channels=["eeg:C3-M2"])
    assert whole.shape == (6, 32)
    assert np.all(part[:, 16:] == 0)
    assert np.abs(whole[:, 16:]).min(axis=0).max() > 0
    assert not np.allclose(whole[:, :16], part[:, :16])
    noisy = []
    for window in windows:
        arrays = {kind: array.copy() for kind, array in window.arrays.items()}
        arrays["eeg"][1] += 100  # C4, which is hidden
        noisy.append(replace(window, arrays=arrays))
    assert np.array_equal(extract(noisy, channels=["eeg:C3-M2"]), part)


def test_pieces_cover_the_window_evenly(windows) -> None:
    batch = collate_channels(windows, kinds=["eeg"], view="zscore").to("cpu")
    pieces, number = cut(batch, segment_s=3.0)
    assert number == 3  # of 8 s
    assert pieces.signal_BCT.shape == (18, 2, 192)
    assert torch.equal(pieces.signal_BCT[5], batch.signal_BCT[1, :, -192:])
    assert torch.equal(pieces.mask_BC[3], batch.mask_BC[1])
    assert cut(batch, segment_s=None) == (batch, 1)


def test_univariate_features_channel_by_channel_are_those_of_the_encoder(windows) -> None:
    encoder = random_encoder(UNIVARIATE, seed=0)
    reading = Reading(groups={"all": ("eeg", "ecg")}, view="robust", segment_s=4.0)
    alone, together = extractor_of(encoder, reading, identity="x"), EncoderFeatures(encoder, reading, identity="x")
    for channels in (None, ["eeg:C4-M1"], ["eeg:C3-M2", "ecg:II"]):
        assert alone(windows, channels=channels) == pytest.approx(together(windows, channels=channels), abs=1e-5)


def test_random_weights_depend_on_the_seed_alone() -> None:
    before = torch.get_rng_state()
    weights = [next(iter(random_encoder(SLEEP, seed=seed).state_dict().values())) for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_features_are_kept_by_encoder_and_data(labelled, tmp_path) -> None:
    _, rows, digests = labelled
    calls = []

    class Count:
        identity = "one"

        def __call__(self, windows, *, channels=None):
            calls.append((len(windows), channels))
            return np.full((len(windows), 2), 7.0)

    def make(extractor=None, snapshots=digests, table=rows):
        return features_of(table, extractor or Count(), cache=tmp_path, snapshots=snapshots, batch=20)

    first = make()
    assert np.array_equal(make(), first)
    assert len(first) == len(rows)
    assert sum(number for number, _ in calls) == len(rows)
    other = Count()
    other.identity = "two"
    for changed in ({"extractor": other}, {"snapshots": [digest("x")]}, {"table": rows.iloc[:10]}):
        calls.clear()
        make(**changed)
        assert calls, changed


def test_band_powers_name_the_band_of_a_sine() -> None:
    time = np.arange(30 * 128) / 128
    for number, (low, high) in enumerate(BANDS_HZ.values()):
        found = describe_signal(20 * np.sin(2 * np.pi * (low + high) / 2 * time), rate_hz=128.0)
        assert int(found[: len(BANDS_HZ)].argmax()) == number
        assert np.exp(found[number]) == pytest.approx(200.0, rel=0.1)  # a² / 2
        assert np.exp(found[len(BANDS_HZ)]) == pytest.approx(20 / np.sqrt(2), rel=0.01)
    assert np.isfinite(describe_signal(np.zeros(512), rate_hz=128.0)).all()


def test_band_power_features_have_mean_and_spread_by_kind(windows) -> None:
    extract = band_power(load_task("sleep_staging"))
    features = extract(windows)
    assert features.shape == (6, 3 * 2 * (len(BANDS_HZ) + 5))
    one = extract(windows, channels=["eeg:C3-M2"])
    assert np.all(one[:, len(BANDS_HZ) + 5 : 2 * (len(BANDS_HZ) + 5)] == 0)  # one channel has no spread
    assert not np.allclose(one, features)
