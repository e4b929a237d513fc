"""Channel dropout: training windows with fewer channels than they have, since a stranger's montage has others."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from manifests.tasks import Task
from trainer.batches import KIND_IDS, ChannelBatch


def drop_channels(task: Task, batch: ChannelBatch, generators: Iterable[np.random.Generator]) -> ChannelBatch:
    """The batch with some channels masked, for a share `task.channel_dropout` of its windows.

    `generators` holds one per window, so that what happens to a window does not depend on the rank that reads it.

    Such a window keeps a random number of its channels, each number being equally likely, and never fewer than
    `task.min_channels` per kind.
    """
    mask_BC = batch.mask_BC.numpy().copy()
    kind_BC = batch.kind_BC.numpy()
    least = {KIND_IDS[kind]: number for kind, number in task.min_channels.items()}
    for mask_C, kind_C, generator in zip(mask_BC, kind_BC, generators, strict=True):
        real = np.flatnonzero(mask_C)
        if generator.random() >= task.channel_dropout:
            continue
        shuffled = generator.permutation(real)
        needed = [c for kind, number in least.items() for c in [c for c in shuffled if kind_C[c] == kind][:number]]
        others = [c for c in shuffled if c not in needed]
        extra = int(generator.integers(len(others) + 1))
        mask_C[:] = False
        mask_C[[*needed, *others[:extra]]] = True
    mask = torch.from_numpy(mask_BC)
    return replace(batch, mask_BC=mask, signal_BCT=batch.signal_BCT * mask[:, :, None])
