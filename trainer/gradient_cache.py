"""Cached gradients (GradCache, Gao et al. 2021): contrastive batches larger than memory, with all their negatives.

Plain gradient accumulation contrasts each micro-batch with itself, so it never enlarges the set of negatives. Here
the embeddings of all micro-batches are computed first without gradient, the loss of the whole global batch and its
gradient with respect to every embedding are computed once, and then each micro-batch runs again, from the same random
state, and that gradient is sent through it. The result is the gradient of the undivided batch; the price is a second
forward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

Embedded = dict[str, torch.Tensor]
Losses = Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]


class Contrast(Protocol):
    """An objective in two halves: `forward(batch)` is `loss(embed(batch) | loss_parameters)`.

    `forward(batch, finish)` calls `finish` in place of `loss`. What `embed` returns, with one row per window or crop
    in each tensor, and the parameters of the objective that `loss_parameters` names (a temperature) are all that
    `loss` may look at.
    """

    loss_parameters: tuple[str, ...]

    def embed(self, batch: Any) -> Embedded:
        """Embeddings and ids of a micro-batch."""
        ...

    def loss(self, embedded: Embedded) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of the local rows against those of all ranks, and metrics."""
        ...


def plain_losses(model: Any, batches: Sequence[Any]) -> Losses:
    """Loss and metrics of each micro-batch by itself."""
    for batch in batches:
        yield model(batch.to(model.device))


def cached_losses(model: Any, batches: Sequence[Any]) -> Losses:
    """For each micro-batch a value whose backward pass gives its share of the gradient of the global batch.

    The metrics are those of the global batch. Micro-batches are moved to the device twice: that is cheaper than
    keeping them there.
    """
    random_states, parts = [], []
    for batch in batches:
        random_states.append(_random_state(model.device))
        with torch.no_grad():
            parts.append(model(batch.to(model.device), _detached))
    shared = model.module.loss_parameters
    whole = {name: parts[0][name] if name in shared else torch.cat([part[name] for part in parts]) for name in parts[0]}
    leaves = {name: tensor.requires_grad_() for name, tensor in whole.items() if tensor.is_floating_point()}
    loss, metrics = model.module.loss(whole)
    names, tensors = list(leaves), list(leaves.values())
    # Not loss.backward(): nothing of the model is in this graph, only copies.
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    gradients = {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}
    sizes = [len(part[next(name for name in part if name not in shared)]) for part in parts]
    split = {name: gradient.split(sizes) for name, gradient in gradients.items() if name not in shared}
    for number, (batch, state) in enumerate(zip(batches, random_states, strict=True)):
        _set_random_state(model.device, state)
        own = {name: gradients[name] / len(batches) if name in shared else split[name][number] for name in gradients}
        # DeepSpeed divides by the number of micro-batches, and these are terms of a sum.
        yield model(batch.to(model.device), _sender(own, factor=len(batches))), metrics


def _detached(embedded: Embedded) -> Embedded:
    """Copies, for under ZeRO-3 the parameters among them are emptied when the forward pass ends."""
    return {name: tensor.detach().clone() for name, tensor in embedded.items()}


def _sender(gradients: Embedded, *, factor: int) -> Callable[[Embedded], torch.Tensor]:
    """A function of embeddings whose gradient is `factor × gradients`."""
    return lambda embedded: factor * torch.stack([(embedded[name] * gradients[name]).sum() for name in gradients]).sum()


def _random_state(device: torch.device) -> list[torch.Tensor]:
    """State of the generators that dropout draws from."""
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


def _set_random_state(device: torch.device, state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
