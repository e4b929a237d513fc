"""Frozen features: what an encoder with fixed weights says about a window, one row each, and a cache of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import BaseModel

from manifests.config import code_digest, digest
from manifests.tasks import Task
from trainer.batches import ChannelBatch, collate_channels
from trainer.evaluation.windows import Rows, read_windows
from trainer.models.build import Encoder, build_encoder
from trainer.read import Window


class Extractor(Protocol):
    """Makes features of windows. `identity` decides them together with the windows."""

    identity: str

    def __call__(self, windows: Sequence[Window], *, channels: Sequence[str] | None = None) -> np.ndarray:
        """(N, F) features; `channels` hides all others."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How windows reach the encoder.

    Attributes:
        groups: Modality to kinds; each is encoded by itself, as in leave-one-out pretraining, and gives its own block
            of features, zeros where a window lacks it.
        view: Name in `trainer.views.VIEWS`.
        segment_s: Windows are cut into pieces of this length, whose embeddings are averaged; null = whole windows.
    """

    groups: Mapping[str, tuple[str, ...]]
    view: str
    segment_s: float | None


def reading_of(task: Task, objective: BaseModel | None) -> Reading:
    """How the encoder of an objective read windows, limited to the task's kinds; without one, as the task says.

    An objective of single channels gives each kind a block of its own.
    """
    if objective is None:
        return Reading(groups={"all": tuple(task.kinds)}, view=task.view, segment_s=None)
    modalities: Mapping[str, tuple[str, ...]] = getattr(objective, "modalities", {kind: (kind,) for kind in task.kinds})
    groups = {name: tuple(kind for kind in kinds if kind in task.kinds) for name, kinds in modalities.items()}
    left = tuple(kind for kind in task.kinds if not any(kind in kinds for kinds in groups.values()))
    groups = {name: kinds for name, kinds in groups.items() if kinds} | ({"others": left} if left else {})
    return Reading(
        groups=groups, view=getattr(objective, "view", task.view), segment_s=getattr(objective, "crop_s", None)
    )


class EncoderFeatures:
    """Pooled embeddings of an encoder, one block per modality."""

    def __init__(self, encoder: Encoder, reading: Reading, *, identity: str, device: str = "cpu") -> None:
        self.identity = digest([identity, reading.view, reading.segment_s, {**reading.groups}])
        self._encoder = encoder.eval().to(device)
        self._reading = reading
        self._device = device

    @torch.no_grad()
    def __call__(self, windows: Sequence[Window], *, channels: Sequence[str] | None = None) -> np.ndarray:
        """(N, modalities x width) float32."""
        found = read_features(self._encoder, windows, self._reading, device=self._device, channels=channels)
        return found.float().cpu().numpy()


def read_features(
    encoder: Encoder,
    windows: Sequence[Window],
    reading: Reading,
    *,
    device: str | torch.device,
    channels: Sequence[str] | None = None,
) -> torch.Tensor:
    """(N, modalities x width): pooled embeddings, a block for each modality; with gradient, where that is on."""
    blocks = []
    for kinds in reading.groups.values():
        stored = collate_channels(windows, kinds=kinds, view=reading.view, channels=channels)
        batch, num_pieces = cut(stored.to(device), segment_s=reading.segment_s)
        pooled_BD = encoder(batch).pooled_BD.unflatten(0, (-1, num_pieces)).mean(dim=1)
        has_any_B = stored.mask_BC.any(dim=1).to(pooled_BD.device)
        blocks.append(torch.where(has_any_B[:, None], pooled_BD, torch.zeros_like(pooled_BD)))
    return torch.cat(blocks, dim=1)


def cut(batch: ChannelBatch, *, segment_s: float | None) -> tuple[ChannelBatch, int]:
    """Every window as so many evenly spread pieces of `segment_s`, piece after piece, and their number."""
    length = batch.signal_BCT.shape[2]
    piece = length if segment_s is None else min(length, round(segment_s * batch.rate_hz))
    num = -(-length // piece)
    if num == 1:
        return batch, 1
    starts = np.linspace(0, length - piece, num).round().astype(int)
    signal_BSCT = torch.stack([batch.signal_BCT[:, :, s : s + piece] for s in starts], dim=1)
    ids = {
        name: getattr(batch, name).repeat_interleave(num, dim=0)
        for name in ("mask_BC", "anode_BC", "cathode_BC", "kind_BC")
    }
    return replace(batch, signal_BCT=signal_BSCT.flatten(0, 1), **ids), num


def random_encoder(config: Any, *, seed: int) -> Encoder:
    """Encoder of a configuration with fresh weights; the caller's generator stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_encoder(config).eval()


def features_of(rows: Rows, extractor: Extractor, *, cache: Path, snapshots: Sequence[str], batch: int) -> Any:
    """Features (N, F) of the rows, streamed from the shards once and kept in `cache`.

    The file is named by what decides them: extractor (the encoder's SHA-256), digests of snapshots, keys, and code.
    """
    keys = hashlib.sha256("\n".join(rows["key"]).encode()).hexdigest()
    name = digest([extractor.identity, sorted(snapshots), keys, code_digest(), torch.__version__])[:24]
    path = cache / f"{name}.npy"
    if path.is_file():
        return np.load(path, allow_pickle=False)
    features = np.concatenate([extractor(windows) for windows in read_windows(rows, batch=batch)])
    cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    with temporary.open("wb") as file:
        np.save(file, features)
    temporary.replace(path)
    return features
