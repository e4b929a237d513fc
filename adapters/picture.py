"""Pictures of predictions: hypnogram or event strip over time, and the probability of every class below it."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from adapters.tables import Track, is_staging

INK, FAINT, LINE = "#22272e", "#5f6872", "#e6e9ec"
# Okabe and Ito, Color Universal Design (2008): told apart under every form of colour blindness.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#22272e")
STAGE_COLOURS = {"W": "#E69F00", "R": "#D55E00", "N1": "#9ad0f0", "N2": "#3b8bc4", "N3": "#123c69"}
STAGE_ORDER = ("W", "R", "N1", "N2", "N3")  # from the top of a hypnogram
STEPS_S = (1, 2, 5, 10, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 14400, 21600, 43200, 86400)
MAX_TICKS = 12
LABEL_GAP = 0.02  # between the labels of the rows and what they are, of the panel's width
CHARACTER = 0.0055  # width of one in a label, of the figure's


def draw_track(track: Track, *, file: str, bundle: str, start_time: str = "") -> Figure:
    """Two panels over one time axis.

    Above, which class when: a hypnogram where the classes are sleep stages, else a strip with a row per class. Below,
    the probabilities: stacked to 1 for exclusive classes, a line each for yes/no labels, with 0.5 marked.

    Args:
        track: Predictions of one task, at least one.
        file: Name of the recording, for the title.
        bundle: What made the predictions, for the title.
        start_time: HH:MM:SS at which the recording began, where that is known.
    """
    labels = track.record.task.labels
    rows = [stage for stage in STAGE_ORDER if stage in labels] if is_staging(track.record) else list(labels)
    colours = _colours(labels)
    upper, lower = 0.34 * len(rows) + 0.25, 1.9
    height = upper + lower + 1.75
    figure = Figure(figsize=(11, height), dpi=130, facecolor="white")
    longest = max(len(label) for label in labels)
    left = 0.075 + CHARACTER * max(longest, 4)
    width = 1 - left - 0.05 - CHARACTER * max(longest, 8)
    above = figure.add_axes((left, (lower + 0.95) / height, width, upper / height))
    below = figure.add_axes((left, 0.65 / height, width, lower / height), sharex=above)
    begin, end = track.onset_s, _ends(track)
    _draw_rows(above, track, rows, colours, begin=begin, end=end)
    _draw_probabilities(below, track, rows, colours, begin=begin, end=end)
    above.tick_params(labelbottom=False)
    _time_axis(below, float(begin[0]), float(end.max()), start_time=start_time)
    figure.text(left, 1 - 0.33 / height, track.record.task.title, color=INK, fontsize=12, weight="bold", va="center")
    hours = f"{len(track):,} windows of {track.duration_s[0]:g} s"
    figure.text(left, 1 - 0.6 / height, f"{file}   ·   {bundle}   ·   {hours}", color=FAINT, fontsize=8, va="center")
    return figure


def _ends(track: Track) -> np.ndarray:
    """Where each window stops to count: its end, or the begin of the next one where they overlap."""
    begin = track.onset_s
    end = begin + track.duration_s
    end[:-1] = np.minimum(end[:-1], np.maximum(begin[1:], begin[:-1]))
    return end


def _colours(labels: Sequence[str]) -> dict[str, str]:
    if set(labels) <= set(STAGE_COLOURS):
        return {label: STAGE_COLOURS[label] for label in labels}
    return {label: COLOURS[number % len(COLOURS)] for number, label in enumerate(labels)}


def _said(track: Track) -> np.ndarray:
    """Whether the task says each class of each window, bool (N, K)."""
    probability_NK = track.probabilities
    if track.record.task.loss == "cross_entropy":
        return probability_NK.argmax(axis=1)[:, None] == np.arange(probability_NK.shape[1])
    return probability_NK > 0.5


def _draw_rows(
    axes: Axes, track: Track, rows: Sequence[str], colours: dict[str, str], *, begin: np.ndarray, end: np.ndarray
) -> None:
    """A row per class, filled while the task says it; in a hypnogram a line leads from stage to stage."""
    labels, said_NK = track.record.task.labels, _said(track)
    for height, label in enumerate(rows):
        said = said_NK[:, labels.index(label)]
        spans = [(begin[first], end[last] - begin[first]) for first, last in _runs(said, begin, end)]
        axes.broken_barh(spans, (height - 0.36, 0.72), facecolors=colours[label], linewidth=0)
    if is_staging(track.record):
        place_N = np.array([rows.index(labels[k]) for k in said_NK.argmax(axis=1)], dtype=float)
        _step(axes, begin, end, place_N)
    counts = said_NK.mean(axis=0)
    for height, label in enumerate(rows):
        share = f"{100 * counts[labels.index(label)]:.0f} %"
        axes.text(1.008, height, share, color=FAINT, fontsize=8, va="center", transform=axes.get_yaxis_transform())
    axes.text(1.008, -0.85, "of windows", color=FAINT, fontsize=7, va="center", transform=axes.get_yaxis_transform())
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_ylabel("stage" if is_staging(track.record) else "class", color=FAINT, fontsize=8)
    axes.yaxis.set_label_coords(-LABEL_GAP - CHARACTER * max(4, *map(len, rows)) / axes.get_position().width, 0.5)
    _plain(axes, grid="y")


def _runs(said: np.ndarray, begin: np.ndarray, end: np.ndarray) -> list[tuple[int, int]]:
    """(first, last) window of every stretch that says so without a gap."""
    places = np.flatnonzero(said)
    if not places.size:
        return []
    parts = (np.diff(places) > 1) | (begin[places[1:]] > end[places[:-1]] + 1e-6)
    cuts = np.flatnonzero(parts) + 1
    return [(int(part[0]), int(part[-1])) for part in np.split(places, cuts)]


def _step(axes: Axes, begin: np.ndarray, end: np.ndarray, place_N: np.ndarray) -> None:
    """Thin line from row to row; it stops at a gap."""
    x, y = [], []
    for number, place in enumerate(place_N):
        if number and begin[number] > end[number - 1] + 1e-6:
            x.append(np.nan)
            y.append(np.nan)
        x += [begin[number], end[number]]
        y += [place, place]
    axes.plot(x, y, color=INK, linewidth=0.6, alpha=0.75)


def _draw_probabilities(
    axes: Axes, track: Track, rows: Sequence[str], colours: dict[str, str], *, begin: np.ndarray, end: np.ndarray
) -> None:
    """Probability of every class over time, the legend in the order of the rows above."""
    labels, probability_NK = track.record.task.labels, track.probabilities
    time, values = _as_steps(begin, end, probability_NK[:, [labels.index(label) for label in rows]])
    if track.record.task.loss == "cross_entropy":
        base = np.zeros(len(time))
        for label, value in zip(reversed(rows), values.T[::-1], strict=True):  # the first row lies on top
            axes.fill_between(time, base, base + value, color=colours[label], linewidth=0, label=label)
            base = base + value
    else:
        for label, value in zip(reversed(rows), values.T[::-1], strict=True):
            axes.plot(time, value, color=colours[label], linewidth=1.2, label=label)
        axes.axhline(0.5, color=FAINT, linewidth=0.8, linestyle="--")
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.5, 1])
    axes.set_ylabel("probability", color=FAINT, fontsize=8)
    axes.yaxis.set_label_coords(-LABEL_GAP - CHARACTER * max(4, *map(len, rows)) / axes.get_position().width, 0.5)
    handles, names = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1],
        names[::-1],
        loc="upper left",
        bbox_to_anchor=(1.0, 1.02),
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        handlelength=1.0,
        handletextpad=0.4,
        labelspacing=0.35,
    )
    _plain(axes, grid="y")


def _as_steps(begin: np.ndarray, end: np.ndarray, value_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Times and values that hold still within each window, with NaN between windows that do not touch."""
    gap_N = np.append(begin[1:] > end[:-1] + 1e-6, False)
    time = np.stack([begin, end, end], axis=1)
    value = np.repeat(value_NK[:, None, :], 3, axis=1).astype(float)
    value[:, 2] = np.nan
    keep = np.ones(time.shape, dtype=bool)
    keep[:, 2] = gap_N
    return time[keep], value[keep]


