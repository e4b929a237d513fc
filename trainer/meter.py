"""How well a run goes between two rows of its metrics: speed, waiting for data, use of the device, memory, spikes."""

import math
import time
from collections import deque

import psutil
import torch

from trainer.collectives import all_gather_rows, world_size

SPIKE_STEPS = 128  # losses that a spike is measured against
SPIKE_SIGMA = 6.0
_MIN_STEPS = 32  # before that a spread says nothing
_MIN_SPREAD = 1e-3  # of the mean: a loss that does not move has no sigma

# Dense bf16 FLOP/s of one device by the beginning of its name, from the makers' data sheets; longest name first.
PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA GH200": 990e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA A30": 165e12,
    "NVIDIA A10": 125e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
    "NVIDIA RTX A6000": 154.8e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "Tesla V100": 125e12,  # fp16, it has no bf16
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device, None for one that is not in the table."""
    return next((peak for name, peak in PEAK_FLOPS.items() if device_name.startswith(name)), None)


def device_peak(device: torch.device) -> float | None:
    """FLOP/s of what a model is on, None for a CPU and an unknown GPU."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


class Meter:
    """Adds up steps on every rank; `row` turns what came since the last row into metrics of the whole run.

    Args:
        global_batch: Windows of a step over all ranks.
        device: What the model is on.
    """

    def __init__(self, *, global_batch: int, device: torch.device) -> None:
        self._global_batch = global_batch
        self._device = device
        self._peak = device_peak(device)
        self._process = psutil.Process()
        self._losses: deque[float] = deque(maxlen=SPIKE_STEPS)
        self._clear()

    @property
    def has_peak(self) -> bool:
        """Whether operations are worth counting: what the device could do is known."""
        return self._peak is not None

    def _clear(self) -> None:
        self._since = time.monotonic()
        self._steps, self._seconds, self._data_s, self._signal_s, self._flops = 0, 0.0, 0.0, 0.0, 0.0
        self._spike = 0.0

    def add(self, *, seconds: float, data_s: float, signal_s: float, flops: float) -> None:
        """Count a step of this rank.

        Args:
            seconds: Time of the whole step.
            data_s: Part of it spent waiting for the batch.
            signal_s: Recorded time of its windows.
            flops: Floating-point operations of its forward and backward pass.
        """
        self._steps += 1
        self._seconds += seconds
        self._data_s += data_s
        self._signal_s += signal_s
        self._flops += flops

    def spike(self, loss: float) -> float | None:
        """How many standard deviations a loss lies above the last 128, when that is more than 6."""
        found = None
        if len(self._losses) >= _MIN_STEPS:
            mean = math.fsum(self._losses) / len(self._losses)
            spread = math.sqrt(math.fsum((item - mean) ** 2 for item in self._losses) / len(self._losses))
            sigma = (loss - mean) / max(spread, _MIN_SPREAD * abs(mean), 1e-12)
            if sigma > SPIKE_SIGMA:
                found = sigma
                self._spike = max(self._spike, sigma)
        self._losses.append(loss)
        return found

    def row(self, *, replaced: int) -> dict[str, float]:
        """Metrics since the last row. A collective.

        Args:
            replaced: Samples that this rank could not read since it started.
        """
        wall_s = max(time.monotonic() - self._since, 1e-9)
        is_cuda = self._device.type == "cuda"
        cuda_bytes = torch.cuda.max_memory_allocated(self._device) if is_cuda else 0
        own = [self._seconds, self._data_s, self._signal_s, self._flops, self._process.memory_info().rss, cuda_bytes]
        row = torch.tensor([[*own, replaced]], dtype=torch.float64, device=self._device)
        ranks = all_gather_rows(row, [1] * world_size()).cpu()
        seconds, data_s, signal_s, flops, _, _, replaced_all = ranks.sum(dim=0).tolist()
        values = {
            "windows_per_s": self._steps * self._global_batch / wall_s,
            "hours_per_s": signal_s / 3600 / wall_s,
            "data_wait": data_s / max(seconds, 1e-9),
            "rss_bytes": float(ranks[:, 4].max()),
            "replaced": replaced_all,
        }
        if is_cuda:
            values["cuda_bytes"] = float(ranks[:, 5].max())
        if self._peak is not None and flops:
            values["mfu"] = flops / (seconds * self._peak)  # seconds are those of all ranks together
        if self._spike:
            values["loss_spike"] = self._spike
        self._clear()
        return values
