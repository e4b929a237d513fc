import itertools
import json
import logging
import math
from pathlib import Path

import pytest

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


def test_curves_are_written_for_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(MetricsWriter(tmp_path, step=0, steps=10), range(1, 4))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert next((item.step, item.value) for item in events.Scalars("loss")) == (1, 1.0)
    assert "time" not in events.Tags()["scalars"]
