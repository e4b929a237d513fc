import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manifests.errors import ConfigError, ContractError
from trainer import loop, meter, stopper
from trainer.config import PretrainConfig
from trainer.export import load_encoder, read_card
from trainer.loop import pretrain
from trainer.metrics import read_metrics
from trainer.run import held_out_windows
from trainer.run_folder import read_result
from trainer.tiny import write_tiny_snapshot

MakeConfig = Callable[..., PretrainConfig]


def losses(run_dir: str) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(run_dir)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float, float]]:
    """Rows of the run of `tiny_config`, from a snapshot of its own."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    write_tiny_snapshot(folder / "tiny")
    config = PretrainConfig.model_validate(
        {
            "run_dir": str(folder / "run"),
            "snapshots": [{"path": str(folder / "tiny")}],
            "encoder": {"kind": "sleep", "width": 16, "depth": 1, "dropout": 0.1},
            "objective": {"kind": "leave_one_out", "channel_dropout": 0.3},
            "steps": 8,
            "global_batch": 9,
            "log_every": 1,
            "seed": 4,
        }
    )
    pretrain(config)
    return losses(config.run_dir)


def test_a_run_leaves_metrics_checkpoints_and_an_encoder(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config(eval_every=4)
    result = pretrain(config)
    assert (result.step, result.is_finished) == (8, True)
    rows = read_metrics(config.run_dir)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert {"loss", "lr", "grad_norm", "top1", "alignment", "windows_per_s", "hours_per_s", "data_wait"} <= rows[
        0
    ].keys()
    assert {"rss_bytes", "goodput", "replaced", "skipped", "eta_s", "time"} <= rows[0].keys()
    assert 0 < rows[7]["goodput"] < 1
    assert [row["step"] for row in rows if "eval_top1" in row] == [4, 8]
    assert result.evaluation["n"] == 16
    assert result.evaluation["chance"] == pytest.approx(1 / 16)
    run_dir = tmp_path / "run"
    assert {"config.yaml", "version.json", "tensorboard"} <= {path.name for path in run_dir.iterdir()}
    assert [path.name[:14] for path in sorted((run_dir / "checkpoints").iterdir())] == [
        "step-000000003",
        "step-000000006",
        "step-000000008",
    ]
    assert read_card(result.encoder).step == 8
    assert read_card(result.encoder).recipes.keys() == {"tiny"}
    assert load_encoder(result.encoder).width == 16
    assert read_result(config) == result


def test_the_same_configuration_gives_the_same_losses(
    tiny_config: MakeConfig, uninterrupted: list[tuple[int, float, float]]
) -> None:
    pretrain(tiny_config())
    assert losses(tiny_config().run_dir) == uninterrupted
    pretrain(tiny_config("other", seed=5))
    assert losses(tiny_config("other").run_dir) != uninterrupted


def test_stopped_twice_and_started_again_the_losses_are_the_same_bit_for_bit(
    tiny_config: MakeConfig, uninterrupted: list[tuple[int, float, float]]
) -> None:
    for stop_at in (1, 5):
        result = pretrain(tiny_config(stop_at=stop_at))
        assert (result.step, result.is_finished) == (stop_at, False)
    assert pretrain(tiny_config()).is_finished
    assert losses(tiny_config().run_dir) == uninterrupted
    # Once more: nothing is left to do, and nothing changes.
    assert pretrain(tiny_config()).is_finished
    assert losses(tiny_config().run_dir) == uninterrupted


def test_a_run_killed_after_a_checkpoint_writes_each_step_once(
    tiny_config: MakeConfig, uninterrupted: list[tuple[int, float, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.train_step
    calls = []

    def die_at_step_five(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", die_at_step_five)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny_config())
    assert [row[0] for row in losses(tiny_config().run_dir)] == [1, 2, 3, 4]
    monkeypatch.undo()
    pretrain(tiny_config())  # from step 3: step 4 comes again
    assert losses(tiny_config().run_dir) == uninterrupted


def test_resume_goes_back_past_a_damaged_checkpoint(
    tiny_config: MakeConfig, uninterrupted: list[tuple[int, float, float]]
) -> None:
    result = pretrain(tiny_config(stop_at=6))
    assert result.checkpoint is not None
    weights = result.checkpoint / "zero_00000_of_00001.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    pretrain(tiny_config())
    assert losses(tiny_config().run_dir) == uninterrupted


@pytest.mark.parametrize("way", ["SIGTERM", "stop file"])
def test_asked_to_stop_it_saves_and_the_same_command_goes_on(
    way: str, tiny_config: MakeConfig, uninterrupted: list[tuple[int, float, float]]
) -> None:
    config = tiny_config(save="sync")  # async, the report of step 3 comes some steps later

    def ask(values: dict[str, float]) -> None:
        if values["step"] == 3:
            if way == "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                Path(config.run_dir, "STOP").touch()

    before = signal.getsignal(signal.SIGTERM)
    result = pretrain(config, report=ask)
    assert signal.getsignal(signal.SIGTERM) is before
    assert (result.step, result.is_finished) == (4, False)
    assert pretrain(config).is_finished
    assert losses(config.run_dir) == uninterrupted


def test_told_that_a_machine_goes_away_it_saves_at_once_and_trains_on(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopper, "NOTICE_EVERY_S", 0.0)
    answers = iter([False, True])
    seen: list[tuple[int, list[str]]] = []
    config = tiny_config(save_every=100, keep=9, evaluation=None)

    def notice() -> bool:
        steps = [path.name[:14] for path in Path(config.run_dir, "checkpoints").glob("step-*")]
        seen.append((len(read_metrics(config.run_dir)), steps))
        return next(answers, False)

    assert pretrain(config, notice=notice).is_finished
    # Asked after every step; the second answer makes a checkpoint that stands before the third step.
    assert seen[:3] == [(0, []), (1, []), (2, ["step-000000002"])]
    assert len(seen) == 8


def test_another_configuration_in_the_same_folder_is_refused_by_key(tiny_config: MakeConfig) -> None:
    pretrain(tiny_config(stop_at=1))
    with pytest.raises(ConfigError, match=r"optimizer\.lr: 0\.001 → 0\.5"):
        pretrain(tiny_config(optimizer={"lr": 0.5}))
    with pytest.raises(ConfigError, match=r"encoder\.width"):
        pretrain(tiny_config(encoder={"kind": "sleep", "width": 32}))
    free = {"log_every": 2, "save_every": 5, "eval_every": 3, "read_threads": 2, "prefetch": 1, "steps": 3}
    assert pretrain(tiny_config(**free)).step == 3


def test_more_steps_are_done_and_the_change_of_the_learning_rate_is_told(
    tiny_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    pretrain(tiny_config(steps=2, save_every=2))
    pretrain(tiny_config(steps=2, save_every=2, log_every=2))
    assert "learning rate" not in caplog.text
    assert pretrain(tiny_config(steps=3, save_every=2)).step == 3
    assert "steps: was 2, is 3; from here on the learning rate is that of a run of 3 steps" in caplog.text


def test_another_snapshot_at_the_same_path_is_refused(tiny_config: MakeConfig, tmp_path: Path) -> None:
    write_tiny_snapshot(tmp_path / "own")
    source = {"snapshots": [{"path": str(tmp_path / "own")}]}
    pretrain(tiny_config(**source, stop_at=1))
    shutil.rmtree(tmp_path / "own")
    write_tiny_snapshot(tmp_path / "own", seed=1)
    with pytest.raises(ContractError, match="snapshots it was trained on"):
        pretrain(tiny_config(**source))


@pytest.mark.usefixtures("zero_alone")
def test_accumulated_micro_batches_resume_too(tiny_config: MakeConfig) -> None:
    pretrain(tiny_config("full", gradient_accumulation=2, precision="bf16", zero_stage=2))
    pretrain(tiny_config(gradient_accumulation=2, precision="bf16", zero_stage=2, stop_at=4))
    pretrain(tiny_config(gradient_accumulation=2, precision="bf16", zero_stage=2))
    assert losses(tiny_config().run_dir) == losses(tiny_config("full").run_dir)


def test_univariate_pretraining_runs_through_the_same_loop(tiny_config: MakeConfig) -> None:
    univariate = {
        "encoder": {"kind": "univariate"},
        "objective": {"kind": "nt_xent", "kinds": ["eeg", "ecg"], "rates_hz": [64], "crop_s": 2.0},
    }
    pretrain(tiny_config("full", **univariate, steps=4))
    pretrain(tiny_config(**univariate, steps=4, stop_at=2))
    result = pretrain(tiny_config(**univariate, steps=4))
    assert losses(tiny_config().run_dir) == losses(tiny_config("full").run_dir)
    assert read_card(result.encoder).kind == "univariate"


@pytest.mark.parametrize("kind", ["leave_one_out", "nt_xent"])
def test_recorded_hours_and_operations_of_both_objectives_are_counted(
    kind: str, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter, "device_peak", lambda _: 1e12)
    univariate = {
        "encoder": {"kind": "univariate"},
        "objective": {"kind": "nt_xent", "kinds": ["eeg", "ecg"], "rates_hz": [64], "crop_s": 2.0},
    }
    config = tiny_config(steps=2, evaluation=None, **(univariate if kind == "nt_xent" else {}))
    pretrain(config)
    window_s = 2.0 if kind == "nt_xent" else 8.0
    for row in read_metrics(config.run_dir):
        assert 0 < row["mfu"] < 0.5
        assert row["hours_per_s"] == pytest.approx(row["windows_per_s"] * window_s / 3600)


def test_held_out_windows_are_the_same_every_time_and_of_their_split(tiny_config: MakeConfig) -> None:
    windows = held_out_windows(tiny_config(evaluation={"num_windows": 5}))
    assert [w.key for w in windows] == [
        w.key for w in held_out_windows(tiny_config(seed=9, evaluation={"num_windows": 5}))
    ]
    assert len(windows) == 5
    assert {w.meta["split"] for w in windows} == {"val"}
    assert held_out_windows(tiny_config(evaluation=None)) == []


def train_on_rank(number: int, port: int, plain: dict[str, Any]) -> None:
    """What each process of a group does, as torchrun would start it."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ.update({**group, "RANK": str(number), "LOCAL_RANK": str(number)})
    pretrain(PretrainConfig.model_validate(plain))


def test_two_processes_resume_bit_for_bit_and_one_goes_on_alone(
    tiny_config: MakeConfig, run_ranks: Callable[..., None]
) -> None:
    # Without dropout, whose draws differ between one rank and two.
    changes = {"zero_stage": 2, "encoder": {"kind": "sleep", "width": 16, "depth": 1}}
    full, cut, alone = (tiny_config(name, **changes) for name in ("full", "cut", "alone"))
    run_ranks(train_on_rank, full.model_dump(mode="json"))
    run_ranks(train_on_rank, cut.model_copy(update={"stop_at": 4}).model_dump(mode="json"))
    shutil.copytree(cut.run_dir, alone.run_dir)
    run_ranks(train_on_rank, cut.model_dump(mode="json"))
    assert losses(cut.run_dir) == losses(full.run_dir)
    assert [row[0] for row in losses(full.run_dir)] == list(range(1, 9))
    pretrain(alone)
    assert [row[1] for row in losses(alone.run_dir)] == pytest.approx(
        [row[1] for row in losses(full.run_dir)], rel=1e-5
    )
