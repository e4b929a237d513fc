"""The PEFT methods by name: how an adapter's configuration is made, and what its file must say.

Each has been seen to keep tasks apart on one shared base, and to come back from a file key by key
(tests/adapters/test_methods.py). What fails that is refused in `adapters.config`, with the reason.
"""

from collections.abc import Callable
from typing import Any

from peft import (
    HiraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    VeraConfig,
)

from adapters.config import LoraSpec

Options = Callable[[LoraSpec], dict[str, Any]]


def _low_rank(spec: LoraSpec) -> dict[str, Any]:
    return {"r": spec.r, "lora_alpha": spec.alpha, "lora_dropout": spec.dropout, "bias": "none"}


def _lycoris(spec: LoraSpec) -> dict[str, Any]:
    return {"r": spec.r, "alpha": spec.alpha, "rank_dropout": spec.dropout}


METHODS: dict[str, tuple[Callable[..., PeftConfig], Options]] = {
    "lora": (LoraConfig, lambda spec: {**_low_rank(spec), "use_rslora": False, "use_dora": False}),
    "rslora": (LoraConfig, lambda spec: {**_low_rank(spec), "use_rslora": True, "use_dora": False}),
    "dora": (LoraConfig, lambda spec: {**_low_rank(spec), "use_rslora": False, "use_dora": True}),
    "ia3": (IA3Config, lambda _: {"feedforward_modules": r"blocks\.\d+\.(fc1|fc2)"}),
    "loha": (LoHaConfig, _lycoris),
    "lokr": (LoKrConfig, _lycoris),
    # One random projection for all layers and tasks, drawn from the key and kept in the file.
    "vera": (VeraConfig, lambda spec: {"r": spec.r, "vera_dropout": spec.dropout, "projection_prng_key": 0}),
    # Rank or block size, the other is 0; PEFT takes the nearest divisor of a width that 8 does not divide.
    "oft": (OFTConfig, lambda spec: {"r": 0, "oft_block_size": 8, "module_dropout": spec.dropout}),
    "hra": (HRAConfig, lambda spec: {"r": spec.r}),
    "miss": (MissConfig, lambda spec: {"r": spec.r, "miss_dropout": spec.dropout}),
    "hira": (HiraConfig, lambda spec: {"r": spec.r, "hira_dropout": spec.dropout}),
}


def peft_config(spec: LoraSpec) -> PeftConfig:
    """PEFT's configuration of an adapter."""
    config, options = METHODS[spec.kind]
    return config(target_modules=spec.pattern, **options(spec))


def required_config(spec: LoraSpec) -> dict[str, Any]:
    """What an adapter's `adapter_config.json` must say for stock PEFT to make the same adapter of its tensors."""
    config, options = METHODS[spec.kind]
    name = getattr(config().peft_type, "value", None)
    return {"peft_type": name, "target_modules": spec.pattern, "modules_to_save": None, **options(spec)}
