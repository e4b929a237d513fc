"""Layouts of the shipped corpora: files as their papers describe them become labelled windows."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from pydantic import ValidationError
from scipy import io

from engine.readers.arrays_layout import ArraysLayout, LabelRule, natural
from engine.windows import Sample, window_recording
from manifests.corpora import Corpus, load_corpus
from manifests.recipes import load_recipe

ARRAY_CORPORA = ("seed", "deap", "dreamer", "dod_h", "dod_o", "code15", "ucddb_epochs_mat")


def noise(*shape: int) -> np.ndarray:
    """Values of about 30 uV."""
    return 30 * np.random.default_rng(11).normal(size=shape)


def windows(corpus: Corpus, root: Path, name: str, recipe: str = "eeg200") -> list[Sample]:
    return list(window_recording(root / name, corpus=corpus, recipe=load_recipe(recipe), root=root))


@pytest.mark.parametrize("name", ARRAY_CORPORA)
def test_shipped_layouts_fit_the_schema_and_name_known_channels(name):
    corpus = load_corpus(name)
    assert corpus.reader == "arrays"
    rules = ArraysLayout.model_validate(corpus.layout)
    labels = {label for rule in rules.signals if isinstance(rule.labels, tuple) for label in rule.labels}
    assert labels <= set(corpus.channels)


def test_seed_sessions_become_windows_with_the_emotion_of_their_film(tmp_path):
    trials = {f"djc_eeg{i}": noise(62, 200 * 9 + i) for i in range(1, 16)}
    io.savemat(tmp_path / "1_20131027.mat", trials)
    found = windows(load_corpus("seed"), tmp_path, "1_20131027.mat")
    assert len(found) == 30  # two of 4 s in each film of 9 s
    labels = [sample.meta["labels"]["classes"] for sample in found]
    assert labels[:6] == [["positive"]] * 2 + [["neutral"]] * 2 + [["negative"]] * 2
    assert {sample.arrays["eeg"].shape for sample in found} == {(62, 800)}
    assert [sample.meta["start"] for sample in found[:4]] == [0, 800, 12_000, 12_800]


def test_deap_films_carry_their_ratings_without_the_baseline(tmp_path):
    ratings = np.full((40, 4), 4.0)
    ratings[1:, 0] = 5.0
    io.savemat(tmp_path / "s01.mat", {"data": noise(40, 40, 128 * 11), "labels": ratings})
    found = windows(load_corpus("deap"), tmp_path, "s01.mat")
    assert len(found) == 80  # two of 4 s in each film of 8 s
    assert found[0].meta["labels"]["classes"] == ["low_valence", "low_arousal"]
    assert found[2].meta["labels"]["classes"] == ["high_valence", "low_arousal"]


def test_dreamer_persons_become_recordings(tmp_path):
    def films(rate: int, channels: int) -> np.ndarray:
        cells = np.empty((18, 1), dtype=object)
        for film in range(18):
            cells[film, 0] = noise(rate * 5, channels) + 4200
        return cells

    persons = np.empty((1, 2), dtype=object)
    for person in range(2):
        persons[0, person] = {
            "EEG": {"stimuli": films(128, 14)},
            "ECG": {"stimuli": films(256, 2)},
            **{f"Score{name}": np.full((18, 1), 2.0 + person) for name in ("Valence", "Arousal", "Dominance")},
        }
    io.savemat(tmp_path / "DREAMER.mat", {"DREAMER": {"Data": persons}})
    corpus = load_corpus("dreamer")
    first, second = (windows(corpus, tmp_path, f"DREAMER.mat#{person}") for person in (1, 2))
    assert len(first) == len(second) == 18
    assert first[0].meta["labels"]["classes"] == ["low_valence", "low_arousal"]
    assert second[0].meta["labels"]["classes"] == ["high_valence", "high_arousal"]
    assert first[0].meta["subject"] != second[0].meta["subject"]


def test_dod_nights_carry_their_stages(tmp_path):
    with h5py.File(tmp_path / "0a1b.h5", "w") as file:
        for name in ("eeg/C3_M2", "eog/EOG1"):
            file[f"signals/{name}"] = noise(250 * 600)
            group = file[f"signals/{name.split('/')[0]}"]
            group.attrs["fs"], group.attrs["unit"] = 250, "uV"
        file["hypnogram"] = [-1, 0, 1, 2, 3, 4] * 3 + [2, 2]
    (first, *_) = windows(load_corpus("dod_h"), tmp_path, "0a1b.h5", "sleep128")
    assert first.meta["labels"]["stage"][:6] == ["?", "W", "N1", "N2", "N3", "R"][: len(first.meta["labels"]["stage"])]


def test_names_are_sorted_by_their_numbers():
    assert sorted(["e10", "e9", "e1b", "e1", "x"], key=natural) == ["e1", "e1b", "e9", "e10", "x"]


@pytest.mark.parametrize(
    ("rule", "value", "text"),
    [
        ({"path": "l"}, 1.0, "1"),
        ({"path": "l"}, 2.5, "2.5"),
        ({"path": "l", "edges": [3, 4]}, 3.0, "1"),
        ({"path": "l", "edges": [3, 4], "name": "arousal"}, 4.5, "arousal=2"),
        ({"values": ["rest"]}, "rest", "rest"),
        ({"path": "l", "edges": [3]}, float("nan"), "nan"),
    ],
)
def test_labels_become_texts(rule, value, text):
    assert LabelRule.model_validate(rule).text(value) == text


@pytest.mark.parametrize("rule", [{}, {"values": [1], "path": "l"}])
def test_labels_come_from_one_place(rule):
    with pytest.raises(ValidationError):
        LabelRule.model_validate(rule)
