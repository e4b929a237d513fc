"""Adapters: how small, how fast to switch, how many predictions, what six tasks cost together and apart.

Six tasks like sleep staging on one encoder (SleepFM's sizes, 4.45 M parameters, fresh weights), made by `kymo adapt`'s
own code from synthetic nights: LoRA r = 8. What is compared takes turns in one process on one thread; CPU seconds, and
of the rounds the median. The last part runs `kymo predict` on files of 1 h and 24 h and asks the kernel for its memory.
About 6 minutes on a quiet machine.

    python benchmarks/adapt.py [--fast] [--out FOLDER]
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from inputs import NIGHT, write_edf

from adapters.build import build_task_model
from adapters.bundle import Bundle, load_bundle, write_bundle
from adapters.config import AdaptConfig, TaskRun
from adapters.evaluate import collate_task
from adapters.model import MultiTaskModel
from adapters.predict import predict
from adapters.sampling import Share
from adapters.train import adapt, train_step
from adapters.update import LabelledBatch, Update
from engine.config import ConvertConfig
from engine.convert import convert_all
from engine.rows import Losses
from engine.synthetic import synthesise
from jobs import cli
from jobs.predict import stranger, windows_of
from manifests.config import dump_yaml, load_config
from manifests.recipes import load_recipe
from manifests.tasks import load_task
from trainer.config import PretrainConfig
from trainer.export import save_encoder
from trainer.models.build import build_encoder
from trainer.read import Window

CONFIG = Path(__file__).parents[1] / "jobs" / "configs" / "pretrain_sleep_small.yaml"
TASKS = tuple(f"stages_{number}" for number in range(6))
BATCH = 16  # windows of 30 s a task and step
ROUNDS = 7
FAST_ROUNDS = 3
SWITCHES = 2000
WINDOWS = 64
LONG_H = 24
SIX_CHANNELS = NIGHT[:6]


def make_bundle(folder: Path) -> Bundle:
    """Bundle of six tasks after one step."""
    synthesise(folder / "nights", num_subjects=4, num_ecg=1, night_minutes=20)
    source = {"corpus": "synthetic_psg", "root": str(folder / "nights")}
    settings = {"output": str(folder / "shards"), "recipe": "sleep128", "sources": [source], "quarantine_budget": 0.5}
    convert_all(ConvertConfig.model_validate(settings))
    plain = ["run_dir=x", "snapshots.0.path=x"]
    torch.manual_seed(0)
    encoder = build_encoder(load_config(PretrainConfig, CONFIG, plain).encoder)
    recipe = load_recipe("sleep128").model_dump(mode="json")
    save_encoder(folder / "encoder", encoder, recipes={"sleep128": recipe}, step=0)
    runs = []
    for name in TASKS:
        path = folder / f"{name}.yaml"
        path.write_text(dump_yaml(load_task("sleep_staging").model_copy(update={"id": name}).model_dump(mode="json")))
        runs.append(TaskRun(task=str(path), snapshots=[str(folder / "shards")], batch=2))
    result = adapt(
        AdaptConfig(
            run_dir=str(folder / "run"),
            encoder=str(folder / "encoder"),
            tasks=runs,
            steps=1,
            eval_every=1,
            eval_windows=4,
        )
    )
    write_bundle(result, folder / "bundle")
    return load_bundle(folder / "bundle")


def take_turns(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(1 + rounds):
        for name, work in contenders.items():
            began = time.process_time()
            work()
            if number:
                seconds[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_size(bundle: Bundle) -> dict[str, Any]:
    """Trainable parameters, and bytes of the bundle: what all tasks share, and what each adds."""
    model, files = bundle.model, bundle.manifest.files
    counts: dict[str, int] = {}
    for name, parameter in model.trainable().items():
        counts[model.group(name)] = counts.get(model.group(name), 0) + parameter.numel()
    own = {name: entry.size for name, entry in files.items() if f"/{TASKS[0]}" in name}
    shared = sum(entry.size for name, entry in files.items() if not any(f"/{task}" in name for task in TASKS))
    return {
        "parameters of the encoder": sum(
            p.numel() for name, p in model.encoder.named_parameters() if "lora_" not in name
        ),
        "trainable, LoRA of a task": counts["lora"] // len(TASKS),
        "trainable, head of a task": counts["head"] // len(TASKS),
        "trainable, shared temporal encoder": counts["temporal"],
        "bytes of a task in the bundle": sum(own.values()),
        "bytes of its adapter and head": sum(
            size for name, size in own.items() if name.startswith("adapters/") and name.endswith(".safetensors")
        ),
        "bytes that all tasks share": shared,
    }


def measure_switch(bundle: Bundle) -> dict[str, Any]:
    """Microseconds to make another task's adapter the active one."""
    times = []
    for name in itertools.islice(itertools.cycle(TASKS), SWITCHES):
        began = time.perf_counter()
        bundle.model.activate(name)
        times.append(time.perf_counter() - began)
    times.sort()
    return {"switch, median us": 1e6 * statistics.median(times), "switch, 99 % us": 1e6 * times[int(0.99 * SWITCHES)]}


