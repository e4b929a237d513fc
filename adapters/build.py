"""The model of an adaptation run by its method."""

from collections.abc import Callable, Mapping

from torch import nn

from adapters.baselines import ExpertModel, SharedModel
from adapters.config import AdaptConfig
from adapters.guards import check_adapters
from adapters.model import MultiTaskModel, TaskModel

Outputs = Mapping[str, int]


def _lora(config: AdaptConfig, encoder: nn.Module, outputs: Outputs) -> TaskModel:
    model = MultiTaskModel(encoder, outputs, lora=config.lora, temporal=config.temporal, seed=config.seed)
    check_adapters(model)
    return model


def _trained(config: AdaptConfig, encoder: nn.Module, outputs: Outputs) -> TaskModel:
    return SharedModel(encoder, outputs, is_frozen=False, seed=config.seed)


def _probe(config: AdaptConfig, encoder: nn.Module, outputs: Outputs) -> TaskModel:
    return SharedModel(encoder, outputs, is_frozen=True, seed=config.seed)


def _mmoe(config: AdaptConfig, encoder: nn.Module, outputs: Outputs) -> TaskModel:
    return ExpertModel(encoder, outputs, experts=config.experts, task_experts=0, seed=config.seed)


def _cgc(config: AdaptConfig, encoder: nn.Module, outputs: Outputs) -> TaskModel:
    return ExpertModel(encoder, outputs, experts=config.experts, task_experts=config.task_experts, seed=config.seed)


METHODS: dict[str, Callable[[AdaptConfig, nn.Module, Outputs], TaskModel]] = {
    "lora": _lora,
    "full": _trained,
    "linear_probe": _probe,
    "hps": _trained,
    "mmoe": _mmoe,
    "cgc": _cgc,
}


def build_task_model(config: AdaptConfig, encoder: nn.Module, outputs: Outputs) -> TaskModel:
    """Model of a run's method around a pretrained encoder, which becomes part of it.

    Args:
        config: Of the run.
        encoder: From `load_encoder`.
        outputs: Task id to its number of logits.

    Raises:
        ConfigError: Task ids or an encoder that the method cannot work with, or adapters that would do nothing.
    """
    return METHODS[config.method](config, encoder, outputs)
