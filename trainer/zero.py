"""DeepSpeed: the process group, the one dict, the initialised model, and the learning rate of a step."""

import logging
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported

import deepspeed
import deepspeed.comm
import deepspeed.ops
import deepspeed.utils.groups

from manifests.errors import ConfigError
from trainer.collectives import world_size
from trainer.config import OptimizerConfig, PretrainConfig
from trainer.gradient_cache import cached_losses, plain_losses
from trainer.process_group import join_group

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

# torch's own. ZeRO-3 replaces it in the whole process and for good: runs that came after computed another last bit.
_LINEAR = torch.nn.functional.linear
# Gradients that ZeRO averages at once: DeepSpeed's own default, 2 GB.
MAX_BUCKET = 500_000_000
# Names of parameters that never decay, whatever their shape (beside all of one dimension).
NO_DECAY = ("temperature", "log_scale", "logit_scale")


def join_processes(backend: str, *, timeout_s: float = 900.0) -> None:
    """Make sure that a process group exists and that DeepSpeed uses it.

    See `trainer.process_group.join_group`. A collective that `timeout_s` does not suffice for fails.

    Raises:
        ConfigError: NCCL was asked for and there is no GPU.
    """
    has_gpu = torch.cuda.is_available()
    chosen = join_group(backend, timeout_s=timeout_s)
    if not has_gpu:
        # Otherwise the first use on a CPU compiles an operator for a hundred seconds; a kill -9 in that time
        # leaves a lock that hangs every later run.
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
    deepspeed.comm.init_distributed(dist_backend=chosen, auto_mpi_discovery=False, verbose=False)
    groups = deepspeed.utils.groups.__dict__
    if groups["_WORLD_GROUP"] is None:
        # DeepSpeed would clone the group without its timeout, and a hung rank would hold the others for half an hour.
        groups["_WORLD_GROUP"] = distributed.new_group(timeout=timedelta(seconds=timeout_s))


def deepspeed_dict(config: PretrainConfig) -> dict[str, Any]:
    """The DeepSpeed configuration of a pretraining run."""
    if config.cached_gradients and config.gradient_accumulation == 1:
        raise ConfigError(
            "cached_gradients: true with gradient_accumulation: 1 runs everything twice and changes nothing; "
            "set gradient_accumulation to the number of micro-batches, or cached_gradients to false"
        )
    micro_batch = config.global_batch // (world_size() * config.gradient_accumulation)
    if micro_batch < 1:
        raise ConfigError(
            f"global_batch: {config.global_batch} is under num_workers {world_size()} × gradient_accumulation "
            f"{config.gradient_accumulation}; raise it or lower one of them"
        )
    # Nominal: slices of a global batch may differ by one window between ranks.
    return zero_settings(
        stage=config.zero_stage,
        micro_batch=micro_batch,
        accumulation=config.gradient_accumulation,
        clipping=config.gradient_clipping if config.zero_stage > 0 else 0.0,  # else `ClippingAdamW` does it
        is_bf16=is_bf16(config),
    )


