"""What a task is: corpora, labels, the raw labels they come from, window, channels, loss. One YAML each in `tasks/`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from manifests.annotations import STAGES
from manifests.channels import KINDS
from manifests.config import load_shipped
from manifests.errors import ConfigError
from manifests.recipes import load_recipe

TASKS_DIR = Path(__file__).resolve().parent / "tasks"

# Longer than any module name of an encoder; `adapters.model` refuses those that still collide.
TaskId = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{1,62}$")]
MetricName = Literal["balanced_accuracy", "macro_f1", "weighted_f1", "kappa", "auroc", "auprc"]
UNSCORED = "?"


class Task(BaseModel):
    """A task. Snapshots are named by the run, so one task serves any corpus that has its labels.

    Attributes:
        corpora: Corpora that the task is made for, each with the split that its published numbers are on (`strict`, or
            a name in the corpus file); null = any split. A snapshot of such a corpus with another split is refused.
        target: Where labels stand in a sample: `stage` (of the window) or `classes` (of the recording, or of the event
            that the window stands in).
        labels: Classes in the order of the head's outputs. Of a yes or no, the one that means yes.
        map: Raw label to class; null = known and none of the classes: left out under cross_entropy, a no under bce.
            Raw labels that are not listed say nothing: a window that has no others is left out.
        recipe: Shipped recipe that its corpora are converted with; another one of the same window serves as well.
        window_s: Length of a window in seconds; null = as the snapshots have it. Another one is refused.
        kinds: Kinds the model sees, all of one rate.
        channels: Symbols the model sees; null = every channel of `kinds`.
        min_channels: Least number of channels per kind that a recording must have.
        view: Normalisation, a name in `trainer.views.VIEWS`.
        head: `linear` = a norm and one linear layer on the mean of the tokens.
        loss: `cross_entropy` (exactly one class a window) or `bce` (each class is a yes or no of its own).
        balance: Classes are drawn in proportion to n^balance: 0 = equally often, 1 = as they come. Several labels
            under `bce` do not exclude each other, so their windows are drawn as they come.
        class_weights: Weight of each class in the loss; null = 1 each.
        weight: Factor on the share of steps that a run of several tasks gives to this one.
        cap_per_epoch: Share of the training windows that an epoch draws anew; null = all of them.
        channel_dropout: Share of training windows that lose a random number of channels, so that recordings with
            fewer channels than the training data can be read.
        metrics: What is reported.
        primary: One of them, which chooses the best step on `val`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: TaskId
    title: str
    corpora: dict[str, str | None] = {}
    target: Literal["stage", "classes"]
    labels: Annotated[list[str], Field(min_length=1)]
    map: dict[str, str | None]
    recipe: str | None = None
    window_s: Annotated[int, Field(gt=0)] | None = None
    kinds: Annotated[list[str], Field(min_length=1)]
    channels: list[str] | None = None
    min_channels: dict[str, Annotated[int, Field(ge=1)]]
    view: str = "zscore"
    head: Literal["linear"] = "linear"
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    balance: Annotated[float, Field(ge=0, le=1)] = 0.5
    class_weights: dict[str, Annotated[float, Field(gt=0)]] | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0
    cap_per_epoch: Annotated[float, Field(gt=0, le=1)] | None = None
    channel_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    metrics: Annotated[tuple[MetricName, ...], Field(min_length=1)] = (
        "balanced_accuracy",
        "auroc",
        "auprc",
        "kappa",
        "weighted_f1",
    )
    primary: MetricName = "balanced_accuracy"

    @field_validator("kinds")
    @classmethod
    def _known_kinds(cls, value: list[str]) -> list[str]:
        if unknown := [kind for kind in value if kind not in KINDS]:
            raise ValueError(f"{', '.join(unknown)}: expected some of {', '.join(KINDS)}")
        return value

    @model_validator(mode="after")
    def _labels_and_map_agree(self) -> "Task":
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels {self.labels}: a label stands twice")
        if self.loss == "cross_entropy" and len(self.labels) < 2:
            raise ValueError("cross_entropy needs two labels or more; use bce for a single yes or no")
        named = {label for label in self.map.values() if label is not None}
        if named != set(self.labels):
            raise ValueError(
                f"map: labels {sorted(set(self.labels) - named)} come from no raw label and "
                f"{sorted(named - set(self.labels))} are not in labels"
            )
        says_no = any(label is None and raw != UNSCORED for raw, label in self.map.items())
        if self.loss == "bce" and self.is_exclusive and not says_no:
            raise ValueError(f"a yes or no on {self.labels[0]!r} needs a raw label that means no; map it to null")
        if self.class_weights is not None and set(self.class_weights) != set(self.labels):
            raise ValueError(f"class_weights: give a weight to each of {self.labels}")
        return self

    @model_validator(mode="after")
    def _stages_are_stages(self) -> "Task":
        if self.target == "stage":
            if unknown := sorted(set(self.map) - set(STAGES)):
                raise ValueError(f"map: {', '.join(unknown)} not among the stages {', '.join(STAGES)}")
            if self.map.get(UNSCORED) is not None:
                raise ValueError("map: '?' means unscored and must be null; it is never a class")
        return self

    @model_validator(mode="after")
    def _primary_is_reported(self) -> "Task":
        if self.primary not in self.metrics:
            raise ValueError(f"primary {self.primary!r} is not among the metrics {', '.join(self.metrics)}; add it")
        return self

    @property
    def is_exclusive(self) -> bool:
        """Whether a window has exactly one answer: one class of several, or the yes or no of a single label."""
        return self.loss == "cross_entropy" or len(self.labels) == 1

    @property
    def answers(self) -> list[str]:
        """Names of the exclusive answers: the labels, or `not LABEL` and LABEL of a single yes or no."""
        return self.labels if self.loss == "cross_entropy" else [negative(self.labels[0]), *self.labels]

    @model_validator(mode="after")
    def _channels_can_be_met(self) -> "Task":
        if not self.min_channels or not set(self.min_channels) <= set(self.kinds):
            raise ValueError(f"min_channels {self.min_channels}: name one or more of the kinds {self.kinds}")
        if self.channels is not None:
            for kind, least in self.min_channels.items():
                offered = sum(symbol.startswith(f"{kind}:") for symbol in self.channels)
                if offered < least:
                    raise ValueError(f"min_channels asks for {least} of {kind}, channels offers {offered} of that kind")
        return self


