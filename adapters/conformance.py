"""Fixed input with the logits it must give: tells a reader that views, encoder and adapter still mean the same."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from adapters.evaluate import collate_task
from adapters.layout import TaskRecord
from adapters.model import MultiTaskModel
from manifests.channels import UCS_VERSION, ChannelTag, resolve
from manifests.errors import ContractError
from manifests.recipes import Recipe
from manifests.tasks import Task
from trainer.read import Window

NUM_WINDOWS = 2
CHANNELS_PER_KIND = 2
NOISE_RATE_HZ = 128  # where a recipe keeps the recorded rate
SCALE = 0.1  # physical units per bit of the input
TOLERANCE = 1e-4  # of logits: another processor's order of summation, and no more


def conformance_bytes(model: MultiTaskModel, record: TaskRecord) -> bytes:
    """Content of a conformance file: noise (no one's recording) in the shape of the task's windows, and its logits."""
    windows = conformance_windows(record)
    arrays = {f"{index}.{kind}": array for index, window in enumerate(windows) for kind, array in window.arrays.items()}
    logits = np.ascontiguousarray(_logits(model, record, windows))
    return save({**arrays, "logits": logits}, {"windows": json.dumps([window.meta for window in windows])})


def check_conformance(model: MultiTaskModel, record: TaskRecord, file: Path) -> None:
    """ContractError when the model's logits differ from those of the file by more than `TOLERANCE`."""
    windows, expected = read_conformance(file)
    logits = _logits(model, record, windows)
    if logits.shape != expected.shape or not np.abs(logits - expected).max() <= TOLERANCE:
        raise ContractError(
            f"{file}: this machine computes other logits than the bundle's maker (limit {TOLERANCE:g}); "
            "update kymo, or report this with both versions"
        )


def _logits(model: MultiTaskModel, record: TaskRecord, windows: list[Window]) -> np.ndarray:
    with torch.no_grad():
        return model(record.task.id, collate_task(record.task, windows)).numpy()


def read_conformance(file: Path) -> tuple[list[Window], np.ndarray]:
    """Windows and expected logits (W, K) of a conformance file."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            metas = json.loads(tensors.metadata()["windows"])
            windows = [
                Window(
                    key=meta["key"],
                    position=index,
                    epoch=0,
                    corpus=meta["corpus"],
                    recording=meta["recording"],
                    meta=meta,
                    arrays={kind: tensors.get_tensor(f"{index}.{kind}") for kind in meta["ucs"]},
                )
                for index, meta in enumerate(metas)
            ]
            return windows, tensors.get_tensor("logits")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ContractError(f"{file}: not a conformance file: {error}") from None


def conformance_windows(record: TaskRecord) -> list[Window]:
    """Windows of seeded noise with the channels that training saw most often."""
    symbols = list(record.data["splits"]["train"]["symbols"])
    return [_noise_window(record.task, record.recipe, symbols, index) for index in range(NUM_WINDOWS)]


def _noise_window(task: Task, recipe: Recipe, symbols: list[str], index: int) -> Window:
    generator = np.random.default_rng(index)
    arrays: dict[str, np.ndarray] = {}
    ucs: dict[str, list[dict[str, Any]]] = {}
    for kind in (kind for kind in task.kinds if kind in recipe.kinds):
        chosen = [symbol for symbol in symbols if symbol.startswith(f"{kind}:")][:CHANNELS_PER_KIND]
        if not chosen:
            continue
        rate_hz = int(recipe.kinds[kind].stored_rate(Fraction(NOISE_RATE_HZ)))
        noise_CT = 50 * generator.standard_normal((len(chosen), rate_hz * recipe.window_s))
        arrays[kind] = np.round(noise_CT / SCALE).astype(np.int16)
        ucs[kind] = [_noise_tag(symbol, rate_hz) for symbol in chosen]
    rate_hz = next(iter(ucs.values()))[0]["rate"][0]
    meta = {
        "key": f"conformance-{index}",
        "corpus": "conformance",
        "recording": "noise",
        "recipe": recipe.id,
        "start": index * rate_hz * recipe.window_s,
        "length": rate_hz * recipe.window_s,
        "rate": [rate_hz, 1],
        "ucs_version": UCS_VERSION,
        "ucs": ucs,
    }
    return Window(
        key=meta["key"], position=index, epoch=0, corpus="conformance", recording="noise", meta=meta, arrays=arrays
    )


def _noise_tag(symbol: str, rate_hz: int) -> dict[str, Any]:
    tag = resolve(symbol)
    if not isinstance(tag, ChannelTag):
        raise ContractError(f"channel {symbol!r} of the training data does not resolve: {tag.reason}")
    return {
        **tag.record(),
        "scale": SCALE,
        "rate": [rate_hz, 1],
        "mean": 0.0,
        "sd": 50.0,
        "median": 0.0,
        "mad": 33.7,
    }
