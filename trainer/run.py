"""What a pretraining run holds between two steps, and what happens every n steps: log, evaluate, save, export."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from manifests.channels import UCS_VERSION, table_digest
from manifests.errors import ConfigError
from trainer.cache import open_cache
from trainer.checkpoint import Progress, load_checkpoint, read_meta, read_weights
from trainer.checkpoint_store import collect_garbage, find_checkpoint, step_of
from trainer.collectives import rank, world_size
from trainer.config import PretrainConfig, differing_keys, order_digest, run_digest
from trainer.data import Address, Order, check_state, mixed_order, order_state, part_sizes
from trainer.evaluate import retrieval_top1
from trainer.export import read_card, save_encoder
from trainer.filters import lowest
from trainer.lock import Fence
from trainer.meter import Meter
from trainer.metrics_writer import MetricsWriter
from trainer.mirror import fetch, send
from trainer.models.build import build_encoder
from trainer.models.flops import training_flops
from trainer.objectives.build import build_objective
from trainer.paths import ENCODER_FOLDER, SKIPPED_FILE, read_skipped, write_skipped
from trainer.pretrained_on import PretrainedOn, read_pretrained_on
from trainer.read import SnapshotReader, Window
from trainer.run_folder import PretrainResult, checkpoint_folder
from trainer.samples import Stream, load_streams, open_snapshot
from trainer.saver import Saver
from trainer.storage import answering
from trainer.watchdog import Watchdog
from trainer.zero import as_carried_out, initialise

logger = logging.getLogger(__name__)

Report = Callable[[dict[str, float]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """What this rank takes in one optimizer step.

    Attributes:
        parts: Collated micro-batches.
        signal_s: Recorded time of the windows or crops, s.
        flops: Floating-point operations of a forward and backward pass, 0 where the device's peak is not known.
    """

    parts: list[Any]
    signal_s: float
    flops: float


class Run:
    """What a run holds between two steps, and the things that happen every n steps."""

    def __init__(self, config: PretrainConfig, streams: Sequence[Stream], *, watchdog: Watchdog, fence: Fence) -> None:
        self.config = config
        self._order_digest = order_digest(config)
        self.run_dir = Path(config.run_dir).absolute()
        self.checkpoints = checkpoint_folder(config)
        self._store = self.checkpoints.parent
        self.watchdog = watchdog
        self.fence = fence
        torch.manual_seed(config.seed)
        self.objective = build_objective(build_encoder(config.encoder), config.objective)
        self.model = initialise(self.objective, as_carried_out(config))
        self.order = mixed_order(
            streams,
            seed=config.seed,
            global_batch=config.global_batch,
            weights=config.weights,
            curriculum=config.curriculum,
            block_samples=config.block_samples,
        )
        snapshots = [open_snapshot(source.path) for source in config.snapshots]
        self.recipes = {str(snapshot.recipe["id"]): snapshot.recipe for snapshot in snapshots}
        self.saver = Saver(
            self.checkpoints,
            fence=fence,
            is_async=config.save == "async",
            on_commit=self._after_commit,
            timeout_s=config.collective_timeout_s,
        )
        self.saved = find_checkpoint(self.checkpoints)
        self.progress = self._resume()
        self.cache = open_cache(config.cache, config.snapshots)
        self.reader = SnapshotReader(
            streams,
            locate=None if self.cache is None else self.cache.locate,
            max_replaced=config.max_replaced,
            num_threads=config.read_threads,
            prefetch=config.prefetch,
        )
        if rank() == 0 and self._store != self.run_dir and self.saved is not None:
            with answering(self._store):
                fetch(self.run_dir, self._store)
        self.metrics = MetricsWriter(self.run_dir, step=self.progress.step, steps=config.steps, is_active=rank() == 0)
        self.evaluation: dict[str, float] = {}
        self._fresh_evaluation: dict[str, float] = {}
        self._evaluated_at: int | None = None
        self._held_out: list[Window] | None = None
        self.meter = Meter(global_batch=config.global_batch, device=self.model.device)
        if rank() == 0 and (skipped := read_skipped(self.run_dir)):
            write_skipped(self.run_dir, [row for row in skipped if row["step"] <= self.progress.step])

    def _resume(self) -> Progress:
        if self.saved is None:
            data = order_state(self.order, config_digest=self._order_digest, batches_committed=0)
            return Progress(step=0, windows=0, seconds=0.0, loss=None, data=data)
        earlier = read_meta(self.saved)["config"]
        if keys := differing_keys(self.config, earlier):
            raise ConfigError(
                f"{self.saved}: of a run with another configuration ({'; '.join(keys)}); set these keys back, or give "
                "another run_dir and storage"
            )
        progress = load_checkpoint(self.saved, self.model)
        check_state(self.order, progress.data, config_digest=self._order_digest)
        logger.info("going on from %s", self.saved)
        steps = self.config.steps
        if rank() == 0 and steps != earlier["steps"] and self.config.optimizer.schedule != "constant":
            logger.warning(
                "steps: was %d, is %d; from here on the learning rate is that of a run of %d steps, so the whole is "
                "another run than one of that length from its beginning",
                *(earlier["steps"], steps, steps),
            )
        if rank() == 0 and _exported_step(self.run_dir / ENCODER_FOLDER) != progress.step:
            self._export(self.saved)  # the run died between the checkpoint and its export
        return progress

    def batches(self) -> Generator[StepBatch, None, None]:
        """Endless batches, one for each optimizer step, collated ahead in the reader's threads."""
        sizes = part_sizes(self.config.global_batch, self.config.gradient_accumulation, rank=rank(), world=world_size())

        def collate(index: int, windows: Sequence[Window]) -> StepBatch:
            if self.cache is not None:
                self.cache.prefetch(self.order.upcoming_shards(index, limit=self.cache.prefetch_shards))
            ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
            parts = [
                self.objective.collate(windows[end - size : end], seed=self.config.seed)
                for size, end in zip(sizes, ends, strict=True)
            ]
            return StepBatch(
                parts=parts,
                signal_s=sum(size * _window_s(part) for size, part in zip(sizes, parts, strict=True)),
                # Host batches, in a reader's thread: it costs the step nothing.
                flops=sum(training_flops(self.objective.encoder, p) for p in parts) if self.meter.has_peak else 0.0,
            )

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
        norm: float,
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
        is_skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if is_skipped:
            self._note_skipped(step, loss, norm)
        elif (sigma := self.meter.spike(loss)) is not None and rank() == 0:
            logger.warning("step %d: the loss jumped to %.4f, %.0f sigma above the last steps", step, loss, sigma)
        self.progress = Progress(
            step=step,
            windows=self.progress.windows + self.config.global_batch,
            seconds=self.progress.seconds + seconds,
            loss=self.progress.loss if is_skipped else loss,
            data=order_state(self.order, config_digest=self._order_digest, batches_committed=step),
            skipped=self.progress.skipped + is_skipped,
        )
        self.meter.add(seconds=seconds, data_s=data_s, signal_s=batch.signal_s, flops=batch.flops)
        self.watchdog.mark("training", step)

    def _note_skipped(self, step: int, loss: float, norm: float) -> None:
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
        self.watchdog.mark("evaluating", self.progress.step)
        values = retrieval_top1(self.objective, self._held_out, device=self.model.device)
        self.watchdog.mark("training", self.progress.step)
        self._evaluated_at = self.progress.step
        self.evaluation = self._fresh_evaluation = {f"eval_{name}": value for name, value in values.items()}

    def log(self, metrics: dict[str, torch.Tensor], *, lr: float, grad_norm: float) -> None:
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

    def is_save_due(self) -> bool:
        """Whether a checkpoint is made after this step, also without a stop."""
        settings = self.config
        is_scored = settings.keep_best is not None and self.is_due(settings.eval_every)
        return self.is_due(settings.save_every) or self.is_due(settings.keep_every) or is_scored

    def save(self, report: Report | None, *, is_urgent: bool) -> None:
        """Begin a checkpoint of now; if it is urgent, or `save: sync`, wait until it is committed. A collective."""
        self.watchdog.mark("saving", self.progress.step)
        self.settle(report, wait=True)
        is_scored = self._evaluated_at == self.progress.step
        self.saver.begin(
            self.model,
            progress=self.progress,
            extra={
                "config": self.config.model_dump(mode="json"),
                "run_digest": run_digest(self.config),
                "ucs": {"version": UCS_VERSION, "digest": table_digest()},
                "recipes": self.recipes,
                "scores": _bare(self.evaluation) if is_scored else {},
            },
        )
        self.settle(report, wait=is_urgent)
        self.watchdog.mark("training", self.progress.step)

    def settle(self, report: Report | None, *, wait: bool = False) -> None:
        """Report a checkpoint that has been committed since the last time, or wait for it. A collective."""
        saved = self.saver.finished(wait=wait)
        if saved is not None:
            self.saved = saved.path
            self.watchdog.note_checkpoint(saved.path.name)
            if report is not None:
                report({"step": float(saved.progress.step), "loss": saved.progress.loss or 0.0})

    def _after_commit(self, path: Path) -> None:
        """Export the encoder and delete old checkpoints; in the thread that saves."""
        if rank() == 0:
            with answering(self.run_dir):
                self._export(path)
            settings = self.config
            if self._store != self.run_dir:
                with answering(self._store):
                    send(self.run_dir, self._store)
            collect_garbage(
                self.checkpoints,
                keep=settings.keep,
                keep_every=settings.keep_every,
                keep_best=settings.keep_best,
                attempt=self.fence.attempt,
            )

    def _export(self, path: Path) -> None:
        """Encoder of a checkpoint, read from its files: no collective, whatever the ZeRO stage."""
        save_encoder(
            self.run_dir / ENCODER_FOLDER,
            self.objective.encoder,
            state=read_weights(path, prefix="encoder."),
            recipes=self.recipes,
            step=step_of(path),
            licence=self.config.licence,
            pretrained_on=self._pretrained_on,
        )

    @cached_property
    def _pretrained_on(self) -> PretrainedOn:
        return read_pretrained_on(self.config)

    def close(self) -> None:
        """Close files, after a checkpoint that is under way."""
        self.saver.close()
        self.metrics.close()
        self.reader.close()
        if self.cache is not None:
            self.cache.close()

    def result(self) -> PretrainResult:
        """Where the run stands now."""
        return PretrainResult(
            step=self.progress.step,
            is_finished=self.progress.step >= self.config.steps,
            loss=self.progress.loss,
            checkpoint=self.saved,
            encoder=self.run_dir / ENCODER_FOLDER,
            evaluation=_bare(self.evaluation),
        )


