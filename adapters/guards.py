"""Do adapters do anything? Asked of a model at the start of a run, since PEFT does not say when they do not.

Two ways to lose them without an error were measured. Encoders descended from BEiT (LaBraM among them) compute
`F.linear(x, self.qkv.weight)`: PEFT has replaced `self.qkv` by a layer whose `weight` is that of the base, and the
adapter is never run. `nn.TransformerEncoderLayer` calls its layers in training, and reads their weights in a kernel of
its own in evaluation: the adapter is trained, and then has no effect.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from adapters.model import MultiTaskModel
from manifests.errors import ConfigError
from trainer.batches import ChannelBatch

NOISE = (
    0.05  # on every adapter while it is probed: most start where they change nothing and half of them get no gradient
)
PROBE_RATE_HZ = 128.0
PROBE_PATCHES = 4  # attention over a single token gives q and k no gradient


def check_adapters(model: MultiTaskModel, batch: ChannelBatch | None = None) -> None:
    """Hold every layer's adapter of every task against the base: it gets a gradient, and changes its layer's output.

    Adapters, gradients, mode and random state of the model are afterwards what they were before.

    Args:
        model: Before it is trained.
        batch: Windows of several patches; None = noise.

    Raises:
        ConfigError: Layers whose adapter is missing, gets no gradient, or has no effect in evaluation, by name.
    """
    batch = (probe_batch(model.encoder) if batch is None else batch).to(model.device)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    was_training = model.training
    model.eval()
    try:
        for task in model.tasks:
            parameters = _by_layer(model, task)
            with _noise(parameters):
                _refuse(task, _without_gradient(model, task, batch, parameters), "get no gradient")
                _refuse(task, _without_effect(model, task, batch, parameters), "change nothing in evaluation")
    finally:
        model.train(was_training)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]


def probe_batch(encoder: nn.Module) -> ChannelBatch:
    """Two windows of noise on three channels, several patches long."""
    patch_s = getattr(getattr(encoder, "config", None), "patch_s", 2.0)
    num_samples = round(PROBE_PATCHES * patch_s * PROBE_RATE_HZ)
    ids_BC = torch.arange(1, 4).expand(2, 3)
    generator = torch.Generator().manual_seed(0)
    return ChannelBatch(
        signal_BCT=torch.randn(2, 3, num_samples, generator=generator),
        mask_BC=torch.ones(2, 3, dtype=torch.bool),
        anode_BC=ids_BC,
        cathode_BC=torch.zeros_like(ids_BC),
        kind_BC=torch.zeros_like(ids_BC),
        rate_hz=PROBE_RATE_HZ,
    )


def _refuse(task: str, layers: list[str], what: str) -> None:
    if layers:
        more = f" and {len(layers) - 4} more" if len(layers) > 4 else ""
        raise ConfigError(
            f"lora: adapters of task {task} {what} on {', '.join(layers[:4])}{more}: the encoder computes with the "
            "weights of these layers past the layers themselves, as F.linear(x, self.qkv.weight) and "
            "nn.TransformerEncoderLayer do; call them as modules, or leave them out of lora.targets"
        )


def _by_layer(model: MultiTaskModel, task: str) -> dict[str, list[nn.Parameter]]:
    """Trainable adapter parameters of a task on each layer that shall have one."""
    count = len(list(model.encoder.get_submodule("blocks").children()))
    wanted = [f"blocks.{index}.{layer}" for index in range(count) for layer in model.lora[task].layers]
    found = {name: [] for name in wanted}
    for name, parameter in model.adapter_parameters(task).items():
        for layer in wanted:
            if f".{layer}." in name:
                found[layer].append(parameter)
    _refuse(task, [layer for layer, parameters in found.items() if not parameters], "are missing or frozen")
    return found


@contextmanager
def _noise(layers: Mapping[str, list[nn.Parameter]]) -> Generator[None, None, None]:
    """Every adapter moved off its start, and put back."""
    parameters = [parameter for of_layer in layers.values() for parameter in of_layer]
    kept = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(NOISE * torch.randn(parameter.shape, generator=generator).to(parameter))
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(parameters, kept, strict=True):
                parameter.copy_(before)


def _without_gradient(
    model: MultiTaskModel, task: str, batch: ChannelBatch, layers: Mapping[str, list[nn.Parameter]]
) -> list[str]:
    model.zero_grad(set_to_none=True)
    with torch.enable_grad():
        model(task, batch).square().sum().backward()
    return [
        name
        for name, parameters in layers.items()
        if any(parameter.grad is None or not parameter.grad.any() for parameter in parameters)
    ]


def _without_effect(
    model: MultiTaskModel, task: str, batch: ChannelBatch, layers: Mapping[str, list[nn.Parameter]]
) -> list[str]:
    adapted = {name: layer for name, layer in model.adapted_layers().items() if name in layers}
    with torch.no_grad(), _watched(adapted) as effective:
        model(task, batch)
    return [name for name in layers if name not in effective]


@contextmanager
def _watched(layers: Mapping[str, nn.Module]) -> Generator[set[str], None, None]:
    """Names of the layers that were called and gave another output than their base would.

    Not by hooks: nn.TransformerEncoderLayer looks for them, and takes its slow and right path where it finds one.
    """
    effective: set[str] = set()

    def forward(name: str, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = type(layer).forward(layer, *args, **kwargs)
        if not torch.equal(output, cast("BaseTunerLayer", layer).get_base_layer()(*args, **kwargs)):
            effective.add(name)
        return output

    for name, layer in layers.items():
        layer.forward = partial(forward, name, layer)
    try:
        yield effective
    finally:
        for layer in layers.values():
            del layer.forward
