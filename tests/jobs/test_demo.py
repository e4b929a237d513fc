"""`kymo demo` as a newcomer runs it: everything is made, a killed worker comes back, and there is learning."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from manifests.config import read_yaml
from trainer.score import score_run

# Twice what it takes beside other work on two cores.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

MIN_RETRIEVAL = 5.0  # times chance, on held-out subjects
MIN_STAGING_MARGIN = 0.3  # balanced accuracy above chance, on held-out subjects


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of a finished demo."""
    out = tmp_path_factory.mktemp("demo") / "out"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "jobs.cli", "demo", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=1100)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out, done.stdout


def test_pretraining_learns_on_held_out_subjects(demo: tuple[Path, str]) -> None:
    scores = score_run(demo[0] / "runs" / "sleep", split="test", num_windows=256)
    assert scores["top1"] >= MIN_RETRIEVAL * scores["chance"]


def test_staging_is_better_than_chance_by_the_stated_margin(demo: tuple[Path, str]) -> None:
    scores = json.loads((demo[0] / "runs" / "adapt" / "result.json").read_text())["scores"]
    staging = scores["sleep_staging"]["test"]["metrics"]["balanced_accuracy"]
    assert staging["value"] >= staging["chance"] + MIN_STAGING_MARGIN


def test_the_killed_worker_lost_no_step_and_doubled_none(demo: tuple[Path, str]) -> None:
    out, text = demo
    assert "was killed (-9)" in text
    rows = [json.loads(line) for line in (out / "runs" / "sleep" / "metrics.jsonl").read_text().splitlines()]
    every = read_yaml(out / "runs" / "sleep" / "config.yaml")["log_every"]
    steps = [row["step"] for row in rows]
    assert steps == list(range(every, steps[-1] + 1, every))
    assert len(list((out / "runs" / "sleep" / "checkpoints").glob("step-*-a2"))) > 0


def test_everything_that_the_table_names_is_there(demo: tuple[Path, str]) -> None:
    out, text = demo
    assert (out / "report.html").stat().st_size > 100_000
    assert (out / "preview.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "bundle" / "bundle.json").exists()
    predicted = {path.stem for path in (out / "predictions").glob("*.csv")}
    assert len({stem.partition(".")[0] for stem in predicted}) == 2  # two recordings, each by the tasks that it suits
    for suffix in ("edf", "png"):
        assert {path.stem for path in (out / "predictions").glob(f"*.{suffix}")} == predicted
    assert list((out / "runs" / "univariate").glob("**/events.out.tfevents.*"))
    assert "what was made" in text
