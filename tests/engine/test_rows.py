from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from engine.recording import Channel, Recording, Segment
from engine.rows import Losses, by_rate_and_kind, clean_prefilter, in_canonical_unit, rows_of
from manifests.corpora import Corpus, load_corpus
from manifests.recipes import load_recipe

RATE = Fraction(128)
CORPUS = Corpus.model_validate(
    {
        "id": "mine",
        "title": "mine",
        "licence": "none",
        "access": "none",
        "reader": "edf",
        "files": ["*.edf"],
        "subject": {"pattern": r"^(?P<subject>\w+)"},
    }
)


def recording_of(signals: dict[str, tuple[np.ndarray, str]], rates: dict[str, Fraction] | None = None) -> Recording:
    channels = tuple(
        Channel(
            index=index,
            label=label,
            rate=(rates or {}).get(label, RATE),
            unit=unit,
            prefilter="",
            num_samples=signal.size,
        )
        for index, (label, (signal, unit)) in enumerate(signals.items())
    )
    return Recording(
        path=Path("a.edf"), channels=channels, segments=(Segment(start=Fraction(0), duration=Fraction(60)),)
    )


def noise(sd: float, rate: Fraction = RATE) -> np.ndarray:
    return np.random.default_rng(0).normal(scale=sd, size=int(60 * rate)).astype(np.float32)


def test_filter_history_is_kept_without_free_text() -> None:
    assert clean_prefilter("HP:0.30Hz LP:75Hz N:50Hz Jane Doe 12") == "HP:0.30Hz LP:75Hz N:50Hz"
    assert clean_prefilter("patient of Dr. HP Smith") == ""


def test_a_declared_unit_may_carry_a_factor() -> None:
    one = np.ones(3, dtype=np.float32)
    assert in_canonical_unit(one, "100 uV", "uV")[0] == 100
    assert in_canonical_unit(one, "mV", "uV")[0] == 1000


@pytest.mark.parametrize(
    ("label", "unit", "sd", "expected"),
    [
        ("C3-M2", "uV", 30.0, False),
        ("C3-M2", "mV", 0.03, False),  # the unit is right, so the amplitude is
        ("C3-M2", "uV", 0.03, True),  # millivolts that call themselves microvolts
        ("C3-M2", "mV", 30.0, True),
        ("ECG II", "mV", 0.3, False),
        ("ECG II", "mV", 300.0, True),
        ("Thorax", "au", 1e6, False),  # arbitrary units have no range
    ],
)
def test_an_implausible_amplitude_makes_the_unit_suspect(
    monkeypatch: pytest.MonkeyPatch, label: str, unit: str, sd: float, *, expected: bool
) -> None:
    signal = noise(sd)
    monkeypatch.setattr("engine.rows.read_signals", lambda *_: [signal.copy()])
    losses = Losses()
    (row,) = rows_of(recording_of({label: (signal, unit)}), CORPUS, load_recipe("sleep128"), losses)
    assert row.tag["unit_suspect"] is expected
    assert losses.unit_suspect == {row.kind: int(expected)}


def test_a_dead_channel_says_nothing_about_its_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    signal = noise(30.0)
    signal[: signal.size * 2 // 3] = 0
    monkeypatch.setattr("engine.rows.read_signals", lambda *_: [signal.copy()])
    (row,) = rows_of(recording_of({"C3-M2": (signal, "uV")}), CORPUS, load_recipe("sleep128"), Losses())
    assert row.bad.is_mostly_flat
    assert row.tag["unit_suspect"] is False


def test_rows_are_grouped_by_rate_only_where_rates_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"C3-M2": Fraction(256), "ECG II": Fraction(256), "C4-M1": Fraction(64)}
    signals = {label: (noise(1.0, rate), "mV") for label, rate in rates.items()}
    monkeypatch.setattr("engine.rows.read_signals", lambda *_: [signal.copy() for signal, _ in signals.values()])
    recording = recording_of(signals, rates)
    native, fixed = load_recipe("native"), load_recipe("sleep128")
    groups = by_rate_and_kind(rows_of(recording, CORPUS, native, Losses()), native)
    assert list(groups) == [256, 64]
    assert {rate: {kind: len(rows) for kind, rows in kinds.items()} for rate, kinds in groups.items()} == {
        256: {"eeg": 1, "ecg": 1},
        64: {"eeg": 1},
    }
    together = by_rate_and_kind(rows_of(recording, CORPUS, fixed, Losses()), fixed)
    assert {rate: {kind: len(rows) for kind, rows in kinds.items()} for rate, kinds in together.items()} == {
        None: {"eeg": 2, "ecg": 1}
    }


def test_a_channel_slower_than_the_windows_is_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"C3-M2": Fraction(256), "SpO2": Fraction(1, 10), "Abdomen": Fraction(1, 60)}
    signals = {label: (noise(1.0, Fraction(256)), "uV" if label == "C3-M2" else "") for label in rates}
    monkeypatch.setattr(
        "engine.rows.read_signals", lambda _, indices: [signals[list(rates)[i]][0].copy() for i in indices]
    )
    losses = Losses()
    found = rows_of(recording_of(signals, rates), CORPUS, load_recipe("native"), losses)
    assert [row.native_rate for row in found] == [256, Fraction(1, 10)]
    assert losses.unresolved == {("Abdomen", "fewer than a sample per window"): 1}


@pytest.mark.parametrize(
    ("corpus", "path", "recipe", "suspects"),
    [
        ("eegmmidb", "eegmmidb/S001/S001R01.edf", "eeg200", 0),
        ("mitdb", "mitdb/100.hea", "ecg128", 0),
        ("ucddb_epochs", "ucddb_epochs/ucd018_C3A2_reassembled.edf", "sleep128", 0),
        ("dreams_spindles", "dreams_spindles/excerpt1.txt", "sleep128", 0),
        ("dreams_psg", "dreams_spindles/excerpt3.edf", "sleep128", 1),
    ],
)
def test_real_recordings_pass_but_for_an_ecg_that_calls_its_microvolts_otherwise(
    shared_data: Path, corpus: str, path: str, recipe: str, suspects: int
) -> None:
    from engine.read import read_header

    loaded = load_corpus(corpus)
    losses = Losses()
    rows = rows_of(
        read_header(shared_data / path, loaded.reader_of(path), loaded.layout), loaded, load_recipe(recipe), losses
    )
    found = {row.tag["symbol"]: (1.4826 * row.tag["mad"], row.tag["unit"]) for row in rows if row.tag["unit_suspect"]}
    assert losses.unit_suspect.total() == suspects, found
