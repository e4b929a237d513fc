"""The training of several tasks on one frozen encoder, in one process or several.

Every step takes every task, in the same order on every rank: forward and backward of one, then of the next, then one
optimizer step. That is exact for any shapes, and needs the memory of one task. What a step does is a pure function of
(configuration, seed, step), so that a run goes on from a checkpoint as if nothing had happened: bit for bit on a CPU
with equal ranks and threads, and with the same windows, channel dropout and rates at any number of ranks. Dropout
inside the model is drawn per rank: it differs between one rank and two, and sums are taken in another order.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adapters.build import build_task_model
from adapters.checkpoint import Checkpoint, Progress, copy_trainable, put_trainable
from adapters.config import AdaptConfig, TaskTraining
from adapters.data import TaskData, describe_data, load_task_data
from adapters.evaluate import evaluate, mean_primary
from adapters.model import MultiTaskModel, TaskModel
from adapters.paths import TRAINED_FILE
from adapters.provenance import seen_in_pretraining
from adapters.rows import Rows
from adapters.run_folder import Start, open_folder
from adapters.running import FREE_KEYS, Running
from adapters.sampling import Share, shares
from adapters.stream import labelled_batches
from adapters.update import LabelledBatch, RunConfig, Update, loss_weight, summed_loss
from manifests.errors import ConfigError
from manifests.tasks import Task, load_task
from trainer.batches import stable_hash
from trainer.cache import open_cache
from trainer.collectives import explained_timeouts, rank, sum_over_ranks
from trainer.config import flatten
from trainer.export import load_encoder, read_card
from trainer.process_group import is_launched, join_group, run_on_rank_zero
from trainer.samples import SnapshotSource
from trainer.stopper import Stopper

logger = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]
# Keys of a configuration that do not decide the trained numbers, or that a run's identity holds in another form.
INCIDENTAL = {"run_dir", "encoder", "tasks", "checkpoint_every", "card"} | FREE_KEYS
MAX_SKIPPED = 10  # steps without a finite gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptResult:
    """A finished run. `model` holds the kept weights; `scores` is task -> split -> `trainer.evaluation.scores`.

    `data` is task -> snapshots, recipe and window counts, as plain data.
    """

    config: AdaptConfig
    run_dir: Path
    model: TaskModel
    tasks: dict[str, Task]
    data: dict[str, dict[str, Any]]
    scores: dict[str, dict[str, Any]]
    kept_step: int
    seconds: float

    def adapters(self) -> MultiTaskModel:
        """The model, if it is a base with adapters: what can be written as a bundle.

        Raises:
            ConfigError: Another method, which changes the base or has none.
        """
        if not isinstance(self.model, MultiTaskModel):
            raise ConfigError(
                f"method: {self.config.method} of {self.run_dir} makes no bundle: a bundle is a frozen base with an "
                f"adapter per task, and this run has none; its weights are in {TRAINED_FILE}; adapt with method=lora"
            )
        return self.model


def adapt(config: AdaptConfig, *, report: Report | None = None, update: type[Update] = Update) -> AdaptResult:
    """Adapters and heads of all tasks of a run, trained or, if the run is finished already, read back.

    The same command continues an interrupted run from its newest sound checkpoint. Under torchrun or Ray Train every
    rank calls it with the same configuration.

    Args:
        config: The run.
        report: Called on the first rank with every row that goes to `metrics.jsonl`.
        update: What makes new weights of losses: `adapters.zero.ZeroUpdate` for `zero_stage` 1 and 2.

    Raises:
        ConfigError: A task without training windows, or a run folder of another configuration or in use.
        KeyboardInterrupt: SIGINT, SIGTERM or the file `STOP` in the run folder asked for a stop; the step in progress
            was finished and saved.
    """
    torch.set_num_threads(config.threads)
    device = find_device(config)
    data = load_data(config)
    outputs = {name: len(item.task.labels) for name, item in data.items()}
    model = build_task_model(config, load_encoder(Path(config.encoder)), outputs)
    result = train_tasks(config, model.to(device), data, report=report, update=update)
    return AdaptResult(
        config=config,
        run_dir=Path(config.run_dir),
        model=model.cpu().eval(),
        tasks={name: item.task for name, item in data.items()},
        data=result["data"],
        scores=result["scores"],
        kept_step=result["kept_step"],
        seconds=result["seconds"],
    )


def find_device(config: Running) -> torch.device:
    """Device of this process, which joins its process group first if it is a rank of one.

    Raises:
        ConfigError: A GPU is asked for and there is none, or ZeRO is asked to leave one alone.
    """
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ConfigError("device: cuda, and torch finds no GPU on this machine; set device to auto or cpu")
    if config.device == "cpu" and has_gpu and config.zero_stage:
        raise ConfigError(
            f"device: cpu with zero_stage {config.zero_stage}: DeepSpeed takes a GPU where there is one; hide it with "
            "CUDA_VISIBLE_DEVICES= or set zero_stage to 0"
        )
    is_gpu = has_gpu and config.device != "cpu"
    if is_launched():
        join_group("nccl" if is_gpu else "gloo", timeout_s=config.collective_timeout_s)
    return torch.device("cuda", torch.cuda.current_device()) if is_gpu else torch.device("cpu")


def train_tasks(
    config: RunConfig,
    model: TaskModel,
    data: dict[str, TaskData],
    *,
    report: Report | None,
    update: type[Update] = Update,
) -> dict[str, Any]:
    """The content of `result.json`: the model trained and scored or, if the run is finished already, read back."""
    began = time.monotonic()
    folder = open_folder(config, identity=_identity(config, data))
    with explained_timeouts(config.collective_timeout_s), _closing_cache(data):
        found = run_on_rank_zero(folder.read_result)
        if found is None:
            with folder.held():
                # It may have been finished by whoever held the folder until now, or on another machine.
                found = run_on_rank_zero(lambda: folder.fetch_result(config))
                if found is None:
                    start = folder.begin(config)
                    kept_step = _train(config, model, data, start=start, report=report, update=update)
                    return _finish(config, model, data, start=start, kept_step=kept_step, began=began)
    result, tensors = found
    put_trainable(model, tensors, where=str(folder.path / TRAINED_FILE))
    logger.info("%s: finished before; nothing to do", folder.path)
    return result


def load_data(config: TaskTraining) -> dict[str, TaskData]:
    """Labelled windows of every task of a run, by the task's id."""
    sources = [SnapshotSource(path=path) for run in config.tasks for path in run.snapshots]
    cache = open_cache(config.cache, sources)
    data: dict[str, TaskData] = {}
    for run in config.tasks:
        task = load_task(run.task)
        if task.id in data:
            raise ConfigError(f"tasks: {task.id} stands twice; a run learns a task once")
        data[task.id] = load_task_data(task, run, cache=cache)
    return data


