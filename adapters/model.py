"""One frozen encoder with one PEFT LoRA adapter and one head per task, and a shared trainable temporal encoder.

What stands here against stock PEFT habits, each seen to go wrong in silence (peft 0.21):
* `set_adapter` flips requires_grad and drops the gradients of other tasks, so the active adapter is set on the
  tuner layers and every adapter stays trainable.
* `modules_to_save` copies a module per adapter, so the shared temporal encoder stays a part of the base.
* heads inside PEFT must all have one shape, so they live in a ModuleDict beside it.
* an adapter named like a module of the base saves an empty file, so such names are refused.
"""

import hashlib
from collections.abc import Mapping
from typing import cast

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from adapters.config import LoraSpec
from manifests.errors import ConfigError, ContractError
from trainer.batches import ChannelBatch
from trainer.models.build import Encoder

SHARED = "temporal_encoder"
LAYERS_PER_BLOCK = 6  # q, k, v, o, fc1, fc2


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


class MultiTaskModel(TaskModel):
    """Logits of any of its tasks. The encoder that is given becomes part of it, its layers wrapped in place.

    Args:
        encoder: Has `blocks`, `temporal_encoder` and `width`; called with a ChannelBatch and, if they are known, its
            `tokens_NPD`, it returns `pooled_BD`.
        outputs: Task id to its number of logits.
        lora: Of every task, or one per task id.
        seed: Of the initial adapters and heads.

    Raises:
        ConfigError: A task id that collides with a module, or LoRA targets that miss layers of the blocks.
    """

    def __init__(
        self, encoder: nn.Module, outputs: Mapping[str, int], *, lora: LoraSpec | Mapping[str, LoraSpec], seed: int = 0
    ) -> None:
        super().__init__()
        self.tasks = tuple(outputs)
        self.lora = {task: lora if isinstance(lora, LoraSpec) else lora[task] for task in self.tasks}
        for task in self.tasks:
            _check_name(task, encoder)
        self._num_layers = LAYERS_PER_BLOCK * len(_blocks(encoder))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first, *others = self.tasks
            self.peft = get_peft_model(encoder, lora_config(self.lora[first]), adapter_name=first)
            for task in others:
                self.peft.add_adapter(task, lora_config(self.lora[task]))
            self.heads = nn.ModuleDict({task: build_head(_width(encoder), outputs[task]) for task in self.tasks})
        self._layers = [module for module in self.peft.modules() if isinstance(module, BaseTunerLayer)]
        self._check_layers()
        self._set_trainable()

    @property
    def encoder(self) -> nn.Module:
        """The wrapped base encoder."""
        return self.peft.get_base_model()

    @property
    def shared(self) -> nn.Module:
        """The temporal encoder that all tasks train together."""
        return self.encoder.get_submodule(SHARED)

    def forward(self, task: str, batch: ChannelBatch, tokens_NPD: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, K) of a task; `tokens_NPD` is what `temporal_tokens` gave for the batch, None computes it."""
        self.activate(task)
        return self.heads[task](self.peft(batch, tokens_NPD=tokens_NPD).pooled_BD)

    def temporal_tokens(self, batch: ChannelBatch) -> torch.Tensor:
        """Tokens (N, P, D) of the real channels by the shared temporal encoder, which all tasks of a file can use."""
        return cast("Encoder", self.encoder).temporal_tokens(batch)

    def group(self, name: str) -> str:
        """`lora`, `head` or `temporal`."""
        return "lora" if ".lora_" in name else "head" if name.startswith("heads.") else "temporal"

    def activate(self, task: str) -> None:
        """Make a task's adapter the one that runs; trainability stays as it is."""
        for layer in self._layers:
            layer._active_adapter = task  # noqa: SLF001 (the public setter flips requires_grad)

    def adapter_tensors(self, task: str) -> dict[str, torch.Tensor]:
        """LoRA tensors of a task under the keys of a stock PEFT file."""
        return get_peft_model_state_dict(self.peft, adapter_name=task, save_embedding_layers=False)

    def load_adapter(self, task: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put a task's LoRA tensors in place; PEFT itself lets wrong keys pass.

        Raises:
            ContractError: A key or a shape that differs.
        """
        _same_layout(f"adapter {task}", self.adapter_tensors(task), tensors)
        set_peft_model_state_dict(self.peft, dict(tensors), adapter_name=task)

    def frozen_digest(self) -> str:
        """SHA-256 (hex) of everything that training must not change."""
        kept = self.trainable().keys()
        sha = hashlib.sha256()
        for name, tensor in self.state_dict().items():
            if name not in kept:
                sha.update(name.encode())
                sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    def _check_layers(self) -> None:
        for task in self.tasks:
            wrapped = sum(task in getattr(layer, "lora_A", {}) for layer in self._layers)
            if wrapped != self._num_layers:
                raise ConfigError(
                    f"lora.targets {self.lora[task].targets!r} matches {wrapped} layers, the encoder's blocks have "
                    f"{self._num_layers} ({LAYERS_PER_BLOCK} each); give the full paths of attn.q, k, v, o, fc1, fc2"
                )

    def _set_trainable(self) -> None:
        shared = {id(parameter) for parameter in self.shared.parameters()}
        for name, parameter in self.peft.named_parameters():
            parameter.requires_grad = "lora_" in name or id(parameter) in shared


def lora_config(spec: LoraSpec) -> LoraConfig:
    """PEFT's configuration of an adapter."""
    return LoraConfig(
        r=spec.r, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=spec.targets, bias="none"
    )


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


def _check_name(task: str, encoder: nn.Module) -> None:
    """Refuse names that PEFT or torch would mix up with something else."""
    parts = {part for name, _ in encoder.named_parameters() for part in name.split(".")}
    parts |= {part for name, _ in encoder.named_modules() for part in name.split(".")}
    parts |= {"base_model", "model", "lora_A", "lora_B", "base_layer", "default"}
    if task in parts or hasattr(nn.ModuleDict(), task):
        raise ConfigError(f"task id {task!r}: a module has this name and PEFT would lose the adapter; choose another")


def _blocks(encoder: nn.Module) -> nn.ModuleList:
    blocks = getattr(encoder, "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or not isinstance(getattr(encoder, SHARED, None), nn.Module):
        raise ConfigError(f"encoder {type(encoder).__name__}: needs a ModuleList `blocks` and a module `{SHARED}`")
    return blocks


def _width(encoder: nn.Module) -> int:
    width = encoder.width
    if not isinstance(width, int):
        raise ConfigError(f"encoder {type(encoder).__name__}: width {width!r} is not a number")
    return width
