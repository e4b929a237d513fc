"""The rows of an ablation as a CSV, as a Markdown table, and as a picture."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from adapters.ablate import Row
from manifests.config import write_atomically
from trainer.evaluation.figures import BLUE, FAINT, GREY, INK, LINE
from trainer.evaluation.scores import METRICS

COLUMNS = (
    *("variant", "task", "metric", "value", "low", "high", "lowest_seed", "highest_seed", "chance"),
    *("seeds", "windows", "subjects", "trainable", "seconds"),
)
NAMES_IN, PANEL_IN, RIGHT_IN, ROW_IN, TITLE_IN, FOOT_IN = 2.5, 2.3, 1.6, 0.34, 0.5, 0.68  # inches
DPI = 120


def write_table(folder: Path, rows: Sequence[Row]) -> dict[str, Path]:
    """Write `ablation.csv`, `ablation.md` and `ablation.png`; returns their paths by suffix."""
    content = {"csv": csv_text(rows), "md": markdown_text(rows), "png": draw_rows(rows)}
    paths = {suffix: folder / f"ablation.{suffix}" for suffix in content}
    for suffix, path in paths.items():
        write_atomically(path, content[suffix])
    return paths


def csv_text(rows: Sequence[Row]) -> str:
    """A line per variant and task, numbers in full; an empty field is undefined."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        spans = (*(row.interval or (None, None)), *(row.extremes or (None, None)))
        head = (row.variant, row.task, row.metric, row.value, *spans, row.chance)
        writer.writerow([*head, row.seeds, row.windows, row.subjects, row.trainable, row.seconds])
    return text.getvalue()


def markdown_text(rows: Sequence[Row]) -> str:
    """A line per variant, a column per task: `0.812 (0.744–0.871)`."""
    tasks, by_variant = _ordered(rows)
    head = ["variant", *(f"{task}: {METRICS[metric]}" for task, metric in tasks.items()), "trainable", "seconds"]
    lines = [_line(head), _line(["---", *["---:"] * (len(tasks) + 2)])]
    for variant, found in by_variant.items():
        any_row = next(iter(found.values()))
        cells = [_cell(found.get(task)) for task in tasks]
        lines.append(_line([variant, *cells, f"{any_row.trainable:,}", f"{any_row.seconds:g}"]))
    seeds = sorted({row.seeds for row in rows})
    few = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    note = f"Mean of {few} seed{'s' if seeds[-1] != 1 else ''}; 95 % interval over subjects in brackets. Scored on:"
    scored = [f"* {task}: {_scored_on(next(row for row in rows if row.task == task))}" for task in tasks]
    return "\n".join([*lines, "", note, "", *scored, ""])


def _scored_on(row: Row) -> str:
    """`1,200 windows of 8 subjects`."""
    return f"{row.windows:,} window{'s'[: row.windows != 1]} of {row.subjects} subject{'s'[: row.subjects != 1]}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _cell(row: Row | None) -> str:
    if row is None or row.value is None:
        return ""
    interval = f" ({row.interval[0]:.3f}–{row.interval[1]:.3f})" if row.interval else ""
    return f"{row.value:.3f}{interval}"


def _ordered(rows: Sequence[Row]) -> tuple[dict[str, str], dict[str, dict[str, Row]]]:
    """Tasks with their metric, and variants with their rows by task, both in the order they came."""
    by_variant: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_variant.setdefault(row.variant, {})[row.task] = row
    return {row.task: row.metric for row in rows}, by_variant


