"""The model card of a bundle: front matter for the hub, and for people what it does, on what, and how well."""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from adapters.config import Card
from adapters.figure import scored_split
from adapters.layout import FIGURE_FILE, SHARED_FILE, Base, TaskRecord, task_files
from adapters.licences import UNKNOWN, terms_of
from adapters.provenance import hours_of, sources_of
from manifests.recipes import NATIVE, KindRule
from trainer.evaluation.scores import METRICS
from trainer.export import EncoderCard

SHOWN_CHANNELS = 16
FEW_SUBJECTS = 10
NOT_CLINICAL = (
    "**Not for clinical use.** This is not a medical device. It must not be used for diagnosis, treatment or "
    "monitoring. How well it works on other devices, montages, ages and diseases than those of the corpora below is "
    "not known."
)


def card_text(
    card: Card, records: Mapping[str, TaskRecord], *, base: Base, encoder: EncoderCard, sizes: Mapping[str, int]
) -> str:
    """README.md of a bundle.

    Args:
        card: What its maker says.
        records: Of its tasks.
        base: Where the weights of the encoder are.
        encoder: Card of the encoder.
        sizes: Bytes of every file that the card speaks of.
    """
    sections = [
        f"---\n{_front_matter(card, records, base)}\n---\n",
        f"# {card.title}\n",
        f"{_count(len(records), 'task')} on one frozen encoder of EEG, ECG and sleep recordings: an adapter and a head "
        "each, and a temporal encoder that they share. The folder holds safetensors, JSON and this page, no pickles; "
        "every file is checked against its SHA-256 before it is used.\n",
        f"![Metrics of each task with their intervals]({FIGURE_FILE})\n",
        *_overview(records, sizes),
        "## What it is for, and what not\n",
        f"{card.intended_use}\n\n{NOT_CLINICAL}\n",
        *_usage(records, base),
    ]
    for name, record in records.items():
        sections += _task_section(name, record)
    sections += _base_section(base, encoder)
    sections += _licences(card, records, encoder)
    sections += _citations(card, records, encoder)
    return "\n".join(sections)


def _front_matter(card: Card, records: Mapping[str, TaskRecord], base: Base) -> str:
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
    more: dict[str, Any] = {}
    if base.reference is not None:
        more |= {"base_model": base.reference.repo_id, "base_model_relation": "adapter"}
    if card.licence.lower() == "other":
        more["license_name"] = "see-licences-below"
    data = ModelCardData(
        license=card.licence.lower(),
        library_name="kymo",
        tags=["kymo", "peft", "lora", "biosignals", *kinds, *records],
        datasets=sorted({corpus for record in records.values() for corpus in record.data["corpora"]}),
        model_name=card.title,
        eval_results=results or None,
        **more,
    )
    if not results:
        del data.model_name
    return data.to_yaml()


def _overview(records: Mapping[str, TaskRecord], sizes: Mapping[str, int]) -> list[str]:
    rows = []
    for name, record in records.items():
        found = scored_split(record)
        value = "not scored"
        if found is not None:
            metric = (
                record.task.primary if record.task.primary in found[1]["metrics"] else next(iter(found[1]["metrics"]))
            )
            entry = found[1]["metrics"][metric]
            value = f"{METRICS[metric]} {_number(entry['value'])} ({_interval(entry['interval'])}), {found[0]}"
        kilobytes = sum(sizes[task_files(name)[role]] for role in ("adapter", "head")) / 1000
        rows.append(f"| `{name}` | {', '.join(record.task.labels)} | {value} | {kilobytes:,.0f} kB |")
    return ["| task | labels | score (95 % interval) | adapter and head |\n|---|---|---|---|", *rows, ""]


