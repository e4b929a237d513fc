import json
import shutil
from pathlib import Path

import pytest

from adapters.layout import read_manifest
from manifests.config import dump_yaml
from manifests.tasks import load_task


@pytest.mark.parametrize("verb", ["verify", "show", "add-task", "merge"])
def test_each_verb_of_bundle_shows_an_example(kymo, verb: str) -> None:
    code, text = kymo("bundle", verb, "--help")
    assert code == 0
    assert f"Example: kymo bundle {verb} " in " ".join(text.split())


def test_show_tells_tasks_scores_data_licences_and_origin(kymo, bundle_dir: Path) -> None:
    code, text = kymo("bundle", "show", bundle_dir)
    assert code == 0
    manifest = read_manifest(bundle_dir)
    for part in (
        "W, N1, N2, N3, R",
        "Cohen's kappa",
        "unknown",  # what pretraining has seen: the encoder of the tests does not tell
        "synthetic_psg",
        "licence of the bundle: other",
        f"base: sleep, 0 steps of pretraining, {manifest.base.sha256[:16]}",
        "temporal encoder: trained",
        "seed 0",
    ):
        assert part in text, part


def test_verify_tells_sound_from_damaged_and_of_licences(kymo, bundle_dir: Path, tmp_path: Path) -> None:
    code, text = kymo("bundle", "verify", bundle_dir)
    assert code == 0
    assert "same logits as at its maker's: sleep_staging, rhythm" in text
    assert "same filtered signal as at its maker's: sleep_staging, rhythm" in text
    assert "licence: base sleep" in text
    assert "(no licence stated)" in text
    copy = Path(shutil.copytree(bundle_dir, tmp_path / "copy"))
    head = copy / "adapters" / "rhythm" / "head.safetensors"
    head.write_bytes(head.read_bytes()[:-1] + b"\x7f")
    code, text = kymo("bundle", "verify", copy)
    assert code == 5
    assert "head.safetensors" in text
    assert "another SHA-256" in text
    assert kymo("bundle", "verify", copy, "--task", "sleep_staging")[0] == 0
    assert kymo("bundle", "verify", tmp_path)[0] == 2


def test_a_task_is_added_from_a_yaml_and_from_another_bundle(kymo, bundle_dir: Path, tmp_path: Path) -> None:
    task = load_task("rhythm").model_copy(update={"id": "second"})
    (tmp_path / "second.yaml").write_text(dump_yaml(task.model_dump(mode="json")))
    run = {
        "run_dir": str(tmp_path / "run"),
        "tasks": [
            {"task": str(tmp_path / "second.yaml"), "snapshots": [str(bundle_dir.parent / "ecg128")], "batch": 4}
        ],
        "steps": 2,
        "eval_every": 2,
        "eval_windows": 8,
    }
    (tmp_path / "run.yaml").write_text(dump_yaml(run))
    code, text = kymo("bundle", "add-task", bundle_dir, tmp_path / "run.yaml", "--out", tmp_path / "grown")
    assert code == 0, text
    assert "with sleep_staging, rhythm, second" in text
    before, after = read_manifest(bundle_dir), read_manifest(tmp_path / "grown")
    old = [name for name in before.files if name not in ("README.md", "scores.png")]
    assert all(after.files[name] == before.files[name] for name in old)
    code, text = kymo("bundle", "add-task", bundle_dir, tmp_path / "grown", "--out", tmp_path / "joined")
    assert code == 0, text
    assert (tmp_path / "joined" / "bundle.json").read_bytes() == (tmp_path / "grown" / "bundle.json").read_bytes()
    code, text = kymo("bundle", "add-task", tmp_path / "grown", tmp_path / "run.yaml", "--out", tmp_path / "grown")
    assert code == 2
    assert "has a task second already" in text


def test_a_task_is_merged_into_its_base(kymo, bundle_dir: Path, tmp_path: Path) -> None:
    code, text = kymo("bundle", "merge", bundle_dir, "rhythm", "--out", tmp_path / "merged")
    assert code == 0, text
    assert "the same logits as with the adapter" in text
    assert json.loads((tmp_path / "merged" / "task.json").read_text())["task"]["id"] == "rhythm"
    assert "read by adapters.merge.load_merged" in " ".join(kymo("bundle", "show", tmp_path / "merged")[1].split())
    assert "load_merged" not in kymo("bundle", "show", tmp_path)[1]
    code, text = kymo("bundle", "merge", bundle_dir, "snoring", "--out", tmp_path / "other")
    assert code == 2
    assert "bundle has no task 'snoring'" in text
