"""What an evaluation is made of: a run or an exported encoder, tasks with their snapshots, baselines, ablation."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskEvaluation(_Strict):
    """A task with the windows it is tried on.

    Attributes:
        task: Name or YAML path of a task.
        snapshots: Folders, of one recipe.
        corpora: Take these only; null = all that have the labels.
        folds: `split` trains on train and val and tests on test; `subjects` leaves one subject out at a time, over all
            splits; a number makes so many folds of subjects.
        max_windows: More windows than these are thinned, evenly within each recording.
    """

    task: str
    snapshots: Annotated[list[str], Field(min_length=1)]
    corpora: list[str] | None = None
    folds: Literal["split", "subjects"] | Annotated[int, Field(ge=2)] = "split"
    max_windows: Count = 5000


class EndToEndConfig(_Strict):
    """Nets of the same architecture trained end to end from random weights, by AdamW; nothing is tuned.

    Attributes:
        seeds: Of weights and batches; a net for each of them and of the folds.
        steps: Of the optimizer.
        batch: Windows of a step.
        lr: Highest learning rate.
        weight_decay: Of AdamW.
    """

    seeds: Annotated[list[int], Field(min_length=1)] = [0]
    steps: Count = 300
    batch: Count = 32
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05


class AblationConfig(_Strict):
    """Channel ablation: the probe of the full montage on random subsets of its channels.

    Attributes:
        subsets: Per number of channels; fewer where fewer exist.
        counts: Numbers of channels; null = every one up to 12, then ever fewer of them.
        max_windows: Held-out windows that are scored.
        dropout: A second probe of the pretrained encoder is fitted on so many copies of each training window, each
            with a random subset of its channels; 0 = none.
    """

    subsets: Count = 20
    counts: list[Count] | None = None
    max_windows: Count = 300
    dropout: Annotated[int, Field(ge=0)] = 0


class RetrievalConfig(_Strict):
    """Retrieval among held-out windows of the run's own snapshots, as in pretraining."""

    split: str = "test"
    num_windows: Annotated[int, Field(ge=2)] = 256


class EvaluateConfig(_Strict):
    """An evaluation.

    Attributes:
        run: Folder of a pretraining run, or of an exported encoder.
        out: Folder of the report; null = `evaluation` in the run.
        tasks: Empty = every shipped task whose labels the run's own snapshots have.
        scratch_seeds: Random weights of the same architecture, frozen.
        end_to_end: null = none; it costs as much as training that often.
        ablation: null = none.
        retrieval: null = none.
        batch: Windows that are encoded at a time.
        device: `auto`, `cpu`, `cuda` …
    """

    run: str
    out: str | None = None
    tasks: list[TaskEvaluation] = []
    scratch_seeds: Annotated[list[int], Field(min_length=1)] = [0, 1, 2]
    end_to_end: EndToEndConfig | None = None
    ablation: AblationConfig | None = AblationConfig()
    retrieval: RetrievalConfig | None = RetrievalConfig()
    batch: Count = 32
    seed: Annotated[int, Field(ge=0)] = 0
    device: str = "auto"
