"""One pretraining run: batch → loss → backward → step → every n steps log, evaluate, save.

Plain Python: a single process, torchrun and Ray Train call the same `pretrain`. Every random draw is a function of
(seed, step, rank) or of (seed, epoch, sample), so a run that was stopped and started again computes the same
numbers bit for bit (same world size, CPU, fp32).
"""

import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from trainer.checkpoint_store import claim_attempt
from trainer.collectives import explained_timeouts, rank, world_size
from trainer.config import PretrainConfig
from trainer.process_group import torchrun_words
from trainer.run import Report, Run
from trainer.run_folder import PretrainResult, check_run, checkpoint_folder, open_run
from trainer.stopper import Stopper
from trainer.watchdog import Watchdog
from trainer.zero import join_processes, learning_rate, set_learning_rate, train_step

logger = logging.getLogger(__name__)


def pretrain(
    config: PretrainConfig,
    *,
    report: Report | None = None,
    notice: Callable[[], bool] | None = None,
    launcher: str | None = None,
) -> PretrainResult:
    """Train until `config.steps`, from the newest valid checkpoint in `config.run_dir` if there is one.

    Args:
        config: The run. All ranks get the same.
        report: Called on every rank after each checkpoint, with step and loss.
        notice: Asked on all ranks together every few seconds; True, on all of them, asks for a checkpoint now,
            because a machine goes away soon.
        launcher: `trainer.watchdog.RAY`, or None: torchrun if the environment tells of it, else this process alone.
            `kymo status` makes of it the command that goes on.

    Raises:
        ConfigError: A value cannot be used, or `run_dir` holds a run with another configuration.
        ContractError: A snapshot or a checkpoint breaks its contract.
    """
    join_processes(config.backend, timeout_s=config.collective_timeout_s)
    run_dir = Path(config.run_dir).absolute()
    streams = check_run(config)
    with explained_timeouts(config.collective_timeout_s), open_run(run_dir, config):
        fence = claim_attempt(checkpoint_folder(config))
        with Watchdog(
            run_dir,
            rank=rank(),
            world_size=world_size(),
            attempt=fence.attempt,
            hang_timeout_s=config.faults.hang_timeout_s,
            launcher=torchrun_words() if launcher is None else launcher,
        ) as watchdog:
            run = Run(config, streams, watchdog=watchdog, fence=fence)
            try:
                with Stopper(run_dir, notice=notice) as stopper:
                    _train(run, stopper, report)
            finally:
                run.close()
            result = run.result()
            watchdog.mark("finished" if result.is_finished else "stopped", result.step)
    return result


def _train(run: Run, stopper: Stopper, report: Report | None) -> None:
    """Steps until the last one, or until somebody asks for a stop."""
    config = run.config
    batches = run.batches()
    try:
        for step in range(run.progress.step, config.steps):
            began = time.monotonic()
            lr = learning_rate(step, config.optimizer, steps=config.steps)
            set_learning_rate(run.model, lr)
            torch.manual_seed(_step_seed(config.seed, step))
            batch = next(batches)
            data_s = time.monotonic() - began
            metrics, norm = train_step(run.model, batch.parts, cached_gradients=config.cached_gradients)
            run.advance(metrics, norm, batch=batch, seconds=time.monotonic() - began, data_s=data_s)
            is_asked, is_leaving = stopper.poll()
            is_stopping = is_asked or run.progress.step == config.stop_at
            is_last = is_stopping or run.progress.step == config.steps
            if run.is_due(config.eval_every) or run.progress.step == config.steps:
                run.evaluate()
            if is_last or run.is_due(config.log_every) or run.is_due(config.eval_every):
                run.log(metrics, lr=lr, grad_norm=norm)
            if is_last or is_leaving or run.is_save_due():
                run.save(report, is_urgent=is_last or is_leaving)
            else:
                run.settle(report)
            if is_stopping:
                logger.info("stopped after step %d; the same command goes on from here", run.progress.step)
                break
    finally:
        batches.close()


def _step_seed(seed: int, step: int) -> int:
    """Seed of torch's generator for a step on this rank (dropout and the like), under 2^63."""
    text = f"{seed}:{step}:{rank()}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1
