"""The figure of a model card: metrics of every task with their intervals against chance, and recall per label."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from adapters.layout import TaskRecord
from trainer.evaluation.figures import BLUE, FAINT, GREEN, INK, LINE
from trainer.evaluation.scores import METRICS

WIDTH_IN, ROW_IN, TITLE_IN, FOOT_IN = 8.6, 0.27, 0.5, 0.48  # inches
DPI = 110


def scored_split(record: TaskRecord) -> tuple[str, dict[str, Any]] | None:
    """The split that a task is judged by: `test`, or `val` where nothing was held out; None without any score."""
    for split in ("test", "val"):
        if (scores := record.scores.get(split)) and scores["metrics"]:
            return split, scores
    return None


def draw_records(records: Mapping[str, TaskRecord]) -> bytes:
    """PNG with a row of two panels per task; the same records give the same bytes."""
    panels = [(name, record, *found) for name, record in records.items() if (found := scored_split(record))]
    heights = [TITLE_IN + FOOT_IN + ROW_IN * max(3, len(s["metrics"]), len(_recalls(r, s))) for _, r, _, s in panels]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user has set in his matplotlibrc
        total = sum(heights) or 1.0
        figure = Figure(figsize=(WIDTH_IN, total), facecolor="white")
        canvas = FigureCanvasAgg(figure)
        if not panels:
            figure.text(0.5, 0.5, "no task was scored", color=FAINT, ha="center", va="center")
        top = total
        for (name, record, split, scores), height in zip(panels, heights, strict=True):
            few = f"{scores['n']:,} windows of {scores['subjects']} subject{'s' if scores['subjects'] != 1 else ''}"
            figure.text(0.02, (top - 0.16) / total, name, color=INK, fontsize=10.5, weight="bold", va="top")
            figure.text(0.98, (top - 0.16) / total, f"{split}: {few}", color=FAINT, fontsize=8.5, ha="right", va="top")
            bottom, tall = top - height + FOOT_IN, height - TITLE_IN - FOOT_IN
            metrics = {METRICS[metric]: entry for metric, entry in scores["metrics"].items()}
            for left, rows, colour in ((0.18, metrics, BLUE), (0.66, _recalls(record, scores), GREEN)):
                axes = figure.add_axes((left, bottom / total, 0.27, tall / total))
                _draw_rows(axes, rows, colour=colour, label="" if colour == BLUE else _recall_name(record))
            top -= height
        buffer = io.BytesIO()
        figure.set_dpi(DPI)
        # Without the version of matplotlib, so that the bytes tell the scores alone.
        canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _recall_name(record: TaskRecord) -> str:
    return "recall of each class" if record.task.loss == "cross_entropy" else "AUROC of each label"


def _recalls(record: TaskRecord, scores: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Per label its recall, or AUROC where labels are a yes or no each; `chance` where it is known."""
    if record.task.loss == "cross_entropy" or "per_label" not in scores:
        return dict(scores.get("recall") or {})
    found = {label: metrics.get("auroc") for label, metrics in scores["per_label"].items()}
    return {label: entry or {"value": None, "interval": None} for label, entry in found.items()}


def _draw_rows(axes: Any, rows: Mapping[str, Mapping[str, Any]], *, colour: str, label: str) -> None:
    """A dot with its 95 % interval per row, a grey tick at its chance level, the value at the right."""
    for row, entry in enumerate(rows.values()):
        if (chance := entry.get("chance")) is not None:
            axes.plot([chance, chance], [row - 0.32, row + 0.32], color=FAINT, linewidth=1.4)
        if entry["interval"]:
            axes.plot(entry["interval"], [row, row], color=colour, linewidth=2.2, alpha=0.55, solid_capstyle="butt")
        if entry["value"] is not None:
            axes.plot([entry["value"]], [row], marker="o", color=colour, markersize=5.5)
        text = "not defined" if entry["value"] is None else f"{entry['value']:.2f}"
        axes.annotate(
            text,
            (1.0, row),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            color=INK,
            fontsize=8,
            va="center",
        )
    low = min([0.0, *_lowest(list(rows.values()))])
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlim=(low - 0.02, 1.02))
    axes.set_xlabel(label or "value, 95 % interval; grey: chance", color=FAINT, fontsize=8)
    axes.tick_params(colors=INK, labelsize=8.5, length=0)
    axes.tick_params(axis="x", colors=FAINT, labelsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.grid(visible=True, axis="x", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)


def _lowest(entries: Sequence[Mapping[str, Any]]) -> list[float]:
    """Values and lower ends below zero, as Cohen's kappa may have."""
    ends = [value for entry in entries for value in (entry["value"], *(entry["interval"] or ())) if value is not None]
    return [end for end in ends if end < 0]
