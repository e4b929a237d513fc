"""How `kymo status` looks of a run that learns tasks."""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from jobs.console import console
from jobs.status_screen import RUN_COLORS, steps_bar

if TYPE_CHECKING:
    from adapters.status import LearnStatus


def show(states: Iterable["LearnStatus"], *, as_json: bool) -> None:
    """Draw each state in place of the one before; where no terminal looks on, print those that differ."""
    if console.is_terminal and not as_json:
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
            for state in states:
                live.update(learn_screen(state), refresh=True)
        return
    last = None
    for state in states:
        if as_json:
            print(json.dumps(state.to_json(), indent=1))
        elif (state.state, state.step) != last:
            console.print(learn_screen(state), soft_wrap=True)
        last = (state.state, state.step)


def learn_screen(state: "LearnStatus") -> Group:
    """Headline, bar, and a row for each task."""
    head = Text(f"{state.run_dir}: ")
    head.append(state.state, style=RUN_COLORS.get(state.state, "cyan"))
    if state.reason:
        head.append(f"\n{state.reason}")
    if state.state == "stopped":
        head.append(f"\ngo on with: {state.resume}")
    facts = [
        "" if state.windows_per_s is None else f"{state.step_s:.3g} s a step, {state.windows_per_s:.0f} windows/s",
        "" if state.checkpoint is None else f"checkpoint of step {state.checkpoint:,}",
        f"{state.skipped} steps skipped, for their gradient was not finite" if state.skipped else "",
    ]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("task", "loss", "epochs", "scores"):
        table.add_column(column, overflow="fold")
    for task in dict.fromkeys([*state.loss, *state.scores]):
        scores = state.scores.get(task, {}).items()
        table.add_row(
            escape(task),
            f"{state.loss[task]:.4f}" if task in state.loss else "",
            f"{state.epochs[task]:.2f}" if task in state.epochs else "",
            ", ".join(f"{name} {value:.3f}" for name, value in scores if value is not None),
        )
    return Group(
        head,
        steps_bar(state.step, state.steps, eta_s=state.eta_s),
        Text("; ".join(filter(None, facts))),
        table,
    )
