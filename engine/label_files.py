"""Which file, or which row of a corpus' table, holds the labels of a recording."""

import csv
import functools
import glob
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path

from engine.recording import split_member
from manifests.annotations import FILE_SOURCES, AnnotationRule, LabelTable
from manifests.corpora import Corpus
from manifests.errors import ConfigError, RecordingError

MAX_TEXT_BYTES = 64 << 20
"""Largest text file of labels that is read; a night's scoring takes less than a megabyte."""

_MAX_LEVELS = 6  # folders above a recording that are searched for its corpus' table
_NUMBER = re.compile(r"0*(\d+)(?:\.0+)?")


def read_bytes(path: Path) -> bytes:
    """Content of a label file.

    Raises:
        RecordingError: `ANNOTATION_INVALID` for one that is far too large.
    """
    size = path.stat().st_size
    if size > MAX_TEXT_BYTES:
        raise RecordingError(
            "ANNOTATION_INVALID", f"{path}: {size:,} bytes; a label file has at most {MAX_TEXT_BYTES:,}"
        )
    return path.read_bytes()


def read_text(path: Path, encoding: str = "utf-8-sig") -> str:
    """Text of a label file.

    Raises:
        RecordingError: `ANNOTATION_INVALID` for bytes that are no text in that encoding.
    """
    try:
        return read_bytes(path).decode(encoding)
    except UnicodeError as error:
        raise RecordingError(
            "ANNOTATION_INVALID", f"{path}: not text in {encoding}; set table.encoding to what it is"
        ) from error


def label_file(path: Path, rule: AnnotationRule, corpus: Corpus) -> Path | None:
    """The one label file of a recording; None where it is absent and the rule does not require it.

    Raises:
        RecordingError: `ANNOTATION_INVALID` for no file where one is required, and for several.
        ConfigError: The pattern names a part that the corpus' paths do not have.
    """
    found = _matches(path, rule, corpus)
    if len(found) == 1:
        return found[0]
    if not found and not rule.required:
        return None
    raise RecordingError(
        "ANNOTATION_INVALID",
        f"{path}: {len(found)} label files match {_filled(path, rule, corpus, escape=False)} beside it; 1 expected "
        "(with annotations.required: false a recording may have none)",
    )


def label_files(path: Path, corpus: Corpus) -> list[Path]:
    """Label files of a recording that exist, whether or not they are as expected."""
    rules = [rule for rule in corpus.annotation_rules if rule.source in FILE_SOURCES]
    return sorted({found for rule in rules for found in _matches(path, rule, corpus)})


def names_of_labels(name: str, corpus: Corpus) -> list[str]:
    """Names or globs of a recording's label files relative to the corpus' root, before any file is there."""
    found: list[str] = []
    for rule in corpus.annotation_rules:
        if rule.source in FILE_SOURCES:
            is_glob = glob.has_magic(rule.pattern or "")
            path = Path(name).parent / _filled(Path(name), rule, corpus, escape=is_glob)
            found.append(posixpath.normpath(path.as_posix()))
    return found


def label_row(path: Path, rule: AnnotationRule, corpus: Corpus) -> dict[str, str] | None:
    """Cells of the row of the corpus' table that a recording belongs to; None where it may lack one and does.

    Raises:
        RecordingError: `ANNOTATION_INVALID` for a missing table or row, or two rows that differ.
        ConfigError: The table has no column of that name.
    """
    table = rule.labels
    if table is None:
        raise ConfigError(f"{corpus.id}.yaml: annotations: source {rule.source!r} has no table of labels")
    file = _nearest(path, table)
    key = _plain(table.match.format_map(_parts(path, corpus)))
    rows: list[tuple[str, ...]] = []
    if file is not None:
        stat = file.stat()
        rows = _read_rows(file, (stat.st_size, getattr(stat, "st_mtime_ns", 0)), table.key, tuple(table.columns)).get(
            key, []
        )
    if len(rows) == 1:
        return dict(zip(table.columns, rows[0], strict=True))
    if not rows and not rule.required:
        return None
    where = file or f"no {table.file} beside it or in {_MAX_LEVELS} folders above"
    raise RecordingError(
        "ANNOTATION_INVALID", f"{path}: {len(rows)} rows with {table.key} {key!r} ({where}); 1 expected"
    )


