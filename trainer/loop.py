"""One pretraining run: batch → loss → backward → step → every n steps log, evaluate, save.

Plain Python: a single process, torchrun and Ray Train call the same `pretrain`. Every random draw is a function of
(seed, step, rank) or of (seed, epoch, sample), so a run that was stopped and started again computes the same
numbers bit for bit (same world size, CPU, fp32).
"""

import hashlib
import logging
import time

import torch

from trainer.collectives import rank
from trainer.config import PretrainConfig
from trainer.run import Report, Run
from trainer.run_folder import PretrainResult
from trainer.stopper import Stopper
from trainer.zero import join_processes, learning_rate, set_learning_rate, train_step

logger = logging.getLogger(__name__)


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
    run = Run(config)
    batches = run.batches()
    try:
        with Stopper(run.run_dir) as stopper:
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


def _step_seed(seed: int, step: int) -> int:
    """Seed of torch's generator for a step on this rank (dropout and the like), under 2^63."""
    text = f"{seed}:{step}:{rank()}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1
