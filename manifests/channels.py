"""Unified Channel Schema (UCS): the table of sites and `resolve`, which turns a channel label into a tag.

A channel is a pair of sites, anode minus cathode, and its symbol says so: `eeg:C3-M2`, `eeg:Fp1`, `ecg:II`, `emg:chin`.
`C3-M2` and `M2-C3` are two channels. The sites, their ids and spellings stand in `channels.yaml` and nowhere else.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from manifests.config import digest, read_yaml
from manifests.errors import ContractError
from manifests.labels import ELECTRICAL, Reading, Vocabulary, fold, parse, squeeze

UCS_VERSION = 1
"""Version of the schema; the table's own `version` must equal it."""

Kind = Literal["eeg", "eog", "emg", "ecg", "resp", "spo2", "ppg", "snore", "position", "temp", "hr", "other"]
Role = Literal["signal", "reference", "flag", "derived", "marker"]

KINDS: tuple[str, ...] = get_args(Kind)
"""Kinds of channel. Order frozen: the index is the kind's id."""

UNITS = {"eeg": "uV", "eog": "uV", "emg": "uV", "ecg": "mV", "spo2": "%", "temp": "degC"}
"""Canonical unit by kind; `au` for every other kind."""

REFERENCES = (
    *("common", "average", "linked_mastoid", "linked_ears", "unknown"),
    *("linked_ears_cle", "linked_ears_ler"),
)
"""Rows that stand for a reference. Only `unknown` may also be an anode."""

TABLE_FILE = Path(__file__).with_name("channels.yaml")