def label_cells(path: Path, corpus: Corpus) -> str:
    """What the corpus' tables say of a recording, as one text that enters its identity; empty for nothing.

    Only the recording's own cells: a change in another row leaves this one's conversion valid.
    """
    texts: list[str] = []
    for rule in corpus.annotation_rules:
        if rule.source == "table_file":
            try:
                texts.append(repr(label_row(path, rule, corpus)))
            except RecordingError as error:  # told again, and quarantined, when the labels are read
                texts.append(error.reason)
    return "\n".join(texts)


def _parts(path: Path, corpus: Corpus) -> dict[str, str]:
    """What a template may name: the recording's name in pieces and the groups of the corpus' path pattern."""
    file, member = split_member(path)
    match = re.search(corpus.subject.pattern, path.as_posix()) or re.search(corpus.subject.pattern, path.name)
    return {"stem": file.stem, "name": file.name, "member": member, **(match.groupdict("") if match else {})}


def _filled(path: Path, rule: AnnotationRule, corpus: Corpus, *, escape: bool = True) -> str:
    parts = _parts(path, corpus)
    if rule.pattern is None:  # only a BIDS name says by itself where its events stand
        stem, mark, _ = parts["stem"].rpartition("_")
        pattern, parts = "{stem}_events.tsv", {"stem": stem if mark else parts["stem"]}
    else:
        pattern = rule.pattern
    try:
        return pattern.format_map({name: glob.escape(text) if escape else text for name, text in parts.items()})
    except (KeyError, ValueError, IndexError) as error:
        raise ConfigError(
            f"{corpus.id}.yaml: annotations.pattern {pattern!r}: {error}; known: {', '.join(parts)}"
        ) from None


def _matches(path: Path, rule: AnnotationRule, corpus: Corpus) -> list[Path]:
    folder = path.parent
    is_glob = glob.has_magic(rule.pattern or "")
    pattern = _filled(path, rule, corpus, escape=is_glob)
    while pattern.startswith("../"):
        folder, pattern = folder.parent, pattern.removeprefix("../")
    # A plain name is asked for by itself: listing a folder of an object store takes long.
    found = folder.glob(pattern) if is_glob else [folder / pattern]
    return sorted(name for name in found if name.is_file() and name != path)


def _nearest(path: Path, table: LabelTable) -> Path | None:
    """The table in the recording's folder or in the nearest one above it."""
    for folder in list(path.parents)[: _MAX_LEVELS + 1]:
        found = sorted(folder.glob(table.file))
        if found:
            return found[0]
    return None


@functools.lru_cache(maxsize=4)
def _read_rows(
    path: Path, _stamp: tuple[int, int], key: str, columns: tuple[str, ...]
) -> Mapping[str, list[tuple[str, ...]]]:
    """Different rows of a table by key. The stamp, size and date, makes a changed file a new one."""
    rows: dict[str, list[tuple[str, ...]]] = {}
    try:
        reader = csv.DictReader(read_text(path).splitlines(), delimiter="\t" if path.suffix == ".tsv" else ",")
        missing = sorted({key, *columns} - set(reader.fieldnames or ()))
        if missing:
            raise ConfigError(f"{path}: no column {', '.join(missing)}; it has {', '.join(reader.fieldnames or ())}")
        for row in reader:
            cells = tuple((row[column] or "").strip() for column in columns)
            known = rows.setdefault(_plain(row[key] or ""), [])
            if cells not in known:
                known.append(cells)
    except csv.Error as error:
        raise RecordingError("ANNOTATION_INVALID", f"{path}: not a table: {error}") from error
    return rows


def _plain(text: str) -> str:
    """A cell without outer blanks; pandas writes whole numbers as `15709.0`, file names pad them as `00001`."""
    text = text.strip()
    match = _NUMBER.fullmatch(text)
    return match[1] if match else text
