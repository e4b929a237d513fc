import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from manifests.config import dump_yaml, read_yaml
from manifests.errors import ConfigError
from trainer.config import PretrainConfig
from trainer.lock import hold
from trainer.loop import pretrain
from trainer.paths import HEARTBEAT_FILE, LAUNCH_LOCK_FILE
from trainer.status import is_run, run_status, watch
from trainer.storage import location
from trainer.watchdog import Heartbeat

MakeConfig = Callable[..., PretrainConfig]


@pytest.fixture(scope="module")
def run_of_eight(tmp_path_factory: pytest.TempPathFactory, tiny_snapshot: Path) -> Path:
    """A run that ended at its eighth and last step, made once."""
    folder = tmp_path_factory.mktemp("status") / "run"
    config = {
        "run_dir": str(folder),
        "snapshots": [{"path": str(tiny_snapshot)}],
        "encoder": {"kind": "sleep", "width": 16, "depth": 1},
        "objective": {"kind": "leave_one_out"},
        "steps": 8,
        "global_batch": 9,
        "log_every": 1,
        "save_every": 3,
    }
    pretrain(PretrainConfig.model_validate(config))
    return folder


@pytest.fixture
def run(run_of_eight: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_of_eight, tmp_path / "run"))


def beat(run: Path, **changes: Any) -> None:
    """Heartbeat of this process, now, in training."""
    now = time.time()
    plain = {"state": "training", "step": 5, "since": now, "time": now, "lived_s": 9.0, "attempt": 2, "world_size": 3}
    plain |= {"host": socket.gethostname(), "pid": os.getpid(), **changes}
    (run / HEARTBEAT_FILE).write_text(Heartbeat.model_validate(plain).model_dump_json())


def test_a_finished_run_tells_all_that_its_last_row_does(run: Path) -> None:
    state = run_status(run)
    assert (state.state, state.step, state.steps, state.reason) == ("finished", 8, 8, "")
    assert state.checkpoint is not None
    assert state.checkpoint.startswith("step-000000008-")
    assert state.checkpoint_age_s is not None
    assert 0 <= state.checkpoint_age_s < 600
    assert state.evaluation["n"] == 16
    assert state.trend is not None
    assert state.trend_steps == 7
    assert state.eta_s is None
    assert {"loss", "windows_per_s", "hours_per_s", "data_wait", "rss_bytes", "goodput"} <= state.row.keys()
    assert json.loads(json.dumps(state.to_json()))["heartbeat"]["world_size"] == 1
    assert [item.state for item in watch(run)] == ["finished"]


def test_while_it_lives_its_own_word_counts_and_what_is_left_is_told(run: Path) -> None:
    beat(run)
    state = run_status(run)
    assert (state.state, state.eta_s) == ("training", 0.0)
    beat(run, state="saving", since=time.time() - 500)
    assert run_status(run).state == "saving"


