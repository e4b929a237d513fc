"""Where a bundle comes from: data, code and seed of each task, persons that pretraining saw, licences of it all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from adapters.config import AdaptConfig
from adapters.data import TaskData
from adapters.layout import BASE_CARD, Manifest, TaskRecord, read_record
from adapters.licences import Source, check_publication
from trainer.evaluation.seen import is_apart, pretrain_seen, pretraining_of, sentence
from trainer.export import EncoderCard, read_card

SCORED = ("val", "test")
# Names of folders and how often something is logged: nobody else's business, and no part of what was computed.
PRIVATE = {"run_dir", "encoder", "tasks", "log_every", "eval_every", "checkpoint_every", "threads", "card"}


def seen_in_pretraining(card: EncoderCard, data: TaskData) -> dict[str, dict[str, Any]]:
    """What the base has seen of the persons that a task is scored on, by split.

    Returns:
        Per split with windows the fields of `trainer.evaluation.seen.pretrain_seen` and a `sentence`; `subjects_seen`
        is null where the card cannot tell.
    """
    pretraining = pretraining_of(card.pretrained_on)
    found: dict[str, dict[str, Any]] = {}
    for split in SCORED:
        labelled = data.splits[split]
        persons = {(stream.corpus, labelled.subjects[key]) for stream in labelled.streams for key in stream.keys}
        if not persons:
            continue
        seen = pretrain_seen(pretraining, pd.DataFrame(sorted(persons), columns=["corpus", "subject"]))
        found[split] = {**seen, "sentence": sentence(seen)}
    return found


def with_corpora_told(record: TaskRecord, card: EncoderCard) -> TaskRecord:
    """A record that does not know whom pretraining saw, told by the corpora in another card of the same base.

    Where these have nothing to do with the task's nobody was seen; else the record stays as it is, with the reason.
    """
    pretraining = pretraining_of(card.pretrained_on)
    seen = dict(record.data["pretrain_seen"])
    for split, found in seen.items():
        if found["subjects_seen"] is None and is_apart(pretraining, record.data["splits"][split]["corpora"]):
            told = {**found, "corpora": [], "rows": [], "subjects_seen": 0, "unknown": []}
            seen[split] = {**told, "sentence": sentence(told)}
    return record.model_copy(update={"data": {**record.data, "pretrain_seen": seen}})


def training_facts(config: AdaptConfig, run_dir: Path, *, kept_step: int) -> dict[str, Any]:
    """What trained a task: code version of the run, seed, settings without paths, the step that was kept."""
    settings = config.model_dump(mode="json", exclude=PRIVATE)
    code = json.loads((run_dir / "version.json").read_text(encoding="utf-8"))
    return {"code": code, "kept_step": kept_step, "settings": settings}


def hours_of(record: TaskRecord) -> dict[str, float]:
    """Hours of labelled windows by split; windows that overlap count each."""
    splits = record.data["splits"]
    return {split: round(facts["windows"] * record.recipe.window_s / 3600, 2) for split, facts in splits.items()}


def sources_of(card: EncoderCard, records: Mapping[str, TaskRecord]) -> list[Source]:
    """Everything with a licence that a bundle is made from: its base, the base's corpora and those of its tasks."""
    sources = [Source(role="base", name=f"{card.kind} {card.sha256[:12]}", licence=card.licence)]
    if card.pretrained_on is not None:
        for corpus, facts in card.pretrained_on.corpora.items():
            sources.append(Source(role="pretraining corpus", name=corpus, licence=facts.get("licence")))
    corpora = {corpus: facts for record in records.values() for corpus, facts in record.data["corpora"].items()}
    sources += [Source(role="corpus", name=name, licence=facts.get("licence")) for name, facts in corpora.items()]
    return sources


def check_rights(bundle_dir: Path, manifest: Manifest, *, is_public: bool, is_confirmed: bool) -> list[str]:
    """Whether a verified bundle may be published; sentences that its publisher should read.

    Raises:
        ConfigError: It holds changed weights of a base without derivatives, or terms that nobody has confirmed.
    """
    records = {name: read_record(bundle_dir, name, manifest) for name in manifest.tasks}
    sources = sources_of(read_card(bundle_dir / Path(BASE_CARD).parent), records)
    is_changed = manifest.temporal == "trained"
    return check_publication(sources, is_base_changed=is_changed, is_public=is_public, is_confirmed=is_confirmed)
