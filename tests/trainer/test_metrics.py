from pathlib import Path

from trainer.metrics import describe, read_metrics


def test_rows_in_their_order_without_half_a_last_one(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_the_line_for_a_person_shows_hours_and_held_out_retrieval() -> None:
    row = {"step": 40, "loss": 1.5, "lr": 1e-3, "windows_per_s": 310.4, "eta_s": 3661.0}
    assert describe(row, steps=200) == "step 40/200  loss 1.5000  lr 1.0e-03  310 windows/s  ETA 1:01:01"
    assert "held-out top-1 0.500 (chance 0.100)" in describe(row | {"eval_top1": 0.5, "eval_chance": 0.1}, steps=200)


def test_the_line_for_a_person_tells_what_is_wrong_and_only_that() -> None:
    row = {"step": 40, "lr": 1e-3, "windows_per_s": 310.4, "eta_s": 61.0, "data_wait": 0.01, "skipped": 0.0}
    assert describe(row, steps=200) == "step 40/200  loss nan  lr 1.0e-03  310 windows/s  ETA 1:01"
    line = describe(row | {"data_wait": 0.31, "skipped": 2.0, "loss_spike": 9.2, "mfu": 0.412}, steps=200)
    for part in ("waits for data 31% of the time", "2 steps skipped", "spike of 9 sigma", "MFU 41.2%"):
        assert part in line
