"""A tiny snapshot on disk, for tests and for trying things: a few subjects, a few windows, real shard format.

All kinds of a window share one latent (a frequency and its phase), so that an objective which matches modalities
or recordings has something to learn within a few steps.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from manifests.channels import UCS_VERSION, ChannelTag, resolve, table_digest
from manifests.config import digest
from manifests.shards import (
    FORMAT_VERSION,
    SAMPLE_COLUMNS,
    SAMPLES_FILE,
    SNAPSHOT_FILE,
    TAR_END,
    ShardEntry,
    Snapshot,
    npy_bytes,
    tar_sample,
)

CHANNELS: Mapping[str, tuple[str, ...]] = {
    "eeg": ("eeg:C3-M2", "eeg:C4-M1"),
    "ecg": ("ecg:II",),
    "resp": ("resp:thorax",),
}
STAGES = ("W", "N1", "N2", "N3", "R")
SCALE = 0.01


def write_tiny_snapshot(
    folder: Path,
    *,
    corpus: str = "tiny",
    num_subjects: int = 6,
    windows_per_subject: int = 8,
    channels: Mapping[str, Sequence[str]] = CHANNELS,
    rate_hz: int | Mapping[str, int] = 64,
    seconds: int = 8,
    num_shards: int = 4,
    num_held_out: int = 2,
    seed: int = 0,
) -> Snapshot:
    """Snapshot written to `folder`: `num_held_out` subjects are split `val`, the others `train`.

    Subject 1 lacks the last kind of `channels`; windows carry the stages W, N1, N2, N3, R in turn. `rate_hz` may give
    each kind its own rate; the first one's counts a window's start and length.
    """
    rng = np.random.default_rng([seed, 7])
    folder.mkdir(parents=True, exist_ok=True)
    samples = [
        _sample(
            rng,
            subject=subject,
            window=window,
            corpus=corpus,
            kinds={kind: channels[kind] for kind in list(channels)[: -1 if subject == 1 else None]},
            seconds=seconds,
            rates_hz={kind: rate_hz if isinstance(rate_hz, int) else rate_hz[kind] for kind in channels},
            split="val" if subject >= num_subjects - num_held_out else "train",
        )
        for subject in range(num_subjects)
        for window in range(windows_per_subject)
    ]
    entries: list[ShardEntry] = []
    rows: list[dict[str, Any]] = []
    for number, group in enumerate(np.array_split(np.arange(len(samples)), num_shards)):
        entry, shard_rows = _write_shard(folder, f"{corpus}-{number:05d}.tar", [samples[i] for i in group])
        entries.append(entry)
        rows += shard_rows
    return _write_index(folder, corpus=corpus, entries=entries, rows=rows)


def _sample(
    rng: np.random.Generator,
    *,
    subject: int,
    window: int,
    corpus: str,
    kinds: Mapping[str, Sequence[str]],
    seconds: int,
    rates_hz: Mapping[str, int],
    split: str,
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """JSON of one window and its array members."""
    subject_hash = hashlib.sha256(f"{corpus}/{subject}".encode()).hexdigest()[:12]
    latent_hz = rng.uniform(1.0, 6.0)
    phase = rng.uniform(0, 2 * np.pi)
    ucs: dict[str, list[dict[str, Any]]] = {}
    members: dict[str, bytes] = {}
    rate_hz = next(iter(rates_hz.values()))
    for order, (kind, labels) in enumerate(kinds.items()):
        length = seconds * rates_hz[kind]
        wave = np.sin(2 * np.pi * latent_hz * np.arange(length) / rates_hz[kind] + phase + order)
        signal_CT = np.stack([wave + 0.3 * rng.standard_normal(length) for _ in labels])
        members[f"{kind}.npy"] = npy_bytes(np.round(signal_CT / SCALE).astype(np.int16))
        ucs[kind] = [_tag(label, row, rate_hz=rates_hz[kind]) for row, label in enumerate(labels)]
    meta = {
        "key": f"{corpus}-{subject_hash}-{window:06d}",
        "corpus": corpus,
        "subject": subject_hash,
        "recording": f"{subject_hash}-r0",
        "session": "",
        "split": split,
        "recipe": "tiny",
        "start": window * rate_hz * seconds,
        "length": rate_hz * seconds,
        "rate": [rate_hz, 1],
        "quality": 1.0,
        "ucs_version": UCS_VERSION,
        "labels": {"stage": [STAGES[window % len(STAGES)]], "classes": [], "events": []},
        "ucs": ucs,  # last and without spaces, as the engine writes it
    }
    return meta, members


def _tag(label: str, row: int, *, rate_hz: int) -> dict[str, Any]:
    tag = resolve(label)
    if not isinstance(tag, ChannelTag):
        raise ValueError(f"{label!r} does not resolve: {tag.reason}")
    return {
        **tag.record(),
        "scale": SCALE,
        "rate": [rate_hz, 1],
        "native_rate": [rate_hz, 1],
        "prefilter": "",
        "source_index": row,
        "mean": 0.0,
        "sd": 0.77,
        "median": 0.0,
        "mad": 0.6,
        "flat": 0.0,
        "clipped": 0.0,
        "nan": 0.0,
    }


def _write_shard(
    folder: Path, name: str, samples: Sequence[tuple[dict[str, Any], dict[str, bytes]]]
) -> tuple[ShardEntry, list[dict[str, Any]]]:
    content = bytearray()
    rows: list[dict[str, Any]] = []
    for ordinal, (meta, members) in enumerate(samples):
        blob = tar_sample(meta["key"], {**members, "json": json.dumps(meta, separators=(",", ":")).encode()})
        tags = [tag for rows_of_kind in meta["ucs"].values() for tag in rows_of_kind]
        rows.append(
            {
                **{name: meta[name] for name in ("key", "corpus", "subject", "recording", "session", "split")},
                **{name: meta[name] for name in ("start", "length", "quality")},
                "shard": name,
                "ordinal": ordinal,
                "offset": len(content),
                "num_bytes": len(blob),
                "kinds": sorted(meta["ucs"]),
                "symbols": [tag["symbol"] for tag in tags],
                "num_channels": len(tags),
                "rate_num": meta["rate"][0],
                "rate_den": meta["rate"][1],
                "stage": meta["labels"]["stage"][0],
                "classes": meta["labels"]["classes"],
            }
        )
        content += blob
    content += TAR_END
    (folder / name).write_bytes(content)
    entry = ShardEntry(
        path=name,
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        num_samples=len(samples),
        unit="tiny",
    )
    return entry, rows


def _write_index(
    folder: Path, *, corpus: str, entries: Sequence[ShardEntry], rows: Sequence[dict[str, Any]]
) -> Snapshot:
    types = {"string": pa.string(), "int32": pa.int32(), "int64": pa.int64(), "float": pa.float32()}
    types["list<string>"] = pa.list_(pa.string())
    schema = pa.schema([(name, types[kind]) for name, kind in SAMPLE_COLUMNS.items()])
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), folder / SAMPLES_FILE)
    snapshot = Snapshot(
        format_version=FORMAT_VERSION,
        shards=list(entries),
        corpora={corpus: {"id": corpus}},
        recipe={"id": "tiny"},
        recipe_digest=digest({"id": "tiny"}),
        ucs_version=UCS_VERSION,
        ucs_digest=table_digest(),
        samples_sha256=hashlib.sha256((folder / SAMPLES_FILE).read_bytes()).hexdigest(),
        counts={"samples": len(rows)},
    )
    snapshot = snapshot.model_copy(update={"digest": snapshot.content_digest()})
    (folder / SNAPSHOT_FILE).write_text(json.dumps(snapshot.model_dump(mode="json")), encoding="utf-8")
    return snapshot
