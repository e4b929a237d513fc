"""Cached gradients equal those of the undivided batch, temperature included, on any number of ranks and ZeRO stage."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from manifests.errors import ConfigError
from trainer import gradient_cache
from trainer.config import PretrainConfig
from trainer.fragments import held_fragments
from trainer.gradient_cache import cached_losses, plain_losses
from trainer.loop import pretrain
from trainer.metrics import read_metrics
from trainer.models.build import build_encoder
from trainer.objectives.build import build_objective
from trainer.read import Window
from trainer.run import held_out_windows
from trainer.zero import deepspeed_dict, initialise, join_processes, train_step

NUM_WINDOWS, NUM_PARTS = 14, 3
SLEEP = {
    "encoder": {"kind": "sleep", "width": 16, "depth": 1},
    "objective": {"kind": "leave_one_out", "mask_same_recording": True},
}
UNIVARIATE = {
    "encoder": {"kind": "univariate", "width": 16, "depth": 1, "conv_channels": [4, 4, 8]},
    "objective": {"kind": "nt_xent", "kinds": ["eeg", "ecg"], "rates_hz": [32, 64], "crop_s": 2.0, "near_s": 4.0},
}
OBJECTIVES = {"leave_one_out": SLEEP, "nt_xent": UNIVARIATE}


def make_config(folder: Path, kind: str, **changes: Any) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            "run_dir": "unused",
            "snapshots": [{"path": str(folder)}],
            "evaluation": {"split": "train", "num_windows": NUM_WINDOWS},
            "steps": 1,
            "global_batch": NUM_WINDOWS,
            "gradient_accumulation": NUM_PARTS,
            "gradient_clipping": 0.0,
            **OBJECTIVES[kind],
            **changes,
        }
    )


def make_objective(config: PretrainConfig) -> Any:
    torch.manual_seed(0)
    return build_objective(build_encoder(config.encoder), config.objective)


def parts_of(objective: Any, windows: list[Window], *, rank: int = 0, world: int = 1) -> list[Any]:
    """Micro-batches of a rank, together the windows of its share."""
    shares = [windows[r * len(windows) // world : (r + 1) * len(windows) // world] for r in range(world)]
    share, parts = shares[rank], []
    for number in range(NUM_PARTS):
        low, high = (n * len(share) // NUM_PARTS for n in (number, number + 1))
        parts.append(objective.collate(share[low:high], seed=0))
    return parts


def whole_gradients(objective: Any, windows: list[Window]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients and metrics of the undivided batch, by torch alone."""
    objective.zero_grad()
    loss, metrics = objective(objective.collate(windows, seed=0).to("cpu"))
    loss.backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}, metrics