def test_a_checkpoint_in_an_object_store_is_known_from_the_one_who_saved_it(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    beat(run)
    assert run_status(run).checkpoint is None
    beat(run, checkpoint="step-000000005-a2", checkpoint_time=time.time() - 40)
    state = run_status(run)
    assert state.checkpoint == "step-000000005-a2"
    assert state.checkpoint_age_s == pytest.approx(40, abs=5)


def test_a_process_without_steps_is_stalled(run: Path) -> None:
    beat(run, since=time.time() - 70)
    state = run_status(run)
    assert state.state == "stalled"
    assert "no step for 70 s" in state.reason


def test_a_process_that_is_gone_has_died_and_that_of_another_machine_when_it_is_silent(run: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    beat(run, pid=gone.pid)
    assert run_status(run).state == "died"
    beat(run, pid=gone.pid, host="elsewhere")
    assert run_status(run).state == "training"
    beat(run, host="elsewhere", time=time.time() - 90)
    state = run_status(run)
    assert state.state == "died"
    assert "on elsewhere was last heard of at step 5, 90 s ago" in state.reason


def test_a_driver_that_lives_will_start_dead_workers_again(run: Path) -> None:
    beat(run, time=time.time() - 90)
    with hold(run / LAUNCH_LOCK_FILE):
        os.utime(run / LAUNCH_LOCK_FILE, (0, time.time() - 200))
        assert run_status(run).state == "restarting"
        beat(run, state="failed", message="why")
        assert run_status(run).state == "restarting"
    state = run_status(run)
    assert (state.state, state.reason) == ("failed", "why")


def test_a_run_whose_driver_has_just_been_started_again_is_starting_whatever_it_said_before(run: Path) -> None:
    beat(run, state="stopped", time=time.time() - 90)
    assert run_status(run).state == "stopped"
    with hold(run / LAUNCH_LOCK_FILE):
        assert run_status(run).state == "starting"
        beat(run)
        assert run_status(run).state == "training"


def test_more_steps_than_it_was_finished_with_make_it_a_stopped_run(run: Path) -> None:
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("steps: 8", "steps: 20"))
    state = run_status(run)
    assert (state.state, state.steps) == ("stopped", 20)
    assert state.resume == f"kymo pretrain {path} --no-ray"


def test_the_command_that_goes_on_is_that_of_how_the_run_was_carried_out(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run / "config.yaml"
    beat(run, launcher="ray")
    assert run_status(run).resume == f"kymo pretrain {path}"
    beat(run, launcher="torchrun --nproc-per-node 2")
    assert run_status(run).resume == f"torchrun --nproc-per-node 2 -m jobs.cli pretrain {path} --no-ray"
    (run / HEARTBEAT_FILE).unlink()
    assert run_status(run).resume == f"kymo pretrain {path}"
    # A run that was started with a relative folder goes on from where it was started.
    config = read_yaml(path)
    path.write_text(dump_yaml({**config, "run_dir": "run"}))
    beat(run)
    assert run_status(run).resume == f"cd {tmp_path} && kymo pretrain run/config.yaml --no-ray"
    monkeypatch.chdir(tmp_path)
    assert run_status(Path("run")).resume == "kymo pretrain run/config.yaml --no-ray"
    assert run_status(run).resume == f"kymo pretrain {path} --no-ray"


def test_a_run_without_a_heartbeat_of_an_earlier_kymo(run: Path) -> None:
    (run / HEARTBEAT_FILE).unlink()
    assert run_status(run).state == "finished"


def test_skipped_and_replaced_samples_and_spikes_are_counted(run: Path) -> None:
    rows = [{"step": step, "loss": "nan", "grad_norm": "nan", "keys": ["a"]} for step in (2, 5, 9)]
    (run / "skipped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = run / "metrics.jsonl"
    last = json.loads(path.read_text().splitlines()[-1]) | {"loss_spike": 9.0, "replaced": 4.0}
    path.write_text(path.read_text() + json.dumps(last) + "\n")
    state = run_status(run)
    assert (state.skipped, state.spikes, state.row["replaced"]) == (2, 1, 4.0)


def test_only_a_run_folder_is_one(tmp_path: Path) -> None:
    assert not is_run(tmp_path)
    (tmp_path / "config.yaml").write_text("output: x\n")
    assert not is_run(tmp_path)
    with pytest.raises(ConfigError, match="holds no pretraining run"):
        run_status(tmp_path)


@pytest.mark.usefixtures("s3")
def test_a_run_on_another_machine_is_seen_from_its_store(tiny_config: MakeConfig, tmp_path: Path) -> None:
    UPath("s3://bucket").mkdir(exist_ok=True)
    store = f"s3://bucket/{tmp_path.name}"
    config = tiny_config("there", evaluation=None, storage=store)
    pretrain(config.model_copy(update={"stop_at": 4}))
    # Here is the configuration, and nothing was ever trained.
    here = tmp_path / "here"
    here.mkdir()
    shutil.copy(Path(config.run_dir, "config.yaml"), here)
    for place in (here, location(store)):
        state = run_status(place)
        assert (state.state, state.step, state.steps) == ("elsewhere", 4, 8)
        assert f"seen from {store}" in state.reason
        assert state.checkpoint == "step-000000004-a1"
        assert state.checkpoint_age_s is not None
        assert 0 <= state.checkpoint_age_s < 600
        assert state.row["loss"] == run_status(Path(config.run_dir)).row["loss"]
        assert [item.state for item in watch(place)] == ["elsewhere"]
        assert "elsewhere" in json.dumps(state.to_json())
    # A checkpoint that is not committed, or was found damaged, is none.
    last = location(store) / "checkpoints" / "step-000000004-a1"
    (last / "DAMAGED").write_text("why")
    assert run_status(here).checkpoint == "step-000000003-a1"
    (last / "DAMAGED").unlink()
    (last / "MANIFEST.json").unlink()
    assert run_status(here).checkpoint == "step-000000003-a1"
    pretrain(config)
    assert run_status(here).state == run_status(Path(config.run_dir)).state == "finished"


@pytest.mark.usefixtures("s3")
def test_the_folder_of_a_run_that_was_started_again_knows_the_checkpoint_in_its_store(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    UPath("s3://bucket").mkdir(exist_ok=True)
    config = tiny_config(evaluation=None, storage=f"s3://bucket/{tmp_path.name}", stop_at=3)
    pretrain(config)
    beat(Path(config.run_dir))  # of a start that has committed none yet
    state = run_status(Path(config.run_dir))
    assert (state.state, state.checkpoint) == ("training", "step-000000003-a1")


def test_a_storage_that_is_a_shared_folder_is_looked_at_too(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config(evaluation=None, storage=str(tmp_path / "shared"), stop_at=3)
    pretrain(config)
    state = run_status(tmp_path / "shared")
    assert (state.state, state.step, state.checkpoint) == ("elsewhere", 3, "step-000000003-a1")
