"""Which files a corpus and a recording consist of, and what identifies their content."""

import hashlib
import re
from pathlib import Path

from engine.read import READERS
from manifests.corpora import Corpus
from manifests.errors import ConfigError

_EDGE_BYTES = 1 << 16  # of each end of a file, and of blocks between, that an identity covers
_NUM_BLOCKS = 8


def corpus_files(corpus: Corpus, root: Path) -> list[Path]:
    """Recordings of a corpus under its root by the globs of its file, sorted by path."""
    if not root.is_dir():
        raise ConfigError(f"{corpus.id}: root {root} is no folder; give the folder that holds its recordings")
    found = {path for pattern in corpus.files for path in root.glob(pattern) if path.is_file()}
    found -= {path for pattern in corpus.exclude for path in root.glob(pattern)}
    return sorted(found)


def companions(path: Path, reader: str, corpus: Corpus | None = None) -> list[Path]:
    """Files that a recording consists of: itself, those that its reader names, and the corpus' file of labels."""
    names = {path, *READERS[reader].companions(path)}
    rule = corpus.annotations if corpus else None
    if corpus and rule and rule.pattern and rule.source in {"edf_file", "wfdb", "text_codes"}:
        match = re.search(corpus.subject.pattern, path.as_posix())
        known = {"subject": "", "session": "", "run": "", **(match.groupdict("") if match else {})}
        pattern = rule.pattern.format_map({**known, "stem": path.stem})
        names |= set(path.parent.glob(pattern)) if _is_glob(pattern) else {path.parent / pattern}
    return sorted(name for name in names if name.is_file())


def _is_glob(pattern: str) -> bool:
    return any(mark in pattern for mark in "*?[")


def identity_of(path: Path, reader: str, corpus: Corpus | None = None) -> tuple[str, int]:
    """Digest (16 hex) and size in bytes of a recording's files, free of dates and folders.

    Covers every file's name and size and blocks at its ends and between, not every byte: a scan reads headers.
    The SHA-256 of the whole files stands in the commit of the unit that converted them.
    """
    sha = hashlib.sha256()
    total = 0
    for name in companions(path, reader, corpus):
        size = name.stat().st_size
        total += size
        sha.update(f"{name.name}/{size}/".encode())
        step = max(_EDGE_BYTES, size // _NUM_BLOCKS)
        with name.open("rb") as file:
            for offset in {*range(0, size, step), max(0, size - _EDGE_BYTES)}:
                file.seek(offset)
                sha.update(str(offset).encode())
                sha.update(file.read(_EDGE_BYTES if offset in (0, size - _EDGE_BYTES) else 4096))
    return sha.hexdigest()[:16], total
