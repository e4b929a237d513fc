"""Traps of DeepSpeed and of contrastive losses over ranks: ours is right, and what one would write first is not."""

import ast
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn.functional import cross_entropy, normalize

import trainer
from manifests.config import dump_yaml
from trainer.collectives import all_gather_rows, all_gather_with_grad, explained_timeouts
from trainer.config import PretrainConfig
from trainer.fragments import held_fragments
from trainer.loop import pretrain
from trainer.metrics import read_metrics
from trainer.models.build import build_encoder
from trainer.objectives.build import build_objective
from trainer.read import Window
from trainer.run import held_out_windows
from trainer.zero import initialise, join_processes, train_step

MakeConfig = Callable[..., PretrainConfig]
REPOSITORY = Path(trainer.__file__).parent.parent
WAYS = ("engine.backward", "loss.backward", "own slice put back")
STAGES = range(4)
SUBJECT_WITHOUT_RESP = 1  # of the tiny snapshot


def make_config(folder: Path, *, stage: int, **changes: Any) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            "run_dir": "unused",
            "snapshots": [{"path": str(folder)}],
            "evaluation": {"split": "train", "num_windows": 32},
            "encoder": {"kind": "sleep", "width": 16, "depth": 1},
            "objective": {"kind": "leave_one_out"},
            "steps": 1,
            "zero_stage": stage,
            "gradient_clipping": 0.0,
            **changes,
        }
    )


class Tower(nn.Module):
    """Two views go through it one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.log_scale = nn.Parameter(torch.ones(1))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return normalize(self.layers(rows), dim=-1) * self.log_scale.exp()


def views() -> tuple[torch.Tensor, torch.Tensor]:
    first = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    return first, first + 0.3 * torch.randn(8, 6, generator=torch.Generator().manual_seed(2))


def contrast(own: list[torch.Tensor], everywhere: list[torch.Tensor], *, start: int) -> torch.Tensor:
    """Loss of the own rows of two views against all rows of the other view."""
    labels = torch.arange(len(own[0])) + start
    return sum(cross_entropy(a @ b.T, labels) for a, b in zip(own, reversed(everywhere), strict=True)) / 2


def with_own_slice(rows: torch.Tensor, *, rank: int) -> torch.Tensor:
    """The trick that is refused: a gather without gradient with the own rows put back in."""
    parts = list(all_gather_rows(rows).split(len(rows)))
    parts[rank] = rows
    return torch.cat(parts)


def gradient_of_two_views(way: str, *, stage: int, rank: int, world: int) -> Any:
    model = initialise(Tower(), make_config(Path("unused"), stage=stage, global_batch=8))
    share = slice(8 // world * rank, 8 // world * (rank + 1))
    own = [model(view[share]) for view in views()]
    gather = all_gather_with_grad if way != WAYS[2] else lambda rows: with_own_slice(rows, rank=rank)
    loss = contrast(own, [gather(rows) for rows in own], start=share.start)
    try:
        if way == "loss.backward":
            loss.backward()
        else:
            model.backward(loss)
        model.step()
    except (RuntimeError, KeyError) as error:
        return repr(error)[:200]
    return moments(model)


def moments(model: Any) -> dict[str, tuple[int, torch.Tensor]]:
    """Fragments of the gradient of the only step so far: Adam's first moment over 1 - 0.9, alike at every stage."""
    return {f.name: (f.start, f.tensors["exp_avg"].clone() * 10) for f in held_fragments(model)}


def make_objective(config: PretrainConfig) -> Any:
    torch.manual_seed(0)
    return build_objective(build_encoder(config.encoder), config.objective)


def lacking_config(folder: Path, kind: str, *, stage: int) -> PretrainConfig:
    univariate = {
        "encoder": {"kind": "univariate", "width": 16, "depth": 1, "conv_channels": [4, 4, 8]},
        "objective": {"kind": "nt_xent", "kinds": ["resp"], "rates_hz": [32, 64], "crop_s": 2.0, "near_s": 0.0},
    }
    return make_config(folder, stage=stage, **(univariate if kind == "nt_xent" else {}))


def share_of(windows: list[Window], *, rank: int) -> list[Window]:
    """Rank 0 gets the windows without breathing, rank 1 those with it."""
    return [window for window in windows if ("resp" in window.arrays) == (rank == 1)]


