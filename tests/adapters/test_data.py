import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from adapters.config import TaskRun
from adapters.data import TaskData, describe_data, load_task_data, read_spread
from manifests.errors import ConfigError
from manifests.shards import SAMPLES_FILE, SNAPSHOT_FILE, load_snapshot
from manifests.tasks import Task, load_task
from trainer.data import Order

Rows = list[dict[str, Any]]


def altered(folder: Path, target: Path, *, change: Callable[[dict[str, Any]], None], **facts: str) -> Path:
    """A copy of a snapshot whose index rows were changed, with facts added to its corpus."""
    shutil.copytree(folder, target)
    table = pq.read_table(target / SAMPLES_FILE)
    rows = table.to_pylist()
    for row in rows:
        change(row)
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), target / SAMPLES_FILE)
    snapshot = load_snapshot(folder)
    corpora = {name: {**entry, **facts} for name, entry in snapshot.corpora.items()}
    sha = hashlib.sha256((target / SAMPLES_FILE).read_bytes()).hexdigest()
    snapshot = snapshot.model_copy(update={"samples_sha256": sha, "corpora": corpora})
    snapshot = snapshot.model_copy(update={"digest": snapshot.content_digest()})
    (target / SNAPSHOT_FILE).write_text(json.dumps(snapshot.model_dump(mode="json")))
    return target


@pytest.fixture
def staging(task_files: dict[str, Path]) -> Task:
    return load_task(task_files["sleep_staging"])


def load(task: Task, *folders: Path) -> TaskData:
    return load_task_data(task, TaskRun(task=task.id, snapshots=[str(folder) for folder in folders]))


def with_changes(task: Task, **changes: Any) -> Task:
    return Task.model_validate({**task.model_dump(), **changes})


DEEP = {"loss": "bce", "labels": ["deep"], "map": {"N3": "deep", "W": None, "R": None, "?": None}}


def test_another_window_than_the_tasks_is_refused(staging: Task, snapshots: dict[str, Path]) -> None:
    assert load(staging, snapshots["staged"]).splits["train"].counts["W"] == 4 * 4
    with pytest.raises(ConfigError, match=r"wants windows of 30 s, recipe tiny_psg has 8 s; convert with sleep128"):
        load(with_changes(staging, window_s=30), snapshots["staged"])
    assert load(with_changes(staging, window_s=None), snapshots["staged"]).recipe["window_s"] == 8


def test_windows_of_a_grid_are_not_those_at_events(staging: Task, snapshots: dict[str, Path]) -> None:
    task = with_changes(staging, recipe="eeg200_trials")
    with pytest.raises(
        ConfigError, match="its windows lie at events, those of the snapshot on a grid; convert with eeg"
    ):
        load(task, snapshots["staged"])


def test_another_split_than_the_tasks_is_refused(staging: Task, snapshots: dict[str, Path], tmp_path: Path) -> None:
    folder = altered(snapshots["staged"], tmp_path / "s", change=lambda _: None, split_name="strict")
    task = with_changes(staging, corpora={"staged": "official", "elsewhere": "folds"})
    with pytest.raises(ConfigError, match=r"converted with the split 'strict', the task's is 'official'; convert with"):
        load(task, folder)
    found = load(with_changes(staging, corpora={"staged": "strict"}), folder)
    assert load(with_changes(staging, corpora={"staged": None}), folder).splits["test"].counts["R"] == 8
    assert describe_data(found)["corpora"]["staged"]["split_name"] == "strict"


