"""One frozen encoder with one PEFT adapter and one head per task, and a shared temporal encoder.

What stands here against stock PEFT habits, each seen to go wrong in silence (peft 0.21):
* `set_adapter` flips requires_grad and drops the gradients of other tasks, so the active adapter is set on the
  tuner layers and every adapter stays trainable.
* `modules_to_save` copies a module per adapter, so the shared temporal encoder stays a part of the base.
* heads inside PEFT must all have one shape, so they live in a ModuleDict beside it.
* an adapter named like a module of the base saves an empty file, so such names are refused.
* the active adapter belongs to the model and not to a call, so activation and forward pass are one step under a lock.
* gradient checkpointing computes blocks again in the backward pass, when another task may be active, so a block
  activates its task itself.
"""

import hashlib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from threading import RLock
from typing import cast

import torch
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from adapters.config import LoraSpec, Temporal
from adapters.fused import fuse_attention
from adapters.methods import peft_config
from manifests.errors import ConfigError, ContractError
from trainer.batches import ChannelBatch
from trainer.models.build import Encoder

SHARED = "temporal_encoder"


class TaskModel(nn.Module):
    """What training, scoring and checkpoints need of a model: `model(task, batch)` gives logits (B, K)."""

    def group(self, name: str) -> str:
        """Group that a trainable parameter's learning rate belongs to."""
        raise NotImplementedError

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that training changes, by name, in a fixed order."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.parameters()).device

    def frozen_digest(self) -> str:
        """SHA-256 (hex) of everything that training must not change."""
        kept = self.trainable().keys()
        sha = hashlib.sha256()
        for name, tensor in self.state_dict().items():
            if name not in kept:
                sha.update(name.encode())
                sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()