def _identity(config: RunConfig, data: dict[str, TaskData]) -> dict[str, Any]:
    """Everything that decides the trained numbers, plain data by dotted key."""
    tasks = {
        name: {
            **item.task.model_dump(mode="json"),
            "batch": item.batch,
            "snapshots": [snapshot.digest for snapshot in item.snapshots],
        }
        for name, item in data.items()
    }
    own = config.model_dump(mode="json", exclude=INCIDENTAL)
    return flatten({**own, "encoder": read_card(config.encoder).sha256, "tasks": tasks})


@contextmanager
def _closing_cache(data: Mapping[str, TaskData]) -> Iterator[None]:
    """Let go of the shards of an object store at the end."""
    try:
        yield
    finally:
        for item in data.values():
            if item.cache is not None:
                item.cache.close()


def share_out(config: TaskTraining, data: Mapping[str, TaskData]) -> dict[str, Share]:
    """Each task's part of every step of a run."""
    return shares(
        {name: item.task for name, item in data.items()},
        windows={name: len(item.splits["train"]) for name, item in data.items()},
        batches={name: item.batch for name, item in data.items()},
        sampling=config.sampling,
    )


def _train(
    config: RunConfig,
    model: TaskModel,
    data: dict[str, TaskData],
    *,
    start: Start,
    report: Report | None,
    update: type[Update],
) -> int:
    """Train to the last step, put the kept weights in place and return their step."""
    run_dir = start.folder.path
    parts = share_out(config, data)
    updater = update(config, model, num_tasks=len(data))
    progress, best = _resume(start.saved, model, updater)
    rows = Rows(run_dir, after=progress.step, report=report, is_active=rank() == 0)
    with ExitStack() as stack:
        stopper = stack.enter_context(Stopper(run_dir))
        batches = {
            name: stack.enter_context(
                closing(labelled_batches(item, parts[name], seed=config.seed, start=progress.step))
            )
            for name, item in data.items()
        }
        while progress.step < config.steps:
            losses, norm = train_step(config, updater, batches, parts, step=progress.step)
            progress.step += 1
            _note_skipped(progress, norm)
            is_last = progress.step == config.steps
            rows.count(sum(part.batch for part in parts.values()))
            if progress.step % config.log_every == 0 or is_last:
                _log(rows, progress, steps=config.steps, losses=losses, norm=norm, parts=parts)
            if progress.step % config.eval_every == 0:
                with rows.paused():
                    scores = evaluate(model, data, split="val", limit=config.eval_windows, has_intervals=False)
                rows.write({"step": progress.step, "split": "val", "scores": _values(scores)})
                best = _keep_better(model, best, progress, mean_primary(scores, data))
            is_asked, _ = stopper.poll()
            if progress.step % config.checkpoint_every == 0 or is_last or is_asked:
                _save(start, model, updater, progress=progress, best=best)
            if is_asked and not is_last:
                logger.warning("stopped after step %d; the same command goes on from here", progress.step)
                raise KeyboardInterrupt
    if config.keep == "best" and best:
        put_trainable(model, best, where="best weights")
        return progress.best_step
    return progress.step


