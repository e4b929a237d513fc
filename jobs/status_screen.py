"""How `kymo status` looks: of a conversion, and of a pretraining run."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jobs.console import console, show_table

if TYPE_CHECKING:
    from engine.status import Status, UnitRow
    from trainer.status import RunStatus

COLORS = {"done": "green", "running": "cyan", "stalled": "yellow", "failed": "red", "pending": "dim"}
RUN_COLORS = {"stalled": "yellow", "restarting": "yellow", "died": "red", "failed": "red", "finished": "green"}
_FLAT = 0.005  # a change of the loss, relative, that is none
_SLOW_DATA = 0.05  # share of the time
COLUMNS = ("unit", "state", "recordings", "quarantined", "hours", "windows", "reason")
_ORDER = ("failed", "stalled", "running", "pending", "done")
_HEAD_LINES = 12  # of a screen, that are no unit
_MIN_ROWS = 5


def time_text(seconds: float | None) -> str:
    """Seconds as a person says them: `45 s`, `12 min`, `3 h 05 min`."""
    if seconds is None:
        return "?"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _phase(state: "Status") -> str:
    if state.is_running:
        busy = state.counts["running"]
        return (
            f"running, {busy} unit{'s' * (busy != 1)} at work"
            if busy
            else "running: scanning, starting workers or finalising"
        )
    if state.is_final:
        return f"complete, snapshot {state.digest[:16]}"
    if state.digest:
        return f"stopped; an earlier snapshot {state.digest[:16]} stands. Go on with: {state.resume}"
    return f"stopped, no snapshot. Go on with: {state.resume}"


def headline(state: "Status") -> Text:
    """Units by state, hours, speed, ETA, and what goes on, in two lines."""
    text = Text()
    text.append(f"{len(state.units)} units: ")
    parts = [(count, name) for name, count in state.counts.items() if count or name == "done"]
    for i, (count, name) in enumerate(parts):
        text.append(", " if i else "")
        text.append(f"{count} {name}", style=COLORS[name])
    text.append(f"; {state.hours_done:,.2f} of {state.hours_total:,.2f} h")
    if state.is_running and state.hours_per_s:
        text.append(f" at {state.hours_per_s:,.3g} h/s, ETA {time_text(state.eta_s)}")
    text.append(f"\n{_phase(state)}")
    return text


def _rows(units: Iterable["UnitRow"], limit: int) -> tuple[Sequence[Sequence[object]], int]:
    """Rows of a table, those that need an eye first, and how many were left out."""
    units = sorted(units, key=lambda row: _ORDER.index(row.state))
    kept = units[: limit or None]
    rows = [
        (
            *(row.unit, Text(row.state, style=COLORS[row.state]), f"{row.done}/{row.recordings}"),
            *(row.quarantined, row.hours, row.windows, row.reason),
        )
        for row in kept
    ]
    return rows, len(units) - len(kept)


def _quarantine(state: "Status") -> str:
    if not state.quarantine:
        return ""
    reasons = Counter(item.reason for item in state.quarantine)
    words = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    waived = f", {state.num_waived} of them waived" if state.num_waived else ""
    return f"quarantine ({len(state.quarantine)}{waived}): {words}; kymo quarantine ls tells more"


def show(state: "Status", *, limit: int) -> None:
    """Print a state once."""
    rows, hidden = _rows(state.units, limit)
    show_table("units", COLUMNS, rows)
    if hidden:
        console.print(f"… and {hidden} more units; --limit 0 shows all")
    quarantine = [(item.path, item.reason, item.message, item.command) for item in state.quarantine]
    show_table(
        f"quarantine ({len(quarantine)})", ("path", "reason", "message", "to see it again"), quarantine[: limit or None]
    )
    if state.num_waived:
        console.print(f"{state.num_waived} of {len(quarantine)} are waived, see kymo quarantine ls")
    console.print(headline(state), soft_wrap=True)


def screen(state: "Status", *, height: int) -> Group:
    """One full screen: headline, bar, the units that somebody works on or that need an eye, quarantine by reason."""
    eye = [row for row in state.units if row.state in {"failed", "stalled", "running"} or row.reason]
    eye.sort(key=lambda row: _ORDER.index(row.state))
    kept = eye[: max(_MIN_ROWS, height - _HEAD_LINES)]
    table = Table(header_style="bold", box=None, pad_edge=False, expand=True)
    for column in ("unit", "state"):
        table.add_column(column, no_wrap=True)
    for column in ("recordings", "rejected", "hours"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("what", ratio=1, no_wrap=True, overflow="ellipsis")
    for row in kept:
        cells = (f"{row.done}/{row.recordings}", str(row.quarantined or ""), f"{row.hours:,.2f}", escape(row.reason))
        table.add_row(row.unit, Text(row.state, style=COLORS[row.state]), *cells)
    grid = Table.grid(expand=True)
    grid.add_row(ProgressBar(total=max(1e-9, state.hours_total), completed=state.hours_done))
    hidden = len(eye) - len(kept)
    more = [Text(f"… and {hidden} more", style="dim")] if hidden else []
    return Group(headline(state), grid, *([table] if kept else []), *more, Text(_quarantine(state)))


def run_screen(state: "RunStatus") -> Group:
    """Headline, bar, and a line for each thing that a person asks of a run."""
    bar = steps_bar(state.step, state.steps, eta_s=state.eta_s)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, line in _run_lines(state):
        grid.add_row(name, line)
    return Group(run_headline(state), bar, grid)


def steps_bar(step: int, steps: int, *, eta_s: float | None) -> Table:
    """A bar with the step and the time left beside it, on one line of any terminal."""
    bar = Table.grid(expand=True, padding=(0, 1))
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True)
    left = "" if eta_s is None else f", {time_text(eta_s)} left"
    where = f"step {step:,} of {steps:,} ({step / max(1, steps):.1%}){left}"
    bar.add_row(ProgressBar(total=max(1, steps), completed=step), Text(where))
    return bar


def run_headline(state: "RunStatus") -> Text:
    """Folder, state and why, where and by how many."""
    text = Text(f"{state.run_dir}: ")
    text.append(state.state, style=RUN_COLORS.get(state.state, "cyan"))
    beat = state.heartbeat
    if beat is not None and state.state not in {"finished", "stopped"}:
        workers = f"{beat.world_size} worker{'s' * (beat.world_size != 1)}"
        start = f", start {beat.attempt}" if beat.attempt > 1 else ""
        text.append(f", {workers} on {beat.host}{start}")
    if state.reason:
        text.append(f"\n{state.reason}")
    if state.state in {"died", "failed", "stopped", "elsewhere"}:
        text.append(f"\ngo on with: {state.resume}")
    return text


def _run_lines(state: "RunStatus") -> list[tuple[str, Text]]:
    row = state.row
    lines = [
        ("loss", _loss(state)),
        ("speed", _speed(row)),
        ("memory", _memory(row)),
        ("goodput", _goodput(state)),
        ("checkpoint", _checkpoint(state)),
        ("held out", Text(", ".join(f"{name} {value:.3g}" for name, value in state.evaluation.items()))),
        ("look at", _trouble(state)),
    ]
    return [(name, line) for name, line in lines if line.plain]


def _loss(state: "RunStatus") -> Text:
    row = state.row
    if "loss" not in row:
        return Text("no step was logged yet" if not row else "")
    text = Text(f"{row['loss']:.4f}")
    if state.trend is not None:
        before, now = state.trend
        change = (now - before) / max(abs(before), 1e-12)
        word = "steady" if abs(change) < _FLAT else "falling" if change < 0 else "rising"
        text.append(f", {word}: {before:.4f} → {now:.4f} over the last {state.trend_steps:,} steps")
    for name, label in (("top1", "top-1"), *((name, name) for name in ("alignment", "uniformity", "temperature"))):
        if name in row:
            text.append(f", {label} {row[name]:.3f}")
    if "grad_norm" in row:
        text.append(f", |g| {row['grad_norm']:.2f}")
    return text


def _speed(row: Mapping[str, float]) -> Text:
    if "windows_per_s" not in row:
        return Text()
    text = Text(f"{row['windows_per_s']:,.0f} windows/s")
    if "hours_per_s" in row:
        text.append(f", {row['hours_per_s']:,.3g} h/s")
    if "data_wait" in row:
        style = "yellow" if row["data_wait"] >= _SLOW_DATA else ""
        text.append(", ").append(f"waits for data {row['data_wait']:.1%} of the time", style=style)
    if "mfu" in row:
        text.append(f", MFU {row['mfu']:.1%}")
    return text


def _memory(row: Mapping[str, float]) -> Text:
    if "rss_bytes" not in row:
        return Text()
    device = f", {row['cuda_bytes'] / 1e9:.1f} GB of a GPU at most" if "cuda_bytes" in row else ""
    return Text(f"{row['rss_bytes'] / 1e9:.2f} GB a worker{device}")


def _goodput(state: "RunStatus") -> Text:
    if "goodput" not in state.row or state.heartbeat is None:
        return Text()
    return Text(f"{state.row['goodput']:.1%} of {time_text(state.heartbeat.lived_s)} went into steps that count")


def _checkpoint(state: "RunStatus") -> Text:
    if state.checkpoint is None:
        return Text("none yet")
    return Text(f"{state.checkpoint}, {time_text(state.checkpoint_age_s)} old")


def _trouble(state: "RunStatus") -> Text:
    parts = []
    if state.skipped:
        parts.append(f"{state.skipped} step{'s' * (state.skipped != 1)} skipped (skipped.jsonl)")
    if state.row.get("replaced"):
        parts.append(f"{state.row['replaced']:.0f} samples could not be read (kymo verify)")
    if state.spikes:
        parts.append(f"{state.spikes} loss spike{'s' * (state.spikes != 1)}")
    return Text(", ".join(parts), style="yellow")


def watch_run(states: Iterable["RunStatus"]) -> None:
    """Redraw each state in place; where no terminal looks on, print a line whenever a step was logged."""
    if not console.is_terminal:
        last = ""
        for state in states:
            block = f"{run_headline(state)}, step {state.step:,} of {state.steps:,}"
            block += f", loss {state.row['loss']:.4f}" if "loss" in state.row else ""
            if block != last:
                console.print(escape(block), soft_wrap=True)
                last = block
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        for state in states:
            live.update(run_screen(state), refresh=True)


def watch(states: Iterable["Status"]) -> None:
    """Redraw each state in place; where no terminal looks on, print a block whenever something has changed."""
    if not console.is_terminal:
        last = ""
        for state in states:
            block = f"{headline(state)}"
            counts = f"{state.counts} {[(row.unit, row.state, row.done) for row in state.units]} {state.is_running}"
            if counts != last:
                console.print(escape(block), soft_wrap=True)
                last = counts
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        for state in states:
            live.update(screen(state, height=console.height), refresh=True)
