"""Verbs of the data engine: scan, plan, convert, status, verify, report, preview."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from jobs import scan_screen, status_screen
from jobs.console import bytes_progress, console, hours_progress, show_table
from manifests.config import load_config
from manifests.errors import ConfigError
from manifests.files import is_held

if TYPE_CHECKING:
    from engine.config import ConvertConfig
    from engine.finalise import ConvertResult

ConfigPath = typer.Argument(help="YAML of the run.", metavar="CONFIG")
Overrides = typer.Argument(None, help="key=value, e.g. num_cpus=8", metavar="[KEY=VALUE]...")
_ROWS_SHOWN = 40
SnapshotDir = typer.Argument(help="Folder that kymo convert has written.", metavar="SNAPSHOT")


def scan(
    folder: str = typer.Argument(help="Folder with recordings, or one file; with --corpus also s3://bucket/folder."),
    corpus: str | None = typer.Option(None, help="Name of a shipped corpus, or path of a corpus YAML."),
    only: str = typer.Option("", help="Path of one recording of the corpus, as the tables and quarantine show it."),
    limit: int = typer.Option(40, help="Rows shown of each table; 0 shows all."),
) -> None:
    """Show what lies in a folder, from headers only; with --corpus also what the corpus file lacks.

    Example: kymo scan recordings/ --corpus eegmmidb
    """
    from engine import scan as engine_scan
    from engine.config import Source
    from engine.storage import location

    if only and not corpus:
        raise ConfigError("--only: needs --corpus, which tells the recordings; without one give the file itself")
    root = location(folder)
    result = (
        engine_scan.scan([Source(corpus=corpus, root=root)], only=only, survey=True)
        if corpus
        else engine_scan.scan_folder(root)
    )
    nobodys = [path for paths in result.nobodys.values() for path in paths]
    if not result.rows and not nobodys:
        wanted = (
            f"files of corpus {corpus}"
            if corpus
            else "recordings of a format that tells by its content; tables and arrays need a corpus file (--corpus)"
        )
        raise ConfigError(f"{folder}: holds no {wanted}; give another folder, or a corpus file that says what they are")
    scan_screen.show_survey(result, limit=limit, is_whole=not only)


def plan(config: Path = ConfigPath, overrides: list[str] = Overrides) -> None:
    """Show the units that a conversion would make; nothing is written.

    Example: kymo plan jobs/configs/convert_psg.yaml
    """
    from engine import plan as engine_plan
    from engine.config import ConvertConfig
    from engine.convert import scan_of
    from manifests.recipes import load_recipe

    settings = load_config(ConvertConfig, config, overrides or ())
    scanned = scan_of(settings)
    existing = engine_plan.read_plan(settings.output)
    units = engine_plan.plan(scanned, load_recipe(settings.recipe), settings, existing=existing)
    known = {unit.id for unit in existing}
    rows = engine_plan.plan_rows(units)
    state = {True: "planned before", False: "new"}
    cells = [(r["unit"], r["recordings"], r["hours"], r["megabytes"], state[r["unit"] in known]) for r in rows]
    show_table("units", ("unit", "recordings", "hours", "MB", "state"), cells)
    hours, megabytes = sum(row["hours"] for row in rows), sum(row["megabytes"] for row in rows)
    number = "1 unit" if len(rows) == 1 else f"{len(rows)} units"
    console.print(f"{number}, {hours:.2f} h, about {megabytes:,.0f} MB into {settings.output}")


def convert(config: Path = ConfigPath, overrides: list[str] = Overrides) -> None:
    """Convert recordings to shards with Ray Data. Run the same command again to resume.

    Exit code 3: some recordings are in quarantine, within the budget; 4: over the budget, no snapshot.

    Example: kymo convert jobs/configs/convert_psg.yaml num_cpus=2
    """
    from engine.config import ConvertConfig

    raise typer.Exit(int(run_conversion(load_config(ConvertConfig, config, overrides or ())).exit_code))


def run_conversion(settings: "ConvertConfig") -> "ConvertResult":
    """Result of a conversion, shown with a progress bar and a closing table."""
    from engine import pipeline
    from engine.quarantine import state_of

    bar = hours_progress()
    with bar:
        task = bar.add_task("converting", total=None, hours="", speed="", eta="")

        def show(row: pipeline.ProgressRow) -> None:
            bar.update(
                task,
                total=row.hours_total,
                completed=row.hours_done,
                hours=f"{row.hours_done:.2f}/{row.hours_total:.2f} h",
                speed=f"{row.hours_per_s:.2f} h/s, {row.recordings_done}/{row.recordings_total} recordings",
                eta="" if row.eta_s is None else f"ETA {row.eta_s:.0f} s",
            )

        result = pipeline.run(settings, progress=show)
    quarantine = [(item.path, item.reason, state_of(item, result.waived), item.message) for item in result.quarantine]
    num_waived = sum(state == "waived" for _, _, state, _ in quarantine)
    waived = f", {num_waived} of them waived" if num_waived else ""
    columns = ("path", "reason", "state", "message")
    show_table(f"quarantine ({len(quarantine)}{waived})", columns, quarantine[:_ROWS_SHOWN])
    if quarantine:
        console.print(f"kymo quarantine ls {settings.output} lists them; show, retry and waive go on", soft_wrap=True)
    counts = result.counts
    if suspect := counts.get("unit_suspect"):
        text = f"{suspect} channels have amplitudes outside the range of their kind: are their units right?"
        console.print(f"[yellow]{text}[/] kymo report names them by corpus and kind", soft_wrap=True)
    hours = counts["seconds"] / 3600
    console.print(
        f"{counts['recordings'] - counts['quarantined']} of {counts['recordings']} recordings, {hours:.2f} h, "
        f"{counts['windows']:,} windows in {counts['shards']} shards → {settings.output}"
    )
    if result.snapshot is None:
        console.print("[red]quarantine over budget: no snapshot.[/] Mend or waive them, or raise quarantine_budget.")
    else:
        console.print(f"snapshot {result.snapshot.digest[:16]}. Next: kymo report {settings.output}")
    return result


def status(
    folder: str = typer.Argument(
        help="Output of kymo convert, run_dir or storage of kymo pretrain, adapt or finetune."
    ),
    watch: bool = typer.Option(False, "--watch", "-w", help="Redraw until it ends; Ctrl-C leaves it be."),
    limit: int = typer.Option(40, help="Rows shown of each table; 0 shows all."),
    as_json: bool = typer.Option(False, "--json", help="The whole state once, as JSON."),
) -> None:
    """Show how far a conversion or a run is, how fast, whether it is well, and when it will be done.

    Example: kymo status demo/runs/sleep --watch
    """
    from adapters import status as learn_status
    from engine import status as engine_status
    from engine.storage import is_remote, location
    from jobs import learn_screen
    from trainer import status as run_status
    from trainer.paths import LAUNCH_LOCK_FILE

    place = location(folder)

    def is_starting() -> bool:
        is_driven = not is_remote(place) and is_held(place / LAUNCH_LOCK_FILE)  # a store is not asked for it
        return is_driven and not (learn_status.is_learn_run(place) or run_status.is_run(place))

    if is_starting():
        console.print(f"{place}: a run is starting under Ray and has not written anything yet", soft_wrap=True)
        if not watch:
            return
        while is_starting():
            time.sleep(1.0)
    if learn_status.is_learn_run(place):
        is_once = as_json or not watch
        states = [learn_status.learn_status(place)] if is_once else learn_status.watch(place)
        learn_screen.show(states, as_json=as_json)
        return
    is_run = run_status.is_run(place)
    if as_json:
        state = run_status.run_status(place).to_json() if is_run else asdict(engine_status.status(place))
        print(json.dumps(state, indent=1, default=str))
    elif is_run and watch:
        status_screen.watch_run(run_status.watch(place))
    elif is_run:
        console.print(status_screen.run_screen(run_status.run_status(place)), soft_wrap=True)
    elif watch:
        status_screen.watch(engine_status.watch(place))
    else:
        status_screen.show(engine_status.status(place), limit=limit)


def verify(
    folder: str = SnapshotDir,
    deep: bool = typer.Option(False, "--deep", help="Decode every sample as well."),
    source: bool = typer.Option(False, "--source", help="Hash the recordings that it was made from as well."),
) -> None:
    """Hash every shard again and hold index and tables against each other. Exit code 5 when anything is wrong.

    Example: kymo verify demo/shards/psg --deep
    """
    from engine.storage import location
    from engine.verify import verify as verify_snapshot
    from manifests.shards import load_snapshot

    total = load_snapshot(location(folder)).counts["num_bytes"]
    with bytes_progress("verifying", None if source else total) as tick:
        found = verify_snapshot(location(folder), deep=deep, source=source, tick=tick)
    for problem in found.problems:
        console.print(f"[red]{escape(problem)}[/]", soft_wrap=True)
    for advice in found.advice:
        console.print(f"→ {escape(advice)}", soft_wrap=True)
    recordings = f", {found.recordings:,} recordings" if source else ""
    console.print(f"{found.shards} shards, {found.samples:,} samples{recordings}: ", end="")
    console.print("all as committed" if found.is_sound else f"[red]{len(found.problems)} problems[/]")
    if not found.is_sound:
        raise typer.Exit(5)


def report(
    folder: str = SnapshotDir,
    out: Path | None = typer.Option(None, help="HTML file; default: report.html in the snapshot, here for a store."),
    run: list[Path] = typer.Option([], help="Training runs whose loss curves are shown; repeatable."),
) -> None:
    """Write one self-contained HTML page about a snapshot and the runs that trained on it.

    Example: kymo report demo/shards/psg --run demo/runs/sleep --out demo/psg.html
    """
    from engine.report import write_report
    from engine.storage import is_remote, location

    snapshot = location(folder)
    beside = Path("report.html") if is_remote(snapshot) else snapshot / "report.html"
    path = write_report(snapshot, out or beside, runs=run)
    console.print(f"report: {path}")


def preview(
    folder: str = SnapshotDir,
    key: str = typer.Argument("", help="Sample key; empty takes the first one."),
    out: Path = typer.Option(Path("preview.png"), help="PNG file."),
) -> None:
    """Draw one sample: all channels with symbols, units and labels.

    Example: kymo preview demo/shards/psg --out demo/preview.png
    """
    from engine.preview import draw_sample, first_key
    from engine.storage import location

    snapshot = location(folder)
    path = draw_sample(snapshot, key or first_key(snapshot), out)
    console.print(f"preview: {path}")
