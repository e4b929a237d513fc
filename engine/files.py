"""Which files a corpus and a recording consist of, and what identifies their content."""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from engine.label_files import label_cells, label_files
from engine.read import READERS
from engine.readers.magic import MFF_FILES, is_mff
from engine.recording import MEMBER_MARK, split_member
from engine.storage import glob_matches, is_remote, names_under, read_ranges
from manifests.corpora import Corpus, who_of
from manifests.errors import ConfigError, RecordingError
from manifests.subjects import look_up, path_groups

_EDGE_BYTES = 1 << 16  # of each end of a file, and of blocks between, that an identity covers
_NUM_BLOCKS = 8


def corpus_files(corpus: Corpus, root: Path) -> list[Path]:
    """Recordings of a corpus under its root by the globs of its file, sorted by path.

    Recordings that share a file come as `file#member`, in the file's order; the globs know the file alone. A file
    whose recordings cannot be listed comes as itself: reading its header tells why.
    """
    if is_remote(root):
        return [recording for path in _objects(corpus, root) for recording in _listed(path, corpus)]
    if not root.is_dir():
        raise ConfigError(f"{corpus.id}: root {root} is no folder; give the folder that holds its recordings")
    found = {path for pattern in corpus.files for path in root.glob(pattern) if path.is_file() or is_mff(path)}
    found -= {path for pattern in corpus.exclude for path in root.glob(pattern)}
    refuse_foreign_names(found, corpus.id)
    return [recording for path in sorted(found) for recording in _listed(path, corpus)]


def left_out(corpus: Corpus, root: Path, recordings: Iterable[Path]) -> Counter[str]:
    """By suffix, files under a local root that no rule of the corpus takes.

    A recording's companions and its file of labels are taken, as are the corpus' tables and what `exclude` names.
    """
    taken = {part for path in recordings for part in companions(path, corpus.reader_of(path), corpus)}
    taken |= {split_member(path)[0] for path in recordings}
    taken |= {path for pattern in corpus.exclude for path in root.glob(pattern)}
    taken |= {path for pattern in corpus.side_files for path in root.rglob(pattern)}
    return by_suffix(set(root.rglob("*")) - taken, folders=taken)


def by_suffix(paths: Iterable[Path], *, folders: Collection[Path] = ()) -> Counter[str]:
    """Number of files by suffix, in lower case; those inside of `folders` (recordings that are one) do not count."""
    return Counter(
        path.suffix.lower() or "no suffix"
        for path in paths
        if path.is_file() and not any(folder in folders for folder in path.parents)
    )


def refuse_foreign_names(paths: Iterable[Path], where: str) -> None:
    """Raise `ConfigError` for names that are no UTF-8, as old archives leave them: no ledger could hold them."""
    for path in paths:
        if str(path) != str(path).encode(errors="ignore").decode():
            shown = str(path).encode(errors="backslashreplace").decode()
            raise ConfigError(f"{where}: the name of {shown} is no UTF-8; rename it (convmv -t utf8) or leave it out")


def _listed(path: Path, corpus: Corpus) -> list[Path]:
    """The recordings of one file."""
    list_members = READERS[corpus.reader_of(path)].members
    if list_members is None:
        return [path]
    try:
        # A layout of one recording a file tells so without opening it; on a store nothing could be opened.
        names = list_members(Path(path.name) if is_remote(path) else path, corpus.layout)
    except (RecordingError, OSError):
        if is_remote(path):
            raise ConfigError(
                f"{path}: holds several recordings, which cannot be read from a store one by one; copy the corpus to "
                "a disk (aws s3 sync, kymo fetch) and give that folder as root"
            ) from None
        return [path]
    return [path.with_name(f"{path.name}{MEMBER_MARK}{name}") for name in names] or [path]