def zero_settings(*, stage: int, micro_batch: int, accumulation: int, clipping: float, is_bf16: bool) -> dict[str, Any]:
    """DeepSpeed's configuration as plain data. Its own default clips gradients at 1.0; here 0 clips nothing."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clipping,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        # Autocast, not bf16 parameters: normalisation and filter layers stay fp32, and the loss is ten times
        # closer to fp32's.
        "torch_autocast": {"enabled": is_bf16, "dtype": "bfloat16"},
        "checkpoint": {"tag_validation": "Fail"},
        "steps_per_print": None,
    }


def is_bf16(config: PretrainConfig) -> bool:
    """Whether matrices are multiplied in bf16; `precision: auto` looks at this machine."""
    return config.precision == "bf16" or (config.precision == "auto" and torch.cuda.is_available())


def initialise(objective: nn.Module, config: PretrainConfig) -> Any:
    """The objective under DeepSpeed with AdamW: `loss = model(batch)`, `model.backward(loss)`, `model.step()`.

    Raises:
        ConfigError: A layer that `check_layers` refuses.
    """
    check_layers(objective)
    torch.set_num_threads(config.num_threads)
    if config.compile:
        _compile_parts(objective)
    return wrap(objective, _adamw(objective, config), settings=deepspeed_dict(config))


def as_carried_out(config: PretrainConfig) -> PretrainConfig:
    """The configuration on as many ranks as there are: one alone has nobody to share with and takes ZeRO's stage 0.

    The numbers are the same up to the order of summation. The stages above keep the weights twice and copy every
    gradient five times, also where nothing is sent.
    """
    return config if world_size() > 1 else config.model_copy(update={"zero_stage": 0})


def wrap(module: nn.Module, optimizer: torch.optim.Optimizer, *, settings: dict[str, Any]) -> Any:
    """A module under DeepSpeed with the given optimizer and settings (`zero_settings`)."""
    num_trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    # DeepSpeed takes memory for a whole bucket in every step, however small the model is.
    zero = settings["zero_optimization"] | {"reduce_bucket_size": min(num_trained, MAX_BUCKET)}
    config = settings | {"zero_optimization": zero}
    torch.nn.functional.linear = _LINEAR
    model, _, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    if world_size() == 1 and model.zero_optimization_stage() == 0:
        model.enable_backward_allreduce = False  # it would copy every gradient to and fro
    return model


def check_layers(module: nn.Module) -> None:
    """Refuse what cannot be trained on several ranks.

    Raises:
        ConfigError: A parameter without dimensions, which DeepSpeed 0.19.8 cannot broadcast, or a layer whose result
            depends on the other windows of its rank.
    """
    for name, parameter in module.named_parameters():
        if parameter.ndim == 0:
            raise ConfigError(f"parameter {name} has no dimension; give it the shape (1,)")
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm):
            raise ConfigError(
                f"module {name} is a {type(part).__name__}: its result would change with the number of workers and "
                "with the other windows of a batch; take GroupNorm or LayerNorm"
            )


def _compile_parts(objective: nn.Module) -> None:
    """Compile each part of the encoder by itself, in place, for any batch size.

    In place, so that parameters keep their names; by parts, for what lies between them (which channels are real)
    depends on the data, and equal blocks share one compiled code.
    """
    encoder: Any = objective.encoder
    for child in encoder.children():
        for part in child if isinstance(child, nn.ModuleList) else (child,):
            part.compile(dynamic=True)


class ClippingAdamW(torch.optim.AdamW):
    """AdamW as ZeRO's stages step: gradients are clipped, and one that is not finite changes nothing.

    Parameters without a gradient take part with zeros: they must not differ between ranks, nor between stages.

    Args:
        groups: As for AdamW, with their settings.
        max_norm: What the norm over all parameters is clipped to; 0 clips nothing.
    """

    def __init__(self, groups: list[dict[str, Any]], *, max_norm: float, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self._max_norm = max_norm
        self._global_grad_norm: torch.Tensor | None = None  # DeepSpeed takes it from an attribute of this name

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Clip and step."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        is_finite = bool(norm.isfinite())
        self._global_grad_norm = norm if is_finite else norm.new_tensor(math.inf)  # as ZeRO tells it
        if not is_finite:
            return
        if self._max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._max_norm, norm)
        super().step(closure)


def _adamw(objective: nn.Module, config: PretrainConfig) -> torch.optim.AdamW:
    """AdamW of torch: DeepSpeed's own is compiled at first use."""
    settings = config.optimizer
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            is_plain = parameter.ndim < 2 or name.rpartition(".")[2] in NO_DECAY
            (others if is_plain else decaying).append(parameter)
    both = [
        {"params": decaying, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in both if group["params"]]
    common: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    if config.zero_stage > 0:  # they clip and skip by themselves
        return torch.optim.AdamW(groups, **common)
    return ClippingAdamW(groups, max_norm=config.gradient_clipping, **common)


def learning_rate(step: int, config: OptimizerConfig, *, steps: int) -> float:
    """Learning rate of optimizer step `step` (the first is 0): a pure function, so nothing of it is saved."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    low = config.lr * config.final_lr_ratio
    return low + (config.lr - low) * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(model: Any, value: float) -> None:
    """Give `value` to every parameter group of an initialised model."""
    for group in model.optimizer.param_groups:
        group["lr"] = value


def train_step(
    model: Any, batches: Sequence[Any], *, cached_gradients: bool = False
) -> tuple[dict[str, torch.Tensor], float]:
    """Metrics (mean over the micro-batches) and gradient norm before clipping of one optimizer step.

    A step whose loss or gradient is not finite changes neither parameters nor moments; its norm is not finite.
    """
    sums: dict[str, torch.Tensor] = {}
    for loss, metrics in (cached_losses if cached_gradients else plain_losses)(model, batches):
        # A loss that is no number makes every gradient one, also where its own would have been finite: then the
        # norm, which all ranks share and which is looked at before a step, tells without another transfer.
        poison = torch.where(loss.detach().isfinite(), 1.0, float("nan"))
        model.backward(loss * poison)  # never loss.backward(): with two forward passes it is silently wrong
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
        model.step()
    means = {name: value / len(batches) for name, value in sums.items()}
    return means, float(model.get_global_grad_norm())


def gathered(model: Any, parameters: list[nn.Parameter], *, is_written: bool = False) -> Any:
    """Context in which `parameters` are whole; `is_written` sends rank 0's values to all when it ends."""
    if model.zero_optimization_stage() < 3 or not parameters:
        return nullcontext()
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if is_written else None)