class MultiTaskModel(TaskModel):
    """Logits of any of its tasks. The encoder that is given becomes part of it, its layers wrapped in place.

    Args:
        encoder: Has `blocks`, `temporal_encoder` and `width`; called with a ChannelBatch it returns `pooled_BD`.
        outputs: Task id to its number of logits.
        lora: Of every task, or one per task id.
        temporal: `frozen` = the shared temporal encoder stays as it was pretrained.
        seed: Of the initial adapters and heads.

    Raises:
        ConfigError: A task id that collides with a module, adapters of two kinds, or an encoder whose blocks lack
            layers that shall have one.
    """

    def __init__(
        self,
        encoder: nn.Module,
        outputs: Mapping[str, int],
        *,
        lora: LoraSpec | Mapping[str, LoraSpec],
        temporal: Temporal = "trainable",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tasks = tuple(outputs)
        self.lora = {task: lora if isinstance(lora, LoraSpec) else lora[task] for task in self.tasks}
        blocks = _blocks(encoder)
        _check_kinds(self.lora)
        self._prefix = _prefix(next(iter(self.lora.values())))
        for task in self.tasks:
            _check_name(task, encoder, self._prefix)
        if any("attn.qkv" in spec.layers for spec in self.lora.values()):
            fuse_attention(blocks)
        for spec in self.lora.values():
            _check_layers(blocks, spec)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first, *others = self.tasks
            self.peft = get_peft_model(encoder, peft_config(self.lora[first]), adapter_name=first)
            for task in others:
                self.peft.add_adapter(task, peft_config(self.lora[task]))
            self.heads = nn.ModuleDict({task: build_head(encoder_width(encoder), outputs[task]) for task in self.tasks})
        self._layers = {name: m for name, m in self.peft.named_modules() if isinstance(m, BaseTunerLayer)}
        self._lock = RLock()
        self.peft.requires_grad_(requires_grad=False)
        self.peft.set_requires_grad(list(self.tasks))
        self.shared.requires_grad_(requires_grad=temporal == "trainable")

    @property
    def encoder(self) -> nn.Module:
        """The wrapped base encoder."""
        return self.peft.get_base_model()

    @property
    def shared(self) -> nn.Module:
        """The temporal encoder that all tasks train together."""
        return self.encoder.get_submodule(SHARED)

    def forward(self, task: str, batch: ChannelBatch, tokens_NPD: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, K) of a task; `tokens_NPD` is what `temporal_tokens` gave for the batch, None computes it.

        Threads may call it for different tasks: one computes at a time.
        """
        with self._lock, self._bound(task):
            return self.heads[task](self.peft(batch, tokens_NPD=tokens_NPD).pooled_BD)

    def temporal_tokens(self, batch: ChannelBatch) -> torch.Tensor:
        """Tokens (N, P, D) of the real channels by the shared temporal encoder, which all tasks of a file can use."""
        return cast("Encoder", self.encoder).temporal_tokens(batch)

    def group(self, name: str) -> str:
        """`lora` (of any kind), `head` or `temporal`."""
        return "lora" if f".{self._prefix}" in name else "head" if name.startswith("heads.") else "temporal"

    def activate(self, task: str) -> None:
        """Make a task's adapter the one that runs; trainability stays as it is."""
        for layer in self._layers.values():
            layer._active_adapter = task  # noqa: SLF001 (the public setter flips requires_grad)

    @contextmanager
    def _bound(self, task: str) -> Generator[None, None, None]:
        """The task's adapter active now and, with checkpointing, when its blocks are computed again."""
        self.activate(task)
        if not (self.training and torch.is_grad_enabled()):
            yield
            return
        blocks = self.encoder.blocks
        self.encoder.blocks = nn.ModuleList(
            _Bound(block, partial(self.activate, task)) for block in _blocks(self.encoder)
        )
        try:
            yield
        finally:
            self.encoder.blocks = blocks

    def adapted_layers(self) -> dict[str, nn.Module]:
        """Layers with adapters, by their path in the encoder."""
        return {
            name.removeprefix("base_model.model."): cast("nn.Module", layer) for name, layer in self._layers.items()
        }

    def adapter_parameters(self, task: str) -> dict[str, nn.Parameter]:
        """What training changes of a task's adapter, by name."""
        return {
            name: parameter
            for name, parameter in self.trainable().items()
            if f".{self._prefix}" in name and task in name.split(".")
        }

    def adapter_tensors(self, task: str) -> dict[str, torch.Tensor]:
        """Tensors of a task's adapter under the keys of a stock PEFT file."""
        return get_peft_model_state_dict(self.peft, adapter_name=task, save_embedding_layers=False)

    def load_adapter(self, task: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put the tensors of a task's adapter in place; PEFT itself lets wrong keys pass.

        Raises:
            ContractError: A key or a shape that differs.
        """
        _same_layout(f"adapter {task}", self.adapter_tensors(task), tensors)
        set_peft_model_state_dict(self.peft, dict(tensors), adapter_name=task)


class _Bound(nn.Module):
    """A block that activates its task before it runs, at any time."""

    def __init__(self, block: nn.Module, activate: Callable[[], None]) -> None:
        super().__init__()
        self.block = block
        self._activate = activate

    def forward(self, *args: torch.Tensor | None) -> torch.Tensor:
        self._activate()
        return self.block(*args)


def build_head(width: int, outputs: int) -> nn.Module:
    """Classifier of one task: its own norm (the encoder's are frozen) and a linear layer."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs))


def load_strict(where: str, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy tensors into a module; ContractError names every key and shape that differs."""
    _same_layout(where, module.state_dict(), tensors)
    module.load_state_dict(dict(tensors), strict=True)


def _same_layout(where: str, expected: Mapping[str, torch.Tensor], got: Mapping[str, torch.Tensor]) -> None:
    wrong = [f"{key} is missing" for key in expected if key not in got]
    wrong += [f"{key} is not expected" for key in got if key not in expected]
    wrong += [
        f"{key} has shape {tuple(got[key].shape)}, expected {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in got and got[key].shape != tensor.shape
    ]
    if wrong:
        raise ContractError(f"{where}: {'; '.join(wrong[:4])}; the file belongs to another model")


def _prefix(spec: LoraSpec) -> str:
    """What the names of a method's parameters begin with, such as `lora_`."""
    return PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(peft_config(spec).peft_type)]


def _check_name(task: str, encoder: nn.Module, prefix: str) -> None:
    """Refuse names that PEFT or torch would mix up with something else."""
    parts = {part for name, _ in encoder.named_parameters() for part in name.split(".")}
    parts |= {part for name, _ in encoder.named_modules() for part in name.split(".")}
    parts |= {"base_model", "model", "base_layer", "default", "qkv"}
    parts |= {name for layer in BaseTunerLayer.__subclasses__() for name in layer.adapter_layer_names}
    if task in parts or task in prefix:
        raise ConfigError(f"task id {task!r}: a module has this name and PEFT would lose the adapter; choose another")
    check_head_name(task)


def check_head_name(task: str) -> None:
    """Refuse names of torch's own: heads are the items of a ModuleDict."""
    if hasattr(nn.ModuleDict(), task):
        raise ConfigError(f"task id {task!r}: torch has an attribute of this name; choose another")


def _check_kinds(specs: Mapping[str, LoraSpec]) -> None:
    """PEFT mixes no methods in a model, and a layer is split or fused for all tasks."""
    for field in ("kind", "attn"):
        found = {task: getattr(spec, field) for task, spec in specs.items()}
        if len({*found.values()}) > 1:
            listed = ", ".join(f"{task}: {value}" for task, value in found.items())
            raise ConfigError(f"lora.{field}: {listed}; the tasks of a model have one {field}: make them equal")


def _check_layers(blocks: nn.ModuleList, spec: LoraSpec) -> None:
    """PEFT is content when a pattern matches anything."""
    found = {f"{index}.{name}" for index, block in enumerate(blocks) for name, _ in block.named_modules()}
    if missing := [
        f"blocks.{i}.{name}" for i in range(len(blocks)) for name in spec.layers if f"{i}.{name}" not in found
    ]:
        raise ConfigError(
            f"lora.targets {spec.targets}: the encoder has no {', '.join(missing[:4])}; name its linear layers so, or "
            "choose other targets"
        )


def _blocks(encoder: nn.Module) -> nn.ModuleList:
    blocks = getattr(encoder, "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or not isinstance(getattr(encoder, SHARED, None), nn.Module):
        raise ConfigError(f"encoder {type(encoder).__name__}: needs a ModuleList `blocks` and a module `{SHARED}`")
    return blocks


def encoder_width(encoder: nn.Module) -> int:
    """Width D of the vectors that an encoder gives."""
    width = encoder.width
    if not isinstance(width, int):
        raise ConfigError(f"encoder {type(encoder).__name__}: width {width!r} is not a number")
    return width
