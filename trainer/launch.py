"""Training under Ray Train: the same function as without, on workers that Ray starts, watches and starts again.

Our own checkpoints in `run_dir` are the truth. Nothing that Ray stores is ever read back: a run name is used once,
because one truncated file of Ray's would keep a named run from starting for ever, and Ray never falls back to an
older checkpoint. What a person sees comes from `metrics.jsonl` and not through Ray's log, which mixes it with its
own. Ctrl-C, like the file `run_dir/STOP`, ends a run after the current step with a checkpoint; twice, at once.
"""

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from manifests.errors import ConfigError, ContractError
from manifests.ray_start import start_ray
from trainer.checkpoint_store import step_of
from trainer.collectives import rank
from trainer.config import PretrainConfig, RayConfig
from trainer.lock import hold
from trainer.loop import pretrain
from trainer.metrics import describe, read_metrics
from trainer.paths import LAUNCH_LOCK_FILE, METRICS_FILE, STOP_FILE, WORKERS_FOLDER
from trainer.run_folder import PretrainResult, check_run, read_result
from trainer.storage import StoreError, location
from trainer.watchdog import RAY
from trainer.worker_logging import set_up_logging

logger = logging.getLogger(__name__)

WATCHER_SWITCH = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
POLL_S = 0.5
OBJECT_STORE_BYTES = 128 * 2**20  # no waveform crosses Ray


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What Ray's workers do, and what a person sees of it.

    Attributes:
        work: Called on every worker with `plain`; a function of a module, since it travels by its name.
        plain: Its argument, plain data.
        run_dir: Absolute folder of the run.
        num_workers: Or [least, most].
        ray: How.
        collective_timeout_s: As in the configuration.
        describe: One line about a row of metrics.jsonl.
        backend: Of the process group; None = Ray's choice.
    """

    work: Callable[[dict[str, Any]], None]
    plain: dict[str, Any]
    run_dir: Path
    num_workers: int | tuple[int, int]
    ray: RayConfig
    collective_timeout_s: int
    describe: Callable[[dict[str, Any]], str]
    backend: str | None = None

    @property
    def most_workers(self) -> int:
        """Number of workers that there may be."""
        return self.num_workers[1] if isinstance(self.num_workers, tuple) else self.num_workers


def launch(config: PretrainConfig) -> PretrainResult:
    """Train with `config.num_workers` Ray workers; a worker that dies costs the steps since the last checkpoint.

    Raises:
        ConfigError: As `pretrain`. Ray starts nothing again for it, unless it is a `StoreError`.
        ContractError: The same for artefacts.
        WorkerGroupError: Workers died more often than `ray.max_failures` allows.
    """
    config = _with_absolute_paths(config)
    check_run(config)
    _check_workers(config)
    run_dir = Path(config.run_dir)
    before = read_result(config)
    # Another machine than the one that trained may have all of the steps in the store and still lack the encoder.
    is_done = before.checkpoint is not None and step_of(before.checkpoint) >= config.steps
    if is_done and before.encoder.exists():
        logger.info("%s: finished before, at step %d; nothing to do", run_dir, before.step)
        return before
    if before.checkpoint is not None:
        logger.info("going on from step %d", step_of(before.checkpoint))
    run_workers(
        Launch(
            work=train_on_worker,
            plain={"config": config.model_dump(mode="json"), "has_notice": os.environ.get(WATCHER_SWITCH) != "0"},
            run_dir=run_dir,
            num_workers=config.num_workers,
            ray=config.ray,
            collective_timeout_s=config.collective_timeout_s,
            describe=partial(describe, steps=config.steps),
            backend=None if config.backend == "auto" else config.backend,
        )
    )
    return read_result(config)


def run_workers(task: Launch) -> None:
    """Do it with Ray's workers, until all of them have returned or died too often.

    Raises:
        ConfigError: Another driver runs in this folder, or a worker raised it.
        ContractError: A worker raised it.
        WorkerGroupError: Workers died more often than `ray.max_failures` allows.
    """
    # For a moment the lock may be held by somebody who only looks whether it is free.
    with hold(task.run_dir / LAUNCH_LOCK_FILE, patience_s=1.0):
        logger.info(
            "starting Ray's workers; their imports take half a minute, the first row of metrics comes after them"
        )
        try:
            with _cluster(task):
                _fit(_trainer(task), task)
        except (ControllerError, WorkerGroupError) as error:
            raise error if (told := first_told(error)) is None else told from None


class EndAtOnce(UserCallback):
    """Ends a run whose workers tell a person what to change: they would say the same at every start.

    Ray knows how often to try, but not what for. An exception of a callback is one of its controller, which it does
    not try again.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """In Ray's controller, when workers have raised."""
        del run_context
        told = _first_told(worker_exceptions)
        if told is not None and not isinstance(told, StoreError):
            raise told


