import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from adapters.status import LearnStatus
from engine.commit import Quarantined
from engine.status import Status, UnitRow
from jobs import status_screen
from jobs.data_verbs import status
from jobs.learn_screen import learn_screen
from jobs.status_screen import headline, run_screen, screen, time_text, watch, watch_run
from manifests.errors import ConfigError
from trainer.status import RunStatus
from trainer.watchdog import Heartbeat


def state(*states: str, is_running: bool = True, digest: str = "", speed: float | None = 0.5) -> Status:
    rows = [
        UnitRow(unit=f"{i:016d}", state=name, reason=f"why {i} [/x]" * (name != "done"), recordings=2, hours=1.0)
        for i, name in enumerate(states)
    ]
    bad = Quarantined(corpus="c", recording="r", path="p", reason="TIMEOUT", message="m", command="k")
    return Status(
        units=tuple(rows),
        quarantine=(bad, bad),
        num_waived=1,
        is_running=is_running,
        digest=digest,
        hours_per_s=speed,
        eta_s=None if speed is None else 4000.0,
        resume="kymo convert out/config.yaml",
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "?"), (45.4, "45 s"), (119, "119 s"), (600, "10 min"), (11_100, "3 h 05 min")]
)
def test_times_as_a_person_says_them(seconds: float | None, text: str) -> None:
    assert time_text(seconds) == text


def test_headline_tells_states_speed_and_what_to_do() -> None:
    running = str(headline(state("done", "running", "stalled")))
    assert "3 units: 1 done, 1 running, 1 stalled" in running
    assert "at 0.5 h/s, ETA 67 min" in running
    assert "1 unit at work" in running
    assert "scanning" in str(headline(state(speed=None)))
    assert "complete, snapshot abc" in str(headline(state("done", is_running=False, digest="abc")))
    stopped = str(headline(state("done", "pending", is_running=False)))
    assert stopped.endswith("stopped, no snapshot. Go on with: kymo convert out/config.yaml")
    assert "an earlier snapshot abc stands" in str(headline(state("pending", is_running=False, digest="abc")))


def drawn(value: object, *, width: int = 100, terminal: bool = False) -> str:
    text = io.StringIO()
    Console(file=text, width=width, force_terminal=terminal).print(value)
    return text.getvalue()


def test_the_screen_shows_who_needs_an_eye_first_and_fits() -> None:
    text = drawn(screen(state("done", "running", *["stalled"] * 30, "failed"), height=24))
    lines = text.splitlines()
    assert len(lines) <= 24
    assert "failed" in lines[4]
    assert "stalled" in lines[5]
    assert "[/x]" in lines[5]
    assert "… and 20 more" in text
    assert "quarantine (2, 1 of them waived): 2 TIMEOUT" in text


def test_without_a_terminal_a_block_is_printed_per_change(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(status_screen, "console", Console(file=text, width=200))
    same = state("running")
    watch([same, same, state("done"), state("done", is_running=False, digest="abc")])
    assert text.getvalue().count("1 units: ") == 3


def run_state(**changes: object) -> RunStatus:
    now = time.time()
    beat = Heartbeat(
        state="training", step=50, since=now, time=now, lived_s=900.0, attempt=2, world_size=3, host="h", pid=1
    )
    row = {"step": 50, "loss": 1.25, "grad_norm": 2.0, "windows_per_s": 310.0, "hours_per_s": 25.8, "data_wait": 0.012}
    row |= {"top1": 0.5, "rss_bytes": 1.2e9, "goodput": 0.93, "replaced": 0.0}
    settings: dict[str, object] = {
        "run_dir": "runs/[x]",
        "state": "training",
        "reason": "",
        "step": 50,
        "steps": 200,
        "row": row,
        "trend": (1.5, 1.25),
        "trend_steps": 40,
        "eta_s": 400.0,
        "checkpoint": "step-000000040-a2",
        "checkpoint_age_s": 30.0,
        "skipped": 0,
        "spikes": 0,
        "evaluation": {"top1": 0.5},
        "heartbeat": beat,
        "resume": "kymo pretrain runs/[x]/config.yaml",
    }
    return RunStatus(**{**settings, **changes})  # pyright: ignore[reportArgumentType]


def test_a_run_that_is_well_is_told_in_a_few_lines() -> None:
    text = drawn(run_screen(run_state()))
    for part in (
        "runs/[x]: training, 3 workers on h, start 2",
        "step 50 of 200 (25.0%), 7 min left",
        "1.2500, falling: 1.5000 → 1.2500 over the last 40 steps, top-1 0.500",
        "310 windows/s, 25.8 h/s, waits for data 1.2% of the time",
        "1.20 GB a worker",
        "93.0% of 15 min went into steps that count",
        "step-000000040-a2, 30 s old",
    ):
        assert part in text
    for part in ("look at", "go on with", "MFU", "GPU"):
        assert part not in text
    assert len(text.splitlines()) < 12


def test_a_run_that_learns_tasks_fits_a_terminal_of_80_columns() -> None:
    learned = LearnStatus(
        run_dir="runs/[x]",
        state="training",
        reason="",
        step=50,
        steps=200,
        loss={"staging": 1.25},
        scores={"staging": {"auroc": 0.5}},
        epochs={"staging": 0.75},
        step_s=0.5,
        windows_per_s=32.0,
        eta_s=400.0,
        checkpoint=40,
        skipped=0,
        resume="",
    )
    text = drawn(learn_screen(learned), width=80)
    for part in (
        "runs/[x]: training",
        "step 50 of 200 (25.0%), 7 min left",
        "0.5 s a step, 32 windows/s; checkpoint of step 40\n",
        "auroc 0.500",
    ):
        assert part in text


def test_what_is_wrong_with_a_run_is_told_with_the_remedy() -> None:
    row = {"step": 50, "loss": 1.25, "replaced": 2.0, "mfu": 0.41, "windows_per_s": 9.0, "cuda_bytes": 2e10}
    row["rss_bytes"] = 1e9
    wrong = run_state(row=row, state="died", reason="process 1", skipped=3, spikes=1, trend=(1.0, 1.2), checkpoint=None)
    text = drawn(run_screen(wrong), width=140)
    for part in (
        "runs/[x]: died",
        "process 1",
        "go on with: kymo pretrain runs/[x]/config.yaml",
        "rising: 1.0000 → 1.2000",
        "MFU 41.0%",
        "20.0 GB of a GPU at most",
        "none yet",
        "3 steps skipped (skipped.jsonl), 2 samples could not be read (kymo verify), 1 loss spike",
    ):
        assert part in text
    assert "steady" in drawn(run_screen(run_state(trend=(1.0, 1.001))))
    assert "no step was logged yet" in drawn(run_screen(run_state(row={}, trend=None)))


def test_without_a_terminal_a_line_is_printed_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(status_screen, "console", Console(file=text, width=200))
    watch_run([run_state(), run_state(), run_state(step=60), run_state(step=60, state="finished")])
    assert text.getvalue().count("loss 1.2500") == 3
    assert "runs/[x]: finished, step 60 of 200" in text.getvalue()


def test_the_verb_looks_at_what_a_folder_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("objective: {}\nrun_dir: x\nsteps: 7\n")
    status(str(tmp_path), watch=False, limit=0, as_json=True)
    state = json.loads(capsys.readouterr().out)
    assert (state["state"], state["steps"], state["row"]) == ("stopped", 7, {})
    (tmp_path / "config.yaml").write_text("output: x\n")
    with pytest.raises(ConfigError):
        status(str(tmp_path), watch=False, limit=0, as_json=True)
