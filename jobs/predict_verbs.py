"""Verb of prediction: predict."""

from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from jobs.console import console, show_table, windows_progress

if TYPE_CHECKING:
    from adapters.tables import Track
    from jobs.predict import FileRun


class Output(StrEnum):
    """Formats of predictions."""

    TABLE = "table"
    CSV = "csv"
    EDF = "edf"
    BIDS = "bids"


def predict(
    bundle: str = typer.Argument(
        help="Folder of a bundle, OWNER/NAME@VERSION on the hub, or URL@VERSION.", metavar="BUNDLE"
    ),
    file: Path = typer.Argument(
        help="A recording of any format that kymo scan shows; the .hea of a WFDB record.", metavar="FILE"
    ),
    task: list[str] = typer.Option([], help="Only this task; repeatable."),
    out: Path = typer.Option(Path(), help="Folder for the files; they are named after FILE and task."),
    output: list[Output] = typer.Option(
        [Output.TABLE, Output.CSV, Output.EDF],
        "--format",
        help="table: on the screen. csv. edf: EDF+ annotations. bids: events.tsv and its JSON. Repeatable.",
    ),
    picture: bool = typer.Option(True, help="Draw each task over time as PNG."),
    channel: list[str] = typer.Option([], help="LABEL=SYMBOL for a label that is not known; repeatable."),
    unit: list[str] = typer.Option([], help="LABEL=UNIT where the header's unit is missing or wrong; repeatable."),
    corpus: str | None = typer.Option(None, help="Corpus that FILE is like: its labels, units, layout."),
    mains: str = typer.Option("auto", help="Line frequency to notch out: 50, 60, none, or auto = as the signal shows."),
) -> None:
    """Predict on a recording that the bundle has never seen, from the bundle alone.

    Example: kymo predict demo/bundle night.edf --out predictions --channel "X7=eeg:C3-M2"
    """
    from adapters.bundle import load_bundle
    from adapters.source import bundle_folder
    from jobs.filter_vectors import check_filters
    from jobs.predict import open_file, stranger
    from jobs.prediction_files import PredictionFiles

    recorded = stranger(file, channels=channel, units=unit, corpus=corpus)
    loaded = load_bundle(bundle_folder(bundle, task or None), task or None)
    run = open_file(
        loaded, file, recorded, tasks=task or None, mains=mains, source="" if Path(bundle).is_dir() else bundle
    )
    check_filters(loaded.path, {name: loaded.records[name] for name in run.suits})
    formats: list[Any] = [item.value for item in output if item != Output.TABLE] + ["png"] * picture
    with PredictionFiles(run, out, formats) as files:
        with windows_progress(file.name, run.num_windows) as advance:
            for prediction in run.predictions(advance):
                files.add(prediction)
        written = files.commit()
    if Output.TABLE in output:
        show_predictions(file.name, files.tracks)
    show_fit(run)
    show_losses(run)
    for path in written:
        console.print(f"written: {escape(str(path))}", soft_wrap=True, highlight=False)


def show_fit(run: "FileRun") -> None:
    """Say which tasks the recording suits with which channels, and what was done about the line frequency."""
    for name, suits in run.fit().items():
        parts = [f"sees {', '.join(suits.used)}"]
        if suits.missing:
            parts.append(f"lacks {', '.join(suits.missing)} of its training, masked as in channel dropout")
        if suits.unseen:
            parts.append(f"never saw {', '.join(suits.unseen)} in training")
        console.print(f"[bold]{escape(name)}[/] {escape('; '.join(parts))}", soft_wrap=True, highlight=False)
    console.print(escape(run.mains), soft_wrap=True, highlight=False)


def show_predictions(file: str, tracks: Mapping[str, "Track"]) -> None:
    """A row per task and label: windows, their time, their share, the mean probability of the label in them."""
    rows: list[tuple[object, ...]] = []
    for name, track in tracks.items():
        labels, seconds = track.labels, track.duration_s
        counts = Counter(labels)
        best = track.probabilities.max(axis=1)
        order = [*track.record.task.labels, *(label for label in counts if label not in track.record.task.labels)]
        for label in (label for label in order if label in counts):
            places = [place for place, found in enumerate(labels) if found == label]
            told = f"{best[places].mean():.2f}" if label in track.record.task.labels else ""
            share = f"{100 * counts[label] / len(labels):.0f} %"
            rows.append((name, label, counts[label], clock(float(seconds[places].sum())), share, told))
    show_table(file, ("task", "label", "windows", "time", "share", "mean probability"), rows)


def show_losses(run: "FileRun") -> None:
    """Say which tasks, channels and windows were left out, and why."""
    for name, reason in run.refused.items():
        console.print(f"[yellow]{escape(name)} left out:[/] {escape(reason)}", soft_wrap=True, highlight=False)
    for label, reason in run.losses.unresolved:
        console.print(f"channel left out: {escape(label)} ({escape(reason)})", soft_wrap=True, highlight=False)
    if dropped := +run.losses.dropped:
        text = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        console.print(f"windows left out: {escape(text)}", soft_wrap=True, highlight=False)
    for name, count in (+run.left_out).items():
        text = f"{name}: {count} windows left out, whose channels are flat, clipped or missing for too long"
        console.print(f"[yellow]{escape(text)}[/]", soft_wrap=True, highlight=False)


def clock(seconds: float) -> str:
    """Time as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
