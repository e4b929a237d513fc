"""Stage 2 of One Model for All: a pretrained univariate encoder and a graph over channels, fine-tuned on tasks.

Unlike adaptation it trains every weight: the encoder at 5e-6, all that stands on it at 1e-4 (published). The run,
its order, checkpoints and scores are those of `adapters.train`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters.config import FinetuneConfig, TaskRun
from adapters.data import TaskData, load_task_data
from adapters.model import TaskModel, build_head
from adapters.train import Report, find_device, load_data, train_tasks
from adapters.update import Update
from manifests.errors import ConfigError
from trainer.batches import ChannelBatch
from trainer.export import load_encoder
from trainer.models.art_gat import ArtGat, ArtGatConfig
from trainer.models.univariate import UnivariateEncoder


class FinetuneModel(TaskModel):
    """An ArtGat that all tasks share, and one head per task."""

    def __init__(
        self, encoder: UnivariateEncoder, outputs: Mapping[str, int], *, config: ArtGatConfig, seed: int
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = ArtGat(encoder, config)
            self.heads = nn.ModuleDict({task: build_head(encoder.width, outputs[task]) for task in outputs})

    def forward(self, task: str, batch: ChannelBatch) -> torch.Tensor:
        """Logits (B, K) of a task."""
        return self.heads[task](self.body(batch).pooled_BD)

    def group(self, name: str) -> str:
        """`encoder`, or `head` for all that stands on it."""
        return "encoder" if name.startswith("body.encoder.") else "head"


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneResult:
    """A finished run. `model` holds the kept weights; `channels` is task -> symbols that it sees, None = all.

    `scores` and `data` are those of `adapters.train.AdaptResult`.
    """

    config: FinetuneConfig
    run_dir: Path
    model: FinetuneModel
    channels: dict[str, list[str] | None]
    data: dict[str, dict[str, Any]]
    scores: dict[str, dict[str, Any]]
    kept_step: int
    seconds: float


def finetune(config: FinetuneConfig, *, report: Report | None = None, update: type[Update] = Update) -> FinetuneResult:
    """A whole model trained on the tasks of a run or, if the run is finished already, read back.

    The same command continues an interrupted run from its newest checkpoint, bit for bit on a CPU.

    Args:
        config: The run.
        report: Called on the first rank with every row that goes to `metrics.jsonl`.
        update: What makes new weights of losses: `adapters.zero.ZeroUpdate` for `zero_stage` 1 and 2.

    Raises:
        ConfigError: The encoder is not univariate, a task has no training windows, its windows share no channels, or
            the run folder is that of another configuration or in use.
        KeyboardInterrupt: Somebody asked for a stop; the step in progress was finished and saved.
    """
    torch.set_num_threads(config.threads)
    device = find_device(config)
    data = load_data(config)
    if config.channels == "intersection":
        data = {item.task.id: _narrowed(item, run) for item, run in zip(data.values(), config.tasks, strict=True)}
    outputs = {name: len(item.task.labels) for name, item in data.items()}
    model = FinetuneModel(_encoder(config), outputs, config=config.model, seed=config.seed)
    result = train_tasks(config, model.to(device), data, report=report, update=update)
    return FinetuneResult(
        config=config,
        run_dir=Path(config.run_dir),
        model=model.cpu().eval(),
        channels={name: item.task.channels for name, item in data.items()},
        data=result["data"],
        scores=result["scores"],
        kept_step=result["kept_step"],
        seconds=result["seconds"],
    )


def _encoder(config: FinetuneConfig) -> UnivariateEncoder:
    encoder = load_encoder(Path(config.encoder))
    if not isinstance(encoder, UnivariateEncoder):
        raise ConfigError(
            f"encoder: {config.encoder} holds an encoder of kind {encoder.config.kind!r}; fine-tuning builds on "
            "channels that were encoded alone: give one of kind univariate, or use kymo adapt"
        )
    if not config.from_scratch:
        return encoder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return UnivariateEncoder(encoder.config)


def _narrowed(item: TaskData, run: TaskRun) -> TaskData:
    """The task's data with the channels that every training window has, and no others."""
    train = item.splits["train"]
    shared = [symbol for symbol, count in train.symbols.items() if count == len(train)]
    task = item.task.model_copy(update={"channels": sorted(shared)})
    for kind, least in task.min_channels.items():
        found = [symbol for symbol in shared if symbol.startswith(f"{kind}:")]
        if len(found) < least:
            raise ConfigError(
                f"channels: intersection: all {len(train)} training windows of task {task.id} share {len(found)} "
                f"channel(s) of {kind}, it needs {least}; use union, or snapshots of more like montages"
            )
    return load_task_data(task, run, cache=item.cache)
