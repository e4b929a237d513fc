"""Figures of the report: hours, coverage, losses, label shares, loss curves; light, labelled directly, no pyplot."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.preview import FAINT, INK, KIND_COLOURS
from engine.report_data import Losses, symbol_order

BLUE = "#1f5a94"
LOSS = "#b5344c"
GREY = "#c9d0d7"
WIDTH = 10.0
SPLITS = ("train", "val", "test")
RETRIEVAL = "held-out retrieval top-1"


def _bare(axes: Axes) -> None:
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0, colors=INK, labelsize=9)


def _figure(
    height: float, left_inches: float, *, top_inches: float = 0.45, bottom_inches: float = 0.25
) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    box = (
        left_inches / WIDTH,
        bottom_inches / height,
        1 - (left_inches + 0.4) / WIDTH,
        1 - (top_inches + bottom_inches) / height,
    )
    return figure, figure.add_axes(box)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def draw_hours(corpora: Sequence[str], kinds: Sequence[str], hours: np.ndarray) -> Figure:
    """Hours of windows with a kind, one row a corpus; bars in each cell share one scale."""
    figure, axes = _figure(0.8 + 0.42 * len(corpora), 1.9)
    longest = float(hours.max()) or 1.0
    for row, column in ((row, column) for row in range(len(corpora)) for column in range(len(kinds))):
        value = float(hours[row, column])
        axes.barh(row, 1.0 * 0.92, left=column, height=0.62, color="#f1f3f5")
        axes.barh(row, value / longest * 0.92, left=column, height=0.62, color=KIND_COLOURS[kinds[column]], alpha=0.35)
        text = f"{_number(value)} h" if value else "–"
        axes.text(column + 0.05, row, text, va="center", color=INK if value else FAINT, fontsize=9)
    axes.set(xlim=(0, max(len(kinds), 5)), ylim=(len(corpora) - 0.4, -0.6))
    axes.set_xticks(np.arange(len(kinds)) + 0.05, kinds, ha="left")
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(corpora)), corpora)
    _bare(axes)
    for label, kind in zip(axes.get_xticklabels(), kinds, strict=True):
        label.set(color=KIND_COLOURS[kind], fontweight="bold")
    return figure


def most_frequent(counts: Counter[str], limit: int) -> list[str]:
    """Symbols to draw, in the order of the channel table: the commonest, but up to eight of each kind first."""
    ranks: Counter[str] = Counter()
    ranked = []
    for symbol, count in sorted(counts.items(), key=lambda item: (-item[1], symbol_order(item[0]))):
        kind = symbol.partition(":")[0]
        ranked.append((ranks[kind] >= 8, -count, symbol_order(symbol), symbol))
        ranks[kind] += 1
    return sorted((symbol for *_, symbol in sorted(ranked)[:limit]), key=symbol_order)


def _draw_presence(axes: Axes, present: np.ndarray, row: int, *, left: float, width: float, colour: str) -> None:
    """One row of one corpus: a mark for each recording that has the channel, neighbours joined when there are many."""
    step = width / len(present)
    gap = 0.12 * step if len(present) <= 40 else 0.0  # a gap finer than a pixel draws as stripes
    edges = np.flatnonzero(np.diff(np.concatenate([[0], present.astype(int), [0]])))
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        pieces = range(start, stop) if gap else [start]
        length = step - gap if gap else step * (stop - start)
        marks = [(left + piece * step, length) for piece in pieces]
        axes.broken_barh(marks, (row - 0.38, 0.76), color=colour, linewidth=0)


def draw_coverage(channels: Mapping[tuple[str, str], frozenset[str]], *, max_symbols: int = 120) -> tuple[Figure, int]:
    """Channels (rows) by recording (columns, one block a corpus), and how many rare channels are not drawn.

    The blocks are equally wide, however many recordings they stand for; at the right is the share of all recordings.
    """
    counts = Counter(symbol for symbols in channels.values() for symbol in symbols)
    kept = most_frequent(counts, max_symbols)
    corpora = sorted({corpus for corpus, _ in channels})
    is_crowded = len(corpora) > 5
    figure, axes = _figure(
        (1.7 if is_crowded else 0.75) + 0.21 * max(4, len(kept)), 1.9, top_inches=1.3 if is_crowded else 0.4
    )
    for number, corpus in enumerate(corpora):
        recordings = sorted(key for key in channels if key[0] == corpus)
        for row, symbol in enumerate(kept):
            present = np.array([symbol in channels[recording] for recording in recordings])
            colour = KIND_COLOURS.get(symbol.partition(":")[0], FAINT)
            _draw_presence(axes, present, row, left=number, width=0.95, colour=colour)
        axes.text(
            number,
            -0.9,
            f"{corpus} ({len(recordings):,})",
            color=INK,
            fontsize=9,
            rotation=35 if is_crowded else 0,
            rotation_mode="anchor",
        )
        axes.axvspan(number, number + 0.95, color="#f6f7f9", zorder=0, linewidth=0)
    for row, symbol in enumerate(kept):
        share = counts[symbol] / len(channels)
        axes.text(len(corpora) * 1.0, row, f"{share:.0%}", va="center", color=FAINT, fontsize=8)
    axes.set(xlim=(0, max(1, len(corpora))), ylim=(len(kept) - 0.4, -0.7), xticks=[])
    axes.set_yticks(range(len(kept)), kept)
    axes.set_xlabel("one column per recording", color=FAINT, fontsize=8)
    _bare(axes)
    for label, symbol in zip(axes.get_yticklabels(), kept, strict=True):
        label.set(color=KIND_COLOURS.get(symbol.partition(":")[0], FAINT), fontsize=8)
    return figure, len(counts) - len(kept)


def draw_losses(counts: Losses) -> Figure:
    """Two waterfalls, recordings and windows: what came in, what was lost and why, what is left."""
    blocks = [
        [("recordings found", counts.found, ""), *_steps(counts.quarantined), ("converted", counts.committed, "end")],
        [("windows cut", counts.cut, ""), *_steps(counts.dropped), ("windows kept", counts.kept, "end")],
    ]
    num_rows = sum(len(block) for block in blocks) + 1
    figure, axes = _figure(0.5 + 0.3 * num_rows, 2.4, top_inches=0.1)
    row = 0
    names: dict[int, str] = {}
    for block in blocks:
        total = max(1, block[0][1])
        level = total
        for name, count, kind in block:
            is_loss = kind == "loss"
            start = level - count if is_loss else 0
            axes.barh(row, count / total, left=start / total, height=0.66, color=LOSS if is_loss else BLUE)
            level = start if is_loss else level
            share = f"  {count / total:.1%}" if kind else ""
            text = f"{'−' if is_loss else ''}{count:,}{share}" if count or not is_loss else "none"
            end = (start + count) / total
            if is_loss and start / total > 0.5:
                axes.text(start / total - 0.008, row, text, va="center", ha="right", color=LOSS, fontsize=9)
            else:
                axes.text(end + 0.008, row, text, va="center", color=LOSS if is_loss else INK, fontsize=9)
            names[row] = name
            row += 1
        row += 1
    axes.set(xlim=(0, 1.16), ylim=(num_rows - 0.4, -0.6), xticks=[])
    axes.set_yticks(list(names), list(names.values()))
    _bare(axes)
    return figure


def _steps(reasons: Mapping[str, int]) -> list[tuple[str, int, str]]:
    return [(reason, count, "loss") for reason, count in reasons.items()] or [("lost", 0, "loss")]


def draw_labels(by_split: Mapping[str, Counter[str]], order: Sequence[str], *, noun: str) -> Figure:
    """Share of each label within a split, and its number: one panel a split, one row a label."""
    splits = [split for split in SPLITS if split in by_split]
    height = 0.75 + 0.3 * len(order)
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    left = 1.9 / WIDTH
    panel = (1 - left - 0.02) / max(1, len(splits))
    largest = max(max(counts.values()) / counts.total() for counts in by_split.values())
    for number, split in enumerate(splits):
        counts = by_split[split]
        axes = figure.add_axes((left + number * panel, 0.12 / height, panel * 0.94, 1 - 0.6 / height))
        shares = [counts[label] / counts.total() for label in order]
        axes.barh(range(len(order)), shares, height=0.64, color=BLUE, alpha=0.75)
        for row, (label, share) in enumerate(zip(order, shares, strict=True)):
            text = f"{share:.0%} · {counts[label]:,}" if counts[label] else "none"
            axes.text(
                share + largest * 0.03, row, text, va="center", color=INK if counts[label] else LOSS, fontsize=8.5
            )
        axes.set(xlim=(0, largest * 1.55), ylim=(len(order) - 0.4, -0.6), xticks=[])
        axes.set_yticks(range(len(order)), order if number == 0 else [""] * len(order))
        axes.set_title(f"{split}  {counts.total():,} {noun}", loc="left", color=INK, fontsize=10)
        _bare(axes)
    return figure


def _curves(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[tuple[float, float]]]]:
    """(title, colour, points) of each curve: the loss, one per task where there are several, and retrieval."""
    tasks = sorted({task for row in rows if isinstance(row.get("loss"), Mapping) for task in row["loss"]})
    curves = [
        (f"training loss, {task}", BLUE, [(row["step"], row["loss"][task]) for row in rows if "loss" in row])
        for task in tasks
    ]
    if not tasks:
        curves.append(("training loss", BLUE, [(r["step"], r["loss"]) for r in rows if r.get("loss") is not None]))
    retrieval = [(row["step"], row["eval_top1"]) for row in rows if row.get("eval_top1") is not None]
    return [*curves, (RETRIEVAL, "#2b8a78", retrieval)] if retrieval else curves


def draw_training(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss over steps and, where logged, the held-out top-1 over chance; last values stand at the curves' ends."""
    curves = _curves(rows)
    figure = Figure(figsize=(WIDTH, 2.9), facecolor="white")
    for number, (title, colour, points) in enumerate(curves):
        axes = figure.add_subplot(1, len(curves), number + 1)
        steps, values = (np.array(column, dtype=float) for column in zip(*points, strict=True))
        axes.plot(steps, values, color=colour, linewidth=1.5, marker="o" if len(points) < 40 else "", markersize=3)
        axes.annotate(
            f" {values[-1]:.3g}", (steps[-1], values[-1]), color=colour, fontsize=9, va="center", fontweight="bold"
        )
        chances = [(row["step"], row["eval_chance"]) for row in rows if title == RETRIEVAL and "eval_chance" in row]
        if chances:
            axes.plot(*zip(*chances, strict=True), color=FAINT, linewidth=1, linestyle="--")
            axes.annotate(f" chance {chances[-1][1]:.3g}", chances[-1], color=FAINT, fontsize=9, va="center")
            axes.set_ylim(bottom=0)
        axes.set_title(title, loc="left", color=INK, fontsize=10)
        axes.set_xlabel("step", color=FAINT, fontsize=8)
        axes.margins(x=0.14 if chances else 0.08)
        axes.tick_params(colors=FAINT, labelsize=8, length=3)
        axes.grid(visible=True, axis="y", color="#eceff2", linewidth=0.8)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color("#b8bfc6")
    figure.tight_layout(w_pad=3)
    return figure
