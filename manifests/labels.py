"""The generic label parser: what a channel label says by itself, without knowing its corpus.

Used only where a corpus file has no entry for the label. It knows a vocabulary (`channels.yaml`) and six rules:

| rule | example | reading |
|---|---|---|
| `site` | `Fc5.`, `RIP Tho` | one known spelling of one site |
| `label` | `EEG(sec)` | an entry of `labels:` in the table: the kind, never a guessed site |
| `pair` | `C3-M2`, `C3:M1+M2`, `01-A2` | anode, then cathode or reference token |
| `joined` | `CZA2` | an electrode and one ear or mastoid without a separator |
| `multi` | `C3:M1:M2` | both mastoids: linked; any other company: the cathode is unknown |
| `compound` | `C3-M2:C4-M1` | two derivations in one channel: only the kind is known |

`+typed` follows when a type word was removed (`EEG C3`), `+copy` when a running number was (`ECGII-0`, `C3-A22`),
`+rate` when a sampling period was (`Flow.40ms`). It never guesses: a label with one unknown part stays unread.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

MAX_LABEL_CHARS = 80
"""Longest label read; an EDF header has room for 16 characters."""

ELECTRICAL = ("eeg", "eog", "emg", "ecg")
"""Kinds measured between two electrodes, where a reference belongs to the channel."""

_REFERENCE = "reference"  # stands as the kind of a reference token while a label is read
_EARS = ("M1", "M2", "A1", "A2")
_LINKED = {frozenset({"M1", "M2"}): "linked_mastoid", frozenset({"A1", "A2"}): "linked_ears"}
_TYPE_WORDS = ("eeg", "eog", "emg", "ecg", "ekg", "resp")
_TYPE_WORD = re.compile(rf"({'|'.join(_TYPE_WORDS)})[\s:_\-.]+(.+)")
_SEPARATOR = re.compile(r"\s*[-:/_]\s*|\s+")
_COPY = re.compile(r"(.+)-[01]")  # MNE numbers equal labels from 0
_RATE = re.compile(r"(.+)\.\d+m?s")  # ResMed: `Flow.40ms`, `SpO2.1s`
_EAR_COPY = re.compile(r"([am][12])\d")
_MIDLINE_COPY = re.compile(r"(\w+z)\d")
_ZERO_FOR_O = re.compile(r"0([12z])")
_SQUEEZED = re.compile(r"[\s_\-/:.()#]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a label says: kind, anode, cathode (None: not named) and the rules that read it."""

    kind: str
    anode: str
    cathode: str | None = None
    rule: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Lookups by spelling, built once from the table.

    `electrodes` (kind eeg) and `references` are keyed by `fold`, because blanks and separators matter between
    short names (`T1-0` is not T10); `sensors` and `labels` are keyed by `squeeze`.
    """

    kinds: Mapping[str, str]
    electrodes: Mapping[str, str]
    sensors: Mapping[str, str]
    references: Mapping[str, str]
    labels: Mapping[str, Reading | str]


def fold(text: str) -> str:
    """Text in compatibility form, without control characters and outer or repeated blanks, in lower case."""
    plain = unicodedata.normalize("NFKC", text.replace("\0", " "))
    return " ".join(plain.casefold().split())


def squeeze(text: str) -> str:
    """Folded text without blanks and separators; itself when nothing else is left."""
    folded = fold(text)
    return _SQUEEZED.sub("", folded) or folded


def parse(label: str, vocabulary: Vocabulary) -> Reading | str:
    """Reading of a label, or the reason why it has none. Never raises."""
    if len(label) > MAX_LABEL_CHARS:
        return f"longer than {MAX_LABEL_CHARS} characters"
    text = fold(label)
    if not text:
        return "empty label"
    known = vocabulary.labels.get(squeeze(text))
    if isinstance(known, str):
        return known
    return _read(text, vocabulary) or _reason(text, vocabulary)


def _reason(text: str, vocabulary: Vocabulary) -> str:
    parts = [part for part in _SEPARATOR.split(text) if part]
    excluded = [known for part in parts if isinstance(known := vocabulary.labels.get(squeeze(part)), str)]
    if excluded:
        return excluded[0]
    if all(part in vocabulary.references for part in parts):
        return "a reference without an electrode"
    if len(parts) > 1 and all(_reference(part, vocabulary) for part in parts):
        return "names sites of several kinds, or the same site twice"
    if any(part.isdigit() for part in parts):
        return "a number of an input, no electrode or sensor named"
    return "no known electrode or sensor in the label"


def _read(text: str, vocabulary: Vocabulary) -> Reading | None:
    if found := _site(text, vocabulary):
        return found
    for pattern, suffix in ((_COPY, "+copy"), (_RATE, "+rate")):
        if (match := pattern.fullmatch(text)) and (found := _read(match[1].strip(), vocabulary)):
            return replace(found, rule=found.rule + suffix)
    if (match := _TYPE_WORD.fullmatch(text)) and (found := _typed(match[1], match[2], vocabulary)):
        return found
    return _pair(text, vocabulary) or _joined(text, vocabulary) or _multi(text, vocabulary)


def _site(text: str, vocabulary: Vocabulary) -> Reading | None:
    squeezed, key = squeeze(text), text.rstrip(". ")
    known = vocabulary.labels.get(squeezed)
    if known is not None:
        return known if isinstance(known, Reading) else None
    if (site := vocabulary.electrodes.get(key)) is not None:
        return Reading(kind="eeg", anode=site, rule="site")
    if (site := vocabulary.sensors.get(squeezed)) is not None:
        return Reading(kind=vocabulary.kinds[site], anode=site, rule="site")
    match = _MIDLINE_COPY.fullmatch(key)
    if match and (site := vocabulary.electrodes.get(match[1])) is not None:
        return Reading(kind="eeg", anode=site, rule="site+copy")
    return None


def _reference(text: str, vocabulary: Vocabulary) -> Reading | None:
    """The right side of a pair: a reference token, linked ears, an electrode or its copy."""
    key = text.rstrip(". ")
    if (token := vocabulary.references.get(key)) is not None:
        return Reading(kind=_REFERENCE, anode=token, rule="site")
    if found := _site(text, vocabulary):
        return found
    if match := _EAR_COPY.fullmatch(key):
        return Reading(kind="eeg", anode=vocabulary.electrodes[match[1]], rule="site+copy")
    linked = _joined(key, vocabulary)
    if linked and (token := _LINKED.get(frozenset({linked.anode, str(linked.cathode)}))):
        return Reading(kind=_REFERENCE, anode=token, rule="site")
    return None


def _typed(word: str, rest: str, vocabulary: Vocabulary) -> Reading | None:
    """The rest of a label behind a type word. A named sensor outweighs the word: TUH has `EEG EKG1-REF`."""
    default = _site(word, vocabulary)
    found = _read(rest, vocabulary)
    if default is None:
        return None
    if found is None:  # `EMG-REF`, `ECG EKG-REF`
        token = vocabulary.references.get(rest) if default.kind in ELECTRICAL else None
        return _derive(default, Reading(kind=_REFERENCE, anode=token, rule="site"), "+typed") if token else None
    if default.kind in ("eeg", found.kind):
        return replace(found, rule=found.rule.removesuffix("+typed") + "+typed")
    if found.anode in _EARS and found.cathode is None:  # `EMG M1`: some muscle against the mastoid
        return _derive(default, found, "+typed")
    is_eye = default.kind == "eog" and found.kind == "eeg"  # `EOG Fp1`
    return replace(found, kind="eog", rule=found.rule + "+typed") if is_eye else None


def _splits(text: str) -> Iterator[tuple[str, str, bool]]:
    for match in _SEPARATOR.finditer(text):
        if match.start() > 0 and match.end() < len(text):
            yield text[: match.start()], text[match.end() :], match[0].isspace()


def _pair(text: str, vocabulary: Vocabulary) -> Reading | None:
    for left, right, is_blank in _splits(text):
        cathode = _reference(right, vocabulary)
        if cathode is None or left in _TYPE_WORDS:
            continue
        anode = _site(left, vocabulary)
        if anode is None and cathode.kind == "eeg":
            anode = _site(_ZERO_FOR_O.sub(r"o\1", left), vocabulary)
        if anode is None or (is_blank and not {anode.kind, cathode.kind} <= {"eeg", "eog"}):
            continue
        if found := _derive(anode, cathode):
            return found
    return None


def _derive(anode: Reading, cathode: Reading, suffix: str = "") -> Reading | None:
    """Anode minus cathode, of one kind, or None where the two do not go together."""
    rule = "pair" + ("+copy" if "+copy" in anode.rule + cathode.rule else "") + suffix
    if anode.kind not in ELECTRICAL:
        if cathode.kind == _REFERENCE:  # a belt has no electrical reference: `RESP ABDOMEN-REF`
            return replace(anode, rule=rule)
        return Reading(kind=anode.kind, anode="unknown", rule=rule) if anode.kind == cathode.kind else None
    kind = _one_kind({anode.kind, cathode.kind} - {_REFERENCE})
    if kind is None:
        return None
    if anode.anode == cathode.anode:
        return Reading(kind=kind, anode="unknown", rule=rule) if anode.anode == "unknown" else None
    return Reading(kind=kind, anode=anode.anode, cathode=cathode.anode, rule=rule)


def _one_kind(kinds: set[str]) -> str | None:
    """The kind of a derivation: an eye, muscle or heart electrode against the scalp is not EEG."""
    special = kinds - {"eeg"}
    if not special:
        return "eeg"
    return next(iter(special)) if len(special) == 1 and special <= set(ELECTRICAL) else None


def _joined(text: str, vocabulary: Vocabulary) -> Reading | None:
    ear = vocabulary.electrodes.get(text[-2:])
    anode = _site(text[:-2], vocabulary) if ear in _EARS and len(text) > 3 else None
    if anode is None or anode.kind not in ("eeg", "eog") or anode.anode in (ear, "unknown"):
        return None
    return Reading(kind=anode.kind, anode=anode.anode, cathode=ear, rule="joined")


def _multi(text: str, vocabulary: Vocabulary) -> Reading | None:
    """Three or four electrodes in one label.

    Behind one electrode, M1 and M2 (A1 and A2) with the same separator are linked. Anything else names the
    anode at most. Electrodes of several kinds (`F3:M2:E1:M1`) stay unread, ears and mastoids apart.
    """
    separators = re.findall(r"[-:/_]", text)
    parts = [part.strip() for part in re.split(r"[-:/_]", text)]
    sites = [_site(part, vocabulary) for part in parts if part not in _TYPE_WORDS]
    named = [site for site in sites if site is not None and site.kind in ELECTRICAL]
    if not 3 <= len(parts) <= 4 or len(named) != len(parts):
        return None
    kinds = {site.kind for site in named if site.anode not in _EARS}
    if len(kinds) > 1:
        return None
    kind = next(iter(kinds), "eeg")
    anode, others = named[0].anode, frozenset(site.anode for site in named[1:])
    if len(parts) == 4 or anode in _EARS or anode == "unknown":
        return Reading(kind=kind, anode="unknown", rule="compound")
    cathode = _LINKED.get(others, "unknown") if len(set(separators)) == 1 else "unknown"
    return Reading(kind=kind, anode=anode, cathode=cathode, rule="multi")
