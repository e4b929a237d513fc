"""Verb of exports: export."""

from typing import Literal

import typer

from jobs.console import console


def export(
    run: str = typer.Argument(help="Folder of a pretraining run, or its storage (s3://…).", metavar="RUN"),
    out: str = typer.Argument(help="File to write, local or in a store: NAME.safetensors.", metavar="OUT"),
    step: str = typer.Option("newest", help="Checkpoint: a number of steps, `newest`, or `best` by keep_best."),
    what: Literal["encoder", "model"] = typer.Option("encoder", help="The encoder alone, or with its objective."),
    dtype: Literal["fp32", "bf16"] = typer.Option("fp32", help="Of the weights."),
    licence: str | None = typer.Option(None, help="Of the weights, e.g. cc-by-4.0; default: the run's `licence`."),
) -> None:
    """Write the encoder or the model of a checkpoint to one safetensors file with its configuration.

    Example: kymo export demo/runs/sleep demo/sleep.safetensors --step best
    """
    import torch

    from trainer.export_run import export_run
    from trainer.storage import location

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    chosen = None if step == "newest" else step
    card = export_run(run, location(out), step=chosen, what=what, dtype=dtypes[dtype], licence=licence)
    console.print(f"{what} of kind {card.kind!r}, step {card.step}, {dtype}: {out}", soft_wrap=True)
