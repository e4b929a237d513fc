"""What a report tells, read from a snapshot's folder: samples, commits, training runs."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from engine.commit import COMMITS_DIR
from engine.storage import location
from manifests.channels import KINDS, UNITS, sites
from manifests.errors import ConfigError
from manifests.plausible import plausible
from manifests.recipes import NATIVE
from manifests.shards import SAMPLES_FILE, Snapshot, load_snapshot


class _Lenient(BaseModel):
    """Part of a commit. A report also reads the commits of older and newer versions, so fields may come and go."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Rejected(_Lenient):
    """A recording that was not used, why, and the command that shows it."""

    corpus: str = ""
    path: str = ""
    reason: str = "UNKNOWN"
    message: str = ""
    command: str = ""


class LeftOut(_Lenient):
    """A channel label that stands in no sample, why, and in how many recordings."""

    corpus: str = ""
    label: str
    count: int = 1
    reason: str = ""


class UnitCounts(_Lenient):
    """Totals of a unit."""

    recordings: int = 0
    quarantined: int = 0
    windows: int = 0
    dropped: dict[str, int] = {}


class UnitReport(_Lenient):
    """What a report reads of a unit's commit."""

    counts: UnitCounts = UnitCounts()
    quarantine: list[Rejected] = []
    unresolved: list[LeftOut] = []
    unmapped: dict[str, int] = {}
    unit_suspect: dict[str, dict[str, int]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """A snapshot's manifest, its sample rows and the commits of its units."""

    folder: Path
    snapshot: Snapshot
    samples: pa.Table
    commits: tuple[UnitReport, ...]

    @property
    def hours_per_window(self) -> float:
        """Recorded hours that one window stands for; overlapping windows count their hop."""
        recipe = self.snapshot.recipe
        return min(recipe["window_s"], recipe["hop_s"]) / 3600

    @property
    def is_native(self) -> bool:
        """Whether the recorded rates were kept, so that a window may be several samples."""
        return any(rule["rate_hz"] == NATIVE for rule in self.snapshot.recipe["kinds"].values())

    @property
    def corpora(self) -> list[str]:
        """Corpus ids, sorted."""
        return sorted(self.snapshot.corpora)


def read_report_data(snapshot_dir: Path | str) -> ReportData:
    """Everything a report needs from a snapshot's folder; no tar is opened.

    Raises:
        ConfigError: No finished snapshot in the folder, or a commit that cannot be read.
        ContractError: The snapshot was changed after it was written.
    """
    folder = location(snapshot_dir)
    snapshot = load_snapshot(folder)
    commits = []
    for path in sorted((folder / COMMITS_DIR).glob("commit-*.json")):
        try:
            commits.append(UnitReport.model_validate_json(path.read_bytes()))
        except ValueError as error:
            raise ConfigError(f"{path}: not a commit of this kymo: {error}; run kymo convert again") from None
    with (folder / SAMPLES_FILE).open("rb") as file:
        samples = pq.read_table(file)
    return ReportData(folder=folder, snapshot=snapshot, samples=samples, commits=tuple(commits))


def num_windows(samples: pa.Table) -> int:
    """Windows that the samples stand for: where recorded rates are kept, several samples share one window."""
    columns = {name: samples.column(name).to_numpy() for name in ("start", "rate_num", "rate_den")}
    # A window at a rate of no whole sample begins up to one sample before its grid point.
    seconds = np.rint(columns["start"] * columns["rate_den"] / columns["rate_num"])
    table = pa.table({"recording": samples.column("recording"), "start": seconds})
    return len(table.group_by(["recording", "start"]).aggregate([]))


def hours_by_kind(data: ReportData) -> tuple[list[str], np.ndarray]:
    """Kinds present, and hours of windows with each, shape (corpora, kinds)."""
    counts = _counts(_one_row_each(data.samples, "corpus", "kinds"), ("corpus", "kinds"))
    kinds = [kind for kind in KINDS if any(kind == found for _, found in counts)]
    if data.is_native:
        counts = {
            (corpus, kind): num_windows(_samples_with(data.samples, corpus, kind))
            for corpus in data.corpora
            for kind in kinds
        }
    hours = [[counts[corpus, kind] * data.hours_per_window for kind in kinds] for corpus in data.corpora]
    return kinds, np.array(hours).reshape(len(data.corpora), len(kinds))


def _samples_with(samples: pa.Table, corpus: str, kind: str) -> pa.Table:
    rows = zip(samples.column("corpus").to_pylist(), samples.column("kinds").to_pylist(), strict=True)
    return samples.filter(pa.array([name == corpus and kind in kinds for name, kinds in rows]))


def _one_row_each(table: pa.Table, name: str, list_name: str) -> pa.Table:
    """Two columns, the lists of the second laid out one item a row."""
    lists = cast("pa.ListArray[Any]", pa.concat_arrays(table.column(list_name).chunks))
    parents = table.column(name).take(lists.value_parent_indices())
    return pa.table({name: parents, list_name: lists.flatten()})


def _counts(table: pa.Table, columns: Sequence[str]) -> Counter[tuple[Any, ...]]:
    grouped = table.group_by(list(columns)).aggregate([([], "count_all")])
    values = [grouped.column(name).to_pylist() for name in columns]
    return Counter(dict(zip(zip(*values, strict=True), grouped.column("count_all").to_pylist(), strict=True)))


def channels_by_recording(data: ReportData) -> dict[tuple[str, str], frozenset[str]]:
    """(corpus, recording) to the symbols of its windows; all its windows at one rate have the same channels."""
    names = ["recording", "rate_num", "rate_den"]
    table = data.samples.append_column("row", pa.array(np.arange(len(data.samples))))
    first = table.group_by(names).aggregate([("row", "min")]).column("row_min").to_numpy()
    rows = data.samples.select(["corpus", "recording", "symbols"]).take(pa.array(np.sort(first)))
    found: dict[tuple[str, str], frozenset[str]] = {}
    for row in rows.to_pylist():
        name = row["corpus"], row["recording"]
        found[name] = found.get(name, frozenset()) | frozenset(row["symbols"])
    return found


@cache
def _site_ids() -> dict[tuple[str, str], int]:
    return {(site.kind, site.site): site.id for site in sites()}


def symbol_order(symbol: str) -> tuple[int, int, str]:
    """Sort key of a symbol: kinds in the order of the schema, then its anode's place in the channel table."""
    kind, _, name = symbol.partition(":")
    place = KINDS.index(kind) if kind in KINDS else len(KINDS)
    return place, _site_ids().get((kind, name.partition("-")[0]), 1 << 30), name


def label_counts(data: ReportData, column: str) -> dict[str, Counter[str]]:
    """Split to windows by `stage` or by one of their `classes`."""
    table = data.samples.select(["split", column])
    if column == "classes":
        table = _one_row_each(table, "split", "classes")
    result: dict[str, Counter[str]] = {}
    for (split, label), count in _counts(table, ("split", column)).items():
        if label is not None:
            result.setdefault(split, Counter())[label] += count
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """From files to windows. Recordings: found = committed + quarantined; windows: cut = kept + dropped."""

    found: int
    quarantined: dict[str, int]
    committed: int
    cut: int
    dropped: dict[str, int]
    kept: int


def losses(data: ReportData) -> Losses:
    """Losses over all units, by reason, the most frequent first."""
    reasons = Counter(item.reason for commit in data.commits for item in commit.quarantine)
    dropped: Counter[str] = Counter()
    for commit in data.commits:
        dropped.update({reason: count for reason, count in commit.counts.dropped.items() if count})
    found = sum(commit.counts.recordings for commit in data.commits)
    kept = sum(commit.counts.windows for commit in data.commits)
    return Losses(
        found=found,
        quarantined=dict(reasons.most_common()),
        committed=found - sum(commit.counts.quarantined for commit in data.commits),
        cut=kept + sum(dropped.values()),
        dropped=dict(dropped.most_common()),
        kept=kept,
    )


def unresolved_labels(data: ReportData) -> list[dict[str, Any]]:
    """Labels that no sample holds: corpus, label, recordings, reason; the most frequent first."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for commit in data.commits:
        for item in commit.unresolved:
            counts[item.corpus, item.label, item.reason] += item.count
    return [
        {"corpus": corpus, "label": label, "recordings": count, "reason": reason}
        for (corpus, label, reason), count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def suspect_units(data: ReportData) -> list[dict[str, Any]]:
    """Corpora and kinds with channels whose amplitude or level is implausible, the most frequent first."""
    counts: Counter[tuple[str, str]] = Counter()
    for commit in data.commits:
        for corpus, kinds in commit.unit_suspect.items():
            counts.update({(corpus, kind): count for kind, count in kinds.items()})
    return [
        {"corpus": corpus, "kind": kind, "unit": UNITS.get(kind, "au"), "channels": count, "plausible": _range(kind)}
        for (corpus, kind), count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def _range(kind: str) -> str:
    rule = plausible().get(kind)
    if rule is None:
        return ""
    bounds = {"robust amplitude": rule.amplitude, "median": rule.level}
    return ", ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in ((n, b) for n, b in bounds.items() if b))


def unmapped_annotations(data: ReportData) -> list[dict[str, Any]]:
    """Corpora with annotations whose text their file does not map, the most frequent first.

    The texts themselves stand in no file of an output: one that is in no vocabulary may name a person.
    """
    counts: Counter[str] = Counter()
    for commit in data.commits:
        counts.update(commit.unmapped)
    return [{"corpus": corpus, "annotations": count} for corpus, count in counts.most_common()]


def example_keys(data: ReportData, limit: int) -> list[str]:
    """Keys of typical windows: for each corpus one of each frequent label, with the most channels and best quality."""
    columns = ["key", "corpus", "stage", "classes", "num_channels", "quality"]
    best: dict[tuple[str, str], Mapping[str, Any]] = {}
    sizes: Counter[tuple[str, str]] = Counter()
    # Any sample of a large snapshot will do: look at about 50,000 rows spread over it.
    step = max(1, len(data.samples) // 50_000)
    rows = data.samples.select(columns).take(pa.array(np.arange(0, len(data.samples), step)))
    for row in rows.to_pylist():
        group = row["corpus"], row["stage"] or ",".join(row["classes"])
        sizes[group] += 1
        rank = row["num_channels"], row["quality"]
        if group not in best or rank > (best[group]["num_channels"], best[group]["quality"]):
            best[group] = row
    corpora = sorted({corpus for corpus, _ in best})
    share = max(1, limit // max(1, len(corpora)))
    chosen: list[str] = []
    for corpus in corpora:
        groups = [group for group, _ in sizes.most_common() if group[0] == corpus][:share]
        chosen += [best[group]["key"] for group in sorted(groups)]
    return chosen[:limit]


def metrics_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of a training run's `metrics.jsonl` that are whole; none when the run has not logged yet."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # a whole row ends with a line break
    return [json.loads(line) for line in lines if line]
