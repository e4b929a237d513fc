"""How `kymo status` looks: a headline, the units that need an eye, the quarantine by reason."""

from collections import Counter
from collections.abc import Iterable, Sequence
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

COLORS = {"done": "green", "running": "cyan", "stalled": "yellow", "failed": "red", "pending": "dim"}
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