def draw_rows(rows: Sequence[Row]) -> bytes:
    """PNG with a panel per task: a dot and its interval per variant, seeds as fine ticks, the first variant as a band.

    The same rows give the same bytes.
    """
    tasks, by_variant = _ordered(rows)
    width = NAMES_IN + PANEL_IN * len(tasks) + RIGHT_IN
    height = TITLE_IN + ROW_IN * len(by_variant) + FOOT_IN
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user has set in his matplotlibrc
        figure = Figure(figsize=(width, height), facecolor="white")
        canvas = FigureCanvasAgg(figure)
        tall = ROW_IN * len(by_variant) / height
        figure.text(
            0.01,
            0.02,
            "bars: 95 % interval over subjects\nband: that of the first row\nticks: lowest and highest seed",
            color=FAINT,
            fontsize=7.5,
        )
        for column, (task, metric) in enumerate(tasks.items()):
            left = (NAMES_IN + PANEL_IN * column) / width
            axes = figure.add_axes((left, FOOT_IN / height, 0.84 * PANEL_IN / width, tall))
            found = [of_task.get(task) for of_task in by_variant.values()]
            label = f"{METRICS[metric]}; dashes: chance\n{_scored_on(next(row for row in found if row))}"
            _draw_panel(axes, found, title=task, label=label)
            axes.set_yticks(range(len(by_variant)), list(by_variant) if column == 0 else [""] * len(by_variant))
        _write_costs(figure, list(by_variant.values()), left=1 - RIGHT_IN / width, bottom=FOOT_IN / height, tall=tall)
        figure.set_dpi(DPI)
        buffer = io.BytesIO()
        # Without the version of matplotlib, so that the bytes tell the rows alone.
        canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _draw_panel(axes: Any, rows: Sequence[Row | None], *, title: str, label: str) -> None:
    reference = rows[0]
    if reference is not None and reference.interval is not None:
        axes.axvspan(*reference.interval, color=BLUE, alpha=0.08, linewidth=0)
    for place, row in enumerate(rows):
        if row is None or row.value is None:
            text = "no run" if row is None else "not defined"
            axes.text(0.5, place, text, color=FAINT, fontsize=8, va="center", transform=axes.get_yaxis_transform())
            continue
        colour = BLUE if place == 0 else GREY
        if row.interval is not None:
            axes.plot(row.interval, [place, place], color=colour, linewidth=2.4, alpha=0.6, solid_capstyle="butt")
        if row.extremes is not None and row.seeds > 1:
            for end in row.extremes:
                axes.plot([end, end], [place - 0.11, place + 0.11], color=colour, linewidth=1)
        axes.plot([row.value], [place], marker="o", color=colour, markersize=5.5)
        above = {"textcoords": "offset points", "xytext": (0, 5), "ha": "center", "fontsize": 7.5}
        axes.annotate(f"{row.value:.2f}", (row.value, place), color=colour, **above)
    chances = {row.chance for row in rows if row is not None and row.chance is not None}
    for chance in chances:
        axes.axvline(chance, color=FAINT, linewidth=1, linestyle="--")
    axes.set(ylim=(len(rows) - 0.45, -0.7))
    axes.set_title(title, loc="left", color=INK, fontsize=9.5)
    axes.set_xlabel(label, color=FAINT, fontsize=8)
    axes.margins(x=0.12)
    axes.tick_params(axis="y", colors=INK, labelsize=8.5, length=0)
    axes.tick_params(axis="x", colors=FAINT, labelsize=8, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.grid(visible=True, axis="x", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)


def _write_costs(
    figure: Figure, by_variant: Sequence[dict[str, Row]], *, left: float, bottom: float, tall: float
) -> None:
    """Trainable parameters and seconds of each variant, at the right."""
    axes = figure.add_axes((left, bottom, 1 - left, tall))
    axes.set(ylim=(len(by_variant) - 0.45, -0.7), xlim=(0, 1))
    axes.axis("off")
    for place, found in enumerate(by_variant):
        row = next(iter(found.values()))
        for right, text in ((0.5, _short(row.trainable)), (0.9, f"{row.seconds:.0f} s")):
            axes.text(right, place, text, color=INK, fontsize=8.5, ha="right", va="center")
    for right, text in ((0.5, "trainable"), (0.9, "time")):
        axes.text(right, -0.82, text, color=FAINT, fontsize=8, ha="right", va="bottom")


def _short(count: int) -> str:
    """1234567 as 1.23 M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
