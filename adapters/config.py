"""Configuration of adaptation and of fine-tuning: encoder, tasks with their snapshots, what is trained, optimizer."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from adapters.running import Running
from trainer.models.art_gat import ArtGatConfig

# Anchored on full paths: a bare suffix such as `proj` or `all-linear` would also wrap the temporal encoder.
LORA_TARGETS = r"blocks\.\d+\.(attn\.(q|k|v|o)|fc1|fc2)"

Positive = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraSpec(_Strict):
    """One LoRA adapter: W + (alpha / r) B A on every layer whose full path matches `targets`.

    The default covers q, k, v, o and both feed-forward layers of each block (MTEEG needs attention and
    feed-forward; r = 8 was best there).
    """

    r: Positive = 8
    alpha: Positive = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    targets: str = LORA_TARGETS


class TaskRun(_Strict):
    """A task in a run: its name or YAML path, its snapshots (one recipe), windows per step."""

    task: str
    snapshots: Annotated[list[str], Field(min_length=1)]
    batch: Positive = 32


class TaskOptimizer(_Strict):
    """AdamW with warm-up and cosine decay; the learning rates are those of the groups that a run trains."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    clip_norm: Annotated[float, Field(gt=0)] = 3.0

    def rates(self) -> dict[str, float]:
        """Peak learning rate per group of parameters, as `TaskModel.group` names them."""
        return {name.removeprefix("lr_"): rate for name, rate in self if name.startswith("lr_")}


class AdaptOptimizer(TaskOptimizer):
    """LoRA takes no weight decay: it is a low-rank change already.

    The rates suit tiny encoders pretrained for minutes: there 1e-3 for the temporal encoder took staging of unseen
    synthetic sleepers from 0.62 to 0.83 balanced accuracy against 2e-4. One pretrained for days wants 1e-4.
    """

    lr_lora: Annotated[float, Field(ge=0)] = 1e-3
    lr_head: Annotated[float, Field(ge=0)] = 2e-3
    lr_temporal: Annotated[float, Field(ge=0)] = 1e-3


class FinetuneOptimizer(TaskOptimizer):
    """The published rates of One Model for All: an encoder that is only nudged, and all that stands on it."""

    lr_encoder: Annotated[float, Field(ge=0)] = 5e-6
    lr_head: Annotated[float, Field(ge=0)] = 1e-4


class Card(_Strict):
    """What the model card says that cannot be read off the run.

    Attributes:
        licence: Of the weights, an id of the hub's list; `other` until the holder of the data has decided.
        intended_use: Sentences for the card.
    """

    title: str = "kymo adapters"
    licence: str = "other"
    authors: list[str] = []
    intended_use: str = "Research on EEG, ECG and sleep recordings like those named under Data."


class TaskTraining(Running):
    """What every run that learns labelled tasks has.

    Attributes:
        run_dir: Folder of the run; the same command in the same folder continues it.
        encoder: Folder of an exported encoder (`encoder.safetensors`, `encoder.json`).
        steps: Optimizer steps; each takes windows of every task, always in the same order.
        keep: `last` step, or `best` = the evaluated step with the highest mean of the tasks' primary metric on `val`;
            with a few subjects there that choice is mostly chance.
        eval_windows: At most so many windows per task and split are scored.
    """

    run_dir: str
    encoder: str
    tasks: Annotated[list[TaskRun], Field(min_length=1)]
    steps: Positive = 200
    seed: Annotated[int, Field(ge=0)] = 0
    keep: Literal["best", "last"] = "last"
    log_every: Positive = 10
    eval_every: Positive = 50
    checkpoint_every: Positive = 50
    eval_windows: Positive = 1000

    @model_validator(mode="after")
    def _best_is_kept(self) -> Self:
        if self.keep == "best" and self.eval_every > self.steps:
            raise ValueError(f"keep best needs an evaluation: eval_every {self.eval_every} > steps {self.steps}")
        return self


class AdaptConfig(TaskTraining):
    """An adaptation run: one LoRA adapter and one head per task on a frozen encoder."""

    lora: LoraSpec = LoraSpec()
    optimizer: AdaptOptimizer = AdaptOptimizer()
    card: Card = Card()


class FinetuneConfig(TaskTraining):
    """A fine-tuning run, stage 2 of One Model for All: everything is trained, the encoder at a rate of its own.

    Attributes:
        model: What stands on the univariate encoder.
        from_scratch: Fresh weights in an encoder of the same sizes: what pretraining has to be held against.
        channels: `union` = all channels that a task names, those a window lacks masked; `intersection` = only those
            that every training window has.
    """

    model: ArtGatConfig = ArtGatConfig()
    from_scratch: bool = False
    channels: Literal["union", "intersection"] = "union"
    optimizer: FinetuneOptimizer = FinetuneOptimizer()
