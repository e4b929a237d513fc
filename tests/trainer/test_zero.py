import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional

from manifests.errors import ConfigError
from trainer import zero
from trainer.config import OptimizerConfig, PretrainConfig
from trainer.zero import (
    as_carried_out,
    deepspeed_dict,
    gathered,
    initialise,
    join_processes,
    learning_rate,
    train_step,
)


def config(**changes: object) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            "run_dir": "unused",
            "snapshots": [{"path": "unused"}],
            "encoder": {"kind": "sleep"},
            "objective": {"kind": "leave_one_out"},
            "steps": 10,
            "zero_stage": 0,
            **changes,
        }
    )


def test_the_learning_rate_warms_up_and_then_follows_a_cosine() -> None:
    settings = OptimizerConfig(lr=1.0, warmup_steps=4, final_lr_ratio=0.1)
    values = [learning_rate(step, settings, steps=104) for step in range(105)]
    assert values[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert values[54] == pytest.approx(0.1 + 0.9 * 0.5)
    assert values[104] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in pairwise(values[4:]))
    assert learning_rate(50, OptimizerConfig(lr=1.0, schedule="constant"), steps=60) == 1.0


def test_one_dimensional_parameters_and_temperatures_do_not_decay() -> None:
    class Objective(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)
            self.log_scale = nn.Parameter(torch.zeros(1, 1))

    join_processes("auto")
    model = initialise(Objective(), config(optimizer={"weight_decay": 0.3}))
    decaying, others = model.optimizer.param_groups
    assert [p.shape for p in decaying["params"]] == [(4, 3)]
    assert {tuple(p.shape) for p in others["params"]} == {(4,), (1, 1)}
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.3, 0.0)


def test_a_parameter_without_dimensions_is_refused_with_the_remedy() -> None:
    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor(1.0))

    join_processes("auto")
    with pytest.raises(ConfigError, match=r"temperature.*\(1,\)"):
        initialise(Scalar(), config())


def test_batch_norm_is_refused_with_the_remedy() -> None:
    join_processes("auto")
    with pytest.raises(ConfigError, match=r"module 1 is a BatchNorm1d.*GroupNorm or LayerNorm"):
        initialise(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), config())


class Regression(nn.Module):
    """Mean squared error, so that the mean over equal micro-batches is that of the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = (self.layers(rows).squeeze(1) - rows.sum(dim=1)).square().mean()
        return loss, {"loss": loss.detach()}


@pytest.mark.parametrize("clipping", [0.0, 0.1])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("stage", range(4))
def test_clipping_and_accumulation_are_those_of_torch(stage: int, parts: int, clipping: float) -> None:
    join_processes("auto")
    settings = config(
        zero_stage=stage,
        gradient_accumulation=parts,
        gradient_clipping=clipping,
        optimizer={"lr": 0.05, "weight_decay": 0.0},
    )
    model, plain = initialise(Regression(), settings), Regression()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for step in range(3):
        rows = torch.randn(6, 3, generator=torch.Generator().manual_seed(step))
        metrics, norm = train_step(model, list(rows.chunk(parts)))
        optimizer.zero_grad()
        loss, _ = plain(rows)
        loss.backward()
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), clipping or math.inf)
        optimizer.step()
        assert norm == pytest.approx(float(expected), rel=1e-5)
        assert norm > 0.1, "nothing would be clipped"
        assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    parameters = dict(model.module.named_parameters())
    with gathered(model, list(parameters.values())):
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(parameters[name].detach(), parameter.detach(), rtol=1e-4, atol=1e-6)


def test_only_one_rank_takes_stage_0_whatever_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = config(zero_stage=2)
    assert as_carried_out(asked) == asked.model_copy(update={"zero_stage": 0})
    monkeypatch.setattr(zero, "world_size", lambda: 2)
    assert as_carried_out(asked) == asked


class PartlyUsed(Regression):
    """A weight that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(2, 2))


@pytest.mark.parametrize("stage", range(3))
def test_a_weight_without_a_gradient_decays_at_every_stage(stage: int) -> None:
    join_processes("auto")
    model = initialise(PartlyUsed(), config(zero_stage=stage, optimizer={"lr": 0.1, "weight_decay": 0.5}))
    for step in range(2):
        train_step(model, [torch.randn(6, 3, generator=torch.Generator().manual_seed(step))])
    torch.testing.assert_close(model.module.unused.detach(), torch.full((2, 2), (1 - 0.1 * 0.5) ** 2))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_bucket_of_gradients_is_no_larger_than_the_model(stage: int) -> None:
    join_processes("auto")
    model = initialise(Regression(), config(zero_stage=stage))
    assert model.zero_reduce_bucket_size() == 3 * 8 + 8 + 8 + 1


def test_a_run_after_one_under_zero_3_multiplies_as_torch_does() -> None:
    join_processes("auto")
    initialise(Regression(), config())
    linear = functional.linear
    initialise(Regression(), config(zero_stage=3))
    assert functional.linear is not linear, "DeepSpeed replaces it no more; nor need trainer.zero"
    initialise(Regression(), config())
    assert functional.linear is linear


def test_the_dict_follows_the_configuration() -> None:
    join_processes("auto")
    made = deepspeed_dict(config(zero_stage=2, precision="bf16", global_batch=64, gradient_accumulation=4))
    assert made["zero_optimization"]["stage"] == 2
    assert made["torch_autocast"]["enabled"]
    assert made["train_micro_batch_size_per_gpu"] * made["gradient_accumulation_steps"] == 64
    assert made["checkpoint"]["tag_validation"] == "Fail"
    assert made["torch_autocast"]["dtype"] == "bfloat16"
    assert not deepspeed_dict(config(precision="fp32"))["torch_autocast"]["enabled"]
    assert config().precision == "auto"
    assert deepspeed_dict(config())["torch_autocast"]["enabled"] == torch.cuda.is_available()
    with pytest.raises(ConfigError, match="global_batch"):
        deepspeed_dict(config(global_batch=2, gradient_accumulation=4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_nccl_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a GPU"):
        join_processes("nccl")


def test_cosine_never_leaves_its_bounds_after_the_last_step() -> None:
    settings = OptimizerConfig(lr=1.0, final_lr_ratio=0.0)
    assert math.isclose(learning_rate(500, settings, steps=10), 0.0, abs_tol=1e-12)
