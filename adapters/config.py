"""Configuration of adaptation and of fine-tuning: encoder, tasks with their snapshots, what is trained, optimizer."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from adapters.running import Running
from trainer.config import FolderOnDisk
from trainer.models.art_gat import ArtGatConfig

Positive = Annotated[int, Field(ge=1)]
Temporal = Literal["trainable", "frozen"]
Method = Literal["lora", "full", "linear_probe", "hps", "mmoe", "cgc"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


PeftKind = Literal["lora", "rslora", "dora", "ia3", "loha", "lokr", "vera", "oft", "hra", "miss", "hira"]
REWRITES_BASE = (
    "writes its start into the weights of the base, which all tasks share: a second task would change the first, and "
    "without adapters the encoder would no longer be the base"
)
# Seen with peft 0.21 and two adapters on one base.
REFUSED_KINDS = {
    "pissa": REWRITES_BASE,
    "olora": REWRITES_BASE,
    "corda": REWRITES_BASE,
    "loftq": REWRITES_BASE,
    "adalora": "prunes ranks by a call after every step, with a schedule of its own",
    "boft": "compiles a CUDA extension while it is built; oft is its kin without one",
    "fourierft": "does not start from the base: a fresh adapter changes every output",
    "prefix_tuning": "adds tokens to a language model's prompt; a window has none",
    "prompt_tuning": "adds tokens to a language model's prompt; a window has none",
}


class LoraSpec(_Strict):
    """One adapter per task: on LoRA W + (alpha / r) B A, on every chosen linear layer of the blocks.

    Attributes:
        kind: The PEFT method; all tasks of a run and of a bundle have one. Those without a rank (ia3, oft), a scale
            (ia3, vera, oft, hra, miss, hira) or a dropout (ia3, hra) have no use for r, alpha or dropout.
        r: Rank; 8 was best in MTEEG, 4 to 32 were tried there.
        attn: `split` = an adapter each on q, k and v, as MTEEG's equations say; `fused` = one on a joint qkv layer,
            whose A they share, as its published numbers of parameters say (1.8 M for six tasks on LaBraM-Base).
        targets: Linear layers with an adapter: q, k, v, o of `attention`, fc1 and fc2 of `feed_forward`, or both.
    """

    kind: PeftKind = "lora"
    r: Positive = 8
    alpha: Positive = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    attn: Literal["split", "fused"] = "split"
    targets: Literal["attention", "feed_forward", "both"] = "both"

    @field_validator("kind", mode="before")
    @classmethod
    def _kind_leaves_the_base_alone(cls, kind: object) -> object:
        if reason := REFUSED_KINDS.get(str(kind)):
            raise ValueError(f"{kind} {reason}; choose another kind")
        return kind

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths in a block of the linear layers with an adapter."""
        attention = ("attn.qkv", "attn.o") if self.attn == "fused" else ("attn.q", "attn.k", "attn.v", "attn.o")
        return (
            *(attention if self.targets != "feed_forward" else ()),
            *(("fc1", "fc2") if self.targets != "attention" else ()),
        )

    @property
    def pattern(self) -> str:
        """Regular expression of the full paths: a bare `proj` or `all-linear` would hit the temporal encoder too."""
        return rf"blocks\.\d+\.({'|'.join(layer.replace('.', chr(92) + '.') for layer in self.layers)})"


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
    """Adapters take no weight decay: LoRA is a low-rank change already.

    The rates suit tiny encoders pretrained for minutes: there 1e-3 for the temporal encoder took staging of unseen
    synthetic sleepers from 0.62 to 0.83 balanced accuracy against 2e-4. One pretrained for days wants 1e-4.
    `lr_encoder` is that of the transformer where a method trains it (full, hps, mmoe, cgc).
    """

    lr_lora: Annotated[float, Field(ge=0)] = 1e-3
    lr_head: Annotated[float, Field(ge=0)] = 2e-3
    lr_temporal: Annotated[float, Field(ge=0)] = 1e-3
    lr_encoder: Annotated[float, Field(ge=0)] = 1e-3


class FinetuneOptimizer(TaskOptimizer):
    """The published rates of One Model for All: an encoder that is only nudged, and all that stands on it."""

    lr_encoder: Annotated[float, Field(ge=0)] = 5e-6
    lr_head: Annotated[float, Field(ge=0)] = 1e-4


class Card(_Strict):
    """What the model card says that cannot be read off the run.

    Attributes:
        licence: Of the bundle, an id of the hub's list; `other` until the holder of the data has decided. It may not
            grant more than those of the base and the corpora.
        intended_use: Sentences for the card.
        citation: How to cite the bundle; the corpora's own citations stand in the card by themselves.
    """

    title: str = "kymo adapters"
    licence: str = "other"
    authors: list[str] = []
    intended_use: str = "Research on EEG, ECG and sleep recordings like those of the corpora below."
    citation: str = ""


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

    run_dir: FolderOnDisk
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
    """An adaptation run: one adapter and one head per task on a frozen encoder, or a method to hold that against.

    Attributes:
        method: `lora` = adapters as `lora` describes them. The others see the same batches, steps and scores: `full` =
            all weights, for a run of one task; `linear_probe` = heads alone; `hps` = one encoder that all tasks train;
            `mmoe` and `cgc` = several encoders, weighted by a gate per task. Only `lora` makes a bundle.
        temporal: `frozen` = adapters and heads alone are trained, and tasks of earlier runs stay valid.
        experts: Encoders that all tasks share in mmoe and cgc.
        task_experts: Further encoders of each task in cgc.
    """

    method: Method = "lora"
    lora: LoraSpec = LoraSpec()
    temporal: Temporal = "trainable"
    experts: Positive = 6
    task_experts: Positive = 1
    optimizer: AdaptOptimizer = AdaptOptimizer()
    card: Card = Card()

    @model_validator(mode="after")
    def _method_suits_the_run(self) -> Self:
        if self.method == "full" and len(self.tasks) > 1:
            raise ValueError(
                f"method full trains one task, there are {len(self.tasks)}; give one task, or take hps, where they "
                "share an encoder"
            )
        if self.method != "lora" and self.temporal == "frozen":
            raise ValueError(f"temporal frozen goes with method lora, not with {self.method}; leave it out")
        return self


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
