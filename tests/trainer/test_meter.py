import math
import time

import pytest
import torch

from trainer.meter import SPIKE_STEPS, Meter, peak_flops


def meter() -> Meter:
    return Meter(global_batch=10, device=torch.device("cpu"))


def test_a_row_tells_speed_and_the_share_of_waiting_and_begins_anew() -> None:
    now = meter()
    for _ in range(4):
        now.add(seconds=0.5, data_s=0.125, signal_s=3600.0, flops=1e9)
    time.sleep(0.2)
    row = now.row(replaced=3)
    assert row["data_wait"] == pytest.approx(0.25)
    assert row["windows_per_s"] == pytest.approx(10 * row["hours_per_s"])  # 40 windows, 4 hours
    assert 0 < row["windows_per_s"] <= 40 / 0.2
    assert row["replaced"] == 3
    assert 50e6 < row["rss_bytes"] < 1e12
    assert not row.keys() & {"mfu", "cuda_bytes", "loss_spike"}  # a CPU has no peak
    assert now.row(replaced=3)["windows_per_s"] == 0.0


def test_use_of_the_device_is_measured_against_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    now = meter()
    monkeypatch.setattr(now, "_peak", 1e12)
    now.add(seconds=0.5, data_s=0.0, signal_s=1.0, flops=1e11)
    assert now.row(replaced=0)["mfu"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("cpu", None),
    ],
)
def test_peaks_by_the_name_that_the_driver_gives(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_a_spike_is_a_loss_far_above_the_last_ones() -> None:
    now = meter()
    waves = [2.0 + 0.1 * math.sin(step) for step in range(200)]
    assert [now.spike(loss) for loss in waves] == [None] * 200
    assert now.spike(2.2) is None
    sigma = now.spike(4.0)
    assert sigma is not None
    assert 20 < sigma < 40
    assert now.row(replaced=0)["loss_spike"] == sigma
    assert "loss_spike" not in now.row(replaced=0)
    # A new level is a spike until it fills the memory.
    for _ in range(SPIKE_STEPS):
        now.spike(4.0)
    assert now.spike(4.0) is None


def test_a_falling_loss_a_first_loss_and_one_that_stands_still_are_no_spikes() -> None:
    now = meter()
    assert [now.spike(loss) for loss in (9.0, 1.0, 90.0)] == [None] * 3
    now = meter()
    assert [now.spike(10.0 - step / 20) for step in range(150)] == [None] * 150
    now = meter()
    assert [now.spike(loss) for loss in [1.0] * 40 + [1.0 + 1e-6]] == [None] * 41
    assert now.spike(1.1) is not None
