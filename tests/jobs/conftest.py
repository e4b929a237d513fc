"""A bundle of two tasks made of synthetic recordings, and the command line."""

import sys
from collections.abc import Callable
from pathlib import Path

import edfio
import numpy as np
import pytest

from adapters.bundle import Bundle, load_bundle, write_bundle
from adapters.config import AdaptConfig, TaskRun
from adapters.train import adapt
from engine.config import ConvertConfig
from engine.convert import convert_all
from engine.synthetic import synthesise
from jobs import cli
from jobs.filter_vectors import with_filters
from manifests.recipes import load_recipe
from trainer.export import save_encoder
from trainer.models.sleep import SleepEncoder, SleepEncoderConfig


@pytest.fixture(scope="session")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three nights of ten minutes and 24 ECGs."""
    root = tmp_path_factory.mktemp("recordings")
    synthesise(root, num_subjects=3, num_ecg=24, night_minutes=10)
    return root


@pytest.fixture(scope="session")
def night(nights: Path) -> Path:
    return nights / "psg" / "sub-001" / "sub-001_psg.edf"


@pytest.fixture(scope="session")
def bundle_dir(nights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle of sleep staging and rhythm after two steps: it predicts, not well."""
    root = tmp_path_factory.mktemp("bundle")
    for corpus, recipe in (("synthetic_psg", "sleep128"), ("synthetic_ecg", "ecg128")):
        source = {"corpus": corpus, "root": str(nights)}
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
    write_bundle(with_filters(result), root / "bundle")
    return root / "bundle"


@pytest.fixture(scope="session")
def bundle(bundle_dir: Path) -> Bundle:
    return load_bundle(bundle_dir)


@pytest.fixture
def write_eeg() -> Callable[..., Path]:
    """Function that writes an EDF with one channel of noise, or of the signal given, in uV."""

    def write(
        path: Path, *, rate: int = 128, label: str = "EEG C3-A2", unit: str = "uV", seconds: int = 90,
        signal: np.ndarray | None = None,
    ) -> Path:  # fmt: skip
        if signal is None:
            signal = 30 * np.random.default_rng(0).standard_normal(rate * seconds)
        edfio.Edf([edfio.EdfSignal(signal, rate, label=label, physical_dimension=unit)]).write(path)
        return path

    return write


@pytest.fixture
def kymo(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Function that runs `kymo ARGUMENTS` here; it returns the exit code and the output."""

    def run(*arguments: str | Path) -> tuple[int, str]:
        code = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["kymo", *map(str, arguments)])
            try:
                cli.main()
            except SystemExit as ended:
                code = int(ended.code or 0)
        return code, capsys.readouterr().out

    return run
