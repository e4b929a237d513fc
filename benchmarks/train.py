"""Speed of training: our loop against a bare one, our encoder against the published SleepFM, and figures of a GPU.

Windows are SleepFM's: 300 s at 128 Hz, 12 channels in 4 modalities, read from a snapshot in the page cache. On a CPU
the contenders take turns step by step on one thread, and their least CPU time counts: other work on the machine
disturbs it least. On a GPU, in bf16: windows/s, PSG-hours per GPU-hour and MFU of the sizes that ship, compiled and
not, through our loop with its data. About 2 minutes.

    python benchmarks/train.py
    python benchmarks/train.py --device cuda
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sleepfm
import torch
from torch import nn

from manifests.config import load_config
from trainer.config import PretrainConfig
from trainer.data import Order
from trainer.meter import peak_flops
from trainer.models.build import build_encoder
from trainer.models.flops import training_flops
from trainer.objectives.build import build_objective
from trainer.read import SnapshotReader
from trainer.samples import load_streams
from trainer.tiny import write_tiny_snapshot
from trainer.zero import as_carried_out, initialise, join_processes, learning_rate, set_learning_rate, train_step

CONFIGS = Path(__file__).parents[1] / "jobs" / "configs"
CHANNELS = {
    "eeg": ("eeg:C3-M2", "eeg:C4-M1", "eeg:O1-M2", "eeg:O2-M1"),
    "eog": ("eog:E1-M2", "eog:E2-M2"),
    "resp": ("resp:thorax", "resp:abdomen", "resp:flow"),
    "ecg": ("ecg:II",),
    "emg": ("emg:chin", "emg:leg_l"),
    "position": ("position:body",),  # in no modality: subject 1 of a tiny snapshot lacks the last kind
}
WINDOW_S = 300
CPU_BATCH = 8
CPU_ROUNDS = 5
CUDA_BATCHES = {"small": 256, "base": 128, "large": 48}  # windows that fit 80 GB without computing blocks again
CUDA_STEPS = 30
WARM_UP = 5  # steps on a GPU before the clock starts, compilation among them


class Step(NamedTuple):
    """Seconds of a step: on the clock, of all threads on a CPU, and waiting for data; and its batch."""

    wall_s: float
    cpu_s: float
    waited_s: float
    batch: Any


def settings(name: str, folder: Path, *overrides: str) -> PretrainConfig:
    """A shipped run on the snapshot of this benchmark."""
    plain = [f"run_dir={folder / 'run'}", f"snapshots.0.path={folder / 'snapshot'}", "num_workers=1", "num_threads=1"]
    return load_config(PretrainConfig, CONFIGS / f"{name}.yaml", [*plain, *overrides])


def make_objective(config: PretrainConfig) -> Any:
    """The objective around fresh weights."""
    torch.manual_seed(config.seed)
    return build_objective(build_encoder(config.encoder), config.objective)


def loop_steps(config: PretrainConfig, objective: Any) -> Generator[Step, None, None]:
    """Steps as `trainer.loop` does them, data and DeepSpeed included."""
    model = initialise(objective, as_carried_out(config))
    streams = load_streams(config.snapshots, split="train", keep=config.filter)
    order = Order(streams, seed=config.seed, global_batch=config.global_batch)
    reader = SnapshotReader(streams, num_threads=config.read_threads, prefetch=config.prefetch)
    batches = reader.stream(order, lambda _, windows: objective.collate(windows, seed=config.seed))
    try:
        for step in itertools.count():
            wall, cpu = time.perf_counter(), time.process_time()
            set_learning_rate(model, learning_rate(step, config.optimizer, steps=config.steps))
            torch.manual_seed(step)
            batch = next(batches)
            waited_s = time.perf_counter() - wall
            metrics, _ = train_step(model, [batch])
            float(metrics["loss"])  # waits for the device, as the loop's check for finite numbers does
            yield Step(time.perf_counter() - wall, time.process_time() - cpu, waited_s, batch)
    finally:
        batches.close()
        reader.close()


def bare_steps(module: nn.Module, loss_of: Callable[[], torch.Tensor]) -> Iterator[Step]:
    """Forward, backward, clipping and AdamW in plain torch on one batch that lies in memory."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    while True:
        wall, cpu = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        loss_of().backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        yield Step(time.perf_counter() - wall, time.process_time() - cpu, 0.0, None)


