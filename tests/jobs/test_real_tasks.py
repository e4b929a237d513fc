"""Tasks that the recordings at hand can train: from the files to labelled windows by split."""

import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from adapters.config import AdaptConfig, TaskRun
from adapters.data import TaskData, load_task_data
from engine.config import ConvertConfig
from engine.convert import convert_all
from manifests.config import load_config
from manifests.corpora import load_corpus, recording_split
from manifests.tasks import load_task

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "jobs" / "configs"
Load = Callable[..., TaskData]


@pytest.fixture
def load(shared_data: Path, tmp_path: Path) -> Load:
    """Function that converts some shared files for a task and gives its windows."""

    def loaded(name: str, folder: str, files: Iterable[str], *corpora: str, split: str = "strict") -> TaskData:
        task = load_task(name)
        for file in files:
            target = tmp_path / "recordings" / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(shared_data / folder / file, target)
        sources = [{"corpus": corpus, "root": str(tmp_path / "recordings"), "split": split} for corpus in corpora]
        values: dict[str, Any] = {"output": str(tmp_path / "out"), "recipe": task.recipe, "sources": sources}
        convert_all(ConvertConfig.model_validate({**values, "num_cpus": 1}))
        return load_task_data(task, TaskRun(task=name, snapshots=[str(tmp_path / "out")]))

    return loaded


def counts(data: TaskData) -> dict[str, dict[str, int]]:
    return {split: labelled.counts for split, labelled in data.splits.items() if len(labelled)}


def test_wake_and_deep_sleep_of_ucddb(load: Load) -> None:
    names = [f"ucd{person}_stage{stage}.mat" for person in ("002", "007") for stage in ("wake", "deep")]
    data = load("wake_deep", "ucddb_epochs", names, "ucddb_epochs_mat")
    assert counts(data) == {"train": {"wake": 121, "deep": 87}, "val": {"wake": 84, "deep": 127}}


def test_fists_of_eegmmidb(load: Load) -> None:
    names = [f"{person}/{person}R04.edf" for person in ("S001", "S002", "S003")]
    found = load("motor_imagery", "eegmmidb", names, "eegmmidb")
    assert set(counts(found)) == {"train", "val", "test"}
    assert all(sum(labels.values()) == 15 for labels in counts(found).values())  # every trial of a run, once
    assert all(labelled.left_out == {"no label of the task": 15} for labelled in found.splits.values())  # rest


def test_trials_of_eegmmidb_as_mteeg_cuts_them(load: Load) -> None:
    names = ["S001/S001R04.edf", "S001/S001R06.edf"]
    data = load("physionet_mi", "eegmmidb", names, "eegmmidb", "eegmmidb_feet", split="mteeg")
    found = data.splits["train"]
    assert found.counts == {"rest": 30, "left": 8, "right": 7, "fists": 7, "feet": 8}  # a rest before each movement
    assert not found.left_out
    assert not len(data.splits["val"]) + len(data.splits["test"])


def test_rhythms_of_the_challenge(load: Load, shared_data: Path) -> None:
    task, corpus, root = load_task("rhythm"), load_corpus("challenge2021"), shared_data / "challenge2021_12lead"
    chosen: dict[tuple[str, str], list[Path]] = {}
    for header in sorted(root.rglob("*.hea")):
        path = header.relative_to(root)
        codes = re.findall(r"\d+", (re.search(r"#\s*Dx:(.*)", header.read_text()) or [""])[0])
        rhythms = {task.map[code] for code in codes if task.map.get(code)}
        if len(rhythms) == 1:
            chosen.setdefault((recording_split(corpus, str(path)), str(*rhythms)), []).append(path)
    named = [(split, label, path) for (split, label), paths in chosen.items() for path in paths[:2]]
    records = [str(path.with_suffix(end)) for _, _, path in named for end in (".hea", ".mat")]
    data = load("rhythm", "challenge2021_12lead", records, "challenge2021")
    expected: dict[str, dict[str, int]] = {}
    for split, label, _ in named:
        expected.setdefault(split, dict.fromkeys(task.labels, 0))[label] += 1
    assert counts(data) == expected
    assert all(expected["train"].values())


def test_fibrillation_of_cpsc_2021(load: Load, shared_data: Path) -> None:
    names = [path.name for path in (shared_data / "cpsc2021_af").glob("data_*_*.*") if "_21_9" not in path.name]
    data = load("af", "cpsc2021_af", names, str(CONFIGS / "real/cpsc2021_four.yaml"))
    train, test = data.splits["train"], data.splits["test"]
    assert train.counts == {"af": 51, "not af": 74}  # 8 is in fibrillation throughout, 21 never
    assert test.counts["not af"] > 10  # 101 goes in and out of it
    assert test.counts["af"] > 100
    assert not train.left_out
    assert not set(train.subjects.values()) & set(test.subjects.values())


@pytest.mark.parametrize("path", sorted((CONFIGS).rglob("adapt*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_names_tasks_that_ship(path: Path) -> None:
    config = load_config(AdaptConfig, path)
    assert all(load_task(run.task).id == run.task for run in config.tasks)
    text = path.read_text()
    assert all(word in text for word in ("# Cost:", "# Command: ", "Result:"))


@pytest.mark.parametrize("path", sorted((CONFIGS).rglob("convert*.yaml")), ids=lambda path: path.stem)
def test_a_conversion_names_corpora_and_splits_that_ship(path: Path) -> None:
    config = load_config(ConvertConfig, path)
    for source in config.sources:
        load_corpus(REPOSITORY / source.corpus if source.corpus.endswith(".yaml") else source.corpus).with_split(
            source.split
        )
