"""Verb of the trainer: pretrain."""

from pathlib import Path

import typer

from jobs.console import console, show_table
from manifests.config import load_config

ConfigPath = typer.Argument(help="YAML of the run.", metavar="CONFIG")
Overrides = typer.Argument(None, help="key=value, e.g. steps=2000", metavar="[KEY=VALUE]...")


def pretrain(
    config: Path = ConfigPath,
    overrides: list[str] = Overrides,
    ray: bool = typer.Option(True, help="Ray Train; without: this process alone, or the ranks of torchrun."),
) -> None:
    """Pretrain an encoder. Run the same command again to resume from the newest sound checkpoint.

    Example: kymo pretrain jobs/configs/pretrain_sleep.yaml steps=1000 num_workers=2
    """
    from trainer.collectives import rank
    from trainer.config import PretrainConfig

    settings = load_config(PretrainConfig, config, overrides or ())
    if ray:
        from trainer.launch import launch as train
    else:
        from trainer.loop import pretrain as train
    result = train(settings)
    if rank() != 0:
        return  # under torchrun one rank speaks for all
    loss = "" if result.loss is None else f", loss {result.loss:.4f}"
    console.print(f"step {result.step} of {settings.steps}{loss}; encoder: {result.encoder}", soft_wrap=True)
    if result.evaluation:
        show_scores("retrieval among held-out windows", result.evaluation)
    if result.is_finished:
        return
    if result.step != settings.stop_at:
        raise typer.Exit(130)
    console.print("stopped early, as stop_at says; run the same command again to go on")


def show_scores(title: str, scores: dict[str, float]) -> None:
    """Table of a retrieval's numbers."""
    show_table(title, ("score", "value"), [(name, f"{value:.4g}") for name, value in scores.items()])