def held_out_windows(config: PretrainConfig) -> list[Window]:
    """The windows that `config.evaluation` retrieves among: those with the smallest hash of their key."""
    settings = config.evaluation
    if settings is None:
        return []
    streams = load_streams(config.snapshots, split=settings.split, keep=config.filter, bucket_by=config.bucket_by)
    sizes: Counter[str] = Counter()
    for stream in streams:
        sizes[stream.bucket] += len(stream)
    # One shape, that of most windows; and equal weights, since nothing is mixed here.
    bucket = sizes.most_common(1)[0][0]
    streams = [replace(stream, weight=1.0) for stream in streams if stream.bucket == bucket]
    found: list[tuple[int, int, int]] = []
    for number, stream in enumerate(streams):
        hashes, rows = lowest(stream.keys.texts, settings.num_windows)
        found += [(chance, number, row) for chance, row in zip(hashes.tolist(), rows.tolist(), strict=True)]
    chosen = [Address(number, row, 0, row) for _, number, row in sorted(found)[: settings.num_windows]]
    cache = open_cache(config.cache, config.snapshots)
    locate = None if cache is None else cache.locate
    reader = SnapshotReader(streams, max_replaced=config.max_replaced, locate=locate)
    try:
        order = Order(streams, seed=0, global_batch=len(streams))
        return reader.read(chosen, order=order)
    finally:
        reader.close()
        if cache is not None:
            cache.close()


def _bare(evaluation: Mapping[str, float]) -> dict[str, float]:
    """Scores by the names that `trainer.evaluate` gives them."""
    return {name.removeprefix("eval_"): value for name, value in evaluation.items()}


def _window_s(batch: Any) -> float:
    """Recorded time of a window of an objective's host batch, s: that of its longest group."""
    return max(group.num_samples / group.rate_hz for group in batch.groups)


def _exported_step(folder: Path) -> int | None:
    return read_card(folder).step if folder.exists() else None
