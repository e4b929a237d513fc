"""Picture of one sample: every channel with its symbol and scale, time in seconds, labels in the title."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.storage import location
from manifests.channels import KINDS
from manifests.errors import ConfigError, ContractError
from manifests.shards import SAMPLES_FILE, array_from_npy, load_snapshot, parse_sample

# One colour per kind, in the order of KINDS; even in lightness, told apart without red against green.
KIND_COLOURS = dict(
    zip(
        KINDS,
        (
            "#1f5a94",
            "#2b8a78",
            "#8a5a1f",
            "#b5344c",
            "#6450a0",
            "#0f7fa8",
            "#c2641c",
            "#7a7a2a",
            "#5a6b7a",
            "#a34d8f",
            "#8f3030",
            "#6b6b6b",
        ),
        strict=True,
    )
)
INK = "#22272e"
FAINT = "#6a737d"
UNIT_TEXT = {"uV": "µV", "degC": "°C", "au": "a.u."}
# A row is one unit high; the strongest channel of a kind fills this share of it up and down.
ROW_FILL = 0.46
EVENT_COLOUR = "#b8862b"


def first_key(snapshot_dir: Path | str) -> str:
    """Key of the first sample of a snapshot.

    Raises:
        ConfigError: The snapshot holds no sample.
    """
    load_snapshot(location(snapshot_dir))
    with (location(snapshot_dir) / SAMPLES_FILE).open("rb") as file:
        keys = pq.read_table(file, columns=["key"]).column("key")
    if len(keys) == 0:
        raise ConfigError(f"{snapshot_dir}: the snapshot holds no sample; see kymo report for what was dropped")
    return str(keys[0])


def read_window(snapshot_dir: Path | str, key: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays by kind, (C, T) in physical units, and the JSON of one sample, read at its offset.

    Raises:
        ConfigError: No such key; the message names the nearest ones.
        ContractError: The bytes at the offset are not this sample.
    """
    folder = location(snapshot_dir)
    path = folder / SAMPLES_FILE
    columns = ["shard", "offset", "num_bytes"]
    with path.open("rb") as file:
        rows = pq.read_table(file, columns=columns, filters=[("key", "==", key)]).to_pylist()
    if not rows:
        with path.open("rb") as file:
            keys = pq.read_table(file, columns=["key"]).column("key").to_pylist()
        nearest = difflib.get_close_matches(key, keys[:20_000], n=3, cutoff=0) or ["none: the snapshot is empty"]
        raise ConfigError(f"{path}: no sample {key!r}; nearest: {', '.join(nearest)}")
    row = rows[0]
    with (folder / row["shard"]).open("rb") as shard:
        shard.seek(row["offset"])
        content = shard.read(row["num_bytes"])
    found, members = parse_sample(content)
    if found != key:
        raise ContractError(
            f"{row['shard']} at byte {row['offset']}: sample {found!r} instead of {key!r}; run kymo verify"
        )
    meta = json.loads(bytes(members["json"]))
    arrays = {}
    for kind, tags in meta["ucs"].items():
        scale = np.array([tag["scale"] for tag in tags], dtype=np.float32)
        arrays[kind] = array_from_npy(members[f"{kind}.npy"]) * scale[:, None]
    return arrays, meta


def _nice(value: float) -> float:
    """Largest of 1, 2, 5 times a power of ten that does not exceed the value."""
    power = 10.0 ** np.floor(np.log10(value))
    return float(max(step * power for step in (1, 2, 5) if step * power <= value * (1 + 1e-9)))


def _draw_kind(axes: Axes, kind: str, values: np.ndarray, tags: list[dict[str, Any]], *, top: int) -> None:
    """Channels of one kind under each other from row `top` down, on one common scale with its bar."""
    rate = tags[0]["rate"][0] / tags[0]["rate"][1]
    centred = values - np.median(values, axis=1, keepdims=True)
    # All but the extremes fill the row: a lone artefact may leave it, the rest stays legible. Among many channels
    # the strongest (eyes in frontal EEG, V2 in ECG) may reach into its neighbours instead of flattening them all.
    peaks = np.percentile(np.abs(centred), 99.5, axis=1)
    reach = float(np.percentile(peaks, 80 if len(peaks) > 6 else 100)) or 1.0
    time = np.arange(values.shape[1]) / rate
    for number, (signal, tag) in enumerate(zip(centred, tags, strict=True)):
        base = -(top + number)
        height = np.clip(signal / reach * ROW_FILL, -1.4, 1.4)
        axes.plot(time, base + height, color=KIND_COLOURS[kind], linewidth=0.6, solid_joinstyle="round")
        name = tag["symbol"].partition(":")[2]
        axes.text(
            -0.01, base, name, transform=axes.get_yaxis_transform(), ha="right", va="center", color=INK, fontsize=8
        )
    axes.text(
        -0.115,
        -top,
        kind.upper() if len(kind) < 4 else kind.capitalize(),
        transform=axes.get_yaxis_transform(),
        ha="right",
        va="center",
        color=KIND_COLOURS[kind],
        fontsize=9,
        fontweight="bold",
    )
    unit = tags[0]["unit"]
    bar = _nice(reach)
    half = bar / reach * ROW_FILL / 2
    axes.plot(
        [1.012, 1.012],
        [-top - half, -top + half],
        transform=axes.get_yaxis_transform(),
        clip_on=False,
        color=INK,
        lw=1.4,
    )
    text = f"{bar:g} {UNIT_TEXT.get(unit, unit)}"
    axes.text(1.02, -top, text, transform=axes.get_yaxis_transform(), va="center", color=INK, fontsize=8)


