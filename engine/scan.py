"""What lies in a folder, from headers alone: recordings, hours, channels by symbol, labels nobody resolved."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import permutations
from pathlib import Path
from typing import Any

from engine.annotations import make_labels, read_raw, unmapped_texts
from engine.config import Source
from engine.copies import local_copy, local_tables
from engine.files import by_suffix, companions, corpus_files, identity_of, is_unlisted, left_out, refuse_foreign_names
from engine.probe import HeaderLimits, guarded_headers
from engine.read import read_header, sniff
from engine.recording import Channel, Recording
from engine.scan_cache import ScanCache
from engine.scan_result import NO_CORPUS, ScanChannel, ScanResult, ScanRow
from engine.storage import is_remote
from manifests.channels import ChannelTag, Unresolved, resolve
from manifests.config import digest
from manifests.corpora import Corpus, load_corpus, recording_split, subject_hash, who_of
from manifests.errors import ConfigError, ContractError, RecordingError
from manifests.subjects import is_somebodys

logger = logging.getLogger(__name__)

_NUM_NAMED = 3  # files in a message
_NUM_REQUESTS = 16  # recordings on a store that are identified at once; each takes some ten small requests

# A bank letter and a number, as amplifiers count their inputs; and those of them that no 10-20 site is called.
_INPUT = re.compile(r"[A-H]\d{1,3}")
_NO_SITE = re.compile(r"[AE](?:[3-9]|\d{2,3})|[BDGH]\d{1,2}")
_MIN_NUMBERED = 3


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
    survey: bool = False,
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
        recording, unmapped, label_fault = _read(path, root, corpus, reader, near=near, survey=survey)
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
                label=channel.label,
                symbol=tag.symbol,
                kind=tag.kind,
                rate=channel.rate,
                unit=(corpus.units.get(channel.label, channel.unit) if corpus else channel.unit),
            )
            for channel, tag in found
        ),
        unresolved=tuple((item.label, item.reason) for item in missed),
        unmapped=tuple(unmapped.items()),
        label_fault=label_fault,
    )
    if near and near.cache:
        near.cache.put(key, _plain_header(row))
    return row


def _plain_header(row: ScanRow) -> dict[str, Any]:
    """What a row tells from the header, as plain data."""
    return {
        "duration": str(row.duration),
        "channels": [[item.label, item.symbol, item.kind, str(item.rate), item.unit] for item in row.channels],
        "unresolved": [[label, reason] for label, reason in row.unresolved],
    }


def _with_header(row: ScanRow, plain: Mapping[str, Any]) -> ScanRow:
    """A row with what `_plain_header` told."""
    return replace(
        row,
        duration=Fraction(plain["duration"]),
        channels=tuple(
            ScanChannel(label=label, symbol=symbol, kind=kind, rate=Fraction(rate), unit=unit)
            for label, symbol, kind, rate, unit in plain["channels"]
        ),
        unresolved=tuple((label, reason) for label, reason in plain["unresolved"]),
    )


def _read(
    path: Path, root: Path, corpus: Corpus | None, reader: str, *, near: _Near | None, survey: bool
) -> tuple[Recording, dict[str, int], str]:
    """Header of a recording; in a survey also annotation texts that no map lists, and why its labels are not read."""
    if corpus is None:
        return read_header(path, reader), {}, ""
    with local_copy(path, root, corpus, work=near.folder if near else None) as (copy, here):
        recording = read_header(copy, reader, corpus.layout)
        unmapped: dict[str, int] = {}
        try:
            if survey:
                raws = read_raw(recording, corpus)
                unmapped = unmapped_texts(corpus, raws)
                make_labels(recording, corpus, raws)  # tells what a conversion would refuse
        except RecordingError as error:
            return recording, unmapped, str(error).replace(str(here), str(root))
        return recording, unmapped, ""


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
    survey: bool = False,
) -> ScanResult:
    """Every recording of the sources, read from headers only, in the order of sources and paths.

    Args:
        sources: Corpora with their roots.
        work: Local folder to which recordings on a store are copied to read their headers; None: the system's.
        salt: Secret that persons are hashed with, see `ConvertConfig.salt_file`.
        output: Where is kept what was read of recordings on a store, so that it is read once.
        only: Path of the one recording to look at, relative to its root as in a row; empty takes all.
        limits: Of the child process that reads the headers of fragile formats.
        survey: For a person who looks and keeps nothing: the labels are read too, the files of a local root that
            nobody takes are counted, and recordings that belong to nobody are listed instead of refused.

    Raises:
        ConfigError: A corpus or root that is missing, paths whose subject cannot be read, or no recording `only`.
    """
    loaded = load_sources(sources, salt=salt)
    has_store = any(is_remote(root) for _, root in loaded)
    cache = ScanCache(output) if output is not None and has_store else None
    rows: list[ScanRow] = []
    nobodys: dict[str, list[str]] = {}
    skipped: Counter[str] = Counter()
    with guarded_headers(limits or HeaderLimits()):
        for corpus, root in loaded:
            paths = [path for path in corpus_files(corpus, root) if only in ("", path.relative_to(root).as_posix())]
            lost = nobodys[corpus.id] = _nobodys(corpus, root, paths, refuse=not survey)
            left = set(lost)
            somebodys = [path for path in paths if path.relative_to(root).as_posix() not in left]
            rows += _rows(corpus, root, somebodys, work=work, cache=cache, survey=survey)
            if survey and not only and not is_remote(root):
                skipped += left_out(corpus, root, paths)
    if only and not rows and not any(nobodys.values()):
        raise ConfigError(
            f"--only {only}: no recording of {', '.join(corpus.id for corpus, _ in loaded)} has that path"
        )
    if cache is not None and not only:
        cache.save()
    corpora = {corpus.id: corpus for corpus, _ in loaded}
    return ScanResult(rows=tuple(rows), corpora=corpora, nobodys=nobodys, skipped=skipped)


def _nobodys(corpus: Corpus, root: Path, paths: Sequence[Path], *, refuse: bool) -> list[str]:
    """Relative paths that the corpus' subject pattern does not match.

    Raises:
        ConfigError: There are any, and `refuse`.
    """
    # A file whose recordings cannot be listed belongs to nobody either; its row says what is wrong with it.
    lost = [path for path in paths if not is_somebodys(corpus.subject, path.relative_to(root).as_posix())]
    found = [path.relative_to(root).as_posix() for path in lost if not is_unlisted(path, corpus)]
    if found and refuse:
        some = ", ".join(found[:_NUM_NAMED]) + (", …" if len(found) > _NUM_NAMED else "")
        raise ConfigError(
            f"{corpus.id}.yaml: subject.pattern '{corpus.subject.pattern}' does not match {len(found)} of "
            f"{len(paths)} files ({some}); widen the pattern or exclude the files"
        )
    return found


def _rows(
    corpus: Corpus, root: Path, paths: Sequence[Path], *, work: Path | None, cache: ScanCache | None, survey: bool
) -> list[ScanRow]:
    """Rows of one corpus."""
    if not is_remote(root):
        return [_row(path, root, corpus, corpus.reader_of(path), survey=survey) for path in paths]
    with local_tables(corpus, root, work=work) as (folder, tables), ThreadPoolExecutor(_NUM_REQUESTS) as pool:
        near = _Near(folder=folder, tables=tables, cache=cache)
        identities = pool.map(lambda path: _identity_or_name(path, corpus.reader_of(path), corpus), paths)
        return [
            _row(path, root, corpus, corpus.reader_of(path), identified=identified, near=near, survey=survey)
            for path, identified in zip(paths, identities, strict=True)
        ]


def _recordings_in(root: Path) -> tuple[list[tuple[Path, str]], Counter[str]]:
    """Files that a reader recognises, without those that another one consists of (segments of a WFDB record).

    The second item counts by suffix the files that are neither.
    """
    paths = sorted(root.rglob("*")) if sniff(root) is None and root.is_dir() else [root]
    found = {
        path: reader for path in paths if (path.is_file() or path.is_dir()) and (reader := sniff(path)) is not None
    }
    refuse_foreign_names(found, "scan")
    parts = {path: set(companions(path, reader)) - {path} for path, reader in found.items()}
    inside = {part for path, named in parts.items() for part in named if path not in parts.get(part, ())}
    taken = {*found, *(part for named in parts.values() for part in named)}
    return [item for item in found.items() if item[0] not in inside], by_suffix(set(paths) - taken, folders=taken)


def scan_folder(root: Path) -> ScanResult:
    """Every file under a folder (or one file) whose content a reader recognises; labels by the generic parser."""
    if is_remote(root):
        raise ConfigError(f"{root}: say which corpus it is (--corpus); what lies on a store is not guessed")
    if not root.exists():
        raise ConfigError(f"{root}: no such file or folder; give a folder with recordings")
    base = root if root.is_dir() and sniff(root) is None else root.parent
    with guarded_headers(HeaderLimits()):
        found, skipped = _recordings_in(root)
        rows = tuple(_row(path, base, None, reader) for path, reader in found)
    return ScanResult(rows=rows, corpora={}, skipped=skipped)