def night_windows(folder: Path) -> list[Window]:
    """Windows of a synthetic night with six channels."""
    path = write_edf(folder / "half_hour.edf", SIX_CHANNELS, WINDOWS * 30 / 3600)
    return list(windows_of(path, stranger(path, mains_hz=50), load_recipe("sleep128"), Losses()))


def measure_predictions(bundle: Bundle, windows: list[Window], rounds: int) -> dict[str, Any]:
    """Windows a CPU second: one task, six that share a pass of the temporal encoder, six passes."""
    found = take_turns(
        {
            "one": lambda: list(predict(bundle, windows, tasks=TASKS[:1])),
            "shared": lambda: list(predict(bundle, windows, tasks=TASKS)),
            "apart": lambda: [list(predict(bundle, windows, tasks=[name])) for name in TASKS],
        },
        rounds,
    )
    count = len(windows)
    return {
        "one task, windows per CPU s": count / found["one"],
        "six tasks sharing a pass, windows per CPU s": count / found["shared"],
        "six tasks sharing a pass, predictions per CPU s": len(TASKS) * count / found["shared"],
        "six passes, windows per CPU s": count / found["apart"],
        "six passes over one shared": found["apart"] / found["shared"],
        "six tasks over one task": found["shared"] / found["one"],
    }


class Stepper:
    """Optimizer steps of `adapters.train` on one batch per task that lies in memory."""

    def __init__(self, folder: Path, tasks: tuple[str, ...], windows: list[Window], method: str) -> None:
        runs = [TaskRun(task=name, snapshots=["x"], batch=BATCH) for name in tasks]
        self.config = AdaptConfig(run_dir="x", encoder="x", tasks=runs, steps=1000, eval_every=1000, method=method)
        card = load_bundle(folder / "bundle", tasks[:1])
        task = card.records[tasks[0]].task
        encoder = build_encoder(load_config(PretrainConfig, CONFIG, ["run_dir=x", "snapshots.0.path=x"]).encoder)
        self.model = build_task_model(self.config, encoder, dict.fromkeys(tasks, len(task.labels)))
        batch = collate_task(task, windows[:BATCH])
        target = torch.arange(BATCH) % len(task.labels)
        item = LabelledBatch(task=task, batch=batch, target=target)
        self.batches: dict[str, Iterator[LabelledBatch]] = {name: itertools.repeat(item) for name in tasks}
        self.parts = {name: Share(epoch=1, batch=BATCH, weight=1.0) for name in tasks}
        self.update = Update(self.config, self.model, num_tasks=len(tasks))
        self.steps = 0

    def __call__(self) -> None:
        """Take one step."""
        train_step(self.config, self.update, self.batches, self.parts, step=self.steps)
        self.steps += 1


def measure_steps(folder: Path, windows: list[Window], rounds: int) -> dict[str, Any]:
    """CPU seconds of a joint step of six tasks, and of a step of each of six runs of one task, by LoRA and in full."""
    joint = Stepper(folder, TASKS, windows, "lora")
    lora = [Stepper(folder, (name,), windows, "lora") for name in TASKS]
    full = [Stepper(folder, (name,), windows, "full") for name in TASKS]
    found = take_turns(
        {"joint": joint, "lora": lambda: [step() for step in lora], "full": lambda: [step() for step in full]}, rounds
    )
    trained = {
        "joint": sum(p.numel() for p in joint.model.trainable().values()),
        "full": sum(p.numel() for step in full for p in step.model.trainable().values()),
    }
    return {
        "joint step of six tasks, CPU s": found["joint"],
        "six LoRA fine-tunings over the joint step": found["lora"] / found["joint"],
        "six full fine-tunings over the joint step": found["full"] / found["joint"],
        "trained parameters, six full over joint": trained["full"] / trained["joint"],
    }


