"""The modalities of a window as batches: which kinds belong together, and how they reach the encoder in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from manifests.errors import ConfigError
from trainer.batches import ChannelBatch, StoredBatch, collate_channels, draw_cuts, generator, move, stable_hash
from trainer.read import Window

# Modality to the kinds of its channels.
Groups = Mapping[str, tuple[str, ...]]
GROUP_MAPS: dict[str, Groups] = {
    # SleepFM's four groups by kind. Pulse and heart rate stand under RESP as published, where they give away EKG.
    # Its list of names also has RIP belts and plethysmograms under EMG; a map of kinds does not repeat that.
    "sleepfm": {
        "BAS": ("eeg", "eog"),
        "RESP": ("resp", "spo2", "snore", "ppg", "hr"),
        "EKG": ("ecg",),
        "EMG": ("emg",),
    },
    # Cleaned: one physiological source in one modality. The trend `hr` follows from ecg and ppg and is left out.
    "kymo": {
        "BAS": ("eeg", "eog"),
        "RESP": ("resp", "spo2", "snore"),
        "EKG": ("ecg", "ppg"),
        "EMG": ("emg",),
    },
}


class ModalityConfig(BaseModel):
    """What of a window is contrasted.

    Attributes:
        groups: Modality to the kinds of its channels, or the name of one of `GROUP_MAPS`.
        view: Name in `trainer.views.VIEWS`.
        channels: Symbols to take; null takes all.
        window_s: Length of the random stretch of a sample that is taken; null takes all of it.
        channel_dropout: Probability with which a channel is hidden; one of each modality always stays.
        one_pass: One call of the encoder for all modalities, which must share rate and length. false: a call each.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    groups: Literal["sleepfm", "kymo"] | Annotated[dict[str, tuple[str, ...]], Field(min_length=2)] = Field(
        default={"BAS": ("eeg", "eog"), "RESP": ("resp",), "EKG": ("ecg",), "EMG": ("emg",)}
    )
    view: str = "zscore"
    channels: tuple[str, ...] | None = None
    window_s: float | None = Field(default=None, gt=0)
    channel_dropout: float = Field(default=0.0, ge=0, lt=1)
    one_pass: bool = True

    @property
    def modalities(self) -> Groups:
        """Modality to the kinds of its channels."""
        return GROUP_MAPS[self.groups] if isinstance(self.groups, str) else self.groups

    @model_validator(mode="after")
    def _no_kind_stands_twice(self) -> ModalityConfig:
        kinds = [kind for group in self.modalities.values() for kind in group]
        if twice := sorted({kind for kind in kinds if kinds.count(kind) > 1}):
            raise ValueError(f"groups: {', '.join(twice)} stands twice; a modality would be contrasted with itself")
        return self


@dataclass(slots=True, kw_only=True)
class ModalityBatch:
    """One ChannelBatch per modality, on the host a StoredBatch, all with the same N windows in the same order."""

    groups: tuple[Any, ...]
    available_NM: torch.Tensor
    recording_N: torch.Tensor

    def to(self, device: torch.device | str) -> ModalityBatch:
        """The same batch on `device`."""
        return move(self, device)


def collate_modalities(windows: Sequence[Window], config: ModalityConfig, *, seed: int) -> ModalityBatch:
    """Windows as a batch. `window_s` draws from (seed, epoch, key), `channel_dropout` from these and the modality."""
    groups = []
    cuts = None if config.window_s is None else draw_cuts(windows, config.window_s, seed=seed)
    for name, kinds in config.modalities.items():
        group = collate_channels(windows, kinds=kinds, view=config.view, channels=config.channels, cuts=cuts)
        if config.channel_dropout > 0:
            _drop_channels(group, windows, name, seed=seed, probability=config.channel_dropout)
        groups.append(group)
    recordings = [stable_hash(window.corpus, window.recording) for window in windows]
    return ModalityBatch(
        groups=tuple(groups),
        available_NM=torch.stack([group.mask_BC.any(dim=1) for group in groups], dim=1),
        recording_N=torch.tensor(recordings, dtype=torch.int64),
    )


def merge_groups(groups: Sequence[ChannelBatch]) -> ChannelBatch:
    """All modalities as windows of one batch, modality after modality, padded to the one with most channels.

    Raises:
        ConfigError: Modalities of different rate or length.
    """
    grids = [f"{group.rate_hz:g} Hz x {group.signal_BCT.shape[2]}" for group in groups]
    if len(set(grids)) > 1:
        raise ConfigError(
            f"modalities of different rates or lengths ({', '.join(grids)}), but one call of the encoder takes one of "
            "both; set objective.one_pass to false"
        )
    num_columns = max(group.mask_BC.shape[1] for group in groups)

    def padded(name: str) -> torch.Tensor:
        parts = [getattr(group, name) for group in groups]
        merged = parts[0].new_zeros(sum(map(len, parts)), num_columns, *parts[0].shape[2:])
        starts = accumulate(map(len, parts), initial=0)
        for start, part in zip(starts, parts, strict=False):
            merged[start : start + len(part), : part.shape[1]] = part
        return merged

    return ChannelBatch(
        signal_BCT=padded("signal_BCT"),
        mask_BC=padded("mask_BC"),
        anode_BC=padded("anode_BC"),
        cathode_BC=padded("cathode_BC"),
        kind_BC=padded("kind_BC"),
        rate_hz=groups[0].rate_hz,
    )


def _drop_channels(group: StoredBatch, windows: Sequence[Window], name: str, *, seed: int, probability: float) -> None:
    """Hides random channels of a group in place, always keeping one of those a window has."""
    for b, window in enumerate(windows):
        real = int(group.mask_BC[b].sum())
        if real > 1:
            draws = generator(seed, window.epoch, window.key, "channels", name).random(real)
            draws[draws.argmax()] = 1.0
            group.mask_BC[b, :real] = torch.from_numpy(draws >= probability)
