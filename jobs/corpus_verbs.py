"""Verbs about corpora: what ships with kymo and how to get it, and the download of the open ones."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from jobs.console import bytes_progress, console, show_table
from manifests.config import shipped_names
from manifests.corpora import CORPORA_DIR, Corpus, load_corpus
from manifests.errors import ConfigError
from manifests.tasks import TASKS_DIR, load_task

if TYPE_CHECKING:
    from engine.fetch import Fetched

_FAILURES_SHOWN = 10
_CONFIGS = Path(__file__).resolve().parent / "configs"


def corpora(
    name: str = typer.Argument("", help="One corpus in full; empty lists all.", metavar="[CORPUS]"),
    access: str = typer.Option("", help="Only these: open, registered, agreement, or fetch (kymo fetch gets them)."),
) -> None:
    """List the corpora that kymo knows, with licence and access, or show one in full.

    Example: kymo corpora sleep_edf
    """
    if name:
        show_corpus(load_corpus(name))
        return
    found = [load_corpus(each) for each in shipped_names(CORPORA_DIR)]
    if access not in {"", "open", "registered", "agreement", "fetch"}:
        raise ConfigError(f"--access {access!r}: write open, registered, agreement or fetch")
    wanted = [
        corpus
        for corpus in found
        if not access or access == corpus.access_kind or (access == "fetch" and corpus.fetch is not None)
    ]
    cells = [
        (
            corpus.id,
            "fetch" if corpus.fetch else corpus.access_kind,
            _number(corpus.expected.subjects),
            _number(corpus.expected.recordings),
            _number(corpus.expected.hours),
            corpus.mains_hz or "",
            corpus.licence.partition(";")[0],
        )
        for corpus in wanted
    ]
    columns = ("corpus", "access", "subjects", "recordings", "hours", "mains", "licence")
    show_table(f"corpora ({len(wanted)})", columns, cells)
    shared = [(c.id, ", ".join(c.overlaps)) for c in wanted if c.overlaps]
    show_table("overlaps", ("corpus", "shares recordings or persons with"), shared)
    console.print("fetch: kymo fetch CORPUS --to DIR; agreement: a signed form. kymo corpora CORPUS shows one in full.")


def show_corpus(corpus: Corpus) -> None:
    """Everything that a person asks about one corpus before using it."""
    expected, kind = corpus.expected, corpus.access_kind
    totals = [
        f"{number:,g} {noun}"
        for number, noun in (
            (expected.subjects, "subjects"),
            (expected.recordings, "recordings"),
            (expected.hours, "hours"),
        )
        if number is not None
    ]
    labels: dict[str, list[str]] = {}
    for rule in corpus.annotation_rules:
        where = rule.pattern or (rule.labels.file if rule.labels else "")
        if rule.source != "none":
            labels.setdefault(f"{rule.source}{f' ({where})' if where else ''}", []).append(rule.target)
    strict = f"strict: {corpus.split.rule}"
    published = [f"{name}: {rule.source or rule.rule}" for name, rule in corpus.published.items()]
    signals = sorted({symbol for symbol in corpus.channels.values() if symbol is not None})
    overlaps = [
        f"{other}: {overlap.relation}, persons {overlap.persons}{f'; {overlap.note}' if overlap.note else ''}"
        for other, overlap in corpus.overlaps.items()
    ]
    rows = [
        ("licence", corpus.licence),
        ("access", corpus.access if corpus.access.startswith(corpus.access_kind) else f"{kind}: {corpus.access}"),
        ("homepage", corpus.homepage),
        ("get it", f"kymo fetch {corpus.id} --to DIR" if corpus.fetch else "by hand, as access says"),
        ("citation", corpus.citation),
        ("expected", ", ".join(totals)),
        ("files", "\n".join(corpus.files)),
        ("also needs", "\n".join(corpus.side_files)),
        ("labels", "\n".join(f"{' and '.join(targets)} from {source}" for source, targets in labels.items())),
        ("signals", " ".join(signals)),
        ("mains", f"{corpus.mains_hz} Hz" if corpus.mains_hz else "not the same everywhere, or not known"),
        ("splits", "\n".join([strict, *published])),
        ("overlaps", "\n".join(overlaps)),
        ("left out", "\n".join(f"{path}: {why}" for path, why in corpus.known_bad.items())),
    ]
    show_table("corpus", (corpus.id, corpus.title), [row for row in rows if row[1]])


def fetch(
    name: str = typer.Argument(help="Corpus of `kymo corpora --access fetch`, or path of a YAML.", metavar="CORPUS"),
    to: Path = typer.Option(help="Folder for the recordings; the root of the corpus later."),
    only: list[str] = typer.Option([], help="Only what this glob finds; repeatable."),
    limit: int | None = typer.Option(None, min=1, help="At most so many recordings."),
    base_url: str | None = typer.Option(None, help="A mirror in place of the corpus' own server."),
    jobs: int = typer.Option(4, min=1, max=16, help="Files at the same time."),
) -> None:
    """Download an openly licensed corpus and check every file. Run the same command again to go on.

    Example: kymo fetch sleep_edf --to recordings/sleep_edf --limit 2
    """
    from engine.fetch import fetch as fetch_corpus

    corpus = load_corpus(name)
    if corpus.fetch is not None:
        console.print(f"{corpus.title}. Licence: {corpus.licence}", markup=False, soft_wrap=True)
        console.print(f"Cite: {corpus.citation or corpus.homepage or corpus.access}", markup=False, soft_wrap=True)
    with bytes_progress(f"fetching {corpus.id}", None) as tick:
        found = fetch_corpus(corpus, to, only=only, limit=limit, base_url=base_url, jobs=jobs, progress=tick)
    _show_fetched(found, to)
    if found.failed:
        raise ConfigError(
            f"{len(found.failed)} files did not come; run the same command again, it goes on where it stopped"
        )
    # The folder is shown as it was typed: the next commands run where this one did.
    sources = f"sources=[{{corpus: {name}, root: {json.dumps(str(to))}}}]"
    convert = f"{_overrides(corpus)} output=shards/{corpus.id} {shlex.quote(sources)}"
    console.print(f"Look:    kymo scan {shlex.quote(str(to))} --corpus {name}", markup=False, soft_wrap=True)
    console.print(f"Convert: kymo convert {convert}", markup=False, soft_wrap=True)
    for task in map(load_task, shipped_names(TASKS_DIR)):
        if corpus.id in task.corpora and task.recipe is not None:
            console.print(f"Task {task.id}: convert with recipe={task.recipe}", markup=False, soft_wrap=True)


def _show_fetched(found: "Fetched", to: Path) -> None:
    shown = list(found.failed.items())[:_FAILURES_SHOWN]
    title = f"failed ({len(found.failed)})"
    if len(found.failed) > len(shown):
        title += f", the first {len(shown)} of them"
    show_table(title, ("file", "why"), shown)
    console.print(
        f"{len(found.downloaded)} files came ({found.num_bytes / 1e6:,.1f} MB), {len(found.present)} were there, all "
        f"with the right checksum → {escape(str(to))}",
        soft_wrap=True,
    )


def _overrides(corpus: Corpus) -> str:
    """A run that is near to what the corpus needs, its path from here, and what differs from the demo's settings."""
    kinds = {symbol.partition(":")[0] for symbol in corpus.channels.values() if symbol}
    has_stages = any(rule.target == "stage" and rule.source != "none" for rule in corpus.annotation_rules)
    recipe = "ecg500" if kinds == {"ecg"} else "sleep128" if has_stages else "eeg200"
    config = _CONFIGS / ("convert_ecg.yaml" if recipe == "ecg500" else "convert_psg.yaml")
    here = config.relative_to(Path.cwd()) if config.is_relative_to(Path.cwd()) else config
    return f"{here} recipe={recipe} num_cpus=null unit_bytes=1000000000"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,g}" if value < 100 else f"{value:,.0f}"