def first_told(error: ControllerError | WorkerGroupError) -> ConfigError | ContractError | None:
    """What the workers say to a person: the error of the lowest rank that raised one; None if none did."""
    is_controllers = isinstance(error, ControllerError)
    return _first_told({0: error.controller_failure} if is_controllers else error.worker_failures)


def _first_told(failures: Mapping[int, Exception]) -> ConfigError | ContractError | None:
    for _, failure in sorted(failures.items()):
        cause = getattr(failure, "cause", None) or failure
        if isinstance(cause, ConfigError | ContractError):
            return cause
    return None


def _check_workers(config: PretrainConfig) -> None:
    """Refuse more workers than a micro-batch has windows, before Ray finds it out on a worker."""
    most = config.num_workers[1] if isinstance(config.num_workers, tuple) else config.num_workers
    windows = config.global_batch // config.gradient_accumulation
    if most > windows:
        raise ConfigError(
            f"num_workers: {most} is more than the {windows} windows of a micro-batch (global_batch / "
            "gradient_accumulation); lower num_workers or raise global_batch"
        )


def _trainer(task: Launch) -> TorchTrainer:
    """Ray's trainer for a run; the cluster is connected."""
    settings = task.ray
    for name, value in {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": settings.health_check_s,
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": settings.start_timeout_s,
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": task.collective_timeout_s,  # by default Ray's own never end
    }.items():
        os.environ[name] = str(value)
    # Not whether this machine has one: the driver may run on a head without.
    has_gpu = ray.cluster_resources().get("GPU", 0) > 0 if settings.use_gpu is None else settings.use_gpu
    return TorchTrainer(
        task.work,
        train_loop_config=task.plain,
        torch_config=TorchConfig(backend=task.backend, timeout_s=task.collective_timeout_s),
        scaling_config=ScalingConfig(
            num_workers=task.num_workers,
            use_gpu=has_gpu,
            resources_per_worker={"CPU": settings.cpus_per_worker, **({"GPU": 1} if has_gpu else {})},
            elastic_resize_monitor_interval_s=settings.resize_every_s,
        ),
        run_config=RunConfig(
            name=f"{task.run_dir.name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(task.run_dir / "ray"),
            # A node that goes away with notice is nobody's failure; Ray counts those apart, without a limit.
            failure_config=FailureConfig(max_failures=settings.max_failures),
            callbacks=[EndAtOnce()],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _fit(trainer: TorchTrainer, task: Launch) -> None:
    """Run the trainer in a thread, show new rows of metrics.jsonl here, and turn Ctrl-C into a graceful stop.

    In the main thread Ray's own handler would end the workers at once, without a checkpoint.
    """
    stop_file = task.run_dir / STOP_FILE
    stop_file.unlink(missing_ok=True)  # of an earlier start
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001 (raised again in the main thread)
            failures.append(error)
        finally:
            is_done.set()

    # An event, not Thread.join: until Python 3.13 an interrupted join takes the thread for ended.
    is_done = threading.Event()
    shown = _Shown(time=time.time())
    threading.Thread(target=fit, daemon=True).start()
    while not is_done.is_set():
        try:
            is_done.wait(POLL_S)
            _show_rows(task, shown)
        except KeyboardInterrupt:
            if stop_file.exists():
                raise
            stop_file.touch()
            logger.warning("stopping after this step, with a checkpoint; Ctrl-C again aborts at once")
    _show_rows(task, shown)
    if failures:
        raise failures[0]


@dataclass(slots=True, kw_only=True)
class _Shown:
    """What of metrics.jsonl was shown: rows up to `time` (Unix time in s), of the file as it was when last read."""

    time: float
    num_bytes: int = -1
    changed_ns: int = -1


def _show_rows(task: Launch, shown: _Shown) -> None:
    """Log the rows written since `shown`; the file is read only when it has changed, for it is asked all the time."""
    path = task.run_dir / METRICS_FILE
    if not path.exists():
        return
    stat = path.stat()
    if (stat.st_size, stat.st_mtime_ns) == (shown.num_bytes, shown.changed_ns):
        return
    shown.num_bytes, shown.changed_ns = stat.st_size, stat.st_mtime_ns
    for row in read_metrics(task.run_dir):
        if row["time"] > shown.time:
            logger.info(task.describe(row))
            shown.time = row["time"]


def train_on_worker(plain: dict[str, Any]) -> None:
    """What each Ray worker runs to pretrain; `plain["config"]` is a PretrainConfig as plain data."""
    config = PretrainConfig.model_validate(plain["config"])
    for name in list(logging.root.manager.loggerDict):
        if "ray/train" in name:  # the logger that writes a line for every report is named after its file
            logging.getLogger(name).setLevel(logging.WARNING)
    with marked_worker(Path(config.run_dir)):
        notice = _Notice() if plain["has_notice"] else None
        pretrain(config, report=ray.train.report, notice=notice, launcher=RAY)


@contextmanager
def marked_worker(run_dir: Path) -> Iterator[None]:
    """The process id of this worker stands in the run folder as long as it works."""
    folder = run_dir / WORKERS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f"rank-{rank()}.pid"
    mark.write_text(f"{os.getpid()}\n", encoding="utf-8")
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)


class _Notice:
    """Whether Ray has told of a node that goes away soon, once for each news. The same on all ranks."""

    def __init__(self) -> None:
        self._known: frozenset[str] = frozenset()

    def __call__(self) -> bool:
        info = ray.train.get_preemption_info()
        nodes = frozenset() if info is None else frozenset(info.preempted_node_to_ranks)
        is_news = not nodes <= self._known
        if is_news and rank() == 0:
            logger.warning("node %s goes away: saving a checkpoint now", ", ".join(sorted(nodes - self._known)))
        self._known |= nodes
        return is_news


def _with_absolute_paths(config: PretrainConfig) -> PretrainConfig:
    """The same run for a worker in another working directory."""
    snapshots = [source.model_copy(update={"path": str(Path(source.path).absolute())}) for source in config.snapshots]
    places = {"run_dir": str(Path(config.run_dir).absolute()), "snapshots": snapshots}
    if config.storage is not None:
        places["storage"] = str(location(config.storage))
    return config.model_copy(update=places)


def start_local_ray(num_cpus: int) -> None:
    """Start a Ray on this machine, for `num_cpus` logical CPUs; the caller shuts it down."""
    os.environ[WATCHER_SWITCH] = "0"  # nobody gives notice of taking this machine away

    def start() -> None:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
            runtime_env={"worker_process_setup_hook": set_up_logging},
        )

    start_ray(start, ray.shutdown)


@contextmanager
def _cluster(task: Launch) -> Iterator[None]:
    """A connection to the cluster of `ray.address` or RAY_ADDRESS, else to a local one that ends with the run."""
    if ray.is_initialized():
        yield
        return
    address = task.ray.address or os.environ.get("RAY_ADDRESS")
    if address:
        start_ray(lambda: ray.init(address=address, log_to_driver=False), ray.shutdown)
    else:
        start_local_ray(int(task.most_workers * task.ray.cpus_per_worker) + 1)  # one for the controller
    try:
        yield
    finally:
        ray.shutdown()