_SYMBOL = re.compile(rf"({'|'.join(KINDS)}):(\w+)(?:-(\w+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One row of the table: a physical place, a lead, a sensor or a reference token.

    `xyz` is on the unit sphere of the head (x right, y front, z up), for ECG in the torso frame of the table's header.
    """

    id: int
    site: str
    kind: str
    xyz: tuple[float, float, float] | None
    unit: str
    aliases: tuple[str, ...]
    side: str = "none"
    role: str = "signal"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelTag:
    """A resolved channel.

    `side` is the anode's (L, R, M or none). `role` other than `signal` never reaches a model. `unit` is the canonical
    unit of the kind. `rule` says who read the label: `corpus`, or `parser:<rule>` (rules in `manifests/labels.py`).
    """

    kind: str
    anode: str
    cathode: str | None
    side: str
    role: str
    unit: str
    polarity: str
    source_label: str
    rule: str

    @property
    def symbol(self) -> str:
        """Canonical name `kind:anode` or `kind:anode-cathode`; `resolve` reads it back."""
        return f"{self.kind}:{self.anode}" + (f"-{self.cathode}" if self.cathode else "")

    @property
    def anode_id(self) -> int:
        """Embedding row of the anode."""
        return site(self.anode).id

    @property
    def cathode_id(self) -> int:
        """Embedding row of the cathode, 0 where the label names none."""
        return site(self.cathode).id if self.cathode else 0

    def record(self) -> dict[str, Any]:
        """What a sample's JSON says about the channel itself, beside its signal."""
        return {"symbol": self.symbol, "anode_id": self.anode_id, "cathode_id": self.cathode_id, **asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Unresolved:
    """A label without a tag, and why."""

    label: str
    reason: str


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    id: int
    site: str
    kind: Kind
    side: Literal["L", "R", "M", "none"] = "none"
    role: Role = "signal"
    xyz: tuple[float, float, float] | None = None
    unit: str
    aliases: tuple[str, ...] = ()
    note: str = ""


class _Exception(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    labels: tuple[str, ...]
    symbol: str | None
    why: str


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    version: int
    sites: tuple[_Row, ...]
    labels: tuple[_Exception, ...]


@functools.cache
def _table() -> _Table:
    try:
        table = _Table.model_validate(read_yaml(TABLE_FILE))
    except ValidationError as error:
        raise ContractError(f"{TABLE_FILE.name}: {error}; restore the file from version control") from error
    if table.version != UCS_VERSION:
        raise ContractError(f"{TABLE_FILE.name}: version {table.version}, but this code reads {UCS_VERSION}")
    for number, row in enumerate(table.sites, start=1):
        if row.id != number:
            raise ContractError(
                f"{TABLE_FILE.name}: {row.site}: id {row.id} where {number} is due; ids count up from 1, append only"
            )
        if row.unit != UNITS.get(row.kind, "au"):
            raise ContractError(f"{TABLE_FILE.name}: {row.site}: unit {row.unit!r} is not that of kind {row.kind}")
    return table


@functools.cache
def sites() -> tuple[Site, ...]:
    """All sites in order of id. The first has id 1; id 0 means padding or none."""
    return tuple(
        Site(
            id=row.id,
            site=row.site,
            kind=row.kind,
            xyz=row.xyz,
            unit=row.unit,
            aliases=row.aliases,
            side=row.side,
            role=row.role,
        )
        for row in _table().sites
    )


@functools.cache
def _sites_by_name() -> dict[str, Site]:
    return {row.site: row for row in sites()}


def site(name: str) -> Site:
    """The site of a canonical name, in its exact case. Raises KeyError for any other spelling."""
    return _sites_by_name()[name]


def site_ids() -> int:
    """Number of embedding rows: the largest id and one for 0."""
    return sites()[-1].id + 1


def positions() -> np.ndarray:
    """Coordinates by id, float32 of shape (site_ids, 3), unit sphere; nan where a site has none, and in row 0."""
    table = np.full((site_ids(), 3), np.nan, dtype=np.float32)
    for row in sites():
        if row.xyz is not None:
            table[row.id] = row.xyz
    return table


@functools.cache
def table_digest() -> str:
    """Sha256 of the table's content, spellings included, notes and comments not."""
    content = _table().model_dump(mode="json")
    for row in content["sites"]:
        del row["note"]
    return digest(content)


def resolve(label: str, overrides: Mapping[str, str | None] | None = None) -> ChannelTag | Unresolved:
    """Tag of a channel label, or the reason why it has none. Never raises for a string.

    Args:
        label: The label as it stands in the file, or a symbol.
        overrides: Exact labels of the corpus and their symbols; None means known and left out. They are looked up
            exactly first, then without regard to case and blanks, and come before the generic parser.
    """
    if overrides:
        key = label if label in overrides else _same_label(label, overrides)
        if key is not None:
            return _by_corpus(label, overrides[key])
    return _by_parser(label)


def _same_label(label: str, overrides: Mapping[str, str | None]) -> str | None:
    folded = fold(label)
    return next((key for key in overrides if fold(key) == folded), None)


def _by_corpus(label: str, symbol: str | None) -> ChannelTag | Unresolved:
    if symbol is None:
        return Unresolved(label=label, reason="excluded by corpus")
    reading = _read_symbol(symbol)
    if reading is None:
        return Unresolved(label=label, reason=f"the corpus maps it to {symbol!r}, which is not a UCS symbol")
    return _tag(label, replace(reading, rule="corpus"))


@functools.lru_cache(maxsize=65536)
def _by_parser(label: str) -> ChannelTag | Unresolved:
    reading = _read_symbol(label) or parse(label, _vocabulary())
    if isinstance(reading, str):
        return Unresolved(label=label, reason=reading)
    return _tag(label, replace(reading, rule=f"parser:{reading.rule}"))


def _read_symbol(symbol: str) -> Reading | None:
    match = _SYMBOL.fullmatch(symbol)
    if match is None:
        return None
    kind, names = match[1], [name for name in match.group(2, 3) if name is not None]
    found = [_sites_by_name().get(name) for name in names]
    known = [row for row in found if row is not None]
    if len(known) != len(names) or len(set(names)) != len(names):
        return None
    allowed = ELECTRICAL if kind in ELECTRICAL else (kind,)
    anode_fits = names[0] == "unknown" or (known[0].kind in allowed and names[0] not in REFERENCES)
    cathode_fits = all(row.kind in allowed or (row.site in REFERENCES and kind in ELECTRICAL) for row in known[1:])
    if not (anode_fits and cathode_fits):
        return None
    return Reading(kind=kind, anode=names[0], cathode=names[1] if len(names) > 1 else None, rule="symbol")


def _tag(label: str, reading: Reading) -> ChannelTag:
    anode = site(reading.anode)
    role = anode.role
    if role == "reference" and (reading.kind != "eeg" or reading.cathode not in (None, *REFERENCES)):
        role = "signal"  # M2-C3 is a derivation; M2 alone, or against the amplifier's reference, is a reference
    return ChannelTag(
        kind=reading.kind,
        anode=reading.anode,
        cathode=reading.cathode,
        side=anode.side,
        role=role,
        unit=UNITS.get(reading.kind, "au"),
        polarity="as_recorded",
        source_label=label,
        rule=reading.rule,
    )


@functools.cache
def _vocabulary() -> Vocabulary:
    references = [row for row in sites() if row.site in REFERENCES]
    electrodes = [row for row in sites() if row.kind == "eeg"]
    sensors = [row for row in sites() if row.kind != "eeg" and row.site not in REFERENCES]
    labels: dict[str, Reading | str] = {}
    for entry in _table().labels:
        value = _read_symbol(entry.symbol) if entry.symbol is not None else entry.why
        if value is None:
            raise ContractError(f"{TABLE_FILE.name}: labels: {entry.symbol!r} is not a UCS symbol")
        for label in entry.labels:
            labels[squeeze(label)] = value if isinstance(value, str) else replace(value, rule="label")
    return Vocabulary(
        kinds={row.site: row.kind for row in sites()},
        electrodes=_spellings(electrodes, squeezed=False),
        sensors=_spellings(sensors, squeezed=True),
        references=_spellings(references, squeezed=False),
        labels=labels,
    )


def _spellings(rows: Sequence[Site], *, squeezed: bool) -> dict[str, str]:
    spellings: dict[str, str] = {}
    for row in rows:
        for name in (row.site, *row.aliases):
            key = squeeze(name) if squeezed else fold(name)
            if spellings.setdefault(key, row.site) != row.site:
                raise ContractError(
                    f"{TABLE_FILE.name}: {name!r} is a spelling of {spellings[key]} and of {row.site}; keep it at one"
                )
    return spellings
