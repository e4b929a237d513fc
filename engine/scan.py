"""What lies in a folder, from headers alone: recordings, hours, channels by symbol, labels nobody resolved."""

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import permutations
from pathlib import Path
from typing import Any

from engine.config import Source
from engine.copies import local_copy, local_tables
from engine.files import companions, corpus_files, identity_of, is_unlisted, refuse_foreign_names
from engine.probe import HeaderLimits, guarded_headers
from engine.read import read_header, sniff
from engine.recording import MEMBER_MARK, Channel, Recording
from engine.scan_cache import ScanCache
from engine.storage import is_remote
from manifests.channels import ChannelTag, Unresolved, resolve
from manifests.config import digest
from manifests.corpora import Corpus, load_corpus, recording_split, subject_hash, who_of
from manifests.errors import ConfigError, ContractError, RecordingError

logger = logging.getLogger(__name__)

NO_CORPUS = ""
_NUM_REQUESTS = 16  # recordings on a store that are identified at once; each takes some ten small requests

# Reasons of `Unresolved` that are no gap in our knowledge.
KNOWN_REASONS = ("excluded by corpus", "role ", "uncalibrated")

# A bank letter and a number, as amplifiers count their inputs; and those of them that no 10-20 site is called.
_INPUT = re.compile(r"[A-H]\d{1,3}")
_NO_SITE = re.compile(r"[AE](?:[3-9]|\d{2,3})|[BDGH]\d{1,2}")
_MIN_NUMBERED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanChannel:
    """A channel that resolved: its symbol, kind, native rate in Hz and unit as written."""

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


@dataclass(frozen=True, kw_only=True)
class ScanResult:
    """All recordings of a scan with the corpora that they belong to; the methods give plain rows for tables."""

    rows: tuple[ScanRow, ...]
    corpora: Mapping[str, Corpus]

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


def subject_of(corpus: Corpus, path: str, root: Path | None = None) -> tuple[str, str]:
    """Person and session of a relative POSIX path, unhashed; `root` is needed where a table says who is who.

    Raises:
        ConfigError: The corpus' rules do not know the path, so that the recording would belong to nobody.
    """
    who = who_of(corpus, path, root)
    return who.subject, who.session


def session_hash(corpus: Corpus, subject: str, session: str) -> str:
    """8 hex digits that stand for a session; empty for none."""
    return subject_hash(corpus, f"{subject}/{session}")[:8] if session else ""


def has_numbered_inputs(labels: Iterable[str]) -> bool:
    """Whether labels are a BioSemi (A1…A32, B1…) or EGI (E1…E128) numbering, in which A1, C3 or E1 is no site."""
    return sum(_NO_SITE.fullmatch(label.strip()) is not None for label in labels) >= _MIN_NUMBERED


def resolve_channels(
    recording: Recording, corpus: Corpus | None
) -> tuple[list[tuple[Channel, ChannelTag]], list[Unresolved]]:
    """Channels that are signals with their tags, in file order, and those that are not with the reason."""
    found: list[tuple[Channel, ChannelTag]] = []
    missed: list[Unresolved] = []
    declared = corpus.channels if corpus else {}
    numbered = has_numbered_inputs([channel.label for channel in recording.channels])
    for channel in recording.channels:
        tag = resolve(channel.label, declared)
        if numbered and channel.label not in declared and _INPUT.fullmatch(channel.label.strip()):
            reason = "a numbered input of an amplifier, not a 10-20 site; name its electrode in a corpus file"
            missed.append(Unresolved(label=channel.label, reason=reason))
        elif isinstance(tag, Unresolved):
            missed.append(tag)
        elif tag.role != "signal":
            missed.append(Unresolved(label=channel.label, reason=f"role {tag.role}"))
        elif not channel.calibrated:
            missed.append(Unresolved(label=channel.label, reason="uncalibrated"))
        else:
            polarity = corpus.polarity.get(channel.label) if corpus else None
            found.append((channel, replace(tag, polarity=polarity) if polarity else tag))
    return found, missed


def _identity_or_name(path: Path, reader: str, corpus: Corpus | None) -> tuple[str, int, str]:
    """Identity and size of a recording, and why it cannot be read, if it cannot; its name then stands for it."""
    try:
        return *identity_of(path, reader, corpus), ""
    except OSError as error:
        return digest({"unreadable": path.name})[:16], 0, error.strerror or str(error)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Near:
    """What a scan of a store keeps on a local disk: a folder for copies, one with the corpus' tables, and old rows."""

    folder: Path
    tables: Path
    cache: ScanCache | None