def _usage(records: Mapping[str, TaskRecord], base: Base) -> list[str]:
    first, record = next(iter(records.items()))
    imports = ["import peft", "from safetensors.torch import load_file", "from trainer.export import load_encoder"]
    where, fused = '"BUNDLE/base"', []
    if (reference := base.reference) is not None:
        imports.append("from adapters.hub import fetch_file")
        place = f'"{reference.repo_id}", "{reference.revision}", "{reference.filename}"'
        where += f", weights_file=fetch_file({place})"
    if record.lora.attn == "fused":
        imports.append("from adapters.fused import fuse_attention")
        fused = ["fuse_attention(encoder.blocks)  # q, k and v as one layer"]
    code = [
        *sorted(imports),
        "",
        f"encoder = load_encoder({where})",
        f'encoder.temporal_encoder.load_state_dict(load_file("BUNDLE/{SHARED_FILE}"))',
        *fused,
        f'model = peft.PeftModel.from_pretrained(encoder, "BUNDLE/adapters/{first}").eval()',
        "features_BD = model(batch).pooled_BD",
    ]
    lines = "\n".join(code)
    return [
        "## How to use it\n",
        "Any file that kymo reads (EDF, BDF, WFDB, BrainVision, …), with kymo installed:\n\n"
        f"```\nkymo predict OWNER/NAME@VERSION FILE.edf --task {first}\nkymo bundle verify BUNDLE\n```\n",
        "`adapters/TASK` is a stock PEFT folder. An adapter is valid only with the temporal encoder that it was "
        f"trained with, which PEFT does not load:\n\n```python\n{lines}\n```\n",
    ]


def _task_section(name: str, record: TaskRecord) -> list[str]:
    task, recipe = record.task, record.recipe
    channels = list(record.data["splits"]["train"]["symbols"])
    shown = ", ".join(f"`{symbol}`" for symbol in channels[:SHOWN_CHANNELS])
    rows = [
        f"| {kind} | {task.min_channels.get(kind, 0)} | {recipe.kinds[kind].least_recorded_hz:g} Hz | "
        f"{_band(recipe.kinds[kind])} |"
        for kind in task.kinds
        if kind in recipe.kinds
    ]
    missing = (
        "With fewer of them it computes with those that are there: it was trained with channels left out at random."
        if task.channel_dropout
        else "It was trained with all its channels there; a recording with others is read all the same, at your risk."
    )
    sections = [
        f"## {name}: {task.title}\n",
        f"* Labels, in the order of the outputs: {', '.join(task.labels)}",
        f"* Input: windows of {recipe.window_s} s, view `{task.view}`; a recording that lacks what the table asks for "
        "is refused\n",
        "| kind | channels at least | recorded at least at | what the model sees |\n|---|---|---|---|",
        *rows,
        "",
        f"Channels seen in training: {shown}{' …' if len(channels) > SHOWN_CHANNELS else ''}. {missing}\n",
    ]
    for split, scores in record.scores.items():
        if scores is None:
            sections.append(f"No labelled window in the {split} split: not scored there.\n")
        else:
            sections += _score_table(split, scores)
    return [*sections, *_data_lines(record)]


def _band(rule: KindRule) -> str:
    if rule.rate_hz == NATIVE:
        return f"from {rule.low_hz or 0:g} Hz at the recorded rate"
    return f"{rule.low_hz or 0:g} to {rule.high_hz or rule.rate_hz / 2:g} Hz at {rule.rate_hz} Hz"


def _score_table(split: str, scores: dict[str, Any]) -> list[str]:
    rows = [
        f"| {METRICS[metric]} | {_number(entry['value'])} | {_interval(entry['interval'])} | {entry['chance']:.3f} |"
        for metric, entry in scores["metrics"].items()
    ]
    support = ", ".join(f"{label} {count}" for label, count in scores["support"].items())
    few = "; from so few it is too narrow" if scores["subjects"] < FEW_SUBJECTS else ""
    return [
        f"{split}: {_count(scores['n'], 'window')} of {_count(scores['subjects'], 'subject')} ({support}). The "
        f"interval (95 %) resamples subjects{few}.\n",
        "| metric | value | interval | chance |\n|---|---|---|---|",
        *rows,
        "",
    ]


