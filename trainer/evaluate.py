"""What an encoder learned in pretraining, without labels: retrieval and a channel-identity probe."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import one_hot

from trainer.objectives.build import Objective
from trainer.objectives.leave_one_out import leave_one_out_targets
from trainer.read import Window


def retrieval_top1(
    objective: Objective,
    windows: Sequence[Window],
    *,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Share of windows that are found among all N `windows` (`top1`), the share by guessing (`chance`), and `n`.

    Leave-one-out: a modality must find the mean of its window's others, averaged over modalities. NT-Xent: a view
    must find its other view; also among crops of the same channel only (`same_channel_top1`,
    `same_channel_chance`), and how well a linear probe names the channel (`channel_probe`,
    `channel_probe_chance`). Dropout is off; no collective is called, so a single rank may evaluate.
    """
    embedded = embed_all(objective, windows, seed=seed, batch_size=batch_size, device=device)
    if "embedding_NMD" in embedded:
        return leave_one_out_top1(embedded["embedding_NMD"], embedded["available_NM"])
    return view_top1(embedded["embedding_NVD"], embedded["channel_N"]) | channel_probe(
        embedded["feature_ND"], embedded["channel_N"]
    )


@torch.no_grad()
def embed_all(
    objective: Objective,
    windows: Sequence[Window],
    *,
    seed: int,
    batch_size: int,
    device: torch.device | str,
) -> dict[str, torch.Tensor]:
    """Embeddings of all windows on the CPU, as the objective's `embed` names them."""
    was_training = objective.training
    objective.eval()
    try:
        parts = [
            objective.embed(objective.collate(windows[start : start + batch_size], seed=seed).to(device))  # pyright: ignore[reportArgumentType]  # each objective embeds its own batch
            for start in range(0, len(windows), batch_size)
        ]
    finally:
        objective.train(was_training)
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}


def leave_one_out_top1(unit_NMD: torch.Tensor, available_NM: torch.Tensor) -> dict[str, float]:
    """Top-1 of each modality against the mean direction of the others, averaged over modalities with candidates."""
    target_NMD = leave_one_out_targets(unit_NMD, available_NM, is_normalized=True)
    member_NM = available_NM & (available_NM.sum(dim=1, keepdim=True) >= 2)
    scores, chances = [], []
    for m in range(unit_NMD.shape[1]):
        member_N = member_NM[:, m]
        if int(member_N.sum()) >= 2:
            similarity = unit_NMD[member_N, m] @ target_NMD[member_N, m].T
            scores.append(_top1(similarity))
            chances.append(1.0 / len(similarity))
    count = max(1, len(scores))
    return {"top1": sum(scores) / count, "chance": sum(chances) / count, "n": float(len(unit_NMD))}


def view_top1(unit_NVD: torch.Tensor, channel_N: torch.Tensor) -> dict[str, float]:
    """Top-1 of a crop's first view against all second views, and against those of the same channel."""
    similarity = unit_NVD[:, 0] @ unit_NVD[:, 1].T
    num = len(similarity)
    same = channel_N[:, None] == channel_N
    has_rivals = same.sum(dim=1) >= 2
    within = similarity.masked_fill(~same, float("-inf"))
    hits = (within.argmax(dim=1) == torch.arange(num))[has_rivals].double()
    chance = (1.0 / same.sum(dim=1))[has_rivals].double()
    return {
        "top1": _top1(similarity) if num else 0.0,
        "chance": 1.0 / max(1, num),
        "n": float(num),
        "same_channel_top1": float(hits.mean()) if len(hits) else 0.0,
        "same_channel_chance": float(chance.mean()) if len(hits) else 0.0,
    }


def channel_probe(feature_ND: torch.Tensor, channel_N: torch.Tensor, *, ridge: float = 1.0) -> dict[str, float]:
    """Accuracy of a ridge classifier of the channel on every second window, and the share of the commonest one.

    High accuracy is no virtue by itself: it says how much of an embedding is the channel's identity.
    """
    channels, label_N = channel_N.unique(return_inverse=True)
    train, test = slice(0, None, 2), slice(1, None, 2)
    if len(label_N) < 4 or len(channels) < 2:
        return {"channel_probe": 0.0, "channel_probe_chance": 0.0}
    feature_ND = feature_ND.double()
    mean, sd = feature_ND[train].mean(dim=0), feature_ND[train].std(dim=0).clamp(min=1e-6)
    standard = torch.cat([(feature_ND - mean) / sd, torch.ones(len(feature_ND), 1, dtype=torch.float64)], dim=1)
    gram = standard[train].T @ standard[train] + ridge * torch.eye(standard.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, standard[train].T @ one_hot(label_N[train], len(channels)).double())
    accuracy = (standard[test] @ weights).argmax(dim=1) == label_N[test]
    return {
        "channel_probe": float(accuracy.double().mean()),
        "channel_probe_chance": float(label_N[test].bincount().max() / len(label_N[test])),
    }


def _top1(similarity_NN: torch.Tensor) -> float:
    hits = similarity_NN.argmax(dim=1) == torch.arange(len(similarity_NN))
    return float(hits.double().mean())
