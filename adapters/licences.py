"""What the licences of a base and of corpora permit, and whether a bundle on them may be published, and as what.

A table and four rules, so that nobody publishes by oversight what he may not. Whether trained weights are a derivative
of their training data is not settled; the rules take it that they are. This is not legal advice.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from manifests.errors import ConfigError

RESTRICTED, UNKNOWN = "restricted", "unknown"
Role = Literal["base", "pretraining corpus", "corpus"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a licence says.

    Attributes:
        id: As the hub lists it, e.g. `cc-by-4.0`; `restricted` for an agreement, `unknown` for anything else.
        adapted: An adapted work may be shared.
        commercial: It may be used commercially.
        attribution: The source must be named.
        share_alike: An adapted work must have the same licence.
    """

    id: str
    adapted: bool = True
    commercial: bool = True
    attribution: bool = True
    share_alike: bool = False


# Families; the version is kept in the id. Order: the terms that stricter suggestions are looked for in.
TABLE: dict[str, Terms] = {
    terms.id: terms
    for terms in (
        Terms(id="cc0", attribution=False),
        Terms(id="pddl", attribution=False),
        Terms(id="unlicense", attribution=False),
        Terms(id="cc-by"),
        Terms(id="odc-by"),
        Terms(id="apache"),
        Terms(id="mit"),
        Terms(id="bsd-2-clause"),
        Terms(id="bsd-3-clause"),
        Terms(id="cc-by-nc", commercial=False),
        Terms(id="cc-by-sa", share_alike=True),
        Terms(id="odbl", share_alike=True),
        Terms(id="cc-by-nc-sa", commercial=False, share_alike=True),
        Terms(id="cc-by-nd", adapted=False),
        Terms(id="cc-by-nc-nd", adapted=False, commercial=False),
        Terms(id=RESTRICTED, adapted=False, commercial=False),
        Terms(id=UNKNOWN, adapted=False, commercial=False),
    )
}
_FAMILY = re.compile(
    r"(cc0|pddl|unlicense|cc[ -]by(?:[ -]nc)?(?:[ -](?:sa|nd))?|odc-by|odbl|apache|mit|bsd-[23]-clause)"
    r"(?:[ -](\d+(?:\.\d+)?))?(?![\w-]|\.\d)"
)
_AGREEMENT = re.compile(
    r"agreement|no redistribution|use form|academic use only|ask before|internal|proprietary|confidential"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Something that a bundle is made from; `licence` as its holder words it, None where that is not stated."""

    role: Role
    name: str
    licence: str | None

    @property
    def terms(self) -> Terms:
        """What its licence permits."""
        return terms_of(self.licence)

    def __str__(self) -> str:
        return f"{self.role} {self.name} ({self.licence or 'no licence stated'})"


def terms_of(licence: str | None) -> Terms:
    """Terms of a licence as corpus files and cards word it.

    >>> terms_of("CC-BY-NC-ND-3.0")
    Terms(id='cc-by-nc-nd-3.0', adapted=False, commercial=False, attribution=True, share_alike=False)
    >>> terms_of("NSRR data use agreement; no redistribution, shards included").id
    'restricted'
    """
    text = (licence or "").strip().lower()
    if match := _FAMILY.match(text):
        family, version = match[1].replace(" ", "-"), match[2]
        return replace(TABLE[family], id=f"{family}-{version}" if version else family)
    return TABLE[RESTRICTED if _AGREEMENT.search(text) else UNKNOWN]


def check_grants(licence: str, sources: Iterable[Source]) -> list[str]:
    """Hold the licence of a bundle to those of what it is made from.

    Args:
        licence: Of the bundle. `other` grants nothing by itself and fits everything.
        sources: Base and corpora.

    Returns:
        Sentences about sources whose terms are not known.

    Raises:
        ConfigError: It permits what one of the sources does not.
    """
    ours = terms_of(licence)
    if ours.id in (RESTRICTED, UNKNOWN):
        return []
    sources = list(sources)
    problems, doubts = [], []
    for source in sources:
        if source.terms.id == UNKNOWN:
            doubts.append(f"{source}: whether {licence} grants more than it does cannot be told")
        elif excess := _excess(ours, source.terms):
            problems.append(f"{source} {excess}")
    if problems:
        raise ConfigError(
            f"card.licence: {licence} grants more than the bundle is made from: {'; '.join(problems)}. "
            f"Set card.licence to {_suggestion(sources)}"
        )
    return doubts


def _excess(ours: Terms, theirs: Terms) -> str:
    """What `ours` permits and `theirs` does not; empty = nothing."""
    if not theirs.adapted:
        return "does not permit to share adapted works"
    if ours.commercial and not theirs.commercial:
        return "does not permit commercial use"
    if theirs.share_alike and _family(ours) != _family(theirs):
        return "asks for the same licence"
    if theirs.attribution and not ours.attribution:
        return "asks to be named"
    return ""


def _family(terms: Terms) -> str:
    return re.sub(r"-\d+(\.\d+)?$", "", terms.id)


def _suggestion(sources: Sequence[Source]) -> str:
    """Licences that fit, the most permissive first."""
    known = [source.terms for source in sources if source.terms.id != UNKNOWN]
    candidates = [terms_of(name) for name in ("cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0", "cc-by-nc-sa-4.0")]
    fitting = [item.id for item in candidates if not any(_excess(item, terms) for terms in known)]
    return " or ".join([*fitting, "other"])


def check_publication(
    sources: Sequence[Source], *, is_base_changed: bool, is_public: bool, is_confirmed: bool
) -> list[str]:
    """Whether a bundle may be published.

    Args:
        sources: Base and corpora.
        is_base_changed: It holds weights of the base that training changed.
        is_public: Everybody may read it.
        is_confirmed: The publisher has said that he holds the rights.

    Returns:
        Sentences that the publisher should read: what was confirmed, or holds for a private repository.

    Raises:
        ConfigError: Changed weights of a base without derivatives, or doubts that nobody has confirmed.
    """
    if is_public and is_base_changed:
        for source in sources:
            if source.role == "base" and source.terms.id.startswith(("cc-by-nd", "cc-by-nc-nd")):
                raise ConfigError(
                    f"{source}: its licence permits no derivatives, and the bundle holds changed weights of it (the "
                    "temporal encoder); train with temporal: frozen, or ask its holder for another licence"
                )
    doubts = [
        f"{source}: {_DOUBTS.get(source.terms.id, _NO_DERIVATIVES)}" for source in sources if not source.terms.adapted
    ]
    if doubts and is_public and not is_confirmed:
        raise ConfigError(
            f"not published: {'; '.join(doubts)}. Publish privately, or give --confirm-rights if you hold the rights "
            "or have the consent of those who do"
        )
    return doubts


_NO_DERIVATIVES = "permits no derivatives, and trained weights may be one"
_DOUBTS = {
    RESTRICTED: "an agreement governs what may be shared; read it before anybody else sees the weights",
    UNKNOWN: "its terms are not known here (of an encoder of yours, state them: licence in its pretraining YAML)",
}


def check_merge(base: Source) -> None:
    """ConfigError where the licence of a base forbids to merge an adapter into it."""
    if base.terms.id.startswith(("cc-by-nd", "cc-by-nc-nd")):
        raise ConfigError(
            f"{base}: its licence permits no derivatives, and merged weights are one; serve base and adapter side by "
            "side (kymo predict), or ask the holder of the rights"
        )
