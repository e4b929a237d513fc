"""The training of several tasks on one frozen encoder.

Plain torch in one process: what is trained is a fraction of a megabyte, so there is nothing for ZeRO to split, and
with DeepSpeed a task that is absent from a step would be updated by stale gradients. Every step takes every task in
the same order: forward and backward of one, then of the next, then one optimizer step. That is exact for any shapes,
and needs the memory of one task.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch.nn import functional

from adapters.augment import drop_channels
from adapters.checkpoint import (
    Progress,
    check_fingerprint,
    copy_trainable,
    put_trainable,
    resume,
    save_checkpoint,
)
from adapters.config import AdaptConfig, FinetuneConfig, TaskTraining
from adapters.data import TaskData, describe_data, load_task_data
from adapters.evaluate import collate_task, evaluate, mean_primary, targets_of
from adapters.model import MultiTaskModel, TaskModel
from manifests.config import digest, start_run, write_atomically
from manifests.errors import ConfigError
from manifests.tasks import Task, load_task
from trainer.batches import ChannelBatch, generator, stable_hash
from trainer.data import Order
from trainer.export import load_encoder, read_card
from trainer.read import SnapshotReader, Window

logger = logging.getLogger(__name__)

RunConfig = AdaptConfig | FinetuneConfig
Report = Callable[[dict[str, Any]], None]
LabelledBatch = tuple[Task, ChannelBatch, torch.Tensor]
RESULT_FILE = "result.json"
TRAINED_FILE = "trained.safetensors"
FINAL_RATE = 0.05  # share of the peak learning rate at the last step
# Keys of a configuration that do not decide the trained numbers, or that the fingerprint holds in another form.
INCIDENTAL = {"run_dir", "encoder", "tasks", "log_every", "checkpoint_every", "threads", "card", "device"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptResult:
    """A finished run. `model` holds the kept weights; `scores` is task -> split -> `trainer.evaluation.scores`.

    `data` is task -> snapshots, recipe and window counts, as plain data.
    """

    config: AdaptConfig
    run_dir: Path
    model: MultiTaskModel
    tasks: dict[str, Task]
    data: dict[str, dict[str, Any]]
    scores: dict[str, dict[str, Any]]
    kept_step: int
    seconds: float


def adapt(config: AdaptConfig, *, report: Report | None = None) -> AdaptResult:
    """Adapters and heads of all tasks of a run, trained or, if the run is finished already, read back.

    The same command continues an interrupted run from its newest checkpoint, bit for bit.

    Args:
        config: The run.
        report: Called with every row that goes to `metrics.jsonl`.

    Raises:
        ConfigError: A task without training windows, or a run folder of another configuration.
    """
    torch.set_num_threads(config.threads)
    data = load_data(config)
    model = MultiTaskModel(
        load_encoder(Path(config.encoder)),
        {name: len(item.task.labels) for name, item in data.items()},
        lora=config.lora,
        seed=config.seed,
    )
    result = train_tasks(config, model, data, report=report)
    return AdaptResult(
        config=config,
        run_dir=Path(config.run_dir),
        model=model.eval(),
        tasks={name: item.task for name, item in data.items()},
        data=result["data"],
        scores=result["scores"],
        kept_step=result["kept_step"],
        seconds=result["seconds"],
    )


def train_tasks(
    config: RunConfig, model: TaskModel, data: dict[str, TaskData], *, report: Report | None
) -> dict[str, Any]:
    """The content of `result.json`: the model trained and scored or, if the run is finished already, read back."""
    began = time.monotonic()
    run_dir = Path(config.run_dir)
    fingerprint = _fingerprint(config, data)
    finished = run_dir / RESULT_FILE
    if finished.exists():
        result = json.loads(finished.read_text())
        check_fingerprint(finished, result["fingerprint"], fingerprint)
        put_trainable(model, load((run_dir / TRAINED_FILE).read_bytes()), where=str(run_dir / TRAINED_FILE))
        logger.info("%s: finished before; nothing to do", run_dir)
        return result
    start_run(run_dir, config)
    kept_step = _train(config, model, data, fingerprint=fingerprint, report=report)
    return _finish(config, model, data, fingerprint=fingerprint, kept_step=kept_step, began=began)


def load_data(config: TaskTraining) -> dict[str, TaskData]:
    """Labelled windows of every task of a run, by the task's id."""
    data: dict[str, TaskData] = {}
    for run in config.tasks:
        task = load_task(run.task)
        if task.id in data:
            raise ConfigError(f"tasks: {task.id} stands twice; a run learns a task once")
        data[task.id] = load_task_data(task, run)
    return data


def _fingerprint(config: RunConfig, data: dict[str, TaskData]) -> str:
    """Digest of everything that decides the trained numbers."""
    tasks = [
        [item.task.model_dump(mode="json"), item.batch, [snapshot.digest for snapshot in item.snapshots]]
        for item in data.values()
    ]
    return digest([config.model_dump(mode="json", exclude=INCIDENTAL), read_card(config.encoder).sha256, tasks])