def _data_lines(record: TaskRecord) -> list[str]:
    hours = hours_of(record)
    lines = ["Data and training:\n"]
    for split, facts in record.data["splits"].items():
        parts = ", ".join(f"{corpus} {found['subjects']}" for corpus, found in facts["corpora"].items())
        left_out = ", ".join(f"{reason} ({count})" for reason, count in facts["left_out"].items()) or "none"
        lines.append(
            f"* {split}: {facts['windows']:,} windows ({hours[split]:g} h), {_count(facts['subjects'], 'subject')}"
            f"{f' ({parts})' if parts else ''}, split digest `{facts['digest'][:16]}`; left out: {left_out}"
        )
    seen = {split: found["sentence"] for split, found in record.data["pretrain_seen"].items()}
    for text in dict.fromkeys(seen.values()):
        splits = " and ".join(split for split in seen if seen[split] == text)
        lines.append(f"* {splits}, persons that pretraining saw: {text}")
    snapshots = ", ".join(f"`{digest[:16]}`" for digest in record.data["snapshots"])
    code, settings = record.provenance["code"], record.provenance["settings"]
    lines.append(f"* Snapshots: {snapshots}")
    lines.append(
        f"* Adapter: {record.lora.kind}, r = {record.lora.r}, alpha = {record.lora.alpha}, on {record.lora.targets}; "
        f"step {record.provenance['kept_step']} of {settings['steps']}, seed {settings['seed']}, kymo "
        f"{code['kymo']} (`{code['git']}`)\n"
    )
    return lines


def _base_section(base: Base, encoder: EncoderCard) -> list[str]:
    where = "in this folder" if base.reference is None else f"`{base.reference}`, fetched by its commit and checked"
    lines = [
        "## The encoder\n",
        f"A `{encoder.kind}` encoder after {encoder.step:,} steps of self-supervised pretraining, SHA-256 "
        f"`{encoder.sha256[:16]}`, {where}.\n",
    ]
    facts = encoder.pretrained_on
    if facts is None:
        return [*lines, "What it was pretrained on is not recorded.\n"]
    lines.append("| pretrained on | windows | hours | subjects | licence |\n|---|---|---|---|---|")
    for corpus, found in facts.corpora.items():
        lines.append(
            f"| {found.get('title', corpus)} | {found['windows']:,} | {found['hours']:,.1f} | {found['subjects']:,} | "
            f"{found.get('licence', 'not stated')} |"
        )
    return [*lines, "", *(f"Not known: {reason}.\n" for reason in facts.unknown)]


def _licences(card: Card, records: Mapping[str, TaskRecord], encoder: EncoderCard) -> list[str]:
    rows = [f"| {s.role} | {s.name} | {s.licence or 'not stated'} |" for s in sources_of(encoder, records)]
    own = f"`{card.licence}`"
    if terms_of(card.licence).id == UNKNOWN:
        own += ", which grants nothing by itself: the terms of what it is made from decide"
    return [
        "## Licences\n",
        f"This bundle: {own}. It is made from:\n",
        "| what | name | licence |\n|---|---|---|",
        *rows,
        "",
        "kymo has compared these licences by a table of what they permit. That is no legal advice.\n",
    ]


def _citations(card: Card, records: Mapping[str, TaskRecord], encoder: EncoderCard) -> list[str]:
    corpora = {} if encoder.pretrained_on is None else dict(encoder.pretrained_on.corpora)
    corpora |= {corpus: facts for record in records.values() for corpus, facts in record.data["corpora"].items()}
    lines = [
        f"* {facts.get('title', corpus)}: {facts['citation']}"
        for corpus, facts in corpora.items()
        if facts.get("citation")
    ]
    sections: list[str] = []
    if card.citation or lines:
        own = [f"* {card.citation}"] if card.citation else []
        sections += [
            "## Citation\n",
            "Cite the recordings that this was made from:\n" if lines else "",
            *own,
            *lines,
            "",
        ]
    if card.authors:
        sections += ["## Authors\n", ", ".join(card.authors) + "\n"]
    return sections


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"


def _interval(bounds: Sequence[float] | None) -> str:
    return "too few subjects" if bounds is None else f"{bounds[0]:.3f} to {bounds[1]:.3f}"
