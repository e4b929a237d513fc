import itertools
import json
import logging
import math
import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer import metrics_writer
from trainer.metrics import read_metrics
from trainer.metrics_writer import MetricsWriter


def write(writer: MetricsWriter, steps: range) -> None:
    for step in steps:
        writer.write(step, {"loss": 1.0 / step, "lr": 1e-3, "grad_norm": None, "bad": math.nan, "windows_per_s": 10.0})
    writer.close()


def test_a_row_per_step_with_speed_and_eta(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(0.0, 2.0)  # s
    monkeypatch.setattr(metrics_writer.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO):
        write(MetricsWriter(tmp_path, step=0, steps=10), range(1, 4))
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[2]["eta_s"] == 14.0
    assert not rows[0].keys() & {"grad_norm", "bad"}  # not given, and nothing that JSON can say
    assert "step 3/10  loss 0.3333" in caplog.text
    assert "10 windows/s  ETA 0:14" in caplog.text


def test_rows_after_the_checkpoint_are_cut_off_when_a_run_goes_on(tmp_path: Path) -> None:
    write(MetricsWriter(tmp_path, step=0, steps=10), range(1, 8))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # killed in the middle of a row
    write(MetricsWriter(tmp_path, step=5, steps=10), range(6, 11))
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 11))
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    write(MetricsWriter(tmp_path, step=0, steps=10, is_active=False), range(1, 4))
    assert list(tmp_path.iterdir()) == []


def curves_of(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir / "tensorboard")).Reload()


def test_curves_are_written_for_tensorboard(tmp_path: Path) -> None:
    write(MetricsWriter(tmp_path, step=0, steps=10), range(1, 4))
    events = curves_of(tmp_path)
    assert next((item.step, item.value) for item in events.Scalars("loss")) == (1, 1.0)
    assert "time" not in events.Tags()["scalars"]


def test_where_only_the_rows_came_the_curves_begin_at_the_first_step(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    write(MetricsWriter(here, step=0, steps=10), range(1, 8))
    there.mkdir()
    shutil.copy(here / "metrics.jsonl", there)
    for step in (5, 8):  # the second start finds curves, and draws nothing twice
        write(MetricsWriter(there, step=step, steps=10), range(step + 1, step + 4))
    rows = read_metrics(there)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    for name in ("loss", "windows_per_s"):
        curve = curves_of(there).Scalars(name)
        assert [(item.step, item.wall_time) for item in curve] == [(row["step"], row["time"]) for row in rows]
        assert [item.value for item in curve] == pytest.approx([row[name] for row in rows])
    assert curves_of(there).Tags()["scalars"] == curves_of(here).Tags()["scalars"]
