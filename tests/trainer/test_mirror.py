import json
from pathlib import Path

import pytest

from trainer.metrics import read_metrics
from trainer.mirror import fetch, newest_stored, send
from trainer.paths import read_skipped, write_skipped


def write_rows(folder: Path, rows: list[tuple[int, float]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": x}) + "\n" for s, x in rows))


def rows_of(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(folder)]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ([], [(1, 0.9), (2, 0.8), (4, 0.7)]),
        ([(1, 0.9)], [(1, 0.9), (2, 0.8), (4, 0.7)]),
        # What this machine did after a checkpoint that another went on from is not the run's.
        ([(1, 0.9), (3, 0.1)], [(1, 0.9), (2, 0.8), (4, 0.7)]),
        ([(1, 0.9), (2, 0.8), (4, 0.7), (6, 0.6)], [(1, 0.9), (2, 0.8), (4, 0.7), (6, 0.6)]),
    ],
)
def test_the_rows_of_the_store_come_first(
    tmp_path: Path, own: list[tuple[int, float]], expected: list[tuple[int, float]]
) -> None:
    write_rows(tmp_path / "store", [(1, 0.9), (2, 0.8), (4, 0.7)])
    write_rows(tmp_path / "run", own)
    fetch(tmp_path / "run", tmp_path / "store")
    assert rows_of(tmp_path / "run") == expected


@pytest.mark.parametrize(("own", "stays"), [([(1, 0.9), (2, 0.8)], True), ([(1, 0.9), (2, 0.1)], False)])
def test_curves_of_rows_that_another_machine_replaced_are_deleted(
    tmp_path: Path, own: list[tuple[int, float]], *, stays: bool
) -> None:
    write_rows(tmp_path / "store", [(1, 0.9), (2, 0.8)])
    write_rows(tmp_path / "run", own)
    curves = tmp_path / "run" / "tensorboard" / "events.out.tfevents.1.host.2.3"
    curves.parent.mkdir()
    curves.touch()
    fetch(tmp_path / "run", tmp_path / "store")
    assert curves.exists() == stays


def test_a_store_without_rows_changes_nothing(tmp_path: Path) -> None:
    write_rows(tmp_path / "run", [(1, 0.9)])
    (tmp_path / "store").mkdir()
    fetch(tmp_path / "run", tmp_path / "store")
    assert rows_of(tmp_path / "run") == [(1, 0.9)]


def test_what_is_sent_is_what_is_fetched(tmp_path: Path) -> None:
    for name in ("run", "store", "other"):
        (tmp_path / name).mkdir()
    write_rows(tmp_path / "run", [(1, 0.9)])
    write_skipped(tmp_path / "run", [{"step": 1, "loss": "nan", "grad_norm": "nan", "keys": ["a"]}])
    (tmp_path / "run" / "config.yaml").write_text("steps: 3\n")
    send(tmp_path / "run", tmp_path / "store")
    fetch(tmp_path / "other", tmp_path / "store")
    assert rows_of(tmp_path / "other") == [(1, 0.9)]
    assert read_skipped(tmp_path / "other") == read_skipped(tmp_path / "run")
    assert (tmp_path / "store" / "config.yaml").read_text() == "steps: 3\n"
    assert not (tmp_path / "other" / "config.yaml").exists()


def test_the_newest_checkpoint_on_a_disk_is_a_committed_one(tmp_path: Path) -> None:
    assert newest_stored(tmp_path) is None
    for name in ("step-000000003-a1", "step-000000005-a1", ".tmp-step-000000007-a1", "damaged-step-000000006-a1"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "MANIFEST.json").write_text("{}")
    newest = newest_stored(tmp_path)
    assert newest is not None
    assert newest[0] == "step-000000005-a1"
