"""What `kymo bundle show` prints: tasks, scores, needs, sizes, base, licences, provenance."""

from collections.abc import Mapping

from rich.markup import escape

from adapters.layout import BASE_WEIGHTS, SHARED_FILE, Manifest, TaskRecord, task_files
from adapters.provenance import hours_of, sources_of
from jobs.adapter_verbs import show_task_scores
from jobs.console import console, show_table
from trainer.export import EncoderCard


def show_bundle(name: str, manifest: Manifest, encoder: EncoderCard, records: Mapping[str, TaskRecord]) -> None:
    """Tables of a bundle whose files are verified."""
    show_table(name, ("task", "labels", "needs", "windows", "adapter", "head"), _tasks(manifest, records))
    show_task_scores({task: record.scores for task, record in records.items()})
    show_table("data", ("task", "split", "windows", "hours", "subjects", "seen in pretraining"), _data(records))
    sources = sources_of(encoder, records)
    show_table("made from", ("what", "name", "licence"), [(s.role, s.name, s.licence or "not stated") for s in sources])
    base = manifest.base
    where = (
        f"{manifest.files[BASE_WEIGHTS].size:,} bytes in the bundle" if base.reference is None else str(base.reference)
    )
    lines = [
        f"licence of the bundle: {manifest.card.licence}",
        f"base: {base.kind}, {base.step:,} steps of pretraining, {base.sha256[:16]}, {where}",
        f"temporal encoder: {manifest.temporal}, {manifest.files[SHARED_FILE].size:,} bytes",
        f"channel table: version {manifest.ucs_version}, {manifest.ucs_digest[:16]}",
    ]
    for task, record in records.items():
        made = record.provenance
        lines.append(
            f"{task}: {record.lora.kind} r {record.lora.r} alpha {record.lora.alpha}, step {made['kept_step']} of "
            f"{made['settings']['steps']}, seed {made['settings']['seed']}, kymo {made['code']['kymo']} "
            f"{made['code']['git']}"
        )
    for line in lines:
        console.print(escape(line), soft_wrap=True)


def _tasks(manifest: Manifest, records: Mapping[str, TaskRecord]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for task, record in records.items():
        files = task_files(task)
        needs = ", ".join(f"{least} {kind}" for kind, least in record.task.min_channels.items())
        sizes = [f"{manifest.files[files[role]].size / 1000:,.1f} kB" for role in ("adapter", "head")]
        rows.append((task, ", ".join(record.task.labels), needs, f"{record.recipe.window_s} s", *sizes))
    return rows


def _data(records: Mapping[str, TaskRecord]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for task, record in records.items():
        hours = hours_of(record)
        for split, facts in record.data["splits"].items():
            seen = record.data["pretrain_seen"].get(split)
            told = "" if seen is None else "unknown" if seen["subjects_seen"] is None else str(seen["subjects_seen"])
            rows.append((task, split, f"{facts['windows']:,}", f"{hours[split]:,.2f}", facts["subjects"], told))
    return rows
