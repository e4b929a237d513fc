"""A conversion under Ray Data: one actor per core takes units; only small rows cross Ray, never waveforms.

Source of the settings: Ray 2.60, measured in the notes on data engines: `max_errored_blocks` keeps a failed unit
from ending the others (finalise then refuses the result), the no-progress guard would abort a unit of more than
30 minutes, and retries are bounded because the default repeats a crash for ever.
"""

import json
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import ray
from ray.data import ActorPoolStrategy, DataContext

from engine.commit import pending
from engine.config import ConvertConfig
from engine.convert import Context, Progress, ProgressRow, convert_unit, finish, limits_of, prepare
from engine.finalise import ConvertResult
from engine.heartbeat import append_progress
from engine.lock import locked
from engine.plan import PlanItem, Unit
from engine.sandbox import where_of
from engine.storage import is_remote, remove_dead_work, work_folder, writable
from manifests.errors import ConfigError, ContractError
from manifests.ray_start import start_ray

logger = logging.getLogger(__name__)

_POLL_S = 0.5
_STORE_POLL_S = 5.0  # each look at a store is a request


class ConvertActor:
    """Converts units one at a time; keeps its sandbox between them."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._context = Context.of(ConvertConfig.model_validate(config))
        settings = self._context.config
        if is_remote(settings.output):
            remove_dead_work(work_folder(settings.output, settings.scratch))
        self._sandbox = self._context.sandbox()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Rows that tell what was done, one per unit of the batch."""
        rows = [self._convert(json.loads(unit)) for unit in batch["unit"]]
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    def _convert(self, data: dict[str, Any]) -> dict[str, Any]:
        unit = Unit(id=data["id"], recordings=tuple(PlanItem(**item) for item in data["recordings"]))
        try:
            return convert_unit(unit, context=self._context, sandbox=self._sandbox)
        except Exception as error:
            # Our own errors are told in full; the words of another one may be of a header, Ray's log has them.
            is_ours = isinstance(error, (ConfigError, ContractError))
            told = f"{type(error).__name__}: {error}" if is_ours else f"unit {unit.id}: {where_of(error)}"
            append_progress(self._context.config.output, unit.id, {"error": told})
            raise


@contextmanager
def _ray(num_cpus: int | None) -> Iterator[None]:
    """Ray, initialised here unless it already is; a Ray that was started here is shut down at the end."""
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not os.environ.get("RAY_ADDRESS"):
        # Ray's C++ side writes a line about `max_restarts` across the progress bar.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        options |= {"address": "local", "num_cpus": num_cpus, "include_dashboard": False}
    start_ray(lambda: ray.init(**options), ray.shutdown)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray Data's own lines would tear the progress bar; its errors still come through."""
    noisy = logging.getLogger("ray.data")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # Bounded restarts have no other way in than `ray_remote_args` in Ray 2.60.
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
        try:
            yield
        finally:
            noisy.setLevel(level)


@contextmanager
def _watched(
    meter: Progress, progress: Callable[[ProgressRow], None] | None, *, poll_s: float = _POLL_S
) -> Iterator[None]:
    """Call `progress` every `poll_s` s from a thread, and once more at the end."""
    if progress is None:
        yield
        return
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(poll_s):
            progress(meter.row())

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        progress(meter.row())


def _convert_units(config: ConvertConfig, todo: list[Unit]) -> None:
    """Convert units under Ray Data; a unit that fails is reported and left without a commit."""
    context = DataContext.get_current()
    saved = (context.max_errored_blocks, context.execution_no_progress_timeout_s, context.enable_progress_bars)
    context.max_errored_blocks = -1
    context.execution_no_progress_timeout_s = -1
    context.enable_progress_bars = False
    try:
        available = int(ray.cluster_resources().get("CPU", 1))
        num_actors = max(1, min(config.num_cpus or available, available, len(todo)))
        rows = (
            ray.data.from_items([{"unit": json.dumps(asdict(unit))} for unit in todo], override_num_blocks=len(todo))
            .map_batches(
                ConvertActor,
                fn_constructor_args=(config.model_dump(mode="json"),),
                batch_size=1,
                compute=ActorPoolStrategy(size=num_actors),
                num_cpus=1,
                max_restarts=2,
                max_task_retries=2,
            )
            .iter_rows()
        )
        for row in rows:
            logger.info("unit %s: %d windows, %d quarantined", row["unit"], row["windows"], row["quarantined"])
    finally:
        context.max_errored_blocks, context.execution_no_progress_timeout_s, context.enable_progress_bars = saved


def run(config: ConvertConfig, *, progress: Callable[[ProgressRow], None] | None = None) -> ConvertResult:
    """Scan, plan, convert what is pending on all cores and finalise. Rerun the same command to resume.

    Args:
        config: The conversion.
        progress: Called from a thread about twice a second (every 5 s on a store), and once at the end.

    Raises:
        ConfigError: Wrong configuration, or another conversion writes to the same folder.
        ContractError: A unit ended without a commit, or an earlier result is damaged.
    """
    with writable(config.output), locked(config.output) as check_lock:
        _, units = prepare(config)
        todo = pending(config.output, units, limits_of(config), recheck=config.recheck)
        if todo:
            poll_s = _STORE_POLL_S if is_remote(config.output) else _POLL_S
            meter = Progress(config.output, units, todo)
            with _ray(config.num_cpus), _quiet(), _watched(meter, progress, poll_s=poll_s):
                _convert_units(config, todo)
        check_lock()
        return finish(config, units)