def _train(
    config: RunConfig, model: TaskModel, data: dict[str, TaskData], *, fingerprint: str, report: Report | None
) -> int:
    """Train to the last step, put the kept weights in place and return their step."""
    run_dir = Path(config.run_dir)
    optimizer = build_optimizer(config, model)
    progress, best = resume(run_dir, model=model, optimizer=optimizer, fingerprint=fingerprint)
    rows = _Rows(run_dir / "metrics.jsonl", after=progress.step, report=report)
    began, begin_step = time.monotonic(), progress.step
    with ExitStack() as stack:
        batches = {
            name: stack.enter_context(closing(labelled_batches(item, seed=config.seed, start=progress.step)))
            for name, item in data.items()
        }
        while progress.step < config.steps:
            losses = train_step(config, model, optimizer, batches, step=progress.step)
            progress.step += 1
            if progress.step % config.log_every == 0 or progress.step == config.steps:
                left = (config.steps - progress.step) * (time.monotonic() - began) / (progress.step - begin_step)
                rows.write({"step": progress.step, "split": "train", "loss": losses})
                text = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
                logger.info("adapt %d/%d: loss %s; %.0f s left", progress.step, config.steps, text, left)
            if progress.step % config.eval_every == 0:
                scores = evaluate(model, data, split="val", limit=config.eval_windows)
                rows.write({"step": progress.step, "split": "val", "scores": _values(scores)})
                best = _keep_better(model, best, progress, mean_primary(scores, data))
            if progress.step % config.checkpoint_every == 0:
                save_checkpoint(
                    run_dir, model=model, optimizer=optimizer, best=best, progress=progress, fingerprint=fingerprint
                )
    if config.keep == "best" and best:
        put_trainable(model, best, where="best weights")
        return progress.best_step
    return progress.step


def train_step(
    config: RunConfig,
    model: TaskModel,
    optimizer: torch.optim.Optimizer,
    batches: Mapping[str, Iterator[LabelledBatch]],
    *,
    step: int,
) -> dict[str, float]:
    """Loss per task of one optimizer step over all tasks."""
    model.train()
    factor = rate_factor(step, steps=config.steps, warmup=math.ceil(config.optimizer.warmup_share * config.steps))
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    optimizer.zero_grad(set_to_none=True)
    losses: dict[str, float] = {}
    for name, stream in batches.items():
        task, batch, target = next(stream)
        torch.manual_seed(stable_hash(config.seed, step, name))  # dropout; a resumed run draws the same
        loss = task_loss(task, model(name, batch.to(model.device)), target.to(model.device))
        loss.backward()
        losses[name] = float(loss.detach())
    torch.nn.utils.clip_grad_norm_(model.trainable().values(), config.optimizer.clip_norm)
    optimizer.step()
    return losses


def build_optimizer(config: RunConfig, model: TaskModel) -> torch.optim.Optimizer:
    """AdamW with a learning rate per group of parameters; no decay on LoRA."""
    groups: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in model.trainable().items():
        groups.setdefault(model.group(name), []).append(parameter)
    decay = config.optimizer.weight_decay
    return torch.optim.AdamW(
        [
            {"params": groups[name], "lr": rate, "peak_lr": rate, "weight_decay": 0.0 if name == "lora" else decay}
            for name, rate in config.optimizer.rates().items()
        ]
    )


def rate_factor(step: int, *, steps: int, warmup: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to `FINAL_RATE`."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done))


def task_loss(task: Task, logits_BK: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Scalar loss; the target is class indices (B,) under cross_entropy, 0/1 (B, K) under bce."""
    weight = None
    if task.class_weights is not None:
        weight = torch.tensor([task.class_weights[label] for label in task.labels], device=logits_BK.device)
    if task.loss == "cross_entropy":
        return functional.cross_entropy(logits_BK, target, weight=weight)
    return functional.binary_cross_entropy_with_logits(logits_BK, target, weight=weight)


def labelled_batches(data: TaskData, *, seed: int, start: int) -> Generator[LabelledBatch, None, None]:
    """Endless training batches from step `start` on; a pure function of snapshots, seed and step."""
    train = data.splits["train"]
    order = Order(train.streams, seed=stable_hash(seed, data.task.id), global_batch=data.batch)
    reader = SnapshotReader(train.streams, num_threads=1)

    def work(step: int, windows: list[Window]) -> LabelledBatch:
        batch = collate_task(data.task, windows)
        if data.task.channel_dropout:
            batch = drop_channels(data.task, batch, generator(seed, "channels", data.task.id, step))
        return data.task, batch, targets_of(data.task, train, windows)

    with closing(reader):
        yield from reader.stream(order, work, start_batch=start)


def _keep_better(
    model: TaskModel, best: dict[str, torch.Tensor], progress: Progress, score: float | None
) -> dict[str, torch.Tensor]:
    if score is None or (progress.best_score is not None and score <= progress.best_score):
        return best
    progress.best_score, progress.best_step = score, progress.step
    return copy_trainable(model)


def _finish(
    config: RunConfig,
    model: TaskModel,
    data: dict[str, TaskData],
    *,
    fingerprint: str,
    kept_step: int,
    began: float,
) -> dict[str, Any]:
    """Score the kept weights and write them; `result.json`, written last, marks the run as finished."""
    by_split = {split: evaluate(model, data, split=split, limit=config.eval_windows) for split in ("val", "test")}
    result = {
        "fingerprint": fingerprint,
        "kept_step": kept_step,
        "seconds": round(time.monotonic() - began, 1),
        "scores": {name: {split: by_split[split].get(name) for split in by_split} for name in data},
        "data": {name: describe_data(item) for name, item in data.items()},
    }
    run_dir = Path(config.run_dir)
    write_atomically(run_dir / TRAINED_FILE, save(copy_trainable(model)))
    write_atomically(run_dir / RESULT_FILE, json.dumps(result, indent=2) + "\n")
    return result


def _values(scores: dict[str, dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    return {
        name: {metric: entry["value"] for metric, entry in item["metrics"].items()} for name, item in scores.items()
    }


class _Rows:
    """Rows of metrics.jsonl; those of steps that a resumed run repeats are dropped first."""

    def __init__(self, path: Path, *, after: int, report: Report | None) -> None:
        self._path = path
        self._report = report
        # A line without its end was cut off by a kill.
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= after]
        write_atomically(path, "".join(kept))

    def write(self, row: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._report is not None:
            self._report(row)
