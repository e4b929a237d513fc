"""Figures of the report: scores with intervals, channel ablation, map of embeddings; light, labelled directly."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

INK, FAINT, LINE = "#22272e", "#6a737d", "#eceff2"
BLUE, RED, GREEN, GREY = "#1f5a94", "#b5344c", "#2b8a78", "#8a939c"
COLOURS = (BLUE, RED, GREEN, "#b7791f", "#6b4fa0", "#3f7fbf", GREY, "#a0522d")
MAX_MAPPED = 1500


def draw_scores(entries: Sequence[Mapping[str, Any]], *, chance: float, title: str) -> Figure:
    """A dot and its 95 % interval per way to predict; entries have `name`, `value`, `interval` and `is_ours`."""
    figure = Figure(figsize=(7.2, 0.75 + 0.42 * len(entries)), facecolor="white")
    axes = figure.add_axes((0.34, 0.5 / (0.75 + 0.42 * len(entries)), 0.56, 1 - 0.8 / (0.75 + 0.42 * len(entries))))
    for row, entry in enumerate(entries):
        colour = BLUE if entry["is_ours"] else GREY
        if entry["interval"]:
            axes.plot(entry["interval"], [row, row], color=colour, linewidth=2, solid_capstyle="butt")
        if entry["value"] is not None:
            axes.plot([entry["value"]], [row], marker="o", color=colour, markersize=6)
            axes.annotate(
                f"{entry['value']:.3f}",
                (entry["value"], row),
                textcoords="offset points",
                xytext=(0, 7),
                ha="center",
                color=colour,
                fontsize=8,
            )
    axes.axvline(chance, color=FAINT, linewidth=1, linestyle="--")
    axes.text(chance, -0.75, " chance", color=FAINT, fontsize=8, ha="left", va="center")
    axes.set_yticks(range(len(entries)), [entry["name"] for entry in entries])
    axes.set(ylim=(len(entries) - 0.4, -1.0))
    axes.set_xlabel(f"{title}, 95 % interval over subjects", color=FAINT, fontsize=8)
    _plain(axes, grid="x")
    return figure


def draw_ablation(lines: Mapping[str, Mapping[str, Any]], *, title: str) -> Figure:
    """Mean and 95 % interval over subsets by number of channels, and 95 % of the first line's full score."""
    figure = Figure(figsize=(7.2, 3.6), facecolor="white")
    axes = figure.add_axes((0.1, 0.15, 0.66, 0.78))
    ends: list[tuple[float, str, str]] = []
    for (name, found), colour in zip(lines.items(), (BLUE, GREY, GREEN), strict=False):
        rows = sorted(found["counts"], key=lambda row: row["n"])
        n, mean = [row["n"] for row in rows], [row["mean"] for row in rows]
        low = [(row["interval"] or [row["mean"]] * 2)[0] for row in rows]
        high = [(row["interval"] or [row["mean"]] * 2)[1] for row in rows]
        axes.fill_between(n, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(n, mean, color=colour, marker="o", markersize=3.5, linewidth=1.5)
        ends.append((mean[-1], f"  {name}", colour))
    for height, (_, text, colour) in zip(_apart([end[0] for end in ends], gap=0.05), ends, strict=True):
        axes.text(1.0, height, text, color=colour, fontsize=8, va="center", transform=axes.get_yaxis_transform())
    first = next(iter(lines.values()))
    axes.axhline(first["threshold"], color=BLUE, linewidth=1, linestyle=":")
    axes.text(1, first["threshold"], "95 % of full", color=BLUE, fontsize=8, va="bottom")
    axes.axhline(first["chance"], color=FAINT, linewidth=1, linestyle="--")
    axes.text(1, first["chance"], "chance", color=FAINT, fontsize=8, va="bottom")
    if len(first["montage"]) > 24:
        axes.set_xscale("log", base=2)
    ticks = sorted({row["n"] for row in first["counts"]})
    shown = ticks if len(ticks) <= 16 else ticks[::2]
    axes.set_xticks(shown, [str(tick) for tick in shown])
    axes.minorticks_off()
    axes.set_xlabel("channels left", color=FAINT, fontsize=8)
    axes.set_ylabel(title, color=FAINT, fontsize=8)
    _plain(axes, grid="y")
    return figure


def draw_map(features: np.ndarray, target: np.ndarray, *, labels: Sequence[str], subjects: Sequence[str]) -> Figure:
    """First two principal components of standardised features, coloured by label and, beside it, by subject."""
    keep = np.unique(np.linspace(0, len(features) - 1, min(len(features), MAX_MAPPED)).round().astype(int))
    standard = (features - features.mean(axis=0)) / np.maximum(features.std(axis=0), 1e-9)
    _, _, axes_FD = np.linalg.svd(standard - standard.mean(axis=0), full_matrices=False)
    place = (standard @ axes_FD[:2].T)[keep]
    figure = Figure(figsize=(7.2, 3.5), facecolor="white")
    left, right = figure.subplots(1, 2)
    for k, label in enumerate(labels):
        own = target[keep] == k
        left.scatter(*place[own].T, s=7, color=COLOURS[k % len(COLOURS)], alpha=0.6, linewidths=0, label=label)
    left.legend(fontsize=7, frameon=False, markerscale=1.6, handletextpad=0.1, labelcolor=INK)
    names = np.unique(np.asarray(subjects)[keep], return_inverse=True)[1]
    right.scatter(*place.T, s=7, c=names, cmap="tab20", alpha=0.6, linewidths=0)
    for panel, title in ((left, "by label"), (right, "by subject")):
        panel.set_title(title, loc="left", color=INK, fontsize=9)
        panel.set(xticks=[], yticks=[])
        _plain(panel, grid=None)
    figure.tight_layout()
    return figure


def _apart(heights: Sequence[float], *, gap: float) -> list[float]:
    """The heights moved up so that no two are nearer than `gap`."""
    moved = [0.0] * len(heights)
    last = -np.inf
    for place in np.argsort(heights, kind="stable"):
        last = moved[place] = max(heights[place], last + gap)
    return moved


def svg_of(figure: Figure) -> str:
    """The figure as an SVG text that is the same at every run."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "kymo"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _plain(axes: Any, *, grid: str | None) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#b8bfc6")
    axes.tick_params(colors=INK, labelsize=8, length=0)
    if grid:
        axes.grid(visible=True, axis=grid, color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
