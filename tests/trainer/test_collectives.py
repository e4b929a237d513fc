"""Two gloo processes must give exactly what one process gives, gradients included."""

import numpy as np
import pytest
import torch
from torch import distributed as dist

from manifests.channels import ChannelTag, resolve
from trainer.collectives import (
    all_gather_rows,
    all_gather_with_grad,
    gather_sizes,
    rank,
    sum_over_ranks,
    world_size,
)
from trainer.models.sleep import SleepEncoder, SleepEncoderConfig
from trainer.models.univariate import UnivariateEncoder, UnivariateEncoderConfig
from trainer.objectives.leave_one_out import LeaveOneOut, LeaveOneOutConfig
from trainer.objectives.nt_xent import NtXent, NtXentConfig
from trainer.read import Window

SPLIT = 2  # rank 0 has windows 0-1, rank 1 the other five: ranks of unequal size
SYMBOLS = [("eeg:C3-M2", "eeg:C4-M1", "ecg:II", "resp:thorax"), ("eeg:C3-M2", "ecg:II"), ("eeg:Cz", "resp:thorax")]
NT_XENT = [(guard, near_s) for guard in ("drop", "homogeneous", "dropout") for near_s in (0.0, 4.0, 60.0)]
NAMES = ["leave_one_out", *(f"{guard}_{near_s:g}" for guard, near_s in NT_XENT)]


def make_window(number):
    rng = np.random.default_rng(number)
    ucs, arrays = {}, {}
    for symbol in SYMBOLS[number % 3]:
        tag = resolve(symbol)
        assert isinstance(tag, ChannelTag)
        numbers = {"scale": 0.01, "mean": 0.0, "sd": 1.0, "rate": [64, 1]}
        ids = {"anode_id": tag.anode_id, "cathode_id": tag.cathode_id}
        ucs.setdefault(tag.kind, []).append(
            {"symbol": symbol, "kind": tag.kind, "role": "signal", "unit": tag.unit, **numbers, **ids}
        )
    for kind, tags in ucs.items():
        arrays[kind] = rng.integers(-300, 300, (len(tags), 256)).astype(np.int16)
    meta = {"ucs": ucs, "start": 256 * number, "length": 256, "rate": [64, 1]}
    return Window(
        key=f"w{number}", position=number, epoch=0, corpus="c", recording=f"r{number // 2}", meta=meta, arrays=arrays
    )


def make_objectives():
    torch.manual_seed(0)
    sleep = SleepEncoder(SleepEncoderConfig(width=16, depth=1, patch_s=1.0))
    yield LeaveOneOut(sleep, LeaveOneOutConfig(mask_same_recording=True)).double()
    for guard, near_s in NT_XENT:
        univariate = UnivariateEncoder(
            UnivariateEncoderConfig(width=16, depth=1, channel_code=True, conv_channels=(4, 4, 8))
        )
        config = NtXentConfig(rates_hz=(32.0, 64.0), crop_s=2.0, id_leak_guard=guard, near_s=near_s)
        yield NtXent(univariate, config).double()
    torch.manual_seed(0)
    sleep = SleepEncoder(SleepEncoderConfig(width=16, depth=1, patch_s=1.0))
    # Outside the limit of its scale, where the sign of all ranks' gradient decides what passes.
    yield LeaveOneOut(sleep, LeaveOneOutConfig(contrast="pairwise", temperature=2.0)).double()


def losses_and_gradients(windows):
    """Per objective the loss metric and all gradients, averaged over ranks as DeepSpeed does."""
    results = []
    for objective in make_objectives():
        loss, metrics = objective(objective.collate(windows, seed=0).to("cpu"))
        loss.backward()
        mean_loss = sum_over_ranks(loss) / world_size()
        torch.testing.assert_close(mean_loss.double(), metrics["loss"], rtol=0, atol=1e-10)
        gradients = {
            name: sum_over_ranks(parameter.grad if parameter.grad is not None else torch.zeros_like(parameter))
            / world_size()
            for name, parameter in objective.named_parameters()
        }
        results.append(({name: float(value) for name, value in metrics.items()}, gradients))
    return results


def run_rank(number, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=2)
    try:
        windows = [make_window(n) for n in range(7)]
        own = windows[:SPLIT] if number == 0 else windows[SPLIT:]
        rows = torch.arange(1 + 2 * number, dtype=torch.float64)[:, None] + 10 * number
        rows.requires_grad_()
        gathered = all_gather_with_grad(rows)
        (gathered * (1 + number) * torch.arange(4)[:, None]).sum().backward()
        empty = all_gather_rows(torch.ones(3 * number, 2, dtype=torch.bool))
        nowhere = torch.zeros(0, 2, requires_grad=True)
        all_gather_with_grad(nowhere).sum().backward()
        result = {
            "rank": rank(),
            "sizes": gather_sizes(len(rows), device="cpu"),
            "gathered": gathered.detach(),
            "rows_gradient": rows.grad,
            "empty": empty,
            "nowhere_gradient": nowhere.grad,
            "objectives": losses_and_gradients(own),
        }
        torch.save(result, folder / f"{number}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, run_ranks):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(run_rank, folder)
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(2)]


def test_rows_of_unequal_ranks_arrive_in_rank_order(ranks):
    for number, result in enumerate(ranks):
        assert result["rank"] == number
        assert result["sizes"] == [1, 3]
        assert result["gathered"][:, 0].tolist() == [0, 10, 11, 12]
        assert result["empty"].dtype == torch.bool
        assert result["empty"].shape == (3, 2)
        assert result["nowhere_gradient"].shape == (0, 2)


def test_gradients_of_all_ranks_reach_the_owner(ranks):
    assert ranks[0]["rows_gradient"][:, 0].tolist() == [0.0]  # (1 + 2) x 0
    assert ranks[1]["rows_gradient"][:, 0].tolist() == [3.0, 6.0, 9.0]


@pytest.fixture(scope="module")
def alone():
    return losses_and_gradients([make_window(n) for n in range(7)])


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_two_processes_equal_one(ranks, alone, index):
    metrics, gradients = alone[index]
    assert sum(float(gradient.abs().sum()) for gradient in gradients.values()) > 0.01
    for result in ranks:
        got_metrics, got = result["objectives"][index]
        assert got_metrics == pytest.approx(metrics, abs=1e-9)
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                got[name], gradient, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_one_process_is_the_identity():
    rows = torch.randn(3, 2, requires_grad=True)
    assert (world_size(), rank(), gather_sizes(3, device="cpu")) == (1, 0, [3])
    assert all_gather_with_grad(rows) is rows
    assert not all_gather_rows(rows).requires_grad
