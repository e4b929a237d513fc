"""One pretraining run: batch → loss → backward → step → every n steps log, evaluate, save.

Plain Python: a single process, torchrun and Ray Train call the same `pretrain`. Every random draw is a function of
(seed, step, rank) or of (seed, epoch, sample), so a run that was stopped and started again computes the same
numbers bit for bit (same world size, CPU, fp32).
"""

import hashlib
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch

from manifests.channels import UCS_VERSION, table_digest
from manifests.config import read_yaml, start_run
from manifests.errors import ConfigError
from manifests.shards import load_snapshot
from trainer.checkpoint import (
    Progress,
    collect_garbage,
    find_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    next_attempt,
    read_weights,
    save_checkpoint,
)
from trainer.collectives import rank, sum_over_ranks, world_size
from trainer.config import PretrainConfig, differing_keys, order_digest, run_digest
from trainer.data import Address, Order, Stream, load_streams, order_state, part_sizes, resume_order
from trainer.evaluate import retrieval_top1
from trainer.export import read_card, save_encoder
from trainer.lock import hold
from trainer.metrics import MetricsWriter, read_metrics
from trainer.models.build import build_encoder
from trainer.objectives.build import build_objective
from trainer.read import SnapshotReader, Window
from trainer.zero import initialise, join_processes, learning_rate, set_learning_rate, train_step

logger = logging.getLogger(__name__)

CHECKPOINT_FOLDER = "checkpoints"
ENCODER_FOLDER = "encoder"
LOCK_FILE = "train.lock"
LOCK_PATIENCE_S = 30.0  # Ray may still be ending the workers of the last attempt
STOP_FILE = "STOP"  # made by anyone, stops the run after the current step as SIGTERM does

