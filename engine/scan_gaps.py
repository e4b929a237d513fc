"""What a corpus file lacks, as a survey shows: texts without a label, units, absent channels, unreadable labels."""

import difflib
from collections import Counter
from typing import Any

import numpy as np

from engine.rows import in_canonical_unit
from engine.scan_result import ScanChannel, ScanResult
from manifests.channels import UNITS
from manifests.corpora import Corpus
from manifests.errors import RecordingError
from manifests.labels import fold


def unmapped_texts(result: ScanResult) -> list[dict[str, Any]]:
    """Annotation texts that no map of the corpus lists: corpus, text, n, recordings; the most frequent first."""
    counts: Counter[tuple[str, str]] = Counter()
    recordings: Counter[tuple[str, str]] = Counter()
    for row in result.readable:
        counts.update({(row.corpus, text): count for text, count in row.unmapped})
        recordings.update((row.corpus, text) for text, _ in row.unmapped)
    return [
        {"corpus": corpus, "text": text, "n": count, "recordings": recordings[corpus, text]}
        for (corpus, text), count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def nearest_text(text: str, corpus: Corpus) -> str:
    """The text of the corpus' maps that is most like one that they lack; empty where none is."""
    known = {key.casefold(): key for rule in corpus.annotation_rules for key in rule.map}
    near = difflib.get_close_matches(text.casefold(), known, n=1)
    return known[near[0]] if near else ""


def unknown_units(result: ScanResult) -> list[dict[str, Any]]:
    """Channels that a conversion leaves out for their unit: corpus, label, symbol, unit, recordings."""
    counts = Counter(
        (row.corpus, channel.label, channel.symbol, channel.unit)
        for row in result.readable
        for channel in row.channels
        if not _has_unit(channel)
    )
    return [
        {"corpus": corpus, "label": label, "symbol": symbol, "unit": unit, "recordings": count}
        for (corpus, label, symbol, unit), count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def _has_unit(channel: ScanChannel) -> bool:
    try:
        in_canonical_unit(np.empty(0, dtype=np.float32), channel.unit, UNITS.get(channel.kind, "au"))
    except RecordingError:
        return False
    return True


def absent_channels(result: ScanResult) -> dict[str, list[str]]:
    """By corpus, labels that its file maps to a symbol and that stand in no readable recording."""
    absent: dict[str, list[str]] = {}
    for name, corpus in result.corpora.items():
        rows = [row for row in result.readable if row.corpus == name]
        seen = {channel.label for row in rows for channel in row.channels}
        seen |= {label for row in rows for label, _ in row.unresolved}
        folded = {fold(label) for label in seen}  # as `resolve` looks them up
        missing = [label for label, symbol in corpus.channels.items() if symbol and fold(label) not in folded]
        if rows and missing:
            absent[name] = missing
    return absent


def label_faults(result: ScanResult) -> list[dict[str, str]]:
    """Recordings that a conversion rejects because their labels cannot be found or read: corpus, path, message."""
    return [
        {"corpus": row.corpus, "path": row.path, "message": row.label_fault}
        for row in result.readable
        if row.label_fault
    ]