def compare_on_cpu(folder: Path) -> None:
    """Print seconds per step of all contenders."""
    small = settings("pretrain_sleep_small", folder, f"global_batch={CPU_BATCH}", "read_threads=1", "prefetch=2")
    faithful = settings("pretrain_sleepfm", folder, f"global_batch={CPU_BATCH}")
    torch.set_num_threads(1)
    loop = loop_steps(small, make_objective(small))
    batch = next(loop).batch.to("cpu")
    bare, ours, theirs = make_objective(small), make_objective(faithful), sleepfm.SleepFM()
    signals, paddings = zip(*((group.signal_BCT, ~group.mask_BC) for group in batch.groups), strict=True)
    contenders = {
        "bare torch, kymo small": bare_steps(bare, lambda: bare(batch)[0]),
        "kymo's loop, kymo small": loop,
        "bare torch, SleepFM as in kymo": bare_steps(ours, lambda: ours(batch)[0]),
        "bare torch, SleepFM as published": bare_steps(theirs, lambda: theirs.loss(signals, paddings)),
    }
    done: dict[str, list[Step]] = {name: [] for name in contenders}
    for number in range(1 + CPU_ROUNDS):
        for name, steps in contenders.items():
            step = next(steps)
            if number:  # the first one allocates
                done[name].append(step)
    print(f"{CPU_BATCH} windows of {WINDOW_S} s, one thread, {CPU_ROUNDS} steps each that take turns")
    print(f"{'':34}{'least CPU s':>12}{'median CPU s':>14}{'median s':>10}{'windows/CPU s':>15}")
    least = {name: min(step.cpu_s for step in steps) for name, steps in done.items()}
    for name, steps in done.items():
        cpu_s = statistics.median(step.cpu_s for step in steps)
        wall_s = statistics.median(step.wall_s for step in steps)
        print(f"{name:34}{least[name]:12.2f}{cpu_s:14.2f}{wall_s:10.2f}{CPU_BATCH / least[name]:15.1f}")
    plain, looped, own, published = least.values()
    print(
        f"the loop, data included: {1e3 * (looped - plain):.0f} ms, {100 * (looped / plain - 1):.1f} % over bare torch"
    )
    print(
        f"SleepFM as published takes {published / plain:.2f} x kymo small, {published / own:.2f} x SleepFM as in kymo"
    )
    alone = [next(loop) for _ in range(6)][2:]
    wait = sum(step.waited_s for step in alone) / sum(step.wall_s for step in alone)
    print(f"waiting for data, the loop alone: {100 * wait:.2f} % of its time")


def measure_on_cuda(folder: Path) -> None:
    """Print speed and MFU of each size, compiled and not."""
    device = torch.cuda.get_device_name()
    peak = peak_flops(device)
    print(f"{device}, bf16, {WINDOW_S}-s windows of 12 channels, medians of {CUDA_STEPS} steps of our loop")
    for (size, batch_size), compiled in itertools.product(CUDA_BATCHES.items(), ("false", "true")):
        batch_override = f"global_batch={batch_size}"
        config = settings(
            f"pretrain_sleep_{size}",
            folder,
            *(
                batch_override,
                f"compile={compiled}",
                "encoder.checkpoint_blocks=false",
                "precision=bf16",
            ),
        )
        objective = make_objective(config)
        steps = loop_steps(config, objective)
        rows = [next(steps) for _ in range(WARM_UP + CUDA_STEPS)][WARM_UP:]
        steps.close()
        seconds = statistics.median(row.wall_s for row in rows)
        waited = sum(row.waited_s for row in rows) / sum(row.wall_s for row in rows)
        rate = batch_size / seconds
        flops = training_flops(objective.encoder, rows[-1].batch)
        mfu = "unknown" if peak is None else f"{100 * flops / seconds / peak:.1f} %"
        memory = torch.cuda.max_memory_allocated() / 2**30
        print(
            f"{size:6} compile={compiled:6}{rate:9.1f} windows/s {rate * WINDOW_S:12,.0f} PSG-hours per GPU-hour"
            f"  MFU {mfu}  data wait {100 * waited:.1f} %  {memory:.0f} GiB"
        )
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    """Write the snapshot and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    device = parser.parse_args().device
    join_processes("auto")
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        write_tiny_snapshot(
            folder / "snapshot",
            channels=CHANNELS,
            num_subjects=4,
            windows_per_subject=16 if device == "cpu" else 128,
            rate_hz=128,
            seconds=WINDOW_S,
            num_shards=4,
            num_held_out=0,
        )
        (measure_on_cuda if device == "cuda" else compare_on_cpu)(folder)


if __name__ == "__main__":
    main()