def label_text(labels: Mapping[str, Any]) -> str:
    """Labels of a window as one line: stages, then classes."""
    parts = []
    stages = labels.get("stage", [])
    if stages:
        parts.append("stage " + (stages[0] if len(set(stages)) == 1 else " ".join(stages)))
    if labels.get("classes"):
        parts.append("class " + ", ".join(labels["classes"]))
    return " · ".join(parts) or "no label"


def draw_window(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Figure:
    """Figure of one window: rows by kind in the order of the schema, one colour and one scale bar a kind.

    Args:
        arrays: Kind to (C, T) in physical units.
        meta: The sample's JSON.
    """
    kinds = [kind for kind in KINDS if kind in arrays]
    num_rows = sum(len(arrays[kind]) for kind in kinds)
    height = 1.25 + np.clip(9 / num_rows, 0.24, 0.46) * max(num_rows, 4)
    figure = Figure(figsize=(12, height), facecolor="white")
    axes = figure.add_axes((0.155, 0.5 / height, 0.765, 1 - 1.22 / height))
    seconds = meta["length"] * meta["rate"][1] / meta["rate"][0]
    row = 0
    for kind in kinds:
        _draw_kind(axes, kind, arrays[kind], meta["ucs"][kind], top=row)
        row += len(arrays[kind])
        if row < num_rows:
            axes.axhline(-row + 0.5, color="#d8dde3", linewidth=0.7)
    rate = meta["rate"][0] / meta["rate"][1]
    events = meta["labels"].get("events", [])
    for start, length, text in events:
        axes.axvline(start / rate, color=EVENT_COLOUR, linewidth=0.7)
        axes.broken_barh([(start / rate, length / rate)], (0.72, 0.5), color=EVENT_COLOUR, alpha=0.18, linewidth=0)
        if length / rate > seconds / 20:
            axes.text(start / rate, 0.97, f" {text}", color="#7a5a10", fontsize=7, va="center", clip_on=True)
    axes.set(xlim=(0, seconds), ylim=(-num_rows + 0.35, 1.25 if events else 0.65), yticks=[])
    axes.set_xticks(np.arange(0, seconds + 1e-9, _nice(seconds / 5)))
    axes.set_xlabel("time in window (s), positive up", color=FAINT, fontsize=8)
    axes.tick_params(axis="x", colors=FAINT, labelsize=8, length=3)
    axes.grid(visible=True, axis="x", color="#eceff2", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#b8bfc6")
    minutes, rest = divmod(meta["start"] * meta["rate"][1] / meta["rate"][0], 60)
    top = 1 - 0.30 / height
    figure.text(0.02, top, f"{meta['corpus']}: {label_text(meta['labels'])}", color=INK, fontsize=12, fontweight="bold")
    figure.text(
        0.02,
        1 - 0.53 / height,
        f"{meta['key']}   subject {meta['subject']}   {meta['split']}   from {int(minutes)} min {rest:g} s   "
        f"quality {meta['quality']:.2f}",
        color=FAINT,
        fontsize=8,
    )
    return figure


def draw_sample(snapshot_dir: Path | str, key: str, out_png: Path | str) -> Path:
    """PNG of one sample of a snapshot; returns its path.

    Raises:
        ConfigError: No snapshot in the folder, or no such key.
        ContractError: A damaged snapshot or shard.
    """
    load_snapshot(location(snapshot_dir))
    arrays, meta = read_window(snapshot_dir, key)
    path = Path(out_png)
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_window(arrays, meta).savefig(path, dpi=110)
    return path
