"""What a scan found: a row per recording, and the tables that are made of the rows."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

from engine.recording import MEMBER_MARK
from manifests.corpora import Corpus

NO_CORPUS = ""

# Reasons of `Unresolved` that are no gap in our knowledge.
KNOWN_REASONS = ("excluded by corpus", "role ", "uncalibrated")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanChannel:
    """A channel that resolved: its label, symbol, kind, native rate in Hz and unit as written."""

    label: str
    symbol: str
    kind: str
    rate: Fraction
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanRow:
    """One recording.

    Attributes:
        corpus: Id of its corpus, empty in a scan without one.
        path: POSIX path relative to the root.
        subject: Hashed subject.
        session: Session of the path, hashed like the subject, or empty.
        identity: Digest of the input files, see `engine.files.identity_of`.
        num_bytes: Size of the input files in bytes.
        split: Split by the corpus' rule, empty in a scan without a corpus.
        duration: Recorded time in seconds.
        channels: Channels that resolved to a signal.
        unresolved: Label and reason of each channel that did not.
        reason: Code of a `RecordingError`, empty for a readable recording.
        message: What the error says.
        unmapped: Annotation texts that the corpus file does not map, with their number; of a survey alone. They may
            name a person and are for a screen, never for a file.
        label_fault: Why the labels cannot be read, of a survey alone; a conversion rejects such a recording.
    """

    corpus: str
    path: str
    subject: str
    session: str
    identity: str
    num_bytes: int
    split: str = ""
    duration: Fraction = Fraction(0)
    channels: tuple[ScanChannel, ...] = ()
    unresolved: tuple[tuple[str, str], ...] = ()
    reason: str = ""
    message: str = ""
    unmapped: tuple[tuple[str, int], ...] = ()
    label_fault: str = ""


@dataclass(frozen=True, kw_only=True)
class ScanResult:
    """All recordings of a scan with the corpora that they belong to; the methods give plain rows for tables.

    Attributes:
        rows: In the order of sources and paths.
        corpora: By id.
        nobodys: By corpus, paths of recordings whose subject cannot be read, which have no row; of a survey alone.
        skipped: By suffix, files that are neither a recording nor a part of one; of a survey or a folder alone.
    """

    rows: tuple[ScanRow, ...]
    corpora: Mapping[str, Corpus]
    nobodys: Mapping[str, Sequence[str]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)

    @cached_property
    def readable(self) -> tuple[ScanRow, ...]:
        """Rows without an error."""
        return tuple(row for row in self.rows if not row.reason)

    def corpus_rows(self) -> list[dict[str, Any]]:
        """Per corpus: recordings, subjects, hours, unreadable, megabytes, and what its file expects."""
        groups: dict[str, list[ScanRow]] = {name: [] for name in self.corpora}
        for row in self.rows:
            groups.setdefault(row.corpus, []).append(row)
        return [_corpus_row(name, rows, self.corpora.get(name)) for name, rows in groups.items()]

    def channel_rows(self) -> list[dict[str, Any]]:
        """Per symbol: kind, recordings that have it, their share, hours, native rates in Hz, units."""
        recordings: Counter[tuple[str, str]] = Counter()
        hours: defaultdict[tuple[str, str], Fraction] = defaultdict(Fraction)
        rates: defaultdict[tuple[str, str], set[Fraction]] = defaultdict(set)
        units: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        for row in self.readable:
            for name in {(channel.kind, channel.symbol) for channel in row.channels}:
                recordings[name] += 1
                hours[name] += row.duration / 3600
            for channel in row.channels:
                rates[channel.kind, channel.symbol].add(channel.rate)
                units[channel.kind, channel.symbol].add(channel.unit)
        return [
            {
                "symbol": symbol,
                "kind": kind,
                "recordings": recordings[kind, symbol],
                "share": recordings[kind, symbol] / max(1, len(self.readable)),
                "hours": float(hours[kind, symbol]),
                "rates_hz": [float(rate) for rate in sorted(rates[kind, symbol])],
                "units": sorted(units[kind, symbol]),
            }
            for kind, symbol in sorted(recordings, key=lambda name: (name[0], -recordings[name], name[1]))
        ]

    def unresolved_rows(self) -> list[dict[str, Any]]:
        """Per label and reason: number of recordings, most frequent first."""
        counts = Counter(item for row in self.readable for item in set(row.unresolved))
        return [
            {"label": label, "reason": reason, "recordings": count}
            for (label, reason), count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        ]

    def unknown_shares(self) -> dict[str, tuple[float, list[str]]]:
        """Per corpus: share of its channels whose label nobody knows (excluded ones are known), and these labels."""
        shares: dict[str, tuple[float, list[str]]] = {}
        for name in self.corpora:
            rows = [row for row in self.readable if row.corpus == name]
            unknown = [
                label for row in rows for label, reason in row.unresolved if not reason.startswith(KNOWN_REASONS)
            ]
            total = sum(len(row.channels) + len(row.unresolved) for row in rows)
            shares[name] = (len(unknown) / max(1, total), sorted(set(unknown)))
        return shares

    def rate_rows(self) -> list[dict[str, Any]]:
        """Per kind and native rate in Hz: number of channels."""
        counts = Counter((channel.kind, channel.rate) for row in self.readable for channel in row.channels)
        return [
            {"kind": kind, "rate_hz": float(rate), "channels": count} for (kind, rate), count in sorted(counts.items())
        ]

    def unreadable_rows(self) -> list[dict[str, Any]]:
        """Recordings that cannot be used: corpus, path, reason, message."""
        return [
            {"corpus": row.corpus, "path": row.path, "reason": row.reason, "message": row.message}
            for row in self.rows
            if row.reason
        ]


def _corpus_row(name: str, rows: Sequence[ScanRow], corpus: Corpus | None) -> dict[str, Any]:
    good = [row for row in rows if not row.reason]
    found = {
        "subjects": len({row.subject for row in good}),
        "recordings": len(good),
        "hours": float(sum((row.duration for row in good), Fraction(0)) / 3600),
    }
    expected = corpus.expected.model_dump() if corpus else dict.fromkeys(found)
    differs = [
        key
        for key, value in expected.items()
        if value is not None and abs(found[key] - value) > (0.01 * value if key == "hours" else 0)
    ]
    sizes = {row.path.partition(MEMBER_MARK)[0]: row.num_bytes for row in rows}  # recordings may share a file
    return {
        "corpus": name,
        **found,
        "unreadable": len(rows) - len(good),
        "megabytes": sum(sizes.values()) / 1e6,
        "expected": expected,
        "differs": differs,
    }
