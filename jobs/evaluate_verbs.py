"""Verb of evaluation: evaluate."""

from pathlib import Path

import typer

from jobs.console import console, show_table
from manifests.config import load_config, validate


def evaluate(
    run: Path = typer.Argument(help="Folder of a pretraining run or of an encoder, or YAML.", metavar="RUN"),
    overrides: list[str] = typer.Argument(None, help="key=value, e.g. ablation=null", metavar="[KEY=VALUE]..."),
    tasks: str = typer.Option("", help="Tasks, with commas; without: all whose labels the data have."),
    data: list[str] = typer.Option([], help="Snapshot to try the tasks on; without: those of the run."),
    folds: str = typer.Option("", help="split, subjects (leave one out), or a number of folds."),
    out: Path = typer.Option(None, help="Folder of the report; without: evaluation/ in the run."),
) -> None:
    """Score a pretrained encoder: frozen probes beside random weights and band power, as an HTML report.

    Example: kymo evaluate demo/runs/sleep --tasks sleep_staging
    """
    from manifests.config import apply_overrides, parse_yaml
    from trainer.evaluation.assess import evaluate_run, plan_tasks
    from trainer.evaluation.config import EvaluateConfig
    from trainer.evaluation.report import REPORT_FILE

    is_yaml = run.suffix in {".yaml", ".yml"}
    settings = (
        load_config(EvaluateConfig, run, overrides or ())
        if is_yaml
        else validate(EvaluateConfig, apply_overrides({"run": str(run)}, overrides or ()), where="kymo evaluate")
    )
    chosen = plan_tasks(
        settings,
        names=[name for name in tasks.split(",") if name],
        snapshots=data,
        folds=parse_yaml(folds, where="--folds") if folds else None,
    )
    settings = settings.model_copy(update={"tasks": chosen, **({"out": str(out)} if out else {})})
    scores = evaluate_run(settings, tell=lambda text: console.print(text, style="dim", soft_wrap=True))
    show_evaluation(scores)
    where = Path(settings.out) if settings.out else Path(settings.run) / "evaluation"
    console.print(f"report: {where / REPORT_FILE}", soft_wrap=True)


def show_evaluation(scores: dict) -> None:
    """Tables of the retrieval and of every task, and the sentences of the report."""
    from trainer.evaluation.report import sentences
    from trainer.evaluation.seen import sentence

    retrieval = (scores["retrieval"] or {}).get("scores", {})
    show_table("retrieval among held-out windows", ("score", "value"), [(k, f"{v:.4g}") for k, v in retrieval.items()])
    for task in scores["tasks"]:
        rows = []
        for name, method in task["methods"].items():
            for metric in ("balanced_accuracy", "kappa", "auroc"):
                entry = method["metrics"].get(metric)
                if entry and entry["value"] is not None:
                    bounds = " to ".join(f"{bound:.3f}" for bound in entry["interval"] or ())
                    rows.append((name, metric, f"{entry['value']:.3f}", f"{entry['chance']:.3f}", bounds))
        show_table(task["title"], ("features", "metric", "value", "chance", "95 % interval"), rows)
        for line in [*sentences(task), sentence(task["pretrain_seen"])]:
            console.print(line, soft_wrap=True)