def _time_axis(axes: Axes, first_s: float, last_s: float, *, start_time: str) -> None:
    """Ticks at round times: h:mm for what lasts ten minutes or more, else m:ss."""
    span = max(last_s - first_s, 1e-9)
    step = next((step for step in STEPS_S if span / step <= MAX_TICKS), STEPS_S[-1])
    is_long = span >= 600
    axes.set_xlim(first_s, last_s)
    if last_s / step > 1:
        axes.set_xticks(np.arange(np.ceil(first_s / step) * step, last_s + 1e-6, step))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))

    def text(seconds: float, _: int) -> str:
        whole = round(seconds)
        if is_long:
            return f"{whole // 3600}:{whole % 3600 // 60:02d}"
        return f"{whole // 60}:{whole % 60:02d}"

    axes.xaxis.set_major_formatter(FuncFormatter(text))
    clock = f", which began at {start_time}" if start_time else ""
    unit = "hours:minutes" if is_long else "minutes:seconds"
    axes.set_xlabel(f"time from the start of the recording{clock} ({unit})", color=FAINT, fontsize=8)


def _plain(axes: Axes, *, grid: str) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#b8bfc6")
    axes.tick_params(colors=INK, labelsize=8, length=0)
    axes.tick_params(axis="x", length=3, color="#b8bfc6")
    axes.grid(visible=True, axis=grid, color=LINE, linewidth=0.8)  # pyright: ignore[reportArgumentType]
    axes.set_axisbelow(True)
