"""What a person sees in a terminal: tables, a progress bar, log lines."""

import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

# Numbers are aligned right, everything else left.
RIGHT = {
    *("recordings", "subjects", "unreadable", "done", "quarantined", "hours", "MB", "share", "windows", "channels"),
    *("value", "chance", "seconds", "n", "bytes", "time", "mean probability"),
    *("samples", "weight", "quota", "repeats", "total repeats"),
    *("cache GB", "hit rate", "downloads per shard", "download MB/s"),
}

# A file or a pipe has no width; 80 columns would break the tables.
console = Console(width=None if sys.stdout.isatty() else 120)


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; nothing at all when it has no rows."""
    rows = list(rows)
    if not rows:
        return
    console.print(f"[bold]{escape(title)}[/]")
    console.print(table_of(columns, rows))


def table_of(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Table of plain rows; numbers stand right, floats have two digits."""
    table = Table(header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in RIGHT else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{value:,.2f}" if isinstance(value, float) else _cell(value) for value in row))
    return table


def _cell(value: object) -> str | Text:
    # What comes from a file's header is text, never markup; marks of our own are made of Text.
    return value if isinstance(value, Text) else escape(str(value))


def hours_progress() -> Progress:
    """Progress bar over hours of signal; tasks carry the texts `hours`, `speed` and `eta` as fields."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[hours]}"),
        TextColumn("{task.fields[speed]}"),
        TextColumn("{task.fields[eta]}"),
        console=console,
    )


@contextmanager
def bytes_progress(
    text: str, total: int | None, *, unit: Literal["bytes", "samples"] = "bytes"
) -> Iterator[Callable[[int], None]]:
    """Function that adds a number of bytes or samples to a progress bar; not drawn where no one looks on."""
    amount = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *amount,
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    with bar:
        task = bar.add_task(text, total=total)
        yield lambda num_bytes: bar.advance(task, num_bytes)


@contextmanager
def windows_progress(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """Function that adds a number of windows to a progress bar, which pulses until the first; drawn in a terminal."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.fields[windows]} windows"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    with bar:
        task = bar.add_task(f"{escape(text)}: reading", total=None, windows=total)

        def advance(count: int) -> None:
            if bar.tasks[0].total is None:
                bar.update(task, total=total, description=escape(text))
            bar.advance(task, count)

        yield advance


def set_up_logging(*, verbose: bool) -> None:
    """One handler for the whole process; a library of kymo only calls getLogger."""
    handler = RichHandler(console=console, show_path=False, show_level=False, log_time_format="%H:%M:%S")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    for package in ("adapters", "engine", "jobs", "manifests", "trainer"):
        logging.getLogger(package).setLevel(logging.DEBUG if verbose else logging.INFO)
    # DeepSpeed calls collectives by names that torch 2.13 has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
