"""The model card of a bundle: front matter for the hub, and for people what it does, on what, how well."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from adapters.config import Card
from adapters.layout import TaskRecord
from manifests.recipes import NATIVE, KindRule
from trainer.evaluation.scores import METRICS

FEW_SUBJECTS = 10


def card_text(card: Card, records: Mapping[str, TaskRecord], *, encoder: str) -> str:
    """README.md of a bundle. `encoder` describes the base in a few words."""
    sections = [
        f"---\n{_front_matter(card, records)}\n---\n",
        f"# {card.title}\n",
        f"{len(records)} task(s) on one frozen encoder ({encoder}): a LoRA adapter and a head per task, and a "
        "temporal encoder that they share. The folder holds all that prediction needs:\n\n"
        "```\nkymo predict BUNDLE FILE.edf\n```\n\n"
        "`adapters/TASK` is a stock PEFT folder. Load `shared/temporal_encoder.safetensors` into the encoder's "
        "`temporal_encoder` before `PeftModel.from_pretrained`: an adapter is valid with that one only.\n",
        "## Intended use\n",
        f"{card.intended_use}\n\n**Not for clinical use.** This is not a medical device. It must not be used for "
        "diagnosis, treatment or monitoring. How well it works on other devices, montages, ages and diseases than "
        "those under Data is not known.\n",
    ]
    for name, record in records.items():
        sections += _task_section(name, record)
    if card.authors:
        sections += ["## Authors\n", ", ".join(card.authors) + "\n"]
    return "\n".join(sections)


def _front_matter(card: Card, records: Mapping[str, TaskRecord]) -> str:
    results = [
        EvalResult(
            task_type=name,
            task_name=record.task.title,
            dataset_type="+".join(record.data["corpora"]),
            dataset_name=", ".join(str(facts.get("title", corpus)) for corpus, facts in record.data["corpora"].items()),
            dataset_split="test",
            metric_type=metric,
            metric_name=METRICS[metric],
            metric_value=round(entry["value"], 4),
        )
        for name, record in records.items()
        for metric, entry in ((record.scores.get("test") or {}).get("metrics") or {}).items()
        if entry["value"] is not None
    ]
    kinds = sorted({kind for record in records.values() for kind in record.task.kinds})
    data = ModelCardData(
        license=card.licence,
        library_name="kymo",
        tags=["kymo", "peft", "lora", "biosignals", *kinds, *records],
        model_name=card.title,
        eval_results=results or None,
    )
    if not results:
        del data.model_name
    return data.to_yaml()


def _task_section(name: str, record: TaskRecord) -> list[str]:
    task, recipe = record.task, record.recipe
    needs = ", ".join(f"{least} or more {kind}" for kind, least in task.min_channels.items())
    bands = ", ".join(_band(kind, recipe.kinds[kind]) for kind in task.kinds if kind in recipe.kinds)
    channels = record.data["splits"]["train"]["symbols"]
    sections = [
        f"## {name}: {task.title}\n",
        f"* Labels, in the order of the outputs: {', '.join(task.labels)}",
        f"* Input: windows of {recipe.window_s} s, {bands}; view `{task.view}`",
        f"* Channels: {needs}; seen in training: {', '.join(list(channels)[:16])}{' …' if len(channels) > 16 else ''}",
        f"* Adapter: LoRA r = {record.lora.r}, alpha = {record.lora.alpha}\n",
    ]
    for split, scores in record.scores.items():
        if scores is None:
            sections.append(f"No labelled window in the {split} split: not scored there.\n")
        else:
            sections += _score_table(split, scores)
    return [*sections, *_data_lines(record)]


def _band(kind: str, rule: KindRule) -> str:
    if rule.rate_hz == NATIVE:
        return f"{kind} from {rule.low_hz or 0:g} Hz at the recorded rate"
    return f"{kind} {rule.low_hz or 0:g}-{rule.high_hz or rule.rate_hz / 2:g} Hz at {rule.rate_hz} Hz"


def _score_table(split: str, scores: dict[str, Any]) -> list[str]:
    rows = [
        f"| {METRICS[metric]} | {_number(entry['value'])} | {_interval(entry['interval'])} | {entry['chance']:.3f} |"
        for metric, entry in scores["metrics"].items()
    ]
    support = ", ".join(f"{label} {count}" for label, count in scores["support"].items())
    return [
        f"{split}: {scores['n']} windows of {scores['subjects']} subjects ({support}). The interval (95 %) resamples "
        f"subjects{'; from so few it is too narrow' if scores['subjects'] < FEW_SUBJECTS else ''}.\n",
        "| metric | value | interval | chance |\n|---|---|---|---|",
        *rows,
        "",
    ]


def _data_lines(record: TaskRecord) -> list[str]:
    lines = ["Data:\n"]
    for corpus, facts in record.data["corpora"].items():
        citation = f"; {facts['citation']}" if facts.get("citation") else ""
        lines.append(f"* {facts.get('title', corpus)}: licence {facts.get('licence', 'not stated')}{citation}")
    for split, facts in record.data["splits"].items():
        left_out = ", ".join(f"{count} {reason}" for reason, count in facts["left_out"].items()) or "none"
        lines.append(
            f"* {split}: {facts['windows']} windows, {facts['subjects']} subjects, split digest "
            f"`{facts['digest'][:16]}`; left out: {left_out}"
        )
    snapshots = ", ".join(f"`{digest[:16]}`" for digest in record.data["snapshots"])
    return [*lines, f"* snapshots: {snapshots}\n"]


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"


def _interval(bounds: list[float] | None) -> str:
    return "too few subjects" if bounds is None else f"{bounds[0]:.3f}-{bounds[1]:.3f}"
