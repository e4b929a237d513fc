"""The same architecture trained end to end on the labels, from random weights: what pretraining must beat.

No value is tuned: the numbers of the configuration hold for every fold, so no test person decides any of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from trainer.batches import generator
from trainer.evaluation.config import EndToEndConfig
from trainer.evaluation.features import Reading, random_encoder, read_features
from trainer.evaluation.probe import Folds, split_rows
from trainer.evaluation.windows import Rows, read_windows
from trainer.models.build import Encoder
from trainer.read import Window

WARM_UP = 0.1  # share of the steps
CLIPPING = 1.0


class Classifier(nn.Module):
    """An encoder, read as its frozen features are, and one linear layer."""

    def __init__(self, encoder: Encoder, reading: Reading, *, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.width * len(reading.groups), num_classes)
        self._reading = reading

    def forward(self, windows: Sequence[Window]) -> torch.Tensor:
        """Logits (N, K)."""
        return self.head(read_features(self.encoder, windows, self._reading, device=self.head.weight.device))


def train_end_to_end(
    rows: Rows,
    encoder_config: Any,
    reading: Reading,
    settings: EndToEndConfig,
    *,
    folds: Folds,
    fold_seed: int,
    seed: int,
    num_classes: int,
    device: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows that were tested, in the order of the table, and their probabilities (N, K).

    Args:
        rows: Labelled windows.
        encoder_config: Architecture.
        reading: How windows reach the encoder.
        settings: Steps, batch and learning rate.
        folds: As for the probes.
        fold_seed: Of the folds, the same as the probes'.
        seed: Of weights and batches.
        num_classes: K.
        device: Of torch.
    """
    tested, found = [], []
    for number, (train, test) in enumerate(split_rows(rows, folds, seed=fold_seed)):
        target = rows["target"].to_numpy()[train]
        if len(np.unique(target)) < 2 or len(test) == 0:
            continue
        encoder = random_encoder(encoder_config, seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = Classifier(encoder, reading, num_classes=num_classes).to(device)
            _fit(net, rows.iloc[train], target, settings, key=(seed, number), num_classes=num_classes)
        tested.append(test)
        found.append(_predict(net, rows.iloc[test], batch=settings.batch))
    order = np.argsort(np.concatenate(tested), kind="stable")
    return np.concatenate(tested)[order], np.concatenate(found)[order]


def _fit(
    net: Classifier,
    rows: Rows,
    target: np.ndarray,
    settings: EndToEndConfig,
    *,
    key: tuple[int, int],
    num_classes: int,
) -> None:
    """AdamW with warm-up and a cosine to zero; every class weighs the same in the loss."""
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    warm = max(1, round(WARM_UP * settings.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 0.5 + 0.5 * np.cos(np.pi * step / settings.steps)),
    )
    counts = np.bincount(target, minlength=num_classes)
    weight = torch.tensor(len(target) / (len(np.unique(target)) * np.maximum(counts, 1)), dtype=torch.float32)
    weight = weight.to(net.head.weight.device)
    for _, places in zip(range(settings.steps), _batches(len(rows), settings.batch, key=key), strict=False):
        (windows,) = read_windows(rows.iloc[places], batch=len(places))
        truth = torch.from_numpy(target[places]).to(weight.device)
        optimizer.zero_grad()
        loss = cross_entropy(net(windows), truth, weight=weight)
        loss.backward()  # one process, no DeepSpeed
        nn.utils.clip_grad_norm_(net.parameters(), CLIPPING)
        optimizer.step()
        schedule.step()


def _batches(total: int, batch: int, *, key: tuple[int, int]) -> Iterator[np.ndarray]:
    """Endless places of batches, every window once an epoch; a function of the key."""
    epoch = 0
    while True:
        order = generator("end to end", *key, epoch).permutation(total)
        for first in range(0, max(1, total - batch + 1), batch):
            yield order[first : first + batch]
        epoch += 1


@torch.no_grad()
def _predict(net: Classifier, rows: Rows, *, batch: int) -> np.ndarray:
    net.eval()
    logits = [net(windows) for windows in read_windows(rows, batch=batch)]
    return torch.cat(logits).double().softmax(dim=1).cpu().numpy()