def load_task(name_or_path: str | Path) -> Task:
    """Task by the name of a shipped file, or by the path of one's own YAML.

    Raises:
        ConfigError: No such task, or a file that breaks the schema.
    """
    return load_shipped(Task, TASKS_DIR, name_or_path, noun="task")


def check_place(task: Task, place: str) -> None:
    """Hold where a task's windows lie to the `place` of a recipe.

    Raises:
        ConfigError: The task's recipe cuts windows at events, and this one does not.
    """
    wanted = "grid" if task.recipe is None else load_recipe(task.recipe).place
    if wanted == "events" and place != wanted:
        raise ConfigError(
            f"task {task.id}: its windows lie at events, those of the snapshot on a grid; convert with {task.recipe}"
        )


def window_labels(task: Task, *, stage: str | None, classes: Sequence[str]) -> frozenset[str] | None:
    """Classes of the task that a window carries, None where nothing says which.

    Under cross_entropy there is one at least, and several are ambiguous. Under bce there may be none: a no to each.
    """
    raw = classes if task.target == "classes" else [] if stage is None or stage == UNSCORED else [stage]
    listed = [task.map[label] for label in raw if label in task.map]
    found = frozenset(label for label in listed if label is not None)
    return found if found or (listed and task.loss == "bce") else None


def negative(label: str) -> str:
    """Name of the no of a single yes/no label."""
    return f"not {label}"


def chosen_symbols(task: Task, symbols: Sequence[str]) -> dict[str, list[str]]:
    """Channels of a recording that the task's model would see, by kind."""
    seen = symbols if task.channels is None else [symbol for symbol in symbols if symbol in task.channels]
    return {kind: [symbol for symbol in seen if symbol.startswith(f"{kind}:")] for kind in task.kinds}


def lacking(task: Task, chosen: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Kinds of which a recording has too few channels, with the number the task needs."""
    return {kind: least for kind, least in task.min_channels.items() if len(chosen.get(kind, ())) < least}
