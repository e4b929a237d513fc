import numpy as np
import pytest
import torch

from manifests.channels import ChannelTag, resolve
from trainer.evaluate import channel_probe, leave_one_out_top1, retrieval_top1, view_top1
from trainer.models.sleep import SleepEncoder, SleepEncoderConfig
from trainer.models.univariate import UnivariateEncoder, UnivariateEncoderConfig
from trainer.objectives.leave_one_out import LeaveOneOut, LeaveOneOutConfig
from trainer.objectives.nt_xent import NtXent, NtXentConfig
from trainer.read import Window


def make_window(number, symbols=("eeg:C3-M2", "ecg:II", "resp:thorax")):
    rng = np.random.default_rng(number)
    ucs, arrays = {}, {}
    for symbol in symbols:
        tag = resolve(symbol)
        assert isinstance(tag, ChannelTag)
        numbers = {"scale": 0.01, "mean": 0.0, "sd": 1.0, "rate": [64, 1]}
        ids = {"anode_id": tag.anode_id, "cathode_id": tag.cathode_id}
        ucs[tag.kind] = [{"symbol": symbol, "kind": tag.kind, "role": "signal", "unit": tag.unit, **numbers, **ids}]
        arrays[tag.kind] = rng.integers(-300, 300, (1, 256)).astype(np.int16)
    meta = {"ucs": ucs, "start": 0, "length": 256, "rate": [64, 1]}
    return Window(
        key=f"w{number}", position=number, epoch=0, corpus="c", recording=f"r{number}", meta=meta, arrays=arrays
    )


def test_leave_one_out_retrieval_by_hand():
    unit = torch.eye(4)[:, None, :].repeat(1, 4, 1)
    everything = torch.ones(4, 4, dtype=torch.bool)
    assert leave_one_out_top1(unit, everything) == {"top1": 1.0, "chance": 0.25, "n": 4.0}
    unit[:2, 0] = unit[:2, 0].flip(0)  # two windows swap their first modality: 2 of 16 anchors miss
    assert leave_one_out_top1(unit, everything)["top1"] == pytest.approx(14 / 16)


def test_windows_with_one_modality_are_no_candidates():
    unit = torch.eye(4)[:, None, :].repeat(1, 2, 1)
    available = torch.tensor([[True, True]] * 2 + [[True, False]] * 2)
    assert leave_one_out_top1(unit, available) == {"top1": 1.0, "chance": 0.5, "n": 4.0}
    assert leave_one_out_top1(unit, available & torch.tensor([True, False]))["top1"] == 0.0


def test_view_retrieval_within_the_same_channel():
    unit = torch.eye(4)[:, None, :].repeat(1, 2, 1)
    unit[:, 1] = unit[[1, 0, 2, 3], 1]  # crops 0 and 1 are confused
    scores = view_top1(unit, torch.tensor([7, 8, 9, 9]))
    assert scores["top1"] == 0.5
    assert scores["chance"] == 0.25
    assert scores["same_channel_top1"] == 1.0
    assert scores["same_channel_chance"] == 0.5
    assert view_top1(unit, torch.tensor([7, 7, 9, 9]))["same_channel_top1"] == 0.5


def test_channel_probe_finds_identity_only_where_it_is():
    torch.manual_seed(0)
    channel = torch.arange(4).repeat_interleave(2).repeat(40)
    noise = torch.randn(320, 8)
    told = channel_probe(noise + 4 * torch.nn.functional.one_hot(channel, 8), channel)
    blind = channel_probe(noise, channel)
    assert told["channel_probe"] > 0.95
    assert blind["channel_probe"] < 0.45
    assert told["channel_probe_chance"] == pytest.approx(0.25)


def test_untrained_encoders_score_the_same_whatever_the_batch_size():
    torch.manual_seed(0)
    sleep = LeaveOneOut(SleepEncoder(SleepEncoderConfig(width=16, depth=1, patch_s=1.0)), LeaveOneOutConfig())
    univariate = NtXent(
        UnivariateEncoder(UnivariateEncoderConfig(width=16, depth=1)),
        NtXentConfig(rates_hz=(64.0,), crop_s=2.0),
    )
    windows = [make_window(n) for n in range(10)]
    for objective, names in (
        (sleep, {"top1", "chance", "n"}),
        (
            univariate,
            {
                "top1",
                "chance",
                "n",
                "same_channel_top1",
                "same_channel_chance",
                "channel_probe",
                "channel_probe_chance",
            },
        ),
    ):
        scores = retrieval_top1(objective, windows, batch_size=3)
        assert set(scores) == names
        assert scores == pytest.approx(retrieval_top1(objective, windows, batch_size=10))
        assert scores["chance"] == pytest.approx(0.1)
        assert objective.training
