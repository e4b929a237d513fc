"""The folder of a pretraining run: what lies where, who may write, what it says about the run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from manifests.config import read_yaml, start_run
from manifests.errors import ConfigError
from trainer.checkpoint_store import newest_checkpoint, step_of
from trainer.collectives import rank, sum_over_ranks
from trainer.config import PretrainConfig, differing_keys
from trainer.lock import hold
from trainer.metrics import read_metrics
from trainer.paths import CHECKPOINT_FOLDER, CONFIG_FILE, ENCODER_FOLDER, LOCK_FILE
from trainer.samples import Stream, load_streams
from trainer.storage import location

LOCK_PATIENCE_S = 30.0  # Ray may still be ending the workers of the last attempt


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


def checkpoint_folder(config: PretrainConfig) -> Path:
    """Folder of all checkpoints of a run, on a disk or in an object store."""
    return location(config.storage or config.run_dir) / CHECKPOINT_FOLDER


def check_run(config: PretrainConfig) -> list[Stream]:
    """Streams that a run trains on, if nothing that can be seen beforehand is wrong. Not a collective.

    Raises:
        ConfigError: `run_dir` holds a run with another configuration, or no sample passes the filter.
        ContractError: A snapshot breaks its contract.
    """
    earlier = Path(config.run_dir) / CONFIG_FILE
    if earlier.exists() and (keys := differing_keys(config, read_yaml(earlier))):
        raise ConfigError(
            f"{config.run_dir}: holds a run with another configuration ({'; '.join(keys)}); "
            "set these keys back, or give another run_dir"
        )
    if config.keep_best is not None and (config.evaluation is None or config.eval_every is None):
        raise ConfigError(
            f"keep_best: {config.keep_best} needs evaluation and eval_every; set them, or keep_best to null"
        )
    if config.evaluation is not None:
        load_streams(config.snapshots, split=config.evaluation.split, keep=config.filter)
    return load_streams(config.snapshots, split=config.split, keep=config.filter, bucket_by=config.bucket_by)


def read_result(config: PretrainConfig) -> PretrainResult:
    """Where a run stands according to its folder, for a process that did not train."""
    run_dir = Path(config.run_dir).absolute()
    rows = read_metrics(run_dir)
    evaluations = [
        {name.removeprefix("eval_"): value for name, value in row.items() if name.startswith("eval_")} for row in rows
    ]
    checkpoint = newest_checkpoint(checkpoint_folder(config))
    # Without rows this may be another machine than the one that trained.
    step = rows[-1]["step"] if rows else 0 if checkpoint is None else step_of(checkpoint)
    return PretrainResult(
        step=step,
        is_finished=step >= config.steps,
        loss=rows[-1].get("loss") if rows else None,
        checkpoint=checkpoint,
        encoder=run_dir / ENCODER_FOLDER,
        evaluation=next((values for values in reversed(evaluations) if values), {}),
    )


@contextmanager
def open_run(run_dir: Path, config: PretrainConfig) -> Iterator[None]:
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
    try:
        if rank() == 0:
            start_run(run_dir, config)
        yield
    finally:
        if lock is not None:
            lock.close()
