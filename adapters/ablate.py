"""A table of runs that differ from one in a few keys: its configuration, its runs, its rows.

Every variant sees the tasks, snapshots, steps and seeds of the base run, so that what differs in the table is what
differs in the keys.
"""

import itertools
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from adapters.config import AdaptConfig
from adapters.train import AdaptResult, adapt
from manifests.config import apply_overrides, read_yaml, start_run, validate
from manifests.errors import ConfigError
from manifests.tasks import load_task

logger = logging.getLogger(__name__)

OWN_KEYS = frozenset({"run_dir", "seed"})  # of the table, not of a variant


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Variant(_Strict):
    """A row of the table.

    Attributes:
        name: In table, picture and folder.
        set: What it changes in the base, `key=value` each, as on the command line.
        each_task: One run per task instead of one for all: what a task is without the others.
    """

    name: Annotated[str, Field(min_length=1)]
    set: list[str] = []
    each_task: bool = False

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-.")


class AblationConfig(_Strict):
    """Runs to compare.

    Attributes:
        run_dir: Folder of table, picture and all runs; the same command goes on with what is missing.
        base: Keys of an adaptation run, or the path of its YAML; `run_dir` and `seed` there do not count.
        set: What all rows change in the base, `key=value` each.
        variants: Rows; the first one is what the others are held against in the picture.
        grid: Key to values: a further variant for each combination.
        seeds: Every variant runs with each.
        split: Where it is scored.
    """

    run_dir: str
    base: dict[str, Any] | str
    set: list[str] = []
    variants: list[Variant] = []
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0]
    split: Literal["test", "val"] = "test"

    @model_validator(mode="after")
    def _rows_differ(self) -> Self:
        folders = [variant.folder for variant in self.rows()]
        if not folders:
            raise ValueError("no variants and no grid: nothing to compare; name a variant")
        if twice := sorted({name for name in folders if not name or folders.count(name) > 1}):
            raise ValueError(f"variants: names that make one folder {twice[0]!r}; give each another name")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} has one twice; it would count double")
        return self

    def rows(self) -> list[Variant]:
        """Variants, and those of the grid after them."""
        keys = list(self.grid)
        combinations = itertools.product(*self.grid.values()) if keys else ()
        settings = [dict(zip(keys, values, strict=True)) for values in combinations]
        return [*self.variants, *(_grid_variant(setting) for setting in settings)]


def _grid_variant(setting: dict[str, Any]) -> Variant:
    name = ", ".join(f"{key} {value}" for key, value in setting.items())
    return Variant(name=name, set=[f"{key}={json.dumps(value)}" for key, value in setting.items()])


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One run of the table."""

    variant: str
    seed: int
    config: AdaptConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What a variant scores on a task.

    Attributes:
        metric: The task's primary one.
        value: Mean over seeds; None where it is not defined.
        interval: 95 %, subjects resampled: the mean over seeds of both ends.
        extremes: Lowest and highest seed.
        chance: Of a guess that ignores the signal.
        trainable: Parameters that training changes, over all tasks of the variant.
        seconds: A seed's time over all tasks of the variant, in the mean.
    """

    variant: str
    task: str
    metric: str
    value: float | None
    interval: tuple[float, float] | None
    extremes: tuple[float, float] | None
    chance: float | None
    seeds: int
    windows: int
    subjects: int
    trainable: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """What is kept of a run: its model would fill the memory after a few."""

    planned: Planned
    metrics: dict[str, str]
    scores: dict[str, dict[str, Any] | None]
    trainable: int
    seconds: float


