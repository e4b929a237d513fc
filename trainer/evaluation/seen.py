"""What of the evaluation's data the pretraining has seen: corpora, persons, and corpora that share persons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from manifests.config import shipped_names
from manifests.corpora import CORPORA_DIR, Overlap, load_corpus
from trainer.evaluation.windows import Rows
from trainer.pretrained_on import PretrainedOn


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretraining:
    """What an encoder was pretrained on.

    Attributes:
        subjects: Corpus to hashed subjects of the split that was trained on; all that could have been drawn.
        unknown: Why some or all of it is not known.
    """

    subjects: Mapping[str, frozenset[str]]
    unknown: tuple[str, ...]


def pretraining_of(facts: PretrainedOn | None) -> Pretraining:
    """Corpora and persons as an encoder's card tells them; that of a published bundle tells numbers only."""
    if facts is None:
        return Pretraining(subjects={}, unknown=("the encoder's card does not tell what it was pretrained on",))
    if facts.subjects is None:
        unknown = (*facts.unknown, "the encoder's card tells the number of persons, not who they are")
        return Pretraining(subjects={}, unknown=unknown)
    subjects = {corpus: frozenset(found) for corpus, found in facts.subjects.items()}
    return Pretraining(subjects=subjects, unknown=tuple(facts.unknown))


def pretrain_seen(pretraining: Pretraining, tested: Rows) -> dict[str, Any]:
    """What the pretraining saw of the tested windows.

    Args:
        pretraining: Of `pretraining_of`.
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
