"""Verbs of bundles: predict, publish."""

from collections import Counter
from pathlib import Path

import typer
from rich.markup import escape

from jobs.console import console, show_table

BundleDir = typer.Argument(help="Folder of a bundle.", metavar="BUNDLE")


def predict(
    bundle: Path = BundleDir,
    file: Path = typer.Argument(
        help="A recording of any format that kymo scan shows; the .hea of a WFDB record.", metavar="FILE"
    ),
    task: list[str] = typer.Option([], help="Only this task; repeatable."),
    out: Path = typer.Option(Path(), help="Folder for the CSV and EDF+ annotation files."),
    channel: list[str] = typer.Option([], help="LABEL=SYMBOL for a label that is not known; repeatable."),
    unit: list[str] = typer.Option([], help="LABEL=UNIT where the header's unit is missing or wrong; repeatable."),
    mains: int | None = typer.Option(None, help="Line frequency in Hz, 50 or 60, to be notched out."),
) -> None:
    """Predict on a recording that the bundle has never seen, from the bundle alone.

    Example: kymo predict demo/bundle night.edf --out predictions --channel "X7=eeg:C3-M2"
    """
    from adapters.bundle import load_bundle
    from adapters.predict import annotation_rows, write_csv
    from engine.annotate import write_annotations
    from jobs.predict import predict_file, stranger

    loaded = load_bundle(bundle, task or None)
    corpus = stranger(file, channels=channel, units=unit, mains_hz=mains)
    found = predict_file(loaded, file, corpus, tasks=task or None)
    for name, reason in found.refused.items():
        console.print(f"[yellow]{name} left out:[/] {escape(reason)}", soft_wrap=True)
    out.mkdir(parents=True, exist_ok=True)
    csv, edf = out / f"{file.stem}.predictions.csv", out / f"{file.stem}.predictions.edf"
    write_csv(csv, found.predictions)
    write_annotations(edf, annotation_rows(found.predictions))
    counts = Counter((item.task, item.label or "none") for item in found.predictions)
    show_table(file.name, ("task", "label", "windows"), [(*key, count) for key, count in sorted(counts.items())])
    for label, reason in found.unresolved.items():
        console.print(f"channel left out: {escape(label)} ({escape(reason)})", soft_wrap=True)
    if found.dropped:
        console.print("windows left out: " + ", ".join(f"{count} {why}" for why, count in found.dropped.items()))
    console.print(f"written: {csv}, {edf}")


def publish(
    bundle: Path = BundleDir,
    repo: str = typer.Argument(help="Repository on the hub, OWNER/NAME."),
    tag: str | None = typer.Option(None, help="Version to tag, e.g. v1.0.0; a tag is never moved."),
    endpoint: str | None = typer.Option(None, help="Hub to publish to; default: the client's own."),
    private: bool = typer.Option(True, help="Visibility of a new repository."),
    dry_run: bool = typer.Option(False, help="Show what would be sent; send nothing."),
) -> None:
    """Publish a bundle to a model hub in one commit. The token is the hub client's own (HF_TOKEN, or its login).

    Example: kymo publish demo/bundle my-lab/sleep-adapters --tag v1.0.0 --dry-run
    """
    from adapters.publish import publish as push

    done = push(bundle, repo, endpoint=endpoint, private=private, tag=tag, dry_run=dry_run)
    for name in done.uploaded:
        console.print(f"  {name}")
    for name in done.deleted:
        console.print(f"  {name} (removed)")
    what = f"commit {done.commit}" if done.commit else "dry run, nothing was sent"
    console.print(f"{len(done.uploaded)} files → {done.repo_id}, tag {done.tag}: {what}")
