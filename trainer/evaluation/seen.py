"""What of the evaluation's data the pretraining has seen: corpora, persons, and corpora that share persons."""

from collections.abc import Iterable, Mapping, Sequence
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
        subjects: Corpus to hashed subjects of the split that was trained on; all that could have been drawn. None
            where the card tells how many they were and not who, as that of a published bundle.
        unknown: Why some or all of it is not known.
    """

    subjects: Mapping[str, frozenset[str] | None]
    unknown: tuple[str, ...]

    @property
    def persons(self) -> frozenset[str]:
        """All of them that are told, by hash."""
        return frozenset().union(*(found for found in self.subjects.values() if found is not None))

    @property
    def names_nobody(self) -> bool:
        """Whether persons were seen, or may have been, and none of them is told."""
        return bool(self.subjects or self.unknown) and all(found is None for found in self.subjects.values())


def pretraining_of(facts: PretrainedOn | None) -> Pretraining:
    """Corpora and persons as an encoder's card tells them; that of a published bundle tells numbers only."""
    if facts is None:
        return Pretraining(subjects={}, unknown=("the encoder's card does not tell what it was pretrained on",))
    if facts.subjects is None:
        return Pretraining(subjects=dict.fromkeys(facts.corpora), unknown=tuple(facts.unknown))
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
        `subjects`; `subjects_seen`, null where it cannot be told; and `unknown`, why. Corpora that have nothing to do
        with those of pretraining have no person in it, whoever these were.
    """
    corpora = sorted(set(tested["corpus"]))
    rows = [row for corpus in corpora for row in _rows_of(corpus, pretraining, tested)]
    found = set(tested["subject"])
    untold = sorted({row["pretrained_on"] for row in rows if pretraining.subjects[row["pretrained_on"]] is None})
    reasons = [f"the encoder's card tells how many persons of {name} were in pretraining, not who" for name in untold]
    is_known = not untold and not (pretraining.unknown and pretraining.names_nobody)
    return {
        "corpora": [corpus for corpus in corpora if corpus in pretraining.subjects],
        "rows": rows,
        "subjects": len(found),
        "subjects_seen": len(found & pretraining.persons) if is_known else None,
        "unknown": [*pretraining.unknown, *reasons],
    }


def is_apart(pretraining: Pretraining, corpora: Iterable[str]) -> bool:
    """Whether no person of these corpora can have been in pretraining, as far as its corpora tell: without a name."""
    related = any(one == other or overlap_of(one, other) for one in corpora for other in pretraining.subjects)
    return not related and not pretraining.unknown


def _rows_of(corpus: str, pretraining: Pretraining, tested: Rows) -> list[dict[str, Any]]:
    own = set(tested["subject"][tested["corpus"] == corpus])
    rows = []
    for trained, persons in sorted(pretraining.subjects.items()):
        overlap = overlap_of(corpus, trained)
        if trained != corpus and overlap is None and not own & (persons or frozenset()):
            continue
        is_unlinked = overlap is not None and overlap.persons == "unlinked"
        rows.append(
            {
                "tested": corpus,
                "pretrained_on": trained,
                "relation": "same corpus" if trained == corpus else overlap.relation if overlap else "shares",
                "subjects_tested": len(own),
                "subjects_seen": None if persons is None or is_unlinked else len(own & persons),
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
    if seen["subjects_seen"] is None:
        return f"Not known: {'; '.join(seen['unknown'])}."
    unlinked: Sequence[str] = sorted({row["pretrained_on"] for row in seen["rows"] if row["subjects_seen"] is None})
    text = f"{seen['subjects_seen']} of the {seen['subjects']} tested persons were in pretraining (without labels)"
    if unlinked:
        text += f"; persons shared with {', '.join(unlinked)} cannot be told apart by name"
    if seen["unknown"]:
        text += f"; {'; '.join(seen['unknown'])}"
    return f"{text}."