def _row(
    path: Path,
    root: Path,
    corpus: Corpus | None,
    reader: str,
    *,
    identified: tuple[str, int, str] | None = None,
    near: _Near | None = None,
) -> ScanRow:
    """Row of one recording; `identified` is what `_identity_or_name` says, `near` helps with a root on a store."""
    relative = path.relative_to(root).as_posix()
    identity, size, unreadable = identified or _identity_or_name(path, reader, corpus)
    lookup_root = near.tables if near else root
    owner = corpus if corpus and not is_unlisted(path, corpus) else None
    subject, session = subject_of(owner, relative, lookup_root) if owner else ("", "")
    row = ScanRow(
        corpus=corpus.id if corpus else NO_CORPUS,
        path=relative,
        subject=subject_hash(owner, subject) if owner else "",
        session=session_hash(owner, subject, session) if owner else "",
        split=recording_split(owner, relative, lookup_root) if owner else "",
        identity=identity,
        num_bytes=size,
    )
    try:
        if corpus and (why := corpus.bad_reason(relative)):
            raise RecordingError("KNOWN_BAD", f"{relative}: {why}")
        if unreadable:
            raise RecordingError("UNREADABLE", f"{relative}: {unreadable}; check its rights and the disk")
        key = near.cache.key(corpus, identity) if near and near.cache and corpus else ""
        if near and near.cache and (known := near.cache.get(key)):
            return _with_header(row, known)
        recording = _header(path, root, corpus, reader, near)
    except RecordingError as error:
        return replace(row, reason=error.reason, message=str(error))
    except OSError as error:
        message = f"{relative}: {error.strerror or error}; check its rights and the disk"
        return replace(row, reason="UNREADABLE", message=message)
    except (ConfigError, ContractError):
        raise
    except Exception as error:  # noqa: BLE001 - a decoder's fault costs one recording; its text may hold a name
        logger.warning("%s: %s", relative, type(error).__name__)
        return replace(row, reason="CRASHED", message=f"{relative}: {type(error).__name__} while its header was read")
    found, missed = resolve_channels(recording, corpus)
    row = replace(
        row,
        duration=recording.duration,
        channels=tuple(
            ScanChannel(
                symbol=tag.symbol,
                kind=tag.kind,
                rate=channel.rate,
                unit=(corpus.units.get(channel.label, channel.unit) if corpus else channel.unit),
            )
            for channel, tag in found
        ),
        unresolved=tuple((item.label, item.reason) for item in missed),
    )
    if near and near.cache:
        near.cache.put(key, _plain_header(row))
    return row


def _plain_header(row: ScanRow) -> dict[str, Any]:
    """What a row tells from the header, as plain data."""
    return {
        "duration": str(row.duration),
        "channels": [[item.symbol, item.kind, str(item.rate), item.unit] for item in row.channels],
        "unresolved": [[label, reason] for label, reason in row.unresolved],
    }


def _with_header(row: ScanRow, plain: Mapping[str, Any]) -> ScanRow:
    """A row with what `_plain_header` told."""
    return replace(
        row,
        duration=Fraction(plain["duration"]),
        channels=tuple(
            ScanChannel(symbol=symbol, kind=kind, rate=Fraction(rate), unit=unit)
            for symbol, kind, rate, unit in plain["channels"]
        ),
        unresolved=tuple((label, reason) for label, reason in plain["unresolved"]),
    )


def _header(path: Path, root: Path, corpus: Corpus | None, reader: str, near: _Near | None) -> Recording:
    if corpus is None:
        return read_header(path, reader)
    with local_copy(path, root, corpus, work=near.folder if near else None) as (copy, _):
        return read_header(copy, reader, corpus.layout)


def load_sources(sources: Iterable[Source], *, salt: bytes = b"") -> list[tuple[Corpus, Path]]:
    """Corpora with their roots, hashing with `salt`.

    Raises:
        ConfigError: A corpus stands twice, or a person of two corpora could be in two splits.
    """
    chosen = [(load_corpus(source.corpus).with_split(source.split), source) for source in sources]
    ids = Counter(corpus.id for corpus, _ in chosen)
    twice = [name for name, count in ids.items() if count > 1]
    if twice:
        raise ConfigError(f"sources: corpus {', '.join(twice)} stands twice; give each corpus one root")
    for (corpus, source), (other, _) in permutations(chosen, 2):
        _check_overlap(corpus, other, split=source.split)
    return [(corpus.model_copy(update={"salt": salt}), source.root) for corpus, source in chosen]


