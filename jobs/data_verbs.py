"""Verbs of the data engine: scan, plan, convert, status, verify, report, preview."""

from pathlib import Path

import typer

from jobs.console import console, show_table
from manifests.config import load_config

ConfigPath = typer.Argument(help="YAML of the run.", metavar="CONFIG")
Overrides = typer.Argument(None, help="key=value, e.g. num_cpus=8", metavar="[KEY=VALUE]...")
SnapshotDir = typer.Argument(help="Folder that kymo convert has written.", metavar="SNAPSHOT")


def scan(
    folder: Path = typer.Argument(help="Folder with recordings, or one file."),
    corpus: str | None = typer.Option(None, help="Name of a shipped corpus, or path of a corpus YAML."),
    limit: int = typer.Option(40, help="Rows shown of each table; 0 shows all."),
) -> None:
    """Show what lies in a folder, from headers only.

    Example: kymo scan recordings/ --corpus eegmmidb
    """
    from engine import scan as engine_scan
    from engine.config import Source

    if corpus:
        result = engine_scan.scan([Source(corpus=corpus, root=folder)])
    else:
        result = engine_scan.scan_folder(folder)
    show_scan(result.corpus_rows(), result.channel_rows()[: limit or None], result.rate_rows()[: limit or None])
    unresolved = result.unresolved_rows()
    show_table(
        f"labels without a channel ({len(unresolved)})",
        ("label", "reason", "recordings"),
        [tuple(row.values()) for row in unresolved[: limit or None]],
    )
    refused = result.unreadable_rows()
    show_table(
        f"recordings that cannot be read ({len(refused)})",
        ("path", "reason", "message"),
        [(row["path"], row["reason"], row["message"]) for row in refused[: limit or None]],
    )


def show_scan(corpora: list[dict], channels: list[dict], rates: list[dict]) -> None:
    """Tables of a scan: totals against what the corpus expects, channels by symbol, native rates."""
    totals = []
    for row in corpora:
        differs = ", ".join(f"{key}: {row['expected'][key]} expected" for key in row["differs"])
        name = row["corpus"] or "(no corpus)"
        cells = (row["subjects"], row["recordings"], row["hours"], row["unreadable"], row["megabytes"])
        totals.append((name, *cells, differs))
    show_table("corpora", ("corpus", "subjects", "recordings", "hours", "unreadable", "MB", "differs"), totals)
    columns = ("symbol", "kind", "recordings", "share", "hours", "rates in Hz", "units")
    cells = [
        (
            row["symbol"],
            row["kind"],
            row["recordings"],
            f"{row['share']:.0%}",
            row["hours"],
            " ".join(f"{rate:g}" for rate in row["rates_hz"]),
            " ".join(unit or "(none)" for unit in row["units"]),
        )
        for row in channels
    ]
    show_table("channels", columns, cells)
    show_table("rates", ("kind", "Hz", "channels"), [(r["kind"], f"{r['rate_hz']:g}", r["channels"]) for r in rates])


def plan(config: Path = ConfigPath, overrides: list[str] = Overrides) -> None:
    """Show the units that a conversion would make; nothing is written.

    Example: kymo plan jobs/configs/convert_psg.yaml
    """
    from engine import plan as engine_plan
    from engine.config import ConvertConfig
    from engine.scan import scan as scan_sources
    from manifests.recipes import load_recipe

    settings = load_config(ConvertConfig, config, overrides or ())
    scanned = scan_sources(settings.sources)
    existing = engine_plan.read_plan(settings.output)
    units = engine_plan.plan(scanned, load_recipe(settings.recipe), settings, existing=existing)
    known = {unit.id for unit in existing}
    rows = engine_plan.plan_rows(units)
    state = {True: "planned before", False: "new"}
    cells = [(r["unit"], r["recordings"], r["hours"], r["megabytes"], state[r["unit"] in known]) for r in rows]
    show_table("units", ("unit", "recordings", "hours", "MB", "state"), cells)
    hours, megabytes = sum(row["hours"] for row in rows), sum(row["megabytes"] for row in rows)
    console.print(f"{len(rows)} units, {hours:.2f} h, about {megabytes:,.0f} MB into {settings.output}")
