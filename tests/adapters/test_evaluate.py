import json
import socket
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score, roc_auc_score
from torch import distributed as dist
from torch.multiprocessing import start_processes

from adapters import evaluate as module
from adapters.config import LoraSpec, TaskRun
from adapters.data import load_task_data
from adapters.evaluate import evaluate, mean_primary
from adapters.model import MultiTaskModel
from manifests.config import dump_yaml
from manifests.tasks import Task, load_task
from trainer.export import load_encoder


def scores_of(encoder: str, runs: list[dict], *, seed: int = 0) -> dict:
    """Scores of untrained adapters and heads on the test split: of no use, and the same on every machine."""
    data = {}
    for run in runs:
        settings = TaskRun.model_validate(run)
        task = load_task(settings.task)
        data[task.id] = load_task_data(task, settings)
    outputs = {name: len(item.task.labels) for name, item in data.items()}
    model = MultiTaskModel(load_encoder(Path(encoder)), outputs, lora=LoraSpec(r=4), seed=seed)
    return {"scores": evaluate(model, data, split="test", limit=1000), "mean": mean_primary({}, data)}


def run_rank(number: int, port: int, encoder: str, runs: list[dict], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=2)
    try:
        module.EVAL_BATCH = 8  # six or seven batches to deal
        (Path(folder) / f"{number}.json").write_text(json.dumps(scores_of(encoder, runs)))
    finally:
        dist.destroy_process_group()


@pytest.fixture
def runs(snapshots, task_files, tmp_path) -> list[dict]:
    """Exclusive classes, several yes/no labels, and one."""
    rhythm = load_task(task_files["rhythm"])
    several = {"id": "several", "loss": "bce", "map": {**rhythm.map, "55930002": None}}
    deep = {"id": "deep", "loss": "bce", "labels": ["deep"], "map": {"N3": "deep", "W": None, "R": None, "?": None}}
    found = [{"task": str(task_files["sleep_staging"]), "snapshots": [str(snapshots["staged"])]}]
    for base, changes, snapshot in (("rhythm", several, "coded"), ("sleep_staging", deep, "staged")):
        path = tmp_path / f"{changes['id']}.yaml"
        values = load_task(task_files[base]).model_dump(mode="json")
        path.write_text(dump_yaml({**values, **changes}))
        found.append({"task": str(path), "snapshots": [str(snapshots[snapshot])]})
    return found


def test_two_ranks_give_the_scores_of_one_process(runs, encoder_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EVAL_BATCH", 8)
    alone = scores_of(str(encoder_dir), runs)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # One server forks the processes of a whole session: it imports what those of tests/trainer take long for, too.
    slow = ["trainer.loop", "deepspeed.runtime.zero.muon.muon_optimizer", "torch.distributed.fsdp"]
    get_context("forkserver").set_forkserver_preload([*slow, "adapters.model", "adapters.evaluate"])
    start_processes(run_rank, args=(port, str(encoder_dir), runs, str(tmp_path)), nprocs=2, start_method="forkserver")
    ranks = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)]
    assert ranks[0] == ranks[1] == json.loads(json.dumps(alone))
    assert set(alone["scores"]) == {"sleep_staging", "several", "deep"}


def test_scores_are_those_of_scikit_learn_on_what_the_model_says(runs, encoder_dir, monkeypatch):
    said = []
    real = module.task_probabilities
    monkeypatch.setattr(module, "task_probabilities", lambda task, logits: said.append(real(task, logits)) or said[-1])
    for run in (runs[0], runs[2]):
        said.clear()
        task = load_task(run["task"])
        truth, subjects = [], set()
        labelled = load_task_data(task, TaskRun.model_validate(run)).splits["test"]
        for stream in labelled.streams:
            truth += [labelled.targets[key] for key in stream.keys]
            subjects |= {labelled.subjects[key] for key in stream.keys}
        found = scores_of(str(encoder_dir), [run])["scores"][task.id]
        probabilities = torch.cat(said).numpy()
        metrics = {name: entry["value"] for name, entry in found["metrics"].items()}
        assert list(metrics) == list(task.metrics)
        assert found["subjects"] == len(subjects) == 2
        assert all(entry["interval"] for entry in found["metrics"].values())
        if task.loss == "bce":
            is_yes = np.array([len(indices) for indices in truth])
            guess, auroc = probabilities[:, 0] > 0.5, roc_auc_score(is_yes, probabilities[:, 0])
            assert found["support"] == {"not deep": 2 * 8, "deep": 2 * 4}
        else:
            is_yes, guess = np.array(truth)[:, 0], probabilities.argmax(axis=1)
            auroc = roc_auc_score(is_yes, probabilities, multi_class="ovr")
        assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(is_yes, guess))
        assert metrics["kappa"] == pytest.approx(cohen_kappa_score(is_yes, guess))
        assert metrics["auroc"] == pytest.approx(auroc)


def test_the_mean_is_over_the_tasks_that_have_their_metric(runs):
    data = {}
    for run in runs[:2]:
        task: Task = load_task(run["task"])
        data[task.id] = load_task_data(task, TaskRun.model_validate(run))
    primary = [item.task.primary for item in data.values()]
    value = {"sleep_staging": {"metrics": {primary[0]: {"value": 0.25}}}}
    assert mean_primary(value, data) == 0.25
    both = {**value, "several": {"metrics": {primary[1]: {"value": 0.75}}}}
    assert mean_primary(both, data) == 0.5
    undefined = {**value, "several": {"metrics": {primary[1]: {"value": None}}}}
    assert mean_primary(undefined, data) == 0.25
    assert mean_primary({}, data) is None
