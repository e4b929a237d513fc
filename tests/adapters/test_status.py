import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapters.status import is_learn_run, learn_status, watch
from adapters.train import adapt
from jobs.cli import app
from trainer.lock import hold
from trainer.paths import LOCK_FILE


def test_a_run_tells_where_it_stands_while_it_trains_when_stopped_and_at_the_end(make_config):
    config = make_config(steps=6, log_every=1, eval_every=2, checkpoint_every=2, eval_windows=32)
    run_dir = Path(config.run_dir)
    seen = []

    def look(row: dict) -> None:
        seen.append(learn_status(run_dir))
        if row["step"] == 4 and row["split"] == "train":
            (run_dir / "STOP").touch()

    with pytest.raises(KeyboardInterrupt):
        adapt(config, report=look)
    # flock is per open file: the process that holds the lock sees it held as any other would.
    assert {state.state for state in seen} == {"training"}
    assert [state.step for state in seen] == [1, 2, 2, 3, 4, 4]
    assert seen[-1].eta_s is not None
    stopped = learn_status(run_dir)
    assert (stopped.state, stopped.step, stopped.checkpoint, stopped.eta_s) == ("stopped", 4, 4, None)
    assert stopped.resume == f"kymo adapt {run_dir / 'config.yaml'}"
    assert stopped.scores["rhythm"]["balanced_accuracy"] is not None
    result = adapt(config)
    finished = learn_status(run_dir)
    assert (finished.state, finished.step) == ("finished", 6)
    expected = result.scores["rhythm"]["test"]["metrics"]["balanced_accuracy"]["value"]
    assert finished.scores["rhythm"]["balanced_accuracy"] == expected
    assert [state.state for state in watch(run_dir)] == ["finished"]
    shown = CliRunner().invoke(app, ["status", str(run_dir)])
    assert shown.exit_code == 0, shown.output
    assert "step 6 of 6" in shown.output
    assert "rhythm" in shown.output


def test_other_folders_are_no_such_run(tmp_path):
    assert not is_learn_run(tmp_path)
    (tmp_path / "config.yaml").write_text("run_dir: a\nobjective: {}\nsteps: 3\nencoder: {}\n")
    assert not is_learn_run(tmp_path)


def test_a_run_before_its_first_row_is_training(tmp_path):
    (tmp_path / "config.yaml").write_text("run_dir: a\nsteps: 3\nencoder: e\ntasks: []\nlora: {}\n")
    with hold(tmp_path / LOCK_FILE):
        state = learn_status(tmp_path)
    assert (state.state, state.step, state.eta_s) == ("training", 0, None)


def test_the_status_of_a_run_loads_without_torch():
    command = "import sys, adapters.status; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
