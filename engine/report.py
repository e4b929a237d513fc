"""One self-contained HTML page about a snapshot and the runs trained on it: what is in it, what was lost, why."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import mne
from matplotlib.figure import Figure

from engine.preview import draw_window, read_window
from engine.quarantine import read_waivers
from engine.report_data import (
    ReportData,
    channels_by_recording,
    example_keys,
    hours_by_kind,
    label_counts,
    losses,
    metrics_rows,
    num_windows,
    read_report_data,
    suspect_units,
    unmapped_annotations,
    unresolved_labels,
)
from engine.report_figures import draw_coverage, draw_hours, draw_labels, draw_losses, draw_training
from manifests.annotations import STAGES

logger = logging.getLogger(__name__)

MAX_EXAMPLES = 8
MAX_CLASSES = 20
MAX_ROWS = 500
_MAX_NAMES = 4  # corpora in the page's title

UNMAPPED_NOTE = (
    "Their texts stand in no file of this output, for a text that is in no vocabulary may name a person: "
    "kymo scan FOLDER --corpus CORPUS shows them, with their counts and the nearest text that the corpus file maps."
)

CSS = """
table.kymo {border-collapse: collapse; font-size: 0.9rem; margin: 0.3rem 0 0.6rem 0;}
table.kymo th {text-align: left; font-weight: 600; padding: 0.2rem 1.2rem 0.2rem 0; border-bottom: 1px solid #eceff2;}
table.kymo thead th {border-bottom: 1px solid #b8bfc6;}
table.kymo td {border-bottom: 1px solid #eceff2; padding: 0.2rem 1.2rem 0.2rem 0; vertical-align: top;}
table.kymo td.number {text-align: right; font-variant-numeric: tabular-nums;}
table.kymo code {overflow-wrap: anywhere; display: inline-block; min-width: 12rem;}
table.kymo code, pre.kymo {font-size: 0.8rem; color: #22272e;}
p.kymo {color: #6a737d; font-size: 0.9rem; margin: 0.2rem 0;}
"""


def html_table(rows: Sequence[Mapping[str, Any]], *, code: Sequence[str] = ()) -> str:
    """HTML table of dicts with equal keys, every value escaped; the columns in `code` are set in monospace."""
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = []
    for row in rows[:MAX_ROWS]:
        cells = []
        for name, value in row.items():
            text = escape(f"{value:,}" if isinstance(value, int) else str(value))
            text = f"<code>{text}</code>" if name in code else text
            cells.append(f'<td class="number">{text}</td>' if isinstance(value, int | float) else f"<td>{text}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    more = f"<p class='kymo'>{len(rows) - MAX_ROWS:,} more rows.</p>" if len(rows) > MAX_ROWS else ""
    return f"<table class='kymo'><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>{more}"


def _note(text: str) -> str:
    return f"<p class='kymo'>{escape(text)}</p>"


def _add_figure(report: mne.Report, figure: Figure, title: str, *, section: str, caption: str | None = None) -> None:
    report.add_figure(figure, title=title, caption=caption, section=section, tags=(section.lower(),))


def _add_html(report: mne.Report, html: str, title: str, *, section: str) -> None:
    report.add_html(html, title=title, section=section, tags=(section.lower(),))


def _overview(data: ReportData) -> str:
    counts, snapshot = data.snapshot.counts, data.snapshot
    recipe, made = snapshot.recipe, snapshot.provenance
    hours = (num_windows(data.samples) if data.is_native else len(data.samples)) * data.hours_per_window
    lines = {
        "recordings": f"{counts['recordings']:,}, {counts['quarantined']:,} of them quarantined",
        "subjects": f"{counts['subjects']:,}",
        "windows": f"{len(data.samples):,} of {recipe['window_s']} s, {hours:,.1f} hours",
        "shards": f"{counts['shards']:,}, {counts['num_bytes'] / 1e6:,.1f} MB",
        "recipe": f"{recipe['id']} ({recipe['title']})",
        "channel schema": f"UCS v{snapshot.ucs_version}, {snapshot.ucs_digest[:12]}",
        "snapshot": snapshot.digest,
        "code": ", ".join(f"{name} {str(value)[:20]}" for name, value in sorted(made.items())) or "not recorded",
    }
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in lines.items())
    corpora = [
        {
            "corpus": name,
            "title": entry.get("title", ""),
            "licence": entry.get("licence", ""),
            "recordings": entry.get("recordings", 0),
            "hours": round(entry.get("seconds", 0) / 3600, 1),
            "windows": entry.get("windows", 0),
        }
        for name, entry in sorted(snapshot.corpora.items())
    ]
    return f"<table class='kymo'>{rows}</table>" + (html_table(corpora) if corpora else "")


def _add_content(report: mne.Report, data: ReportData) -> None:
    if len(data.samples) == 0:
        _add_html(report, _note("The snapshot holds no window; see the losses."), "No windows", section="Content")
        return
    kinds, hours = hours_by_kind(data)
    _add_figure(
        report,
        draw_hours(data.corpora, kinds, hours),
        "Hours by corpus and kind",
        section="Content",
        caption="Hours of windows that hold at least one channel of the kind.",
    )
    figure, num_hidden = draw_coverage(channels_by_recording(data))
    hidden = f" {num_hidden} rarer channels are not drawn." if num_hidden else ""
    caption = f"Channels by recording; at the right the share of recordings that have the channel.{hidden}"
    _add_figure(report, figure, "Channel coverage", section="Content", caption=caption)


def _add_losses(report: mne.Report, data: ReportData) -> None:
    if not data.commits:  # an empty table would say that nothing was lost
        parent = escape(str(data.snapshot.provenance.get("parent", "from which it was made")))
        text = f"The folder holds no commits: what was lost stands in the report of snapshot {parent}."
        _add_html(report, _note(text), "From files to windows", section="Losses")
        return
    caption = "What came in, what was lost for which reason, what is left."
    _add_figure(report, draw_losses(losses(data)), "From files to windows", section="Losses", caption=caption)
    waivers = read_waivers(data.folder)
    columns = {"corpus", "path", "reason", "message"}  # `kymo quarantine show` tells the rest
    quarantine = [item.model_dump(include=columns) for commit in data.commits for item in commit.quarantine]
    for row in quarantine if waivers else ():
        waiver = waivers.get((row["corpus"], row["path"], row["reason"]))
        row["waived"] = f"{waiver.note} ({waiver.time[:10]})" if waiver else ""
    quarantine.sort(key=lambda row: (row["reason"], row["corpus"], row["path"]))
    html = html_table(quarantine, code=("path",)) if quarantine else _note("No recording was quarantined.")
    _add_html(report, html, f"Quarantine ({len(quarantine):,})", section="Losses")
    labels = unresolved_labels(data)
    html = html_table(labels, code=("label",)) if labels else _note("Every channel label was resolved.")
    _add_html(report, html, f"Channels left out ({len(labels):,} labels)", section="Losses")
    suspects = suspect_units(data)
    html = html_table(suspects) if suspects else _note("Every channel's amplitude is plausible for its kind and unit.")
    num_suspects = sum(row["channels"] for row in suspects)
    _add_html(report, html, f"Units in doubt ({num_suspects:,} channels)", section="Losses")
    unmapped = unmapped_annotations(data)
    if unmapped:
        title = f"Annotations without a label ({sum(row['annotations'] for row in unmapped):,})"
        _add_html(report, html_table(unmapped) + _note(UNMAPPED_NOTE), title, section="Losses")


def _add_labels(report: mne.Report, data: ReportData) -> None:
    stages = label_counts(data, "stage")
    if stages:
        found = {stage for counts in stages.values() for stage in counts}
        figure = draw_labels(stages, [stage for stage in STAGES if stage in found], noun="windows")
        _add_figure(report, figure, "Stages by split", section="Labels", caption="Share of a split's windows.")
    classes = label_counts(data, "classes")
    if classes:
        total: Counter[str] = sum(classes.values(), Counter())
        order = [label for label, _ in total.most_common(MAX_CLASSES)]
        rest = len(total) - len(order)
        caption = "Share of a split's class labels; a window may have several." + (
            f" {rest} rarer classes are not drawn." if rest else ""
        )
        _add_figure(
            report, draw_labels(classes, order, noun="labels"), "Classes by split", section="Labels", caption=caption
        )
    if not stages and not classes:
        _add_html(report, _note("No window has a label."), "No labels", section="Labels")


def _add_examples(report: mne.Report, data: ReportData) -> None:
    for key in example_keys(data, MAX_EXAMPLES):
        arrays, meta = read_window(data.folder, key)
        labels = meta["labels"]
        text = " ".join([*labels.get("stage", []), *labels.get("classes", [])]) or "no label"
        _add_figure(report, draw_window(arrays, meta), f"{meta['corpus']} {text}", section="Examples")


def _add_run(report: mne.Report, run: Path) -> None:
    section = "Training"
    rows = [row for row in metrics_rows(run) if "step" in row and "loss" in row]
    if rows:
        speed = rows[-1].get("windows_per_s")
        caption = f"{rows[-1]['step']:,} steps" + (f", {speed:,.0f} windows/s at the end" if speed else "")
        _add_figure(report, draw_training(rows), f"{run.name}: loss", section=section, caption=caption)
    else:
        logger.warning("%s: no metrics.jsonl with step and loss; the report shows no curve for it", run)
        _add_html(
            report, _note(f"{run}: no row with step and loss in metrics.jsonl."), f"{run.name}: loss", section=section
        )
    config = run / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.exists() else "config.yaml is missing"
    _add_html(
        report,
        f"<details><summary>config.yaml</summary><pre class='kymo'>{escape(text)}</pre></details>",
        f"{run.name}: configuration",
        section=section,
    )


def write_report(snapshot_dir: Path | str, out_html: Path | str, *, runs: Sequence[Path] = ()) -> Path:
    """Write a self-contained HTML page about a snapshot; returns its path.

    Args:
        snapshot_dir: Folder that `kymo convert` has finished.
        out_html: Page to write; an older one is replaced.
        runs: Folders of training runs, for their loss curves and configurations.

    Raises:
        ConfigError: No finished snapshot in the folder.
        ContractError: A damaged snapshot or shard.
    """
    data = read_report_data(snapshot_dir)
    names = data.corpora if len(data.corpora) <= _MAX_NAMES else [*data.corpora[:_MAX_NAMES], "…"]
    title = f"kymo: {', '.join(names)}"
    report = mne.Report(title=title, image_format="png", img_max_width=1400, verbose="error")
    report.add_custom_css(CSS)
    _add_html(report, _overview(data), "Snapshot", section="Overview")
    _add_content(report, data)
    _add_losses(report, data)
    _add_labels(report, data)
    _add_examples(report, data)
    for run in runs:
        _add_run(report, Path(run))
    path = Path(out_html)
    path.parent.mkdir(parents=True, exist_ok=True)
    report.save(path, open_browser=False, overwrite=True, verbose="error")
    return path