def _objects(corpus: Corpus, root: Path) -> list[Path]:
    """As `corpus_files` on a store: one listing, held against the globs here."""
    names = [tuple(name.split("/")) for name in names_under(root)]
    if not names:
        raise ConfigError(f"{corpus.id}: root {root} holds nothing; give the URL under which its recordings lie")

    def fits(name: Sequence[str], patterns: Sequence[str]) -> bool:
        return any(glob_matches(name, pattern.split("/")) for pattern in patterns)

    listed = set(names)
    # A store has no folders: a recording that is one shows by the files that its objects' names share a beginning with.
    folders = {name[:-1] for name in names if len(name) > 1 and all((*name[:-1], file) in listed for file in MFF_FILES)}
    found = sorted(name for name in listed | folders if fits(name, corpus.files) and not fits(name, corpus.exclude))
    return [root.joinpath(*name) for name in found]


def is_unlisted(path: Path, corpus: Corpus) -> bool:
    """Whether a path is a file of several recordings that could not be listed, so that it belongs to nobody."""
    list_members = READERS[corpus.reader_of(path)].members
    if list_members is None or split_member(path)[1]:
        return False
    try:
        return bool(list_members(path, corpus.layout))
    except (RecordingError, OSError):
        return True


def companions(path: Path, reader: str, corpus: Corpus | None = None) -> list[Path]:
    """Files that a recording consists of: itself, those that its reader names, and the corpus' file of labels."""
    file, _ = split_member(path)
    names = {file, *READERS[reader].companions(file), *(label_files(path, corpus) if corpus else ())}
    return sorted(name for name in names if name.is_file())


def identity_of(path: Path, reader: str, corpus: Corpus | None = None) -> tuple[str, int]:
    """Digest (16 hex) and size in bytes of a recording's files, free of dates and folders.

    Covers every file's name and size and blocks at its ends and between, not every byte: a scan reads headers. Of a
    table that the whole corpus shares (of labels, persons, splits), only the recording's own cells count.
    The SHA-256 of the whole files stands in the commit of the unit that converted them.
    """
    names = companions(path, reader, corpus)
    _, member = split_member(path)
    told = member
    if corpus and not is_unlisted(path, corpus):
        told += label_cells(path, corpus) + _person_cells(path, corpus)
    if member:
        stats = [(name, name.stat()) for name in names]
        whole, total = _sampled_once(tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
    else:
        whole, total = _sampled(names)
    return hashlib.sha256(f"{whole}{MEMBER_MARK}{told}".encode()).hexdigest()[:16] if told else whole, total


def _person_cells(path: Path, corpus: Corpus) -> str:
    """Person, family and published split as a table of the corpus says them; empty for a corpus without one."""
    column = corpus.split.column
    lookup = corpus.subject.table or column
    if lookup is None:
        return ""
    root = next((folder for folder in path.parents if next(folder.glob(lookup.file), None)), None)
    if root is None:
        return ""  # the scan refuses the corpus without its table
    name, where = path.relative_to(root).as_posix(), f"{corpus.id}.yaml"
    who = who_of(corpus, name, root)
    cells: dict[str, str] = {}
    if column is not None:
        cells = look_up(
            column, path_groups(corpus.subject, name, where=where), root, (column.column,), where=f"{where}: split"
        )
    return "/".join(["", who.subject, who.family, *cells.values()])


@lru_cache(maxsize=8)  # thousands of recordings share a file
def _sampled_once(files: tuple[tuple[Path, int, int], ...]) -> tuple[str, int]:
    return _sampled([name for name, _, _ in files])


def _sampled(names: Sequence[Path]) -> tuple[str, int]:
    sha = hashlib.sha256()
    total = 0
    for name in names:
        size = name.stat().st_size
        total += size
        sha.update(f"{name.name}/{size}/".encode())
        step = max(_EDGE_BYTES, size // _NUM_BLOCKS)
        offsets = list({*range(0, size, step), max(0, size - _EDGE_BYTES)})
        lengths = [_EDGE_BYTES if offset in (0, size - _EDGE_BYTES) else 4096 for offset in offsets]
        # A store answers to any range of an empty object that it is impossible; a disk tells whether it can be read.
        can_read = size or not is_remote(name)
        blocks = read_ranges(name, list(zip(offsets, lengths, strict=True))) if can_read else [b""] * len(offsets)
        for offset, block in zip(offsets, blocks, strict=True):
            sha.update(str(offset).encode())
            sha.update(block)
    return sha.hexdigest()[:16], total