def train_step(
    config: RunConfig,
    update: Update,
    batches: Mapping[str, Iterator[LabelledBatch]],
    parts: Mapping[str, Share],
    *,
    step: int,
) -> tuple[dict[str, torch.Tensor], float]:
    """One optimizer step over all tasks: this rank's part of each task's loss, and the gradient's norm before clipping.

    The losses of all ranks add up to the mean over a task's windows, before it is weighted.
    """
    model = update.model
    model.train()
    update.begin(step)
    taken = {name: next(stream) for name, stream in batches.items()}
    counts = [loss_weight(item.task, item.target) if item.is_counted else 0.0 for item in taken.values()]
    totals = sum_over_ranks(torch.tensor(counts, dtype=torch.float64, device=model.device)).tolist()
    losses: dict[str, torch.Tensor] = {}
    for (name, item), total in zip(taken.items(), totals, strict=True):
        torch.manual_seed(_step_seed(config.seed, step, name))
        logits_BK = update.forward(name, item.batch.to(model.device))
        loss = summed_loss(item.task, logits_BK, item.target.to(model.device)) * (float(item.is_counted) / total)
        update.backward(loss * parts[name].weight)
        losses[name] = loss.detach()
    return losses, update.finish()


def _step_seed(seed: int, step: int, name: str) -> int:
    """Seed of dropout, the same for a resumed run. Each rank has its own, lest their windows lose the same units."""
    return stable_hash(seed, step, name) if rank() == 0 else stable_hash(seed, step, name, rank())


def _resume(saved: Checkpoint | None, model: TaskModel, update: Update) -> tuple[Progress, dict[str, torch.Tensor]]:
    """Progress and best weights of a checkpoint, weights and moments put in place; a fresh state without one."""
    if saved is None:
        return Progress(), {}
    put_trainable(model, saved.weights, where=f"checkpoint of step {saved.progress.step}")
    update.restore(saved.moments)
    logger.info("going on after step %d", saved.progress.step)
    return replace(saved.progress), saved.best


def _save(start: Start, model: TaskModel, update: Update, *, progress: Progress, best: dict[str, torch.Tensor]) -> None:
    """Write a checkpoint. A collective."""
    moments = update.moments()
    run_on_rank_zero(
        lambda: start.save(Checkpoint(progress=progress, weights=copy_trainable(model), best=best, moments=moments))
    )


def _note_skipped(progress: Progress, norm: float) -> None:
    """Count a step that changed nothing, for its gradient was not finite.

    Raises:
        ConfigError: There were too many.
    """
    if math.isfinite(norm):
        return
    progress.skipped += 1
    logger.warning("step %d: the gradient is %s; the step is not taken", progress.step, norm)
    if progress.skipped > MAX_SKIPPED:
        raise ConfigError(
            f"step {progress.step}: the gradient is {norm}, and {MAX_SKIPPED} such steps are allowed; look at the loss "
            "of each task in metrics.jsonl, lower the learning rates and start in another run_dir"
        )


def _log(
    rows: Rows,
    progress: Progress,
    *,
    steps: int,
    losses: Mapping[str, torch.Tensor],
    norm: float,
    parts: Mapping[str, Share],
) -> None:
    """Write a training row, with each task's mean loss over all ranks. A collective."""
    means = sum_over_ranks(torch.stack(list(losses.values()))).tolist()
    row = {
        "step": progress.step,
        "split": "train",
        "loss": dict(zip(losses, means, strict=True)),
        "grad_norm": norm,
        "epochs": {name: round(progress.step * part.batch / part.epoch, 4) for name, part in parts.items()},
        "skipped": progress.skipped,
    }
    rows.write_timed(row, steps=steps)


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
    start: Start,
    kept_step: int,
    began: float,
) -> dict[str, Any]:
    """Score the kept weights and write them; `result.json`, written last, marks the run as finished."""
    by_split = {split: evaluate(model, data, split=split, limit=config.eval_windows) for split in ("val", "test")}
    card = read_card(config.encoder)
    result = {
        "kept_step": kept_step,
        "seconds": round(time.monotonic() - began, 1),
        "scores": {name: {split: by_split[split].get(name) for split in by_split} for name in data},
        "data": {
            name: {**describe_data(item), "pretrain_seen": seen_in_pretraining(card, item)}
            for name, item in data.items()
        },
    }

    return run_on_rank_zero(lambda: start.write_result(result, copy_trainable(model)))


def _values(scores: dict[str, dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    return {
        name: {metric: entry["value"] for metric, entry in item["metrics"].items()} for name, item in scores.items()
    }