def test_a_person_on_two_sides_is_refused_unless_the_split_has_it_so(
    staging: Task, snapshots: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    turn = {"train": "test", "val": "val", "test": "train"}

    def swap(row: dict[str, Any]) -> None:
        row["split"] = turn[row["split"]]
        row["key"] = row["key"] + "-again"

    other = altered(snapshots["staged"], tmp_path / "other", change=swap, split_name="strict")
    with pytest.raises(ConfigError, match=r"6 person\(s\) stand in train and in test .* one split"):
        load(staging, snapshots["staged"], other)
    leaky = altered(snapshots["staged"], tmp_path / "leaky", change=swap, split_name="within_session")
    with caplog.at_level(logging.WARNING):
        load(staging, snapshots["staged"], leaky)
    assert "as the split of staged (within_session) has it" in caplog.text


def test_windows_that_cannot_be_used_are_counted_by_reason(
    staging: Task, task_files: dict[str, Path], snapshots: dict[str, Path], tmp_path: Path
) -> None:
    assert load(staging, snapshots["staged"]).splits["test"].left_out == {"no label of the task": 2 * 4}

    def change(row: dict[str, Any]) -> None:
        number = int(row["key"].rpartition("-")[2])
        if number == 0:
            row["classes"] = ["426783006", "164889003"]
        if number == 1:
            row["symbols"] = []
        if number == 2:
            row["classes"] = ["55930002"]

    folder = altered(snapshots["coded"], tmp_path / "coded", change=change)
    found = load(load_task(task_files["rhythm"]), folder).splits["train"]
    assert found.left_out == {"two labels of the task": 4, "channels missing": 4, "no label of the task": 4}
    assert len(found) == 4 * 21
    assert not {key for key in found.targets if key.endswith(("-000000", "-000001", "-000002"))}


def test_an_unscored_epoch_is_neither_a_yes_nor_a_no(staging: Task, snapshots: dict[str, Path]) -> None:
    found = load(with_changes(staging, **DEEP), snapshots["staged"]).splits["train"]
    assert found.counts == {"deep": 4 * 4, "not deep": 4 * 8}
    assert found.left_out == {"no label of the task": 4 * 12}  # N1, N2 and the unscored
    assert set(found.targets.values()) == {(0,), ()}


def test_a_yes_or_no_is_drawn_as_the_balance_says(staging: Task, snapshots: dict[str, Path]) -> None:
    for balance, expected in ((0.0, {1: 60, 0: 60}), (1.0, {1: 40, 0: 80})):
        item = load(with_changes(staging, **DEEP, balance=balance), snapshots["staged"])
        train = item.splits["train"]
        assert len(train.streams) == 2
        order = Order(train.streams, seed=0, global_batch=12)
        drawn = [train.streams[a.stream].keys[a.row] for step in range(10) for a in order.batch(step)]
        assert Counter(len(train.targets[key]) for key in drawn) == expected


def test_several_yes_or_no_labels_are_drawn_as_they_come(
    task_files: dict[str, Path], snapshots: dict[str, Path]
) -> None:
    rhythm = load_task(task_files["rhythm"])
    item = load(with_changes(rhythm, loss="bce", balance=0.0), snapshots["coded"])
    assert len(item.splits["train"].streams) == 1
    assert item.splits["train"].counts["af"] == 4 * 6


def test_an_answer_without_a_training_window_is_named(
    staging: Task, snapshots: dict[str, Path], tmp_path: Path
) -> None:
    def only_deep(row: dict[str, Any]) -> None:
        row["stage"] = "N3" if row["split"] == "train" else row["stage"]

    folder = altered(snapshots["staged"], tmp_path / "deep", change=only_deep)
    with pytest.raises(ConfigError, match="no training window for not deep in"):
        load(with_changes(staging, **DEEP), folder)


@pytest.mark.parametrize("parts", [1, 2, 3, 9])
def test_parts_of_a_split_have_each_batch_once(staging: Task, snapshots: dict[str, Path], parts: int) -> None:
    labelled = load(staging, snapshots["staged"]).splits["test"]
    whole = [[w.key for w in windows] for windows in read_spread(labelled, limit=33, batch=7)]
    dealt = [
        [[w.key for w in windows] for windows in read_spread(labelled, limit=33, batch=7, part=part, parts=parts)]
        for part in range(parts)
    ]
    assert [dealt[number % parts][number // parts] for number in range(len(whole))] == whole
    assert sum(map(len, dealt)) == len(whole)