def ablate(
    config: AblationConfig,
    *,
    learn: Callable[[AdaptConfig], AdaptResult] = adapt,
    report: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """Rows of all variants and tasks, every run trained or, if it is finished already, read back.

    Args:
        config: What to compare.
        learn: Carries out a run.
        report: Called after each run with the rows so far.

    Raises:
        ConfigError: A variant that is no valid run; nothing has been trained then.
    """
    planned = plan_runs(config)
    start_run(config.run_dir, config)
    outcomes: list[_Outcome] = []
    rows: list[Row] = []
    for index, run in enumerate(planned, start=1):
        logger.info("run %d/%d: %s, seed %d: %s", index, len(planned), run.variant, run.seed, run.config.run_dir)
        outcomes.append(_outcome(run, learn(run.config), split=config.split))
        rows = _rows([variant.name for variant in config.rows()], outcomes)
        if report is not None:
            report(rows)
    return rows


def plan_runs(config: AblationConfig) -> list[Planned]:
    """Every run, all variants of a seed before the next seed, so that a table is there early.

    Raises:
        ConfigError: A variant that is no valid run.
    """
    base = read_yaml(config.base) if isinstance(config.base, str) else config.base
    return [run for seed in config.seeds for variant in config.rows() for run in _runs_of(config, base, variant, seed)]


def _runs_of(config: AblationConfig, base: dict[str, Any], variant: Variant, seed: int) -> list[Planned]:
    changes = [*config.set, *variant.set]
    if own := [item for item in changes if item.partition("=")[0] in OWN_KEYS]:
        raise ConfigError(f"variant {variant.name!r}: {own[0]} is the table's; give run_dir and seeds at its top")
    run_dir = f"{config.run_dir}/{variant.folder}/seed-{seed}"
    data = {**apply_overrides(base, changes), "run_dir": run_dir, "seed": seed}
    if data.get("storage") is not None:
        raise ConfigError(
            f"variant {variant.name!r}: storage: {data['storage']} would be that of every run; leave it out: the runs "
            "of a table stay in its run_dir"
        )
    where = f"variant {variant.name!r}"
    if not variant.each_task:
        return [Planned(variant=variant.name, seed=seed, config=validate(AdaptConfig, data, where=where))]
    tasks = data.get("tasks")
    if not isinstance(tasks, list):
        raise ConfigError(f"{where}: tasks: {tasks!r} is no list; the base names the tasks")
    singles = [
        validate(AdaptConfig, {**data, "tasks": [task], "run_dir": f"{run_dir}/{index}"}, where=where)
        for index, task in enumerate(tasks)
    ]
    named = [run.model_copy(update={"run_dir": f"{run_dir}/{load_task(run.tasks[0].task).id}"}) for run in singles]
    return [Planned(variant=variant.name, seed=seed, config=run) for run in named]


def _outcome(planned: Planned, result: AdaptResult, *, split: str) -> _Outcome:
    return _Outcome(
        planned=planned,
        metrics={name: task.primary for name, task in result.tasks.items()},
        scores={name: result.scores[name].get(split) for name in result.tasks},
        trainable=sum(parameter.numel() for parameter in result.model.trainable().values()),
        seconds=result.seconds,
    )


def _rows(variants: Sequence[str], outcomes: Sequence[_Outcome]) -> list[Row]:
    rows: list[Row] = []
    for variant in variants:
        own = [outcome for outcome in outcomes if outcome.planned.variant == variant]
        num_seeds = len({outcome.planned.seed for outcome in own})
        for task in dict.fromkeys(task for outcome in own for task in outcome.metrics):
            of_task = [outcome for outcome in own if task in outcome.metrics]
            first = next(outcome.planned.seed for outcome in own)
            rows.append(
                _row(
                    variant,
                    task,
                    of_task,
                    trainable=sum(outcome.trainable for outcome in own if outcome.planned.seed == first),
                    seconds=sum(outcome.seconds for outcome in own) / num_seeds,
                )
            )
    return rows


def _row(variant: str, task: str, outcomes: Sequence[_Outcome], *, trainable: int, seconds: float) -> Row:
    metric = outcomes[0].metrics[task]
    scores = [outcome.scores[task] or {"metrics": {}, "n": 0, "subjects": 0} for outcome in outcomes]
    entries = [score["metrics"].get(metric, {"value": None, "interval": None, "chance": None}) for score in scores]
    values = [entry["value"] for entry in entries if entry["value"] is not None]
    bounds = [entry["interval"] for entry in entries if entry["interval"] is not None]
    is_whole = len(values) == len(entries)
    return Row(
        variant=variant,
        task=task,
        metric=metric,
        value=float(np.mean(values)) if is_whole else None,
        interval=_mean_ends(bounds) if is_whole and len(bounds) == len(entries) else None,
        extremes=(min(values), max(values)) if is_whole else None,
        chance=entries[0]["chance"],
        seeds=len(outcomes),
        windows=scores[0]["n"],
        subjects=scores[0]["subjects"],
        trainable=trainable,
        seconds=round(seconds, 1),
    )


def _mean_ends(bounds: Sequence[Sequence[float]]) -> tuple[float, float]:
    low, high = np.mean(bounds, axis=0).tolist()
    return low, high
