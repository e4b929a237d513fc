"""What a scan has read of recordings on a store, kept in the output so that a rerun need not copy them again.

Rows are known by the identity of the recording, the corpus file and the code that read them, so that a change of any
of them reads the recording again. They hold no file name.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manifests.config import code_digest, digest, write_atomically
from manifests.corpora import Corpus

CACHE_FILE = "scan.jsonl"


class ScanCache:
    """Rows of `scan.jsonl` of an output folder; `put` what is new, then `save`."""

    def __init__(self, output: Path) -> None:
        self._path = output / CACHE_FILE
        try:
            text = self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            text = ""
        self._rows: dict[str, dict[str, Any]] = dict(json.loads(line) for line in text.splitlines())
        self._used: dict[str, dict[str, Any]] = {}
        self._corpora: dict[str, str] = {}

    def key(self, corpus: Corpus, identity: str) -> str:
        """32 hex digits for one recording as one corpus file and this code read it."""
        if corpus.id not in self._corpora:
            self._corpora[corpus.id] = digest([corpus.model_dump(mode="json"), code_digest()])
        return digest([self._corpora[corpus.id], identity])[:32]

    def get(self, key: str) -> Mapping[str, Any] | None:
        """What is known about a recording, None for nothing."""
        row = self._rows.get(key)
        if row is not None:
            self._used[key] = row
        return row

    def put(self, key: str, row: dict[str, Any]) -> None:
        """Remember what was read of a recording, as plain data."""
        self._used[key] = row

    def save(self) -> None:
        """Write what this scan used, if that differs from what stands there; what nobody asked for goes."""
        if self._used != self._rows:
            lines = [json.dumps(item) + "\n" for item in sorted(self._used.items())]
            write_atomically(self._path, "".join(lines))
