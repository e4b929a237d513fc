"""What of the evaluation's data the pretraining has seen: corpora, persons, and corpora that share persons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
from upath import UPath

from manifests.config import shipped_names
from manifests.corpora import CORPORA_DIR, Overlap, load_corpus
from manifests.errors import ConfigError, ContractError
from manifests.shards import SAMPLES_FILE, load_snapshot
from trainer.config import PretrainConfig
from trainer.evaluation.windows import Rows, folder_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretraining:
    """What an encoder was pretrained on.

    Attributes:
        subjects: Corpus to hashed subjects of the split that was trained on; all that could have been drawn.
        unknown: Why some or all of it is not known.
    """

    subjects: Mapping[str, frozenset[str]]
    unknown: tuple[str, ...]


def read_pretraining(config: PretrainConfig | None) -> Pretraining:
    """Corpora and persons of a run's snapshots, as far as they still lie where its configuration says.

    Filters of single windows are not looked at: a person counts as seen if any window of the split could be drawn.
    """
    if config is None:
        return Pretraining(subjects={}, unknown=("the encoder came without the configuration of its run",))
    subjects: dict[str, set[str]] = {}
    unknown = []
    for source in config.snapshots:
        try:
            load_snapshot(source.path)
        except (ConfigError, ContractError):
            unknown.append(f"snapshot {folder_name(source.path)} of the pretraining is not there any more")
            continue
        table = pq.read_table(UPath(source.path) / SAMPLES_FILE, columns=["corpus", "subject", "split"]).to_pandas()
        table = table[table["split"] == config.split]
        if config.filter.corpora is not None:
            table = table[table["corpus"].isin(config.filter.corpora)]
        for corpus, part in table.groupby("corpus"):
            subjects.setdefault(str(corpus), set()).update(part["subject"])
    return Pretraining(
        subjects={corpus: frozenset(found) for corpus, found in subjects.items()}, unknown=tuple(unknown)
    )


def pretrain_seen(pretraining: Pretraining, tested: Rows) -> dict[str, Any]:
    """What the pretraining saw of the tested windows.

    Args:
        pretraining: Of `read_pretraining`.
        tested: `corpus` and `subject` of each tested window.

    Returns:
        `corpora`: of the tested ones those that were in pretraining; `rows`: per tested corpus the relation to each
        corpus of pretraining, with the persons in common (null where the persons' names cannot be joined);
        `subjects`, `subjects_seen`, and `unknown`.
    """
    corpora = sorted(set(tested["corpus"]))
    rows = [row for corpus in corpora for row in _rows_of(corpus, pretraining, tested)]
    everyone = frozenset().union(*pretraining.subjects.values())
    found = set(tested["subject"])
    return {
        "corpora": [corpus for corpus in corpora if corpus in pretraining.subjects],
        "rows": rows,
        "subjects": len(found),
        "subjects_seen": len(found & everyone),
        "unknown": list(pretraining.unknown),
    }


def _rows_of(corpus: str, pretraining: Pretraining, tested: Rows) -> list[dict[str, Any]]:
    own = set(tested["subject"][tested["corpus"] == corpus])
    rows = []
    for trained, persons in sorted(pretraining.subjects.items()):
        overlap = overlap_of(corpus, trained)
        if trained != corpus and overlap is None and not own & persons:
            continue
        is_unlinked = overlap is not None and overlap.persons == "unlinked"
        rows.append(
            {
                "tested": corpus,
                "pretrained_on": trained,
                "relation": "same corpus" if trained == corpus else overlap.relation if overlap else "shares",
                "subjects_tested": len(own),
                "subjects_seen": None if is_unlinked else len(own & persons),
                "note": overlap.note if overlap else "",
            }
        )
    return rows


def overlap_of(corpus: str, other: str) -> Overlap | None:
    """What the corpus files say that two corpora have in common, whichever of them says it."""
    for one, two in ((corpus, other), (other, corpus)):
        if one in shipped_names(CORPORA_DIR) and (found := load_corpus(one).overlaps.get(two)):
            return found
    return None


def sentence(seen: Mapping[str, Any]) -> str:
    """One sentence for a reader."""
    if seen["unknown"] and not seen["rows"]:
        return f"Not known: {'; '.join(seen['unknown'])}."
    unlinked: Sequence[str] = sorted({row["pretrained_on"] for row in seen["rows"] if row["subjects_seen"] is None})
    text = f"{seen['subjects_seen']} of the {seen['subjects']} tested persons were in pretraining (without labels)"
    if unlinked:
        text += f"; persons shared with {', '.join(unlinked)} cannot be told apart by name"
    if seen["unknown"]:
        text += f"; {'; '.join(seen['unknown'])}"
    return f"{text}."
