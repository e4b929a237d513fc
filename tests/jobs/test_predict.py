"""`kymo predict`: a stranger's file through a bundle, and what it says when the file does not suit."""

import csv
from pathlib import Path

import edfio
import numpy as np
import pytest

from adapters.bundle import Bundle, load_bundle, write_bundle
from adapters.config import AdaptConfig, TaskRun
from adapters.predict import annotation_rows, write_csv
from adapters.train import adapt
from engine.annotate import write_annotations
from engine.config import ConvertConfig
from engine.convert import convert_all
from engine.synthetic import synthesise
from jobs.predict import predict_file, stranger
from manifests.errors import ConfigError, RecordingError
from manifests.recipes import load_recipe
from trainer.export import save_encoder
from trainer.models.sleep import SleepEncoder, SleepEncoderConfig


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recordings")
    synthesise(root, num_subjects=3, num_ecg=24, night_minutes=10)
    return root


@pytest.fixture(scope="module")
def bundle(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Bundle of both tasks after two steps: it predicts, not well."""
    root = tmp_path_factory.mktemp("bundle")
    for corpus, recipe in (("synthetic_psg", "sleep128"), ("synthetic_ecg", "ecg128")):
        source = {"corpus": corpus, "root": str(recordings)}
        settings = {"output": str(root / recipe), "recipe": recipe, "sources": [source], "quarantine_budget": 0.5}
        convert_all(ConvertConfig.model_validate(settings))
    recipes = {name: load_recipe(name).model_dump(mode="json") for name in ("sleep128", "ecg128")}
    encoder = SleepEncoder(SleepEncoderConfig(width=16, depth=1, num_heads=2))
    save_encoder(root / "encoder", encoder, recipes=recipes, step=0)
    result = adapt(
        AdaptConfig(
            run_dir=str(root / "run"),
            encoder=str(root / "encoder"),
            tasks=[
                TaskRun(task="sleep_staging", snapshots=[str(root / "sleep128")], batch=4),
                TaskRun(task="rhythm", snapshots=[str(root / "ecg128")], batch=4),
            ],
            steps=2,
            keep="last",
            eval_every=2,
            eval_windows=8,
        )
    )
    write_bundle(result, root / "bundle")
    return load_bundle(root / "bundle")


def test_a_night_is_predicted_by_the_task_that_it_suits(bundle: Bundle, recordings: Path, tmp_path: Path) -> None:
    path = recordings / "psg" / "sub-001" / "sub-001_psg.edf"
    found = predict_file(bundle, path, stranger(path, mains_hz=50))
    staging = [item for item in found.predictions if item.task == "sleep_staging"]
    assert len(staging) == 20  # ten minutes in epochs of 30 s
    assert [item.start / item.rate for item in staging] == [30 * n for n in range(20)]
    assert all(abs(sum(item.probabilities.values()) - 1) < 1e-5 for item in staging)

    write_csv(tmp_path / "p.csv", found.predictions)
    assert len(list(csv.DictReader((tmp_path / "p.csv").open()))) == len(found.predictions)
    write_annotations(tmp_path / "p.edf", annotation_rows(staging))
    texts = [annotation.text for annotation in edfio.read_edf(tmp_path / "p.edf").annotations]
    assert texts == [f"Sleep stage {item.label}" for item in staging]


def test_predictions_come_from_the_signal(bundle: Bundle, recordings: Path) -> None:
    found = {}
    for subject in ("sub-001", "sub-002"):
        path = recordings / "psg" / subject / f"{subject}_psg.edf"
        found[subject] = predict_file(bundle, path, stranger(path)).predictions[0].probabilities
    assert found["sub-001"] != found["sub-002"]


def test_a_file_without_the_channels_names_what_is_missing(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "belt.edf"
    signal = edfio.EdfSignal(np.sin(np.arange(64 * 60) / 20), 64, label="THOR RES", physical_dimension="mV")
    edfio.Edf([signal]).write(path)
    with pytest.raises(RecordingError, match=r"sleep_staging: task sleep_staging needs at least 1 eeg .*resp:thorax"):
        predict_file(bundle, path, stranger(path))


def _eeg(path: Path, *, rate: int, label: str = "X7", unit: str = "uV", seconds: int = 90) -> Path:
    data = 30 * np.random.default_rng(0).standard_normal(rate * seconds)
    edfio.Edf([edfio.EdfSignal(data, rate, label=label, physical_dimension=unit)]).write(path)
    return path


def test_an_unknown_label_can_be_named(bundle: Bundle, tmp_path: Path) -> None:
    path = _eeg(tmp_path / "x7.edf", rate=128)
    with pytest.raises(RecordingError, match="no channel that is known"):
        predict_file(bundle, path, stranger(path))
    found = predict_file(bundle, path, stranger(path, channels=["X7=eeg:C3-M2"]))
    assert len(found.predictions) == 3


def test_a_rate_that_cannot_carry_the_band_is_refused_with_both_numbers(bundle: Bundle, tmp_path: Path) -> None:
    path = _eeg(tmp_path / "slow.edf", rate=32, label="EEG C3-A2")
    with pytest.raises(RecordingError, match=r"too slow: eeg:C3-A2 \(32 Hz"):
        predict_file(bundle, path, stranger(path))


def test_a_missing_unit_is_refused_and_can_be_declared(bundle: Bundle, tmp_path: Path) -> None:
    path = _eeg(tmp_path / "unit.edf", rate=128, label="EEG C3-A2", unit="")
    with pytest.raises(RecordingError, match="unit"):
        predict_file(bundle, path, stranger(path))
    assert predict_file(bundle, path, stranger(path, units=["EEG C3-A2=uV"])).predictions


def test_wrong_files_and_options_are_said_clearly(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        stranger(tmp_path / "absent.edf")
    (tmp_path / "notes.txt").write_text("not a recording")
    with pytest.raises(RecordingError, match="no reader knows its content"):
        stranger(tmp_path / "notes.txt")
    with pytest.raises(ConfigError, match="expected LABEL=VALUE"):
        stranger(_eeg(tmp_path / "e.edf", rate=128), channels=["X7"])
    with pytest.raises(ConfigError, match="no UCS symbol"):
        stranger(tmp_path / "e.edf", channels=["X7=eeg:Nowhere"])


def test_options_that_name_what_is_not_there_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    path = _eeg(tmp_path / "e.edf", rate=128, label="EEG C3-A2")
    with pytest.raises(ConfigError, match=r"'X8': e.edf has no such label; it has 'EEG C3-A2'"):
        predict_file(bundle, path, stranger(path, channels=["X8=eeg:C3-M2"]))
    with pytest.raises(ConfigError, match="parsec"):
        predict_file(bundle, path, stranger(path, units=["EEG C3-A2=parsec"]))
