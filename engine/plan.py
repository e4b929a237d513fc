"""Units of work: which recordings are converted and committed together. A pure function of scan and recipe.

The plan only grows: a unit that stands in `plan.jsonl` and whose inputs are unchanged is kept as it is, and new
recordings go into new units, so that nothing that is committed is converted again.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from engine.config import ENGINE_VERSION, ConvertConfig
from engine.scan_result import ScanResult, ScanRow
from manifests.channels import table_digest
from manifests.config import digest, write_atomically
from manifests.corpora import Corpus
from manifests.errors import ContractError
from manifests.recipes import Recipe
from manifests.shards import FORMAT_VERSION

PLAN_FILE = "plan.jsonl"

# Bytes of a window beside its samples: JSON identity and labels, tar headers; and the tag of one channel.
WINDOW_BYTES = 3000
TAG_BYTES = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanItem:
    """One recording of a unit.

    Attributes:
        corpus: Id of its corpus.
        path: POSIX path relative to the corpus root.
        identity: Digest of the input files, see `engine.files.identity_of`.
        seconds: Recorded time in whole seconds, rounded down.
        num_bytes: Estimated output in bytes.
    """

    corpus: str
    path: str
    identity: str
    seconds: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Recordings that are converted and committed together; the id is a digest of all that decides the bytes."""

    id: str
    recordings: tuple[PlanItem, ...]

    @property
    def seconds(self) -> int:
        """Recorded time in seconds."""
        return sum(item.seconds for item in self.recordings)

    @property
    def num_bytes(self) -> int:
        """Estimated output in bytes."""
        return sum(item.num_bytes for item in self.recordings)


def estimate_bytes(row: ScanRow, recipe: Recipe) -> int:
    """Output bytes of a recording: int16 samples at the recipe's rates, tags and tar headers."""
    rates = [
        recipe.kinds[channel.kind].stored_rate(channel.rate) for channel in row.channels if channel.kind in recipe.kinds
    ]
    if not rates or row.duration < recipe.window_s:
        return 0
    windows = int((row.duration - recipe.window_s) / recipe.hop_s) + 1
    samples = len(set(rates)) if recipe.is_native else 1
    window = sum(2 * recipe.window_samples(rate) + TAG_BYTES for rate in rates) + samples * WINDOW_BYTES
    return windows * window


def unit_id(items: Sequence[PlanItem], *, common: str, corpora: Mapping[str, Corpus]) -> str:
    """16 hex digits: digest of the inputs, the corpus files that read them, and what is common to all units."""
    used = sorted({item.corpus for item in items})
    return digest(
        {
            "inputs": [[item.corpus, item.path, item.identity] for item in items],
            "corpora": {name: digest(corpora[name].decisive()) for name in used},
            "common": common,
        }
    )[:16]


def common_digest(recipe: Recipe, config: ConvertConfig) -> str:
    """Digest of what decides the bytes of every unit: recipe, channel table, code and format version, sizes."""
    fingerprint = config.salt_fingerprint()
    return digest(
        {
            **({"salt": fingerprint} if fingerprint else {}),
            "engine": ENGINE_VERSION,
            "format": FORMAT_VERSION,
            "recipe": recipe.model_dump(mode="json"),
            "ucs": table_digest(),
            "shard_bytes": config.shard_bytes,
        }
    )


def _shuffled(items: Sequence[PlanItem], seed: int) -> list[PlanItem]:
    def position(item: PlanItem) -> str:
        return hashlib.sha256(f"{seed}/{item.corpus}/{item.path}".encode()).hexdigest()

    return sorted(items, key=position)


def _packed(items: Sequence[PlanItem], unit_bytes: int) -> list[tuple[PlanItem, ...]]:
    """Groups of consecutive items of about `unit_bytes` each, equal in size as far as the items allow."""
    total = sum(item.num_bytes for item in items)
    num_units = min(max(1, math.ceil(total / unit_bytes)), max(1, len(items)))
    groups: list[list[PlanItem]] = [[] for _ in range(num_units)]
    done = 0
    for item in items:
        middle = done + item.num_bytes / 2
        groups[min(num_units - 1, int(middle * num_units / max(1, total)))].append(item)
        done += item.num_bytes
    return [tuple(group) for group in groups if group]


def plan(scan: ScanResult, recipe: Recipe, config: ConvertConfig, *, existing: Sequence[Unit] = ()) -> list[Unit]:
    """Units for all recordings of a scan: the existing ones whose inputs are unchanged, then new ones.

    Unreadable recordings are planned as well: each must end committed or quarantined.
    """
    common = common_digest(recipe, config)
    items = {
        (row.corpus, row.path): PlanItem(
            corpus=row.corpus,
            path=row.path,
            identity=row.identity,
            seconds=math.floor(row.duration),
            num_bytes=estimate_bytes(row, recipe),
        )
        for row in scan.rows
    }
    kept: list[Unit] = []
    for unit in existing:
        current = tuple(items.get((item.corpus, item.path)) for item in unit.recordings)
        if current == unit.recordings and unit.id == unit_id(unit.recordings, common=common, corpora=scan.corpora):
            kept.append(unit)
    planned = {(item.corpus, item.path) for unit in kept for item in unit.recordings}
    new = [item for name, item in items.items() if name not in planned]
    added = [
        Unit(id=unit_id(group, common=common, corpora=scan.corpora), recordings=group)
        for group in _packed(_shuffled(new, config.seed), config.unit_bytes)
    ]
    return [*kept, *added]


def plan_rows(units: Sequence[Unit]) -> list[dict[str, Any]]:
    """One row per unit for a table: unit, recordings, hours, estimated megabytes."""
    return [
        {
            "unit": unit.id,
            "recordings": len(unit.recordings),
            "hours": float(Fraction(unit.seconds, 3600)),
            "megabytes": unit.num_bytes / 1e6,
        }
        for unit in units
    ]


def write_plan(output: Path, units: Sequence[Unit]) -> None:
    """Write `plan.jsonl`, one unit a line; one that says the same already is left alone."""
    text = "".join(json.dumps(asdict(unit), sort_keys=True) + "\n" for unit in units)
    path = output / PLAN_FILE
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)


def read_plan(output: Path) -> list[Unit]:
    """Units of `plan.jsonl`; none when there is no plan yet."""
    path = output / PLAN_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    try:
        return [
            Unit(id=row["id"], recordings=tuple(PlanItem(**item) for item in row["recordings"]))
            for row in map(json.loads, text.splitlines())
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ContractError(
            f"{path}: not a plan of this kymo ({error}); remove it to plan from the beginning"
        ) from error