def gradient_where_a_modality_lacks(folder: Path, kind: str, *, stage: int, rank: int) -> Any:
    config = lacking_config(folder, kind, stage=stage)
    model = initialise(make_objective(config), config)
    windows = share_of(held_out_windows(config), rank=rank)
    assert windows
    train_step(model, [model.module.collate(windows, seed=0)])
    return moments(model)


def run_rank(rank: int, port: int, snapshot: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    join_processes("auto")
    found: dict[str, Any] = {
        f"{way} {stage}": gradient_of_two_views(way, stage=stage, rank=rank, world=2)
        for way in WAYS
        for stage in STAGES
    }
    for kind in ("leave_one_out", "nt_xent"):
        for stage in STAGES:
            found[f"{kind} {stage}"] = gradient_where_a_modality_lacks(snapshot, kind, stage=stage, rank=rank)
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(
    tiny_snapshot: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., None]
) -> list[dict[str, Any]]:
    """What two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(run_rank, tiny_snapshot, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def relative_error(ranks: list[dict[str, Any]], key: str, expected: nn.Module) -> float:
    """Norm of the error of the gradient that the ranks hold together, over that of the expected one."""
    error = total = 0.0
    for name, parameter in expected.named_parameters():
        gradient = torch.zeros(parameter.shape) if parameter.grad is None else parameter.grad
        got = torch.full((gradient.numel(),), float("nan"))
        for found in ranks:
            if name in found[key]:
                start, values = found[key][name]
                got[start : start + len(values)] = values
        error += float((got - gradient.flatten()).square().sum())
        total += float(gradient.square().sum())
    return (error / total) ** 0.5


def whole_tower() -> Tower:
    tower = Tower()
    rows = [tower(view) for view in views()]
    contrast(rows, rows, start=0).backward()
    return tower


@pytest.mark.parametrize("stage", STAGES)
def test_backward_through_the_engine_is_exact_after_two_forward_passes(stage: int, ranks: list[dict[str, Any]]) -> None:
    assert relative_error(ranks, f"engine.backward {stage}", whole_tower()) < 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_loss_backward_is_wrong_or_fails(stage: int, ranks: list[dict[str, Any]]) -> None:
    key = f"loss.backward {stage}"
    assert isinstance(ranks[0][key], str) or relative_error(ranks, key, whole_tower()) > 0.01


@pytest.mark.parametrize("stage", STAGES)
def test_the_own_slice_put_back_into_a_gather_is_wrong(stage: int, ranks: list[dict[str, Any]]) -> None:
    assert relative_error(ranks, f"own slice put back {stage}", whole_tower()) > 0.1


def test_there_is_one_gather_and_one_backward() -> None:
    """In the source: rows are gathered in collectives.py alone, and only `model.backward` is called.

    Nets that an evaluation trains for comparison are plain modules in one process, without DeepSpeed.
    """
    gathers, backwards = set(), set()
    gc.disable()  # as in tests/test_layout.py: a parse within a parse kills the outer one in Python 3.11
    try:
        trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in (REPOSITORY / "trainer").rglob("*.py")}
    finally:
        gc.enable()
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr.startswith(("all_gather", "_all_gather")) and not node.func.attr.endswith("_object"):
                    gathers.add(path.name)
                if node.func.attr == "backward":
                    backwards.add((path.name, ast.unparse(node.func)))
    assert gathers == {"collectives.py"}
    assert backwards == {("zero.py", "model.backward"), ("scratch.py", "loss.backward")}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["leave_one_out", "nt_xent"])
def test_a_rank_without_a_modality_runs_every_module(
    kind: str, stage: int, ranks: list[dict[str, Any]], tiny_snapshot: Path
) -> None:
    config = lacking_config(tiny_snapshot, kind, stage=stage)
    objective = make_objective(config)
    windows = held_out_windows(config)
    assert all(share_of(windows, rank=rank) for rank in range(2))
    objective(objective.collate(windows, seed=0).to("cpu"))[0].backward()
    # fp32 sums over another split of the batch; measured 1.3e-6.
    assert relative_error(ranks, f"{kind} {stage}", objective) < 1e-5


class Branches(nn.Module):
    """A model that skips the branch of a modality when its batch has none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, rows: torch.Tensor, *, has_both: bool) -> torch.Tensor:
        out = self.first(rows).square().mean()
        return out + self.second(rows).square().mean() if has_both else out