class TorchModel:
    """What `train_step` uses of DeepSpeed's object, in plain torch."""

    device = torch.device("cpu")

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, *arguments: Any) -> Any:
        return self.module(*arguments)

    def gradients(self, losses: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
        self.module.zero_grad()
        metrics = []
        for loss, values in losses:
            (loss / NUM_PARTS).backward()
            metrics.append(values)
        return {name: p.grad.clone() for name, p in self.module.named_parameters() if p.grad is not None}, metrics


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_in_double_precision_the_gradient_is_that_of_the_undivided_batch(kind: str, tiny_snapshot: Path) -> None:
    config = make_config(tiny_snapshot, kind)
    windows = held_out_windows(config)
    objective = make_objective(config).double()
    expected, whole_metrics = whole_gradients(objective, windows)
    model, parts = TorchModel(objective), parts_of(objective, windows)
    got, metrics = model.gradients(cached_losses(model, parts))
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")
    for values in metrics:
        assert {k: float(v) for k, v in values.items()} == pytest.approx(
            {k: float(v) for k, v in whole_metrics.items()}
        )
    # Plain accumulation contrasts each micro-batch with itself: another gradient, as documented.
    plain, _ = model.gradients(plain_losses(model, parts))
    assert relative_error(plain, expected) > 0.05


def relative_error(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over all parameters against the norm of what was expected."""
    difference = torch.cat([(got[name] - expected[name]).flatten() for name in expected])
    return float(difference.norm() / torch.cat([g.flatten() for g in expected.values()]).norm())


def test_the_second_pass_draws_the_same_dropout(tiny_snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tiny_snapshot, "leave_one_out", encoder={**SLEEP["encoder"], "dropout": 0.3})
    objective = make_objective(config).double()
    parts = parts_of(objective, held_out_windows(config))
    model = TorchModel(objective)

    torch.manual_seed(5)
    embedded = [objective.embed(part.to("cpu")) for part in parts]
    objective.zero_grad()
    together = {name: torch.cat([e[name] for e in embedded]) for name in embedded[0]}
    objective.loss({**together, "log_scale": objective.log_scale})[0].backward()
    expected = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}

    torch.manual_seed(5)
    got, _ = model.gradients(cached_losses(model, parts))
    assert relative_error(got, expected) < 1e-12
    monkeypatch.setattr(gradient_cache, "_set_random_state", lambda *_: None)
    torch.manual_seed(5)
    other, _ = model.gradients(cached_losses(model, parts))
    assert relative_error(other, expected) > 1e-2


def deepspeed_gradients(folder: Path, *, rank: int, world: int) -> dict[str, dict[str, Any]]:
    """Per objective and ZeRO stage the fragments (start, values) of the gradient that this rank holds.

    Adam's first moment after one step is (1 - beta1) times the gradient, and every stage keeps it.
    """
    found = {}
    for kind in OBJECTIVES:
        for stage in range(4):
            config = make_config(folder, kind, zero_stage=stage, cached_gradients=True)
            model = initialise(make_objective(config), config)
            train_step(
                model, parts_of(model.module, held_out_windows(config), rank=rank, world=world), cached_gradients=True
            )
            beta1 = config.optimizer.betas[0]
            found[f"{kind} {stage}"] = {
                f.name: (f.start, f.tensors["exp_avg"].clone() / (1 - beta1)) for f in held_fragments(model)
            }
    return found


def run_rank(rank: int, port: int, snapshot: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    join_processes("auto")
    torch.save(deepspeed_gradients(snapshot, rank=rank, world=2), folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def fragments(
    tiny_snapshot: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., None]
) -> dict[int, list[dict[str, Any]]]:
    """World size to what each of its ranks holds."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(run_rank, tiny_snapshot, folder)
    join_processes("auto")
    return {
        1: [deepspeed_gradients(tiny_snapshot, rank=0, world=1)],
        2: [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)],
    }


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_under_deepspeed_the_gradient_is_that_of_the_undivided_batch(
    kind: str, stage: int, world: int, fragments: dict[int, list[dict[str, Any]]], tiny_snapshot: Path
) -> None:
    config = make_config(tiny_snapshot, kind)
    expected, _ = whole_gradients(make_objective(config), held_out_windows(config))
    got = {name: torch.full((gradient.numel(),), float("nan")) for name, gradient in expected.items()}
    for of_rank in fragments[world]:
        for name, (start, values) in of_rank[f"{kind} {stage}"].items():
            got.setdefault(name, torch.zeros(start + len(values)))[start : start + len(values)] = values
    assert relative_error({name: got[name].view_as(g) for name, g in expected.items()}, expected) < 1e-6
    if "log_scale" in expected:
        assert float(got["log_scale"]) == pytest.approx(float(expected["log_scale"]), rel=1e-6)


def test_a_run_in_parts_has_the_losses_of_the_undivided_run(tiny_config: Any) -> None:
    plain = {"encoder": SLEEP["encoder"], "steps": 4, "evaluation": None}
    pretrain(tiny_config("whole", **plain))
    parted = {**plain, "gradient_accumulation": 2, "cached_gradients": True}
    pretrain(tiny_config("parts", **parted))
    pretrain(tiny_config("cut", **parted, stop_at=2))
    pretrain(tiny_config("cut", **parted))
    losses = {
        name: [row["loss"] for row in read_metrics(tiny_config(name).run_dir)] for name in ("whole", "parts", "cut")
    }
    assert losses["parts"] == pytest.approx(losses["whole"], rel=1e-5)
    assert losses["cut"] == losses["parts"]


def test_parts_of_one_are_refused_with_the_remedy(tmp_path: Path) -> None:
    join_processes("auto")
    with pytest.raises(ConfigError, match="set gradient_accumulation"):
        deepspeed_dict(make_config(tmp_path, "nt_xent", gradient_accumulation=1, cached_gradients=True))
