"""Noise through the filters of an installation, as a bundle's maker got it: do the filters still mean the same here?

A bundle's conformance tensors begin with stored windows. What comes before, from file to int16, is told by the recipe,
and who reads that otherwise feeds the model another signal without a word. So a bundle that `kymo adapt` writes keeps a
stretch of noise as its maker's kymo filtered, resampled and quantised it; `kymo bundle verify` and `kymo predict` do
that again.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from edfio import Edf, EdfSignal

from adapters.layout import TaskRecord
from adapters.train import AdaptResult
from engine.windows import window_recording
from jobs.predict import stranger
from manifests.channels import ChannelTag, resolve
from manifests.errors import ContractError
from manifests.recipes import Recipe

KEY = "filters"  # in the data of a task's record
RATE_HZ = 256  # of the noise; nearly every recipe resamples it
MAINS_HZ = 50
KEPT = 200  # samples of each channel, from the middle of the window
STEPS = 2  # of quantisation by which another processor's sums may differ
_FULL_SCALE = 3276.8  # physical units; fits the eight characters of an EDF header


def with_filters(result: AdaptResult) -> AdaptResult:
    """A finished run whose tasks remember what this installation's filters make of noise."""
    data = {
        name: {
            **facts,
            KEY: filtered_noise(Recipe.model_validate(facts["recipe"]), facts["splits"]["train"]["symbols"]),
        }
        for name, facts in result.data.items()
    }
    return replace(result, data=data)


def filtered_noise(recipe: Recipe, symbols: Iterable[str]) -> dict[str, dict[str, Any]]:
    """By kind of the recipe `symbol`, `scale` and `samples`: a channel of noise on its whole way into a window.

    Args:
        recipe: Its filters, rates and window hold; what it leaves out and where it cuts do not matter here.
        symbols: Channels by symbol; the first of each kind is taken.
    """
    chosen: dict[str, str] = {}
    for symbol in symbols:
        if (kind := symbol.partition(":")[0]) in recipe.kinds:
            chosen.setdefault(kind, symbol)
    plain = recipe.model_copy(update={"place": "grid", "keep": "all", "min_quality": 0.0, "hop_s": recipe.window_s})
    with tempfile.TemporaryDirectory(prefix="kymo-noise-") as folder:
        path = Path(folder) / "noise.edf"
        _write_noise(path, list(chosen.values()), seconds=recipe.window_s)
        labels = [f"{_label(number)}={symbol}" for number, symbol in enumerate(chosen.values())]
        corpus = stranger(path, channels=labels, mains_hz=MAINS_HZ)
        found: dict[str, dict[str, Any]] = {}
        # With native rates one sample for each of them; here all channels have the same.
        for sample in window_recording(path, corpus=corpus, recipe=plain, root=path.parent):
            for kind, array in sample.arrays.items():
                first = max(0, (array.shape[1] - KEPT) // 2)
                found[kind] = {
                    "symbol": chosen[kind],
                    "scale": sample.meta["ucs"][kind][0]["scale"],
                    "samples": array[0, first : first + KEPT].tolist(),
                }
    return found


def check_filters(where: Path, records: Mapping[str, TaskRecord]) -> list[str]:
    """Tasks whose filtered noise this installation has made again just so; the others remember none.

    Raises:
        ContractError: Here the filters of a task's recipe give another signal.
    """
    checked = []
    for name, record in records.items():
        if (expected := record.data.get(KEY)) is None:
            continue
        found = filtered_noise(record.recipe, [entry["symbol"] for entry in expected.values()])
        for kind, entry in expected.items():
            if (error := _steps_apart(found.get(kind), entry)) > STEPS:
                raise ContractError(
                    f"{where}: task {name}: {kind} of recipe {record.recipe.id}: noise comes out of the filters of "
                    f"this installation up to {error:g} steps of int16 away from the maker's ({STEPS} are allowed), so "
                    f"the model would be shown another signal; install kymo {record.provenance['code']['git']}, which "
                    "made it, or train the task again"
                )
        checked.append(name)
    return checked


def _steps_apart(found: Mapping[str, Any] | None, expected: Mapping[str, Any]) -> float:
    """Largest distance of two stretches in steps of the expected one's scale; infinite if they are no two of a kind."""
    if found is None or len(found["samples"]) != len(expected["samples"]):
        return float("inf")
    got = np.array(found["samples"], dtype=float) * (found["scale"] / expected["scale"])
    return float(np.abs(got - np.array(expected["samples"], dtype=float)).max())


def _label(number: int) -> str:
    return f"noise {number}"


def _write_noise(path: Path, symbols: Sequence[str], *, seconds: int) -> None:
    """EDF of white noise from a hash, the same bits on every machine, one channel for each symbol in its own unit."""
    signals = []
    for number, symbol in enumerate(symbols):
        tag = resolve(symbol)
        if not isinstance(tag, ChannelTag):
            raise ContractError(f"channel {symbol!r} of the training data does not resolve: {tag.reason}")
        content = hashlib.shake_256(f"kymo {symbol}".encode()).digest(2 * RATE_HZ * seconds)
        signals.append(
            EdfSignal.from_digital(
                np.frombuffer(content, dtype="<i2") // 2,
                RATE_HZ,
                label=_label(number),
                physical_dimension="" if tag.unit == "au" else tag.unit,
                physical_range=(-_FULL_SCALE, _FULL_SCALE),
            )
        )
    Edf(signals).write(path)
