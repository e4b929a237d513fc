"""Batches of multichannel windows: what an encoder takes and what it returns.

Shape legend of the trainer: B windows, C channels, T samples, P patches (tokens in time), D width, N rows of a
loss, M modality groups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch

from manifests.channels import KINDS
from manifests.errors import ConfigError, ContractError
from trainer.layout import Rows
from trainer.memory import float_rows, stored_rows
from trainer.read import Outline, Tags, Window
from trainer.views import View, dequantise, find_view, scaling

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

    @property
    def num_samples(self) -> int:
        """T."""
        return self.signal_BCT.shape[2]

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


@dataclass(slots=True, kw_only=True)
class StoredBatch:
    """A ChannelBatch on the host, as it was stored; `to` moves the int16 rows and makes float32 of them there.

    R is the number of real channels of all windows: padding is neither read nor moved. `place_R` is b x C + c,
    ascending. The other tensors are those of the ChannelBatch.
    """

    stored_RT: torch.Tensor
    place_R: torch.Tensor
    gain_R: torch.Tensor
    shift_R: torch.Tensor
    view: View
    mask_BC: torch.Tensor
    anode_BC: torch.Tensor
    cathode_BC: torch.Tensor
    kind_BC: torch.Tensor
    rate_hz: float

    @property
    def num_samples(self) -> int:
        """T."""
        return self.stored_RT.shape[1]

    def to(self, device: torch.device | str) -> ChannelBatch:
        """The batch on `device`, in the units of the view."""
        moved = move(self, device)
        out_RT = float_rows(*self.stored_RT.shape) if moved.stored_RT.device.type == "cpu" else None
        signal_RT = dequantise(moved.stored_RT, moved.gain_R, moved.shift_R, view=self.view, out_RT=out_RT)
        padded_RT = signal_RT
        if len(signal_RT) < self.mask_BC.numel():
            padded_RT = _zero_rows(self.mask_BC.numel(), like=signal_RT, but=moved.place_R)
            padded_RT.index_copy_(0, moved.place_R, signal_RT)
        return ChannelBatch(
            signal_BCT=padded_RT.view(*self.mask_BC.shape, self.num_samples),
            mask_BC=moved.mask_BC,
            anode_BC=moved.anode_BC,
            cathode_BC=moved.cathode_BC,
            kind_BC=moved.kind_BC,
            rate_hz=self.rate_hz,
        )


def _zero_rows(num_rows: int, *, like: torch.Tensor, but: torch.Tensor) -> torch.Tensor:
    """Rows of zeros, as long and on the same device as those of `like`; the rows `but` are going to be written."""
    if like.device.type != "cpu":
        return like.new_zeros(num_rows, like.shape[1])
    rows = float_rows(num_rows, like.shape[1])
    is_padding = torch.ones(num_rows, dtype=torch.bool).index_fill_(0, but, 0)
    return rows.index_fill_(0, is_padding.nonzero()[:, 0], 0.0)


class Cut(NamedTuple):
    """A stretch of a window: `seconds` long, from `share` (0 to 1) of where it could begin."""

    seconds: float
    share: float

    def samples(self, length: int, rate_hz: float) -> tuple[int, int]:
        """First sample and number of samples, in a channel of `length` samples.

        Channels of two rates begin within a sample of each other.
        """
        width = round(self.seconds * rate_hz)
        return int(self.share * (length - width + 1)), width


class _Chosen(NamedTuple):
    """The channels of a window that a model sees: their rows, rate by kind, and what the tags say of each."""

    rows: Rows
    rate_hz: dict[str, float]
    ids_3C: np.ndarray
    gain_C: np.ndarray
    shift_C: np.ndarray

    def is_like(self, other: _Chosen) -> bool:
        """Whether both take the same rows at the same rates."""
        return self is other or (self.rows == other.rows and self.rate_hz == other.rate_hz)


class _UnexpectedError(Exception):
    """A window does not hold what was expected of it."""


def signal_rows(
    ucs: Mapping[str, Sequence[Mapping[str, Any]]], *, kinds: Sequence[str], channels: Collection[str] | None = None
) -> list[tuple[str, int]]:
    """(kind, row) of every channel a model may see, in the order of `kinds` and of the stored rows.

    Only role `signal`: references, flags and markers never reach a model. `channels` keeps those symbols only.
    """
    return [
        (kind, row)
        for kind in kinds
        for row, tag in enumerate(ucs.get(kind, ()))
        if tag["role"] == "signal" and (channels is None or tag["symbol"] in channels)
    ]


def collate_channels(
    windows: Sequence[Window],
    *,
    kinds: Sequence[str],
    view: str,
    channels: Sequence[str] | None = None,
    cuts: Sequence[Cut] | None = None,
) -> StoredBatch:
    """Windows as one padded batch, on the host; its `to` gives what a model takes, in the units of `view`.

    A window without any such channel keeps a row whose mask is False throughout. The batch has at least one
    channel column.

    Args:
        windows: At least one window.
        kinds: Kinds to take, in the order of the batch's channels.
        view: Name in `trainer.views.VIEWS`.
        channels: Symbols to take (`eeg:C3-M2`); None takes all.
        cuts: The stretch of each window; None takes all of it.

    Raises:
        ConfigError: An unknown kind or view, channels of different rate or length in one batch, or a window that is
            shorter than its cut.
    """
    unknown = [kind for kind in kinds if kind not in KIND_IDS]
    if unknown:
        raise ConfigError(f"kinds: {unknown[0]!r} is not a kind; choose from {', '.join(KINDS)}")
    wanted = None if channels is None else frozenset(channels)

    seen: dict[Outline, _Chosen] = {}

    def choose(outline: Outline) -> _Chosen:
        if outline not in seen:
            seen[outline] = _choose(outline.tags, tuple(kinds), wanted, view)
        return seen[outline]

    try:
        return _collate(windows, choose, cuts=cuts, view=find_view(view))
    except ConfigError:
        if all(window.is_open for window in windows):
            raise
    except _UnexpectedError:
        pass
    for window in windows:
        window.open()
    return _collate(windows, choose, cuts=cuts, view=find_view(view))


def _collate(
    windows: Sequence[Window], choose: Callable[[Outline], _Chosen], *, cuts: Sequence[Cut] | None, view: View
) -> StoredBatch:
    """The batch, where all windows hold what is expected.

    Raises:
        _UnexpectedError: One does not.
    """
    outlines = [window.outline() for window in windows]
    expected = [choose(outline) for outline in outlines]
    rate_hz, length = _common_grid(windows, outlines, choose)
    starts, width = _stretches(windows, cuts, rate_hz=rate_hz, length=length)
    sizes = [item.ids_3C.shape[1] for item in expected]
    stored = stored_rows(sum(sizes), width)
    _read_chosen(windows, expected, starts=starts, out_RT=stored.numpy())
    # After all reads, not after each: code that takes turns with copies of 100 KB is cold in the processor's cache.
    own = [window.outline() for window in windows]
    chosen = [choose(outline) for outline in own]
    for then, now, outline, found in zip(outlines, own, expected, chosen, strict=True):
        if now is not then and not (now.fits(then) and found.is_like(outline)):
            raise _UnexpectedError
    num_columns = max(1, *sizes)
    mask_BC = np.arange(num_columns) < np.array(sizes)[:, None]
    place_R = np.flatnonzero(mask_BC)
    ids_3BC = np.zeros((3, mask_BC.size), dtype=np.int64)
    ids_3BC[:, place_R] = np.concatenate([item.ids_3C for item in chosen], axis=1)
    anode_BC, cathode_BC, kind_BC = torch.from_numpy(ids_3BC.reshape(3, len(windows), num_columns))
    return StoredBatch(
        stored_RT=stored,
        place_R=torch.from_numpy(place_R),
        gain_R=torch.from_numpy(np.concatenate([item.gain_C for item in chosen])),
        shift_R=torch.from_numpy(np.concatenate([item.shift_C for item in chosen])),
        view=view,
        mask_BC=torch.from_numpy(mask_BC),
        anode_BC=anode_BC,
        cathode_BC=cathode_BC,
        kind_BC=kind_BC,
        rate_hz=rate_hz,
    )


def draw_cuts(windows: Sequence[Window], seconds: float, *, seed: int) -> list[Cut]:
    """A random stretch of each window, a function of (seed, epoch, key)."""
    return [Cut(seconds=seconds, share=generator(seed, window.epoch, window.key, "cut").random()) for window in windows]


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


def _choose(ucs: Mapping[str, Any], kinds: tuple[str, ...], channels: frozenset[str] | None, view: str) -> _Chosen:
    """What a batch takes of a window, from its tags; computed once for windows that share them."""
    derived = ucs.derived if isinstance(ucs, Tags) else {}
    key = (kinds, channels, view)
    if key not in derived:
        rows: dict[str, list[int]] = {}
        for kind, row in signal_rows(ucs, kinds=kinds, channels=channels):
            rows.setdefault(kind, []).append(row)
        tags = [ucs[kind][row] for kind, chosen in rows.items() for row in chosen]
        gain_C, shift_C = scaling(find_view(view), tags)
        ids_C3 = np.array([channel_ids(tag) for tag in tags], dtype=np.int64).reshape(-1, 3)
        rate_hz = {kind: row_rate_hz(ucs[kind][0]) for kind in rows}
        fixed = tuple((kind, tuple(chosen)) for kind, chosen in rows.items())
        derived[key] = _Chosen(rows=fixed, rate_hz=rate_hz, ids_3C=ids_C3.T, gain_C=gain_C, shift_C=shift_C)
    return derived[key]


def _read_chosen(
    windows: Sequence[Window], chosen: Sequence[_Chosen], *, starts: Sequence[int], out_RT: np.ndarray
) -> None:
    """Chosen rows of the windows, one after the other, from `starts` on."""
    width = out_RT.shape[1]
    memory = memoryview(out_RT.reshape(-1)).cast("B")  # pyright: ignore[reportArgumentType]  # a buffer from 3.12 on
    begins = [0, *accumulate(2 * width * len(item.gain_C) for item in chosen)]
    places = [window.place for window in windows]
    # Ascending offsets: the disk and the page cache read ahead.
    for n in sorted(range(len(windows)), key=places.__getitem__):
        windows[n].read(chosen[n].rows, memory[begins[n] : begins[n + 1]], start=starts[n], width=width)


def _common_grid(
    windows: Sequence[Window], outlines: Sequence[Outline], choose: Callable[[Outline], _Chosen]
) -> tuple[float, int]:
    """Rate in Hz and number of samples that all chosen channels share."""
    if not windows:
        raise ContractError("collate_channels: 0 windows; a batch needs at least one")
    seen: dict[tuple[float, int], str] = {}
    for outline in dict.fromkeys(outlines):  # many windows share one
        for kind, rate_hz in choose(outline).rate_hz.items():
            grid = (rate_hz, outline.shapes[kind][1])
            if grid not in seen:
                seen[grid] = f"{windows[outlines.index(outline)].key}.{kind}"
    if len(seen) > 1:
        found = "; ".join(f"{where}: {rate:g} Hz x {length}" for (rate, length), where in list(seen.items())[:4])
        raise ConfigError(f"batch mixes rates or lengths ({found}); put kinds of one rate and length in a group")
    if seen:
        return next(iter(seen))
    meta = windows[0].meta
    return meta["rate"][0] / meta["rate"][1], int(meta["length"])


def _stretches(
    windows: Sequence[Window], cuts: Sequence[Cut] | None, *, rate_hz: float, length: int
) -> tuple[list[int], int]:
    """First sample of each window, and the number of samples of all."""
    if cuts is None:
        return [0] * len(windows), length
    stretches = [cut.samples(length, rate_hz) for cut in cuts]
    width = stretches[0][1]
    if width > length:
        raise ConfigError(
            f"a stretch of {cuts[0].seconds:g} s, but {windows[0].key} has {length / rate_hz:g} s; "
            "shorten it or choose a recipe with longer windows"
        )
    return [start for start, _ in stretches], width
