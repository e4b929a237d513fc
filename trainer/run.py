"""What a pretraining run holds between two steps, and what happens every n steps: log, evaluate, save, export."""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import torch

from manifests.channels import UCS_VERSION, table_digest
from manifests.errors import ConfigError
from manifests.shards import load_snapshot
from trainer.checkpoint import (
    Progress,
    collect_garbage,
    find_checkpoint,
    load_checkpoint,
    next_attempt,
    read_weights,
    save_checkpoint,
)
from trainer.collectives import rank, sum_over_ranks, world_size
from trainer.config import PretrainConfig, order_digest, run_digest
from trainer.data import Address, Order, load_streams, order_state, part_sizes, resume_order
from trainer.evaluate import retrieval_top1
from trainer.export import read_card, save_encoder
from trainer.metrics import MetricsWriter
from trainer.models.build import build_encoder
from trainer.objectives.build import build_objective
from trainer.read import SnapshotReader, Window
from trainer.run_folder import CHECKPOINT_FOLDER, ENCODER_FOLDER, PretrainResult, check_run, open_run
from trainer.zero import initialise

logger = logging.getLogger(__name__)

Report = Callable[[dict[str, float]], None]


class Run:
    """What a run holds between two steps, and the things that happen every n steps."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self.run_dir = Path(config.run_dir).absolute()
        self.checkpoints = self.run_dir / CHECKPOINT_FOLDER
        streams = check_run(config)
        self._lock = open_run(self.run_dir, config)
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


def _exported_step(folder: Path) -> int | None:
    return read_card(folder).step if folder.exists() else None