Report = Callable[[dict[str, float]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainResult:
    """Where a run ended.

    Attributes:
        step: Optimizer steps done.
        is_finished: All steps of the configuration are done; otherwise the same command goes on.
        loss: Loss of the last step over all ranks, None if no step was ever done.
        checkpoint: Newest checkpoint.
        encoder: Folder of the exported encoder.
        evaluation: Held-out retrieval of the last evaluation of this start, empty if there was none.
    """

    step: int
    is_finished: bool
    loss: float | None
    checkpoint: Path | None
    encoder: Path
    evaluation: dict[str, float]


def pretrain(config: PretrainConfig, *, report: Report | None = None) -> PretrainResult:
    """Train until `config.steps`, from the newest valid checkpoint in `config.run_dir` if there is one.

    Args:
        config: The run. All ranks get the same.
        report: Called on every rank after each checkpoint, with step and loss.

    Raises:
        ConfigError: A value cannot be used, or `run_dir` holds a run with another configuration.
        ContractError: A snapshot or a checkpoint breaks its contract.
    """
    join_processes(config.backend)
    run = _Run(config)
    batches = run.batches()
    try:
        with _Stopper(run.run_dir) as stopper:
            for step in range(run.progress.step, config.steps):
                began = time.monotonic()
                lr = learning_rate(step, config.optimizer, steps=config.steps)
                set_learning_rate(run.model, lr)
                torch.manual_seed(_step_seed(config.seed, step))
                metrics, norm = train_step(run.model, next(batches))
                run.advance(metrics, seconds=time.monotonic() - began)
                is_stopping = stopper.is_asked() or run.progress.step == config.stop_at
                is_last = is_stopping or run.progress.step == config.steps
                if run.is_due(config.eval_every) or run.progress.step == config.steps:
                    run.evaluate()
                if is_last or run.is_due(config.log_every) or run.is_due(config.eval_every):
                    run.log(metrics, lr=lr, grad_norm=norm)
                if is_last or run.is_due(config.save_every):
                    run.save(report)
                if is_stopping:
                    logger.info("stopped after step %d; the same command goes on from here", run.progress.step)
                    break
    finally:
        batches.close()
        run.close()
    return run.result()


class _Run:
    """What a run holds between two steps, and the things that happen every n steps."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self.run_dir = Path(config.run_dir).absolute()
        self.checkpoints = self.run_dir / CHECKPOINT_FOLDER
        streams = check_run(config)
        self._lock = _open_run(self.run_dir, config)
        torch.manual_seed(config.seed)
        self.objective = build_objective(build_encoder(config.encoder), config.objective)
        self.model = initialise(self.objective, config)
        self.order = Order(streams, seed=config.seed, global_batch=config.global_batch)
        self.attempt = next_attempt(self.checkpoints)
        self.saved = find_checkpoint(self.checkpoints)
        self.progress = self._resume()
        self.reader = SnapshotReader(
            streams,
            max_replaced=config.max_replaced,
            num_threads=config.read_threads,
            prefetch=config.prefetch,
        )
        self.metrics = MetricsWriter(self.run_dir, step=self.progress.step, steps=config.steps, is_active=rank() == 0)
        self.evaluation: dict[str, float] = {}
        self._fresh_evaluation: dict[str, float] = {}
        self._held_out: list[Window] | None = None
        self._since = (self.progress.step, time.monotonic())

    def _resume(self) -> Progress:
        if self.saved is None:
            data = order_state(self.order, config_digest=order_digest(self.config), batches_committed=0)
            return Progress(step=0, windows=0, seconds=0.0, loss=None, data=data)
        progress = load_checkpoint(self.saved, self.model)
        self.order = resume_order(self.order, progress.data, config_digest=order_digest(self.config))
        logger.info("going on from %s", self.saved)
        if rank() == 0 and _exported_step(self.run_dir / ENCODER_FOLDER) != progress.step:
            self._export()  # the run died between the checkpoint and its export
        return progress

    def batches(self) -> Generator[list[Any], None, None]:
        """Endless micro-batches of each optimizer step, collated ahead in the reader's threads."""
        sizes = part_sizes(self.config.global_batch, self.config.gradient_accumulation, rank=rank(), world=world_size())

        def collate(_: int, windows: Sequence[Window]) -> list[Any]:
            ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
            return [
                self.objective.collate(windows[end - size : end], seed=self.config.seed)
                for size, end in zip(sizes, ends, strict=True)
            ]

        return self.reader.stream(
            self.order,
            collate,
            start_batch=self.progress.data.batches_committed,
            rank=rank(),
            world=world_size(),
            num_parts=self.config.gradient_accumulation,
        )

    def advance(self, metrics: dict[str, torch.Tensor], *, seconds: float) -> None:
        """Count a step that was done.

        Raises:
            ConfigError: The loss is not a number; the last checkpoint stays as it was.
        """
        step = self.progress.step + 1
        loss = float(metrics["loss"])  # the objective's mean over all ranks
        if not math.isfinite(loss):
            raise ConfigError(
                f"step {step}: the loss is {loss}; lower optimizer.lr or set gradient_clipping, "
                f"then start again: the run goes on from {self.saved or 'the beginning'}"
            )
        self.progress = Progress(
            step=step,
            windows=self.progress.windows + self.config.global_batch,
            seconds=self.progress.seconds + seconds,
            loss=loss,
            data=order_state(self.order, config_digest=order_digest(self.config), batches_committed=step),
        )

    def is_due(self, every: int | None) -> bool:
        """Whether something that happens every so many steps happens now."""
        return every is not None and self.progress.step % every == 0

    def evaluate(self) -> None:
        """Retrieval among the held-out windows. Under ZeRO-3 the weights are gathered, so every rank takes part."""
        settings = self.config.evaluation
        if settings is None or (rank() != 0 and self.config.zero_stage < 3):
            return
        if self._held_out is None:
            self._held_out = held_out_windows(self.config)
        values = retrieval_top1(self.objective, self._held_out, device=self.model.device)
        self.evaluation = self._fresh_evaluation = {f"eval_{name}": value for name, value in values.items()}

    def log(self, metrics: dict[str, torch.Tensor], *, lr: float, grad_norm: float | None) -> None:
        """Write the row of the step that was just done."""
        step, now = self.progress.step, time.monotonic()
        steps, seconds = step - self._since[0], now - self._since[1]
        values: dict[str, float | None] = {"loss": self.progress.loss, "lr": lr, "grad_norm": grad_norm}
        values |= {name: float(value) for name, value in metrics.items() if name != "loss"}
        values |= self._fresh_evaluation
        values["seconds"] = self.progress.seconds
        values["replaced"] = self._count_replaced()
        self.metrics.write(
            step,
            values,
            windows_per_s=steps * self.config.global_batch / max(seconds, 1e-9),
            seconds=seconds / max(steps, 1),
        )
        self._fresh_evaluation = {}
        self._since = (step, now)

    def _count_replaced(self) -> float:
        """Samples that could not be read since this start, over all ranks; another took the place of each."""
        count = torch.tensor([float(len(self.reader.replaced))], device=self.model.device)
        return float(sum_over_ranks(count).item())

    def save(self, report: Report | None) -> None:
        """Commit a checkpoint, export the encoder, delete old checkpoints."""
        self.saved = save_checkpoint(
            self.checkpoints,
            self.model,
            progress=self.progress,
            attempt=self.attempt,
            extra={
                "config": self.config.model_dump(mode="json"),
                "run_digest": run_digest(self.config),
                "ucs": {"version": UCS_VERSION, "digest": table_digest()},
            },
        )
        if rank() == 0:
            self._export()
            collect_garbage(self.checkpoints, keep=self.config.keep, attempt=self.attempt)
        if report is not None:
            report({"step": float(self.progress.step), "loss": self.progress.loss or 0.0})

    def _export(self) -> None:
        """Encoder of the newest checkpoint, read from its files: no collective, whatever the ZeRO stage."""
        if self.saved is None:
            return
        snapshots = [load_snapshot(source.path) for source in self.config.snapshots]
        save_encoder(
            self.run_dir / ENCODER_FOLDER,
            self.objective.encoder,
            state=read_weights(self.saved, prefix="encoder."),
            recipes={str(snapshot.recipe["id"]): snapshot.recipe for snapshot in snapshots},
            step=int(self.saved.name[5:14]),
        )

    def close(self) -> None:
        """Close files and give the folder free."""
        self.metrics.close()
        self.reader.close()
        if self._lock is not None:
            self._lock.close()

    def result(self) -> PretrainResult:
        """Where the run stands now."""
        return PretrainResult(
            step=self.progress.step,
            is_finished=self.progress.step >= self.config.steps,
            loss=self.progress.loss,
            checkpoint=self.saved,
            encoder=self.run_dir / ENCODER_FOLDER,
            evaluation={name.removeprefix("eval_"): value for name, value in self.evaluation.items()},
        )


def held_out_windows(config: PretrainConfig) -> list[Window]:
    """The windows that `config.evaluation` retrieves among: those with the smallest hash of their key."""
    settings = config.evaluation
    if settings is None:
        return []
    streams = load_streams(config.snapshots, split=settings.split, keep=config.filter)
    rows = [
        (hashlib.sha256(str(key).encode()).digest(), Address(stream=s, position=row, epoch=0, row=row))
        for s, stream in enumerate(streams)
        for row, key in enumerate(stream.keys)
    ]
    chosen = sorted(rows, key=lambda item: item[0])[: settings.num_windows]
    reader = SnapshotReader(streams, max_replaced=config.max_replaced)
    try:
        order = Order(streams, seed=0, global_batch=len(streams))
        return reader.read([address for _, address in chosen], order=order)
    finally:
        reader.close()


def check_run(config: PretrainConfig) -> list[Stream]:
    """Streams that a run trains on, if nothing that can be seen beforehand is wrong. Not a collective.

    Raises:
        ConfigError: `run_dir` holds a run with another configuration, or no sample passes the filter.
        ContractError: A snapshot breaks its contract.
    """
    earlier = Path(config.run_dir) / "config.yaml"
    if earlier.exists() and (keys := differing_keys(config, read_yaml(earlier))):
        raise ConfigError(
            f"{config.run_dir}: holds a run with another configuration ({'; '.join(keys)}); "
            "set these keys back, or give another run_dir"
        )
    if config.evaluation is not None:
        load_streams(config.snapshots, split=config.evaluation.split, keep=config.filter)
    return load_streams(config.snapshots, split=config.split, keep=config.filter)


def read_result(config: PretrainConfig) -> PretrainResult:
    """Where a run stands according to its folder, for a process that did not train."""
    run_dir = Path(config.run_dir).absolute()
    rows = read_metrics(run_dir)
    evaluations = [
        {name.removeprefix("eval_"): value for name, value in row.items() if name.startswith("eval_")} for row in rows
    ]
    step = rows[-1]["step"] if rows else 0
    return PretrainResult(
        step=step,
        is_finished=step >= config.steps,
        loss=rows[-1]["loss"] if rows else None,
        checkpoint=newest_checkpoint(run_dir / CHECKPOINT_FOLDER),
        encoder=run_dir / ENCODER_FOLDER,
        evaluation=next((values for values in reversed(evaluations) if values), {}),
    )


def _open_run(run_dir: Path, config: PretrainConfig) -> TextIO | None:
    """Take the folder and write the run's header; the lock is rank 0's."""
    lock, refusal = None, ""
    if rank() == 0:
        try:
            lock = hold(run_dir / LOCK_FILE, patience_s=LOCK_PATIENCE_S)
        except ConfigError as error:
            refusal = str(error)
    # All ranks have looked before rank 0 writes, and all of them end if it may not.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if sum_over_ranks(torch.tensor([float(bool(refusal))], device=device)).item() > 0:
        raise ConfigError(refusal or f"{run_dir}: another run is training here")
    if rank() == 0:
        start_run(run_dir, config)
    return lock


def _exported_step(folder: Path) -> int | None:
    return read_card(folder).step if folder.exists() else None


def _step_seed(seed: int, step: int) -> int:
    """Seed of torch's generator for a step on this rank (dropout and the like), under 2^63."""
    text = f"{seed}:{step}:{rank()}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


class _Stopper:
    """Turns SIGINT, SIGTERM and the stop file into a stop that all ranks make after the same step."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / STOP_FILE
        self._is_asked = False
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_Stopper":
        if threading.current_thread() is threading.main_thread():  # Ray calls from another and has its own way
            for number in (signal.SIGINT, signal.SIGTERM):
                self._earlier[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        logger.warning("%s: stopping after this step", signal.Signals(number).name)
        self._is_asked = True

    def is_asked(self) -> bool:
        """Whether any rank was asked to stop. A collective."""
        if rank() == 0 and self._file.exists():
            self._file.unlink()
            self._is_asked = True
        if world_size() == 1:
            return self._is_asked
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        return bool(sum_over_ranks(torch.tensor([float(self._is_asked)], device=device)).item() > 0)