def peak_mib() -> float:
    """Most memory that this process has had. `ru_maxrss` would do, but a child begins with that of its parent."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _step_memory(folder: str, tasks: tuple[str, ...], method: str, windows: list[Window], queue: Any) -> None:
    torch.set_num_threads(1)
    before = peak_mib()
    step = Stepper(Path(folder), tasks, windows, method)
    for _ in range(3):
        step()
    queue.put(peak_mib() - before)


def measure_step_memory(folder: Path, windows: list[Window]) -> dict[str, Any]:
    """MiB that model, optimizer and activations add to a process: the joint run, and one run of one task."""
    context = multiprocessing.get_context("spawn")
    found = {}
    runs = {"joint": (TASKS, "lora"), "lora": (TASKS[:1], "lora"), "full": (TASKS[:1], "full")}
    for name, (tasks, method) in runs.items():
        queue = context.Queue()
        child = context.Process(target=_step_memory, args=(str(folder), tasks, method, windows[:BATCH], queue))
        child.start()
        found[name] = queue.get()
        child.join()
    return {
        "joint run of six tasks, MiB": found["joint"],
        "one LoRA run, MiB": found["lora"],
        "one full fine-tuning, MiB": found["full"],
        "six full fine-tunings over the joint run": 6 * found["full"] / found["joint"],
    }


def measure_long(folder: Path) -> dict[str, Any]:
    """Peak memory and CPU seconds of `kymo predict` on 1 h and on 24 h of six channels at 256 Hz."""
    found: dict[str, Any] = {}
    for hours in (1, LONG_H):
        path = write_edf(folder / f"{hours}h.edf", SIX_CHANNELS, hours)
        arguments = ["predict", str(folder / "bundle"), str(path), "--out", str(folder / "out"), "--task", TASKS[0]]
        child = subprocess.Popen(
            [sys.executable, __file__, "--kymo", *arguments], stdout=subprocess.PIPE, text=True, cwd=CONFIG.parents[2]
        )
        assert child.stdout is not None
        text = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"kymo {' '.join(arguments)}: exit code {child.returncode}\n{text}")
        found[f"{hours} h: peak MiB"] = float(text.splitlines()[-1])
        found[f"{hours} h: CPU s"] = usage.ru_utime + usage.ru_stime
        path.unlink()
    more = found[f"{LONG_H} h: peak MiB"] - found["1 h: peak MiB"]
    return {**found, "MiB more for each channel and hour": more / (LONG_H - 1) / len(SIX_CHANNELS)}


def run_kymo(arguments: list[str]) -> None:
    """Run the command line here, and print the most memory that it took."""
    sys.argv = ["kymo", *arguments]
    try:
        cli.main()
    finally:
        print(peak_mib())


def main() -> None:
    """Measure all of it and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help=f"{FAST_ROUNDS} rounds instead of {ROUNDS}")
    parser.add_argument("--out", type=Path, help="folder for adapt.json and adapt.md")
    parser.add_argument("--only", action="append", help="name of a part, such as `switching`; repeatable")
    parser.add_argument("--kymo", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kymo:
        run_kymo(options.kymo)
        return
    rounds = FAST_ROUNDS if options.fast else ROUNDS
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        bundle = make_bundle(folder)
        if not isinstance(bundle.model, MultiTaskModel):
            raise SystemExit("the bundle's model has no adapters")
        windows = night_windows(folder)
        parts = {
            "size": lambda: measure_size(bundle),
            "switching": lambda: measure_switch(bundle),
            "prediction": lambda: measure_predictions(bundle, windows, rounds),
            "training": lambda: measure_steps(folder, windows, rounds),
            "memory of training": lambda: measure_step_memory(folder, windows),
            "long recordings": lambda: measure_long(folder),
        }
        results: dict[str, dict[str, Any]] = {}
        for name, measure in parts.items():
            if options.only and name not in options.only:
                continue
            results[name] = measure()
            print(f"\n{name}")
            for what, value in results[name].items():
                print(
                    f"  {what:52}{value:>14,.2f}" if isinstance(value, float) else f"  {what:52}{value:>14,}",
                    flush=True,
                )
    print(f"\nload average {', '.join(f'{load:.1f}' for load in os.getloadavg())}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "adapt.json").write_text(json.dumps(results, indent=2) + "\n")
        rows = [f"| {what} | {value:,.2f} |" for part in results.values() for what, value in part.items()]
        (options.out / "adapt.md").write_text("\n".join(["| | |", "|---|---|", *rows]) + "\n")


if __name__ == "__main__":
    main()