def _check_overlap(corpus: Corpus, other: Corpus, *, split: str) -> None:
    """Refuse two corpora of which a person could be in two splits; warn where recordings come twice."""
    overlap = corpus.overlaps.get(other.id)
    if overlap is None:
        return
    if overlap.persons == "unlinked":
        raise ConfigError(
            f"sources: {corpus.id} and {other.id} hold recordings of the same persons under names that cannot be "
            f"joined ({overlap.note}), so a person could be in two splits; convert one of them"
        )
    if split != "strict" and corpus.split != other.split:
        raise ConfigError(
            f"sources: {corpus.id} has the split {split} and shares persons with {other.id}, whose split is another "
            "one; take strict for both"
        )
    if overlap.relation in ("subset", "same"):
        logger.warning("%s is part of %s: its recordings come twice", corpus.id, other.id)


def scan(
    sources: Iterable[Source],
    *,
    work: Path | None = None,
    salt: bytes = b"",
    output: Path | None = None,
    only: str = "",
    limits: HeaderLimits | None = None,
) -> ScanResult:
    """Every recording of the sources, read from headers only, in the order of sources and paths.

    Args:
        sources: Corpora with their roots.
        work: Local folder to which recordings on a store are copied to read their headers; None: the system's.
        salt: Secret that persons are hashed with, see `ConvertConfig.salt_file`.
        output: Where is kept what was read of recordings on a store, so that it is read once.
        only: Path of the one recording to look at, relative to its root as in a row; empty takes all.
        limits: Of the child process that reads the headers of fragile formats.

    Raises:
        ConfigError: A corpus or root that is missing, a path whose subject cannot be read, or no recording `only`.
    """
    loaded = load_sources(sources, salt=salt)
    has_store = any(is_remote(root) for _, root in loaded)
    cache = ScanCache(output) if output is not None and has_store else None
    with guarded_headers(limits or HeaderLimits()):
        rows = [row for corpus, root in loaded for row in _rows(corpus, root, work=work, cache=cache, only=only)]
    if only and not rows:
        raise ConfigError(
            f"--only {only}: no recording of {', '.join(corpus.id for corpus, _ in loaded)} has that path"
        )
    if cache is not None and not only:
        cache.save()
    return ScanResult(rows=tuple(rows), corpora={corpus.id: corpus for corpus, _ in loaded})


def _rows(corpus: Corpus, root: Path, *, work: Path | None, cache: ScanCache | None, only: str) -> list[ScanRow]:
    """Rows of one corpus."""
    paths = [path for path in corpus_files(corpus, root) if only in ("", path.relative_to(root).as_posix())]
    if not is_remote(root):
        return [_row(path, root, corpus, corpus.reader_of(path)) for path in paths]
    with local_tables(corpus, root, work=work) as (folder, tables), ThreadPoolExecutor(_NUM_REQUESTS) as pool:
        near = _Near(folder=folder, tables=tables, cache=cache)
        identities = pool.map(lambda path: _identity_or_name(path, corpus.reader_of(path), corpus), paths)
        return [
            _row(path, root, corpus, corpus.reader_of(path), identified=identified, near=near)
            for path, identified in zip(paths, identities, strict=True)
        ]


def _recordings_in(root: Path) -> Iterator[tuple[Path, str]]:
    """Files that a reader recognises, without those that another one consists of (segments of a WFDB record)."""
    paths = sorted(root.rglob("*")) if sniff(root) is None and root.is_dir() else [root]
    found = {
        path: reader for path in paths if (path.is_file() or path.is_dir()) and (reader := sniff(path)) is not None
    }
    refuse_foreign_names(found, "scan")
    parts = {path: set(companions(path, reader)) - {path} for path, reader in found.items()}
    inside = {part for path, named in parts.items() for part in named if path not in parts.get(part, ())}
    yield from ((path, reader) for path, reader in found.items() if path not in inside)


def scan_folder(root: Path) -> ScanResult:
    """Every file under a folder (or one file) whose content a reader recognises; labels by the generic parser."""
    if is_remote(root):
        raise ConfigError(f"{root}: say which corpus it is (--corpus); what lies on a store is not guessed")
    if not root.exists():
        raise ConfigError(f"{root}: no such file or folder; give a folder with recordings")
    base = root if root.is_dir() and sniff(root) is None else root.parent
    with guarded_headers(HeaderLimits()):
        rows = tuple(_row(path, base, None, reader) for path, reader in _recordings_in(root))
    return ScanResult(rows=rows, corpora={})
