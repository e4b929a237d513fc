"""Batches of multichannel windows: what an encoder takes and what it returns.

Shape legend of the trainer: B windows, C channels, T samples, P patches (tokens in time), D width, N rows of a
loss, M modality groups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch

from manifests.channels import KINDS
from manifests.errors import ConfigError, ContractError
from trainer.read import Window
from trainer.views import find_view

KIND_IDS = {kind: index for index, kind in enumerate(KINDS)}


class Encoded(NamedTuple):
    """What an encoder says about a batch: one vector per window and one per patch of time.

    A named tuple, not a dataclass: DeepSpeed's ZeRO-3 hooks look for tensors in tuples only.
    """

    pooled_BD: torch.Tensor
    tokens_BPD: torch.Tensor


@dataclass(slots=True, kw_only=True)
class ChannelBatch:
    """Windows of one rate with any channels, padded to the window with most channels.

    `signal_BCT` is float32 with the view applied and zeros in padded rows; `mask_BC` is True for real channels;
    the ids are UCS site ids and the index in `KINDS`, 0 in padded rows.
    """

    signal_BCT: torch.Tensor
    mask_BC: torch.Tensor
    anode_BC: torch.Tensor
    cathode_BC: torch.Tensor
    kind_BC: torch.Tensor
    rate_hz: float

    def to(self, device: torch.device | str) -> ChannelBatch:
        """The same batch on `device`."""
        return move(self, device)


def move(batch: Any, device: torch.device | str) -> Any:
    """A copy of a batch dataclass whose tensors, also those of nested batches, lie on `device`."""
    moved = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            value = value.to(device, non_blocking=True)
        elif isinstance(value, tuple):
            value = tuple(item.to(device) if hasattr(item, "to") else item for item in value)
        moved[field.name] = value
    return type(batch)(**moved)


def signal_rows(
    window: Window, *, kinds: Sequence[str], channels: Collection[str] | None = None
) -> list[tuple[str, int]]:
    """(kind, row) of every channel a model may see, in the order of `kinds` and of the stored rows.

    Only role `signal`: references, flags and markers never reach a model. `channels` keeps those symbols only.
    """
    chosen = []
    for kind in kinds:
        for row, tag in enumerate(window.meta["ucs"].get(kind, ())):
            if tag["role"] == "signal" and (channels is None or tag["symbol"] in channels):
                chosen.append((kind, row))
    return chosen


def collate_channels(
    windows: Sequence[Window], *, kinds: Sequence[str], view: str, channels: Sequence[str] | None = None
) -> ChannelBatch:
    """Windows as one padded batch in the units of `view`.

    A window without any such channel keeps a row whose mask is False throughout. The batch has at least one
    channel column.

    Args:
        windows: At least one window.
        kinds: Kinds to take, in the order of the batch's channels.
        view: Name in `trainer.views.VIEWS`.
        channels: Symbols to take (`eeg:C3-M2`); None takes all.

    Raises:
        ConfigError: An unknown kind or view, or channels of different rate or length in one batch.
    """
    unknown = [kind for kind in kinds if kind not in KIND_IDS]
    if unknown:
        raise ConfigError(f"kinds: {unknown[0]!r} is not a kind; choose from {', '.join(KINDS)}")
    apply_view = find_view(view)
    wanted = None if channels is None else frozenset(channels)
    rows = [signal_rows(window, kinds=kinds, channels=wanted) for window in windows]
    rate_hz, length = _common_grid(windows, rows)
    shape = (len(windows), max(1, *(len(chosen) for chosen in rows)))
    signal_BCT = np.zeros((*shape, length), dtype=np.float32)
    mask_BC = np.zeros(shape, dtype=bool)
    ids_3BC = np.zeros((3, *shape), dtype=np.int64)
    for b, (window, chosen) in enumerate(zip(windows, rows, strict=True)):
        mask_BC[b, : len(chosen)] = True
        c = 0
        for kind, indices in _by_kind(chosen):
            tags = [window.meta["ucs"][kind][row] for row in indices]
            stored_CT = window.arrays[kind]
            if len(indices) != len(stored_CT):
                stored_CT = stored_CT[indices]
            signal_BCT[b, c : c + len(indices)] = apply_view(stored_CT, tags)
            for offset, tag in enumerate(tags):
                ids_3BC[:, b, c + offset] = channel_ids(tag)
            c += len(indices)
    anode_BC, cathode_BC, kind_BC = (torch.from_numpy(ids) for ids in ids_3BC)
    return ChannelBatch(
        signal_BCT=torch.from_numpy(signal_BCT),
        mask_BC=torch.from_numpy(mask_BC),
        anode_BC=anode_BC,
        cathode_BC=cathode_BC,
        kind_BC=kind_BC,
        rate_hz=rate_hz,
    )


def channel_ids(tag: dict[str, Any]) -> tuple[int, int, int]:
    """(anode id, cathode id, kind index) of a channel tag."""
    return tag["anode_id"], tag["cathode_id"], KIND_IDS[tag["kind"]]


def row_rate_hz(tag: dict[str, Any]) -> float:
    """Stored rate of a channel in Hz."""
    numerator, denominator = tag["rate"]
    return numerator / denominator


def stable_hash(*parts: object) -> int:
    """63-bit hash of the parts, the same in every process and on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(*parts: object) -> np.random.Generator:
    """Counter-based generator of a stream that the parts alone decide (seed, epoch, key, view)."""
    return np.random.Generator(np.random.Philox(key=stable_hash(*parts)))


def _by_kind(chosen: list[tuple[str, int]]) -> list[tuple[str, list[int]]]:
    grouped: dict[str, list[int]] = {}
    for kind, row in chosen:
        grouped.setdefault(kind, []).append(row)
    return list(grouped.items())


def _common_grid(windows: Sequence[Window], rows: list[list[tuple[str, int]]]) -> tuple[float, int]:
    """Rate in Hz and number of samples that all chosen channels share."""
    if not windows:
        raise ContractError("collate_channels: 0 windows; a batch needs at least one")
    seen: dict[tuple[float, int], str] = {}
    for window, chosen in zip(windows, rows, strict=True):
        for kind in dict.fromkeys(kind for kind, _ in chosen):
            grid = (row_rate_hz(window.meta["ucs"][kind][0]), window.arrays[kind].shape[1])
            seen.setdefault(grid, f"{window.key}.{kind}")
    if len(seen) > 1:
        found = "; ".join(f"{where}: {rate:g} Hz x {length}" for (rate, length), where in list(seen.items())[:4])
        raise ConfigError(f"batch mixes rates or lengths ({found}); put kinds of one rate and length in a group")
    if seen:
        return next(iter(seen))
    meta = windows[0].meta
    return meta["rate"][0] / meta["rate"][1], int(meta["length"])
