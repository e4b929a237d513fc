import json
from collections.abc import Callable
from pathlib import Path

import pytest

from manifests.config import dump_yaml
from trainer.tiny import write_tiny_snapshot

Kymo = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two tiny corpora: 32 and 40 training windows of 8 s."""
    folder = tmp_path_factory.mktemp("run")
    write_tiny_snapshot(folder / "a", corpus="a")
    write_tiny_snapshot(folder / "b", corpus="b", num_subjects=7)
    path = folder / "run.yaml"
    plain = {
        "run_dir": str(folder / "never_made"),
        "snapshots": [{"path": str(folder / name)} for name in "ab"],
        "encoder": {"kind": "sleep", "width": 16, "depth": 1},
        "objective": {"kind": "leave_one_out"},
        "global_batch": 9,
        "steps": 16,
    }
    path.write_text(dump_yaml(plain))
    return path


def test_mix_shows_a_table_per_stretch_of_steps(kymo: Kymo, config: Path) -> None:
    code, text = kymo("mix", config)
    assert code == 0
    assert "steps 0 to 16: 72 samples, 0.2 h" in text
    assert "44.44%" in text
    code, text = kymo("mix", config, "curriculum=[{from_step: 4, weights: {a: 2, b: 1}}]", "--json")
    assert code == 0
    rows = {(row["from_step"], row["corpus"]): row for row in json.loads(text)}
    assert rows[0, "a"]["repeats"] == pytest.approx(0.5, rel=0.1)
    assert rows[4, "a"]["share"] == pytest.approx(2 / 3, abs=0.001)
    assert rows[4, "a"]["to_step"] == 16
    assert not (config.parent / "never_made").exists()


def test_mix_names_the_corpus_that_has_no_weight(kymo: Kymo, config: Path) -> None:
    code, text = kymo("mix", config, "weights={a: 1}")
    assert code == 2
    assert "weights: corpus 'b': has no weight" in text


def test_simulate_tells_what_the_run_asks_for(kymo: Kymo, config: Path) -> None:
    code, text = kymo("simulate", config, "--windows-per-s", "100", "--disk-mb-s", "0.001")
    assert code == 0
    assert "72 samples, 0.2 h" in text
    assert "the disk is slower than the training reads" in text
    code, text = kymo("simulate", config, "--cache-gb", "1", "--cache-gb", "0", "--steps", "8", "--json")
    assert code == 0
    found = json.loads(text)
    assert [cache["cache_bytes"] for cache in found["caches"]] == [10**9, 0]
    assert found["caches"][0]["downloads_per_shard"] == 1.0
    assert found["caches"][1]["hit_rate"] < found["caches"][0]["hit_rate"]
    assert found["windows_per_s"] == pytest.approx(28_800 / 8)
    assert found["disk_mb_s"] > 0
    assert found["steps"] == 8
