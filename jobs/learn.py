"""A run that learns tasks: in this process, as one of torchrun's ranks, or on workers that Ray starts."""

import logging
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from adapters.config import AdaptConfig, FinetuneConfig
from adapters.finetune import FinetuneResult, finetune
from adapters.rows import describe
from adapters.run_folder import is_finished, saved_step
from adapters.train import AdaptResult, adapt
from adapters.update import Update
from trainer.process_group import is_launched
from trainer.storage import location

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", AdaptConfig, FinetuneConfig)


def learn_adapters(config: AdaptConfig) -> AdaptResult:
    """Adapters and heads of a run, as `adapters.train.adapt` gives them."""
    config = _on_workers(config) if _needs_ray(config) else config
    return adapt(config, update=find_update(config))


def learn_model(config: FinetuneConfig) -> FinetuneResult:
    """Fine-tuned model of a run, as `adapters.finetune.finetune` gives it."""
    config = _on_workers(config) if _needs_ray(config) else config
    return finetune(config, update=find_update(config))


def find_update(config: AdaptConfig | FinetuneConfig) -> type[Update]:
    """What makes new weights of losses under the run's `zero_stage`."""
    if config.zero_stage == 0:
        return Update
    from adapters.zero import ZeroUpdate  # a second of imports, which most runs do without

    return ZeroUpdate


def _needs_ray(config: AdaptConfig | FinetuneConfig) -> bool:
    return config.num_workers != 1 and not is_launched() and not is_finished(config)


def _on_workers(config: ConfigT) -> ConfigT:
    """Train on Ray's workers; returns the configuration whose result can be read back now.

    Raises:
        KeyboardInterrupt: Somebody asked for a stop, and the workers saved a checkpoint.
    """
    from trainer.launch import Launch, run_workers

    config = _with_absolute_paths(config)
    run_dir = Path(config.run_dir)
    kind = "adapt" if isinstance(config, AdaptConfig) else "finetune"
    if (step := saved_step(config)) is not None:
        logger.info("going on after step %d", step)
    run_workers(
        Launch(
            work=learn_on_worker,
            plain={"kind": kind, "config": config.model_dump(mode="json")},
            run_dir=run_dir,
            num_workers=config.num_workers,
            ray=config.ray,
            collective_timeout_s=config.collective_timeout_s,
            describe=partial(describe, steps=config.steps),
            backend="gloo" if config.device == "cpu" else None,
        )
    )
    if not is_finished(config):
        raise KeyboardInterrupt
    return config


def learn_on_worker(plain: dict[str, Any]) -> None:
    """What each Ray worker runs; `plain` holds the kind of run and its configuration."""
    from trainer.launch import marked_worker

    run_dir = Path(plain["config"]["run_dir"])
    with marked_worker(run_dir):
        try:
            if plain["kind"] == "adapt":
                config = AdaptConfig.model_validate(plain["config"])
                adapt(config, update=find_update(config))
            else:
                settings = FinetuneConfig.model_validate(plain["config"])
                finetune(settings, update=find_update(settings))
        except KeyboardInterrupt:
            return  # a stop is no failure that Ray should start the workers again for


def _with_absolute_paths(config: ConfigT) -> ConfigT:
    """The same run for a worker in another working directory; names of shipped tasks and URLs stay."""
    tasks = [
        run.model_copy(
            update={
                "task": str(Path(run.task).absolute()) if run.task.endswith(".yaml") else run.task,
                "snapshots": [str(location(path)) for path in run.snapshots],
            }
        )
        for run in config.tasks
    ]
    places = {name: str(Path(getattr(config, name)).absolute()) for name in ("run_dir", "encoder")}
    if config.storage is not None:
        places["storage"] = str(location(config.storage))
    return config.model_copy(update={**places, "tasks": tasks})
