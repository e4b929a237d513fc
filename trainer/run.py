"""What a pretraining run holds between two steps, and what happens every n steps: log, evaluate, save, export."""

import hashlib
import logging
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manifests.channels import UCS_VERSION, table_digest
from manifests.errors import ConfigError
from manifests.shards import load_snapshot
from trainer.batches import row_rate_hz
from trainer.checkpoint import (
    Progress,
    collect_garbage,
    find_checkpoint,
    load_checkpoint,
    read_weights,
    save_checkpoint,
)
from trainer.collectives import rank, world_size
from trainer.config import PretrainConfig, order_digest, run_digest
from trainer.data import Address, Order, Stream, load_streams, order_state, part_sizes, resume_order
from trainer.evaluate import retrieval_top1
from trainer.export import read_card, save_encoder
from trainer.meter import Meter
from trainer.metrics_writer import MetricsWriter
from trainer.models.build import build_encoder
from trainer.objectives.build import build_objective
from trainer.paths import CHECKPOINT_FOLDER, ENCODER_FOLDER, SKIPPED_FILE, read_skipped, write_skipped
from trainer.read import SnapshotReader, Window
from trainer.run_folder import PretrainResult
from trainer.watchdog import Watchdog
from trainer.zero import initialise

logger = logging.getLogger(__name__)

Report = Callable[[dict[str, float]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """What this rank takes in one optimizer step.

    Attributes:
        parts: Collated micro-batches.
        signal_s: Recorded time of the windows.
        flops: Floating-point operations of a forward and backward pass, 0 where nobody asks.
    """

    parts: list[Any]
    signal_s: float
    flops: float


class Run:
    """What a run holds between two steps, and the things that happen every n steps."""

    def __init__(self, config: PretrainConfig, streams: Sequence[Stream], *, watchdog: Watchdog, attempt: int) -> None:
        self.config = config
        self.run_dir = Path(config.run_dir).absolute()
        self.checkpoints = self.run_dir / CHECKPOINT_FOLDER
        self.watchdog = watchdog
        self.attempt = attempt
        torch.manual_seed(config.seed)
        self.objective = build_objective(build_encoder(config.encoder), config.objective)
        self.model = initialise(self.objective, config)
        self.order = Order(streams, seed=config.seed, global_batch=config.global_batch)
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
        self.meter = Meter(global_batch=config.global_batch, device=self.model.device)
        if rank() == 0 and (skipped := read_skipped(self.run_dir)):
            write_skipped(self.run_dir, [row for row in skipped if row["step"] <= self.progress.step])

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

    def batches(self) -> Generator[StepBatch, None, None]:
        """Endless batches, one for each optimizer step, collated ahead in the reader's threads."""
        sizes = part_sizes(self.config.global_batch, self.config.gradient_accumulation, rank=rank(), world=world_size())

        def collate(_: int, windows: Sequence[Window]) -> StepBatch:
            ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
            parts = [
                self.objective.collate(windows[end - size : end], seed=self.config.seed)
                for size, end in zip(sizes, ends, strict=True)
            ]
            return StepBatch(parts=parts, signal_s=sum(map(_signal_s, windows)), flops=0.0)

        return self.reader.stream(
            self.order,
            collate,
            start_batch=self.progress.data.batches_committed,
            rank=rank(),
            world=world_size(),
            num_parts=self.config.gradient_accumulation,
        )

    def advance(
        self,
        metrics: dict[str, torch.Tensor],
        norm: float | None,
        *,
        batch: StepBatch,
        seconds: float,
        data_s: float,
    ) -> None:
        """Count a step that was done.

        Args:
            metrics: Of the step, means over all ranks.
            norm: Norm of its gradient over all ranks.
            batch: What it was done with.
            seconds: Time it took.
            data_s: Part of it spent waiting for the batch.

        Raises:
            ConfigError: It changed nothing, for loss or gradient is not finite, and so did too many before it.
        """
        step = self.progress.step + 1
        loss = float(metrics["loss"])
        is_skipped = not (math.isfinite(loss) and (norm is None or math.isfinite(norm)))
        if is_skipped:
            self._note_skipped(step, loss, norm)
        elif (sigma := self.meter.spike(loss)) is not None and rank() == 0:
            logger.warning("step %d: the loss jumped to %.4f, %.0f sigma above the last steps", step, loss, sigma)
        self.progress = Progress(
            step=step,
            windows=self.progress.windows + self.config.global_batch,
            seconds=self.progress.seconds + seconds,
            loss=self.progress.loss if is_skipped else loss,
            data=order_state(self.order, config_digest=order_digest(self.config), batches_committed=step),
            skipped=self.progress.skipped + is_skipped,
        )
        self.meter.add(seconds=seconds, data_s=data_s, signal_s=batch.signal_s, flops=batch.flops)
        self.watchdog.mark("training", step)

    def _note_skipped(self, step: int, loss: float, norm: float | None) -> None:
        """Write the batch of a step that was not taken to `skipped.jsonl`; the same on all ranks."""
        path = self.run_dir / SKIPPED_FILE
        if rank() == 0:
            keys = [str(self.order.streams[item.stream].keys[item.row]) for item in self.order.batch(step - 1)]
            row = {"step": step, "loss": str(loss), "grad_norm": str(norm), "keys": keys}
            write_skipped(self.run_dir, [*read_skipped(self.run_dir), row])
            logger.warning(
                "step %d: loss %s, gradient norm %s; the step is not taken, its samples are in %s",
                *(step, loss, norm, path),
            )
        if self.progress.skipped >= self.config.faults.max_skipped:
            raise ConfigError(
                f"step {step}: the loss is {loss}, the gradient norm {norm}, and faults.max_skipped allows "
                f"{self.config.faults.max_skipped} such steps; their samples are in {path}. Look at them, then raise "
                f"faults.max_skipped to go on from {self.saved or 'the beginning'}, or start another run_dir with a "
                "lower optimizer.lr or with gradient_clipping"
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
        """Write the row of the step that was just done. A collective."""
        values: dict[str, float | None] = {"loss": self.progress.loss, "lr": lr, "grad_norm": grad_norm}
        values |= {name: float(value) for name, value in metrics.items() if name != "loss"}
        values |= self._fresh_evaluation
        values |= self.meter.row(replaced=len(self.reader.replaced))
        values["skipped"] = self.progress.skipped
        values["seconds"] = self.progress.seconds
        values["goodput"] = self.progress.seconds / max(self.watchdog.lived_s(), 1e-9)
        self.metrics.write(self.progress.step, values)
        self._fresh_evaluation = {}

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
        """Close files."""
        self.metrics.close()
        self.reader.close()

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


def _signal_s(window: Window) -> float:
    """Recorded time of a window, s: that of its longest kind."""
    return max(
        (array.shape[1] / row_rate_hz(window.meta["ucs"][kind][0]) for kind, array in window.arrays.items()),
        default=0.0,
    )


def _exported_step(folder: Path) -> int | None:
    return read_card(folder).step if folder.exists() else None