def run_branches(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=8)
    )
    join_processes("auto", timeout_s=8)
    model = initialise(Branches(), make_config(Path("unused"), stage=3, global_batch=8))
    outcome = "went through"
    try:
        with explained_timeouts(8):
            for _ in range(2):
                model.backward(model(views()[0], has_both=rank == 0))
                model.step()
            distributed.barrier()
    except (RuntimeError, TimeoutError, AssertionError) as error:
        outcome = repr(error)
    (folder / f"{rank}.txt").write_text(outcome)
    os._exit(0)  # the group is broken and must not be left in order


def test_a_skipped_module_breaks_zero_3(tmp_path: Path, run_ranks: Callable[..., None]) -> None:
    """Why every rank runs every module: otherwise the ranks wait for each other in different collectives."""
    run_ranks(run_branches, tmp_path)
    assert any((tmp_path / f"{rank}.txt").read_text() != "went through" for rank in range(2))


SILENT_RANK = """
import os, sys, time
from manifests.config import load_config
from trainer import loop
from trainer.config import PretrainConfig
step = loop.train_step
def sleep_at_step_two(model, *arguments, **options):
    if os.environ["RANK"] == "1" and model.global_steps == 2:
        time.sleep(600)
    return step(model, *arguments, **options)
loop.train_step = sleep_at_step_two
loop.pretrain(load_config(PretrainConfig, sys.argv[1]))
"""


def test_a_silent_rank_ends_the_others_with_a_message(
    tiny_config: MakeConfig, two_ranks: Callable[[], list[dict[str, str]]], tmp_path: Path
) -> None:
    config = tiny_config(collective_timeout_s=10, zero_stage=2, evaluation=None)
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(config.model_dump(mode="json")))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SILENT_RANK, str(path)],
            env={**os.environ, **environment},
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in two_ranks()
    ]
    try:
        _, errors = processes[0].communicate(timeout=180)
        assert processes[0].returncode not in {0, None}
        assert "rank 0 of 2: another rank did not answer for 10 s (collective_timeout_s)" in errors
        assert processes[1].poll() is None, "the silent rank was to sleep on"
        assert [row["step"] for row in read_metrics(config.run_dir)] == [1, 2]
    finally:
        for process in processes:
            process.kill()
            process.wait()


LOCKED = """
import faulthandler, sys
import torch, deepspeed, deepspeed.comm
from trainer.zero import join_processes
if sys.argv[1] == "ours":
    join_processes("auto")
else:
    faulthandler.dump_traceback_later(10, exit=True)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False)
deepspeed.comm.all_reduce(torch.ones(1))
print("went on")
"""


@pytest.mark.parametrize("way", ["ours", "deepspeed's"])
def test_the_lock_of_a_killed_build_holds_nobody_up(way: str, tmp_path: Path) -> None:
    operator = tmp_path / "deepspeed_shm_comm"
    operator.mkdir()
    (operator / "lock").touch()
    finished = subprocess.run(
        [sys.executable, "-c", LOCKED, way],
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "LOCAL_RANK": "0", "LOCAL_SIZE": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert ("went on" in finished.stdout) == (way == "ours"), finished.stderr
    if way == "ours":
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["deepspeed_shm_comm", "lock"], (
            "something was built"
        )
    else:
        assert "baton" in finished.stderr


def test_bf16_stays_near_fp32(tiny_config: MakeConfig) -> None:
    settings = {"encoder": {"kind": "sleep", "width": 16, "depth": 1}, "evaluation": None}
    losses = {}
    for precision in ("fp32", "bf16", "auto"):
        config = tiny_config(precision, **settings, precision=precision)
        pretrain(config)
        losses[precision] = [row["loss"] for row in read_metrics(config.run_dir)]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=1e-2)
    assert losses["bf16"] != losses["fp32"]
    assert losses["auto"] == losses["bf16" if torch.cuda.is_available() else "fp32"]
