"""Verbs of the adapters: adapt, finetune, ablate."""

from pathlib import Path

import typer

from jobs.console import console, show_table
from manifests.config import load_config

ConfigPath = typer.Argument(help="YAML of the run.", metavar="CONFIG")
Overrides = typer.Argument(None, help="key=value, e.g. steps=500", metavar="[KEY=VALUE]...")


def adapt(
    config: Path = ConfigPath,
    overrides: list[str] = Overrides,
    bundle: Path | None = typer.Option(None, help="Write a bundle here when the run is finished."),
    base: str | None = typer.Option(
        None, help="OWNER/NAME@COMMIT of the encoder on the hub; the bundle then refers to it instead of holding it."
    ),
) -> None:
    """Train one LoRA adapter and one head per task on a frozen encoder. Run the same command again to resume.

    Ctrl-C finishes the step, saves and ends; num_workers=4 trains on workers of Ray, as torchrun's ranks do.

    Example: kymo adapt jobs/configs/adapt.yaml --bundle demo/bundle
    """
    from adapters.bundle import write_bundle
    from adapters.config import AdaptConfig
    from adapters.layout import parse_reference
    from jobs.filter_vectors import with_filters
    from jobs.learn import learn_adapters
    from trainer.collectives import rank

    result = learn_adapters(load_config(AdaptConfig, config, overrides or ()))
    if rank() != 0:
        return  # under torchrun one rank speaks for all
    show_task_scores(result.scores)
    if bundle is not None:
        write_bundle(with_filters(result), bundle, base=parse_reference(base) if base else None)
        console.print(f"bundle: {bundle}. Next: kymo predict {bundle} FILE.edf")


def finetune(config: Path = ConfigPath, overrides: list[str] = Overrides) -> None:
    """Train a graph over channels on a univariate encoder, every weight. Run the same command again to resume.

    Example: kymo finetune jobs/configs/real/finetune_fists.yaml model.graph=gcn run_dir=demo/runs/fists_gcn
    """
    from adapters.config import FinetuneConfig
    from jobs.learn import learn_model
    from trainer.collectives import rank

    result = learn_model(load_config(FinetuneConfig, config, overrides or ()))
    if rank() != 0:
        return
    show_task_scores(result.scores)
    for task, symbols in result.channels.items():
        if symbols is not None:
            console.print(f"{task}: {len(symbols)} channels that all training windows have", soft_wrap=True)
    console.print(f"weights of step {result.kept_step}: {result.run_dir}")


def ablate(
    config: Path = typer.Argument(help="YAML of the runs to compare.", metavar="CONFIG"),
    overrides: list[str] = typer.Argument(None, help="key=value, e.g. set=[steps=500]", metavar="[KEY=VALUE]..."),
) -> None:
    """Compare adaptation runs that differ in a few keys: a table and a picture. Run it again to go on.

    Example: kymo ablate jobs/configs/ablate_demo.yaml seeds=[0,1,2]
    """
    from adapters.ablate import AblationConfig, Row
    from adapters.ablate import ablate as compare
    from adapters.ablate_table import write_table
    from jobs.learn import learn_adapters
    from trainer.collectives import rank

    settings = load_config(AblationConfig, config, overrides or ())

    def write(rows: list[Row]) -> None:
        if rank() == 0:  # under torchrun one rank speaks for all
            write_table(Path(settings.run_dir), rows)

    rows = compare(settings, learn=learn_adapters, report=write)
    if rank() != 0:
        return
    show_table(
        "ablation",
        ("variant", "task", "metric", "value", "95 % interval", "trainable", "seconds"),
        [
            (
                *(row.variant, row.task, row.metric, "undefined" if row.value is None else f"{row.value:.3f}"),
                " to ".join(f"{end:.3f}" for end in row.interval or ()),
                *(f"{row.trainable:,}", row.seconds),
            )
            for row in rows
        ],
    )
    console.print(f"{settings.run_dir}/ablation.md, ablation.csv, ablation.png", soft_wrap=True)


def show_task_scores(scores: dict[str, dict]) -> None:
    """A table of every task and split: scores with chance level and interval over subjects."""
    from trainer.evaluation.bootstrap import FEW_SUBJECTS
    from trainer.evaluation.scores import METRICS

    for task, splits in scores.items():
        for split, found in splits.items():
            if found is None:
                continue
            rows = []
            for metric, entry in found["metrics"].items():
                interval = " to ".join(f"{bound:.3f}" for bound in entry["interval"]) if entry["interval"] else ""
                chance = "" if entry["chance"] is None else f"{entry['chance']:.3f}"
                value = "undefined" if entry["value"] is None else f"{entry['value']:.3f}"
                rows.append((METRICS[metric], value, chance, interval))
            few = "; over so few the interval is too narrow" if found["subjects"] < FEW_SUBJECTS else ""
            title = f"{task}, {split}: {found['n']:,} windows of {found['subjects']} subjects{few}"
            show_table(title, ("metric", "value", "chance", "95 % interval"), rows)
