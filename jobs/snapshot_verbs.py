"""Verbs about finished snapshots and what was rejected on the way: diff, repack, quarantine."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from jobs.console import bytes_progress, console, show_table

if TYPE_CHECKING:
    from engine.difference import Difference

Folder = typer.Argument(help="Folder that kymo convert has written.", metavar="FOLDER")
Names = typer.Argument(None, help="Recordings as `ls` shows them: path, corpus/path or id.", metavar="[RECORDING]...")
Reason = typer.Option("", help="All recordings in quarantine for this reason, e.g. TIMEOUT.")
_KEYS_SHOWN = 5

quarantine = typer.Typer(
    help="Show the recordings that a conversion rejected, and decide about them.\n\nExample: kymo quarantine ls FOLDER",
    no_args_is_help=True,
)


def diff(
    first: str = typer.Argument(help="Folder of the older snapshot.", metavar="SNAPSHOT_A"),
    second: str = typer.Argument(help="Folder of the other snapshot.", metavar="SNAPSHOT_B"),
    exit_code: bool = typer.Option(False, "--exit-code", help="End with 1 when they differ, as git diff does."),
) -> None:
    """Show what differs between two snapshots: settings, corpora, recordings, samples, labels, splits, counts.

    Example: kymo diff snapshots/may snapshots/june
    """
    from engine.difference import difference
    from engine.storage import location

    with bytes_progress("comparing samples", None, unit="samples") as tick:
        found = difference(location(first), location(second), tick=tick)
    show_difference(found)
    if exit_code and not found.is_same:
        raise typer.Exit(1)


def show_difference(found: "Difference") -> None:
    """Tables of what differs, then one line: same or not."""
    show_table("settings", ("setting", "A", "B"), [(name, *pair) for name, pair in found.settings.items()])
    show_table(
        "counts",
        ("count", "A", "B", "B - A"),
        [(name, f"{a:,}", f"{b:,}", f"{b - a:+,}") for name, (a, b) in found.counts.items()],
    )
    changed = [row for row in found.corpora if any(value for name, value in row.items() if name != "corpus")]
    if changed:
        show_table(
            "corpora",
            [name.replace("_", " ") for name in changed[0]],
            [[*row.values()] for row in changed],
        )
    parts = (
        ("only in A", found.removed),
        ("only in B", found.added),
        ("other signals", found.signal),
        ("same signals, other tags", found.tags),
        ("other split", found.splits),
        ("other labels", found.labels),
    )
    rows = [(name, f"{len(keys):,}", _some(keys)) for name, keys in parts if keys]
    show_table("samples", ("what", "n", "keys"), rows)
    same = "same bytes" if found.digests[0] == found.digests[1] else "same samples in other shards"
    verdict = f"[green]same[/]: {same}" if found.is_same else "[yellow]differs[/]"
    console.print(f"{verdict}; {found.num_equal:,} samples are equal byte by byte, {found.num_read:,} had to be read")


def _some(keys: Sequence[str]) -> str:
    more = f" … and {len(keys) - _KEYS_SHOWN:,} more" if len(keys) > _KEYS_SHOWN else ""
    return "\n".join(keys[:_KEYS_SHOWN]) + more


def repack(
    folder: str = typer.Argument(help="Snapshot to read; it is not changed.", metavar="SNAPSHOT"),
    out: str = typer.Option(..., help="Folder of the new snapshot, on a local disk."),
    shard_bytes: int = typer.Option(256_000_000, help="Wanted size of a shard in bytes."),
    seed: int = typer.Option(0, help="Another seed gives another order."),
) -> None:
    """Write a snapshot anew as uniform, globally mixed shards; no signal is decoded. Run it again to resume.

    Example: kymo repack demo/shards/psg --out demo/shards/psg-mixed
    """
    from engine import repack as engine_repack
    from engine.storage import location
    from manifests.shards import load_snapshot

    parent = load_snapshot(location(folder))
    with bytes_progress("repacking", 2 * parent.counts["num_bytes"]) as tick:
        new = engine_repack.repack(location(folder), location(out), shard_bytes=shard_bytes, seed=seed, tick=tick)
    numbers = [shard.num_samples for shard in new.shards]
    each = f"{min(numbers):,} to {max(numbers):,}" if numbers else "0"
    console.print(
        f"{len(parent.shards)} shards → {len(new.shards)} of {each} samples, {new.counts['num_bytes'] / 1e6:,.1f} MB"
    )
    console.print(f"snapshot {new.digest[:16]}. Next: kymo verify {escape(out)}", soft_wrap=True)


@quarantine.command("ls")
def list_quarantine(folder: str = Folder, limit: int = typer.Option(100, help="Rows shown; 0 shows all.")) -> None:
    """List the rejected recordings, and how much of the budget they use.

    Example: kymo quarantine ls demo/shards/psg
    """
    from engine import quarantine as engine_quarantine
    from engine.storage import location

    items = engine_quarantine.rejected(location(folder))
    rows = [(item.corpus, item.path, item.reason, item.state, item.message, item.note) for item in items]
    columns = ("corpus", "path", "reason", "state", "message", "note")
    show_table(f"quarantine ({len(items)})", columns, rows[: limit or None])
    if limit and len(rows) > limit:
        console.print(f"… and {len(rows) - limit} more; --limit 0 shows all")
    console.print(engine_quarantine.budget_line(location(folder), items), soft_wrap=True)


@quarantine.command("show")
def show_recording(
    folder: str = Folder, recording: str = typer.Argument(help="Path, corpus/path or id.", metavar="RECORDING")
) -> None:
    """Show one rejected recording in full: message, files with hashes, what shows it again, what else is like it.

    Example: kymo quarantine show demo/shards/psg psg/sub-009/sub-009_psg.edf
    """
    from engine import quarantine as engine_quarantine
    from engine.storage import location

    found = engine_quarantine.evidence(location(folder), recording)
    item = found.item
    console.print(f"[bold]{escape(item.corpus)}: {escape(item.path)}[/] ({item.recording})", soft_wrap=True)
    console.print(f"{item.reason}, {item.state}{f': {escape(item.note)}' if item.note else ''}", soft_wrap=True)
    console.print(escape(item.message), soft_wrap=True)
    console.print(f"to see it again: {escape(item.command)}", soft_wrap=True)
    files = [(name, f"{size:,}", sha) for name, size, sha in found.files]
    show_table(f"files in {found.where.parent}", ("name", "bytes", "SHA-256"), files)
    if not files:
        console.print(f"no file at {escape(str(found.where))} any more; the next kymo convert leaves it out")
    elif found.is_changed:
        console.print("its files have changed since: the next kymo convert converts them as they are, no retry needed")
    if found.alike:
        others = [(other.corpus, other.path) for other in found.alike[:_KEYS_SHOWN]]
        show_table(f"also {item.reason} ({len(found.alike)})", ("corpus", "path"), others)


@quarantine.command("retry")
def retry_recordings(folder: str = Folder, recordings: list[str] = Names, reason: str = Reason) -> None:
    """Let the next kymo convert try rejected recordings again: their units are converted anew and no other.

    Not needed after mending a file or raising a limit: a conversion sees both by itself.

    Example: kymo quarantine retry demo/shards/psg --reason TIMEOUT
    """
    from engine import quarantine as engine_quarantine
    from engine.storage import location

    units = engine_quarantine.retry(location(folder), recordings or [], reason=reason)
    console.print(f"units marked: {len(units)}. Next: kymo convert {escape(folder)}/config.yaml", soft_wrap=True)


@quarantine.command("waive")
def waive_recordings(
    folder: str = Folder,
    recordings: list[str] = Names,
    note: str = typer.Option(..., help="Why they can be missing; kept in waivers.jsonl."),
    reason: str = Reason,
) -> None:
    """Accept that recordings are missing: they no longer count against the budget. No shard changes.

    Example: kymo quarantine waive demo/shards/psg psg/sub-009/sub-009_psg.edf --note "amplifier was off"
    """
    from engine import quarantine as engine_quarantine
    from engine.storage import location

    items = engine_quarantine.waive(location(folder), recordings or [], note=note, reason=reason)
    console.print(f"recordings waived: {len(items)}")
    left = engine_quarantine.rejected(location(folder))
    console.print(engine_quarantine.budget_line(location(folder), left), soft_wrap=True)
    console.print(f"Next: kymo convert {escape(folder)}/config.yaml", soft_wrap=True)
