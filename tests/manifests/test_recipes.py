from fractions import Fraction
from pathlib import Path

import pytest
from pydantic import ValidationError

from manifests.channels import KINDS
from manifests.config import shipped_names
from manifests.errors import ConfigError
from manifests.recipes import RECIPES_DIR, Recipe, load_recipe

RECIPE = {"id": "mine", "title": "mine", "window_s": 30, "hop_s": 30, "kinds": {"eeg": {"rate_hz": 128}}}


@pytest.mark.parametrize("name", shipped_names(RECIPES_DIR))
def test_every_shipped_recipe_validates(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.id == name
    assert set(recipe.kinds) <= set(KINDS)
    assert recipe.citation, "names no paper"
    for rule in recipe.kinds.values():
        half = float(rule.stored_rate(Fraction(256))) / 2
        assert (rule.high_hz or 0) <= half
        assert (rule.low_hz or 0) < (rule.high_hz or half)


def test_native_keeps_rates_and_whole_samples() -> None:
    native, fixed = load_recipe("native"), load_recipe("eeg200")
    assert native.is_native
    assert not fixed.is_native
    assert native.kinds["eeg"].stored_rate(Fraction(1000, 3)) == Fraction(1000, 3)
    assert fixed.kinds["eeg"].stored_rate(Fraction(1000, 3)) == 200
    assert native.window_samples(Fraction(1000, 3)) == 3333
    assert fixed.window_samples(Fraction(200)) == 800
    assert (native.kinds["eeg"].least_recorded_hz, fixed.kinds["eeg"].least_recorded_hz) == (0.2, 150)


def test_the_recipes_that_others_build_on_are_there() -> None:
    assert {"sleep128", "ecg128", "eeg200", "ecg500", "native"} <= set(shipped_names(RECIPES_DIR))
    assert load_recipe("sleep128").window_s == 30
    assert {rule.rate_hz for rule in load_recipe("sleep128").kinds.values()} == {128}


@pytest.mark.parametrize("name", ["eeg200", "eeg200_10s", "ecg128", "ecg500"])
def test_a_window_on_a_grid_has_the_event_that_fills_most_of_it(name: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.place, recipe.anchor) == ("grid", "centre")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": {}}, "expected some of"),
        ({"kinds": {"brain": {"rate_hz": 128}}}, "brain"),
        ({"kinds": {"eeg": {"rate_hz": 128, "high_hz": 75}}}, "above half of rate_hz"),
        ({"kinds": {"eeg": {"rate_hz": 128, "low_hz": 64}}}, "not below the upper edge"),
        ({"kinds": {"eeg": {"rate_hz": "native", "low_hz": 9, "high_hz": 3}}}, "not below the upper edge"),
        ({"kinds": {"eeg": {"rate_hz": "native"}, "ecg": {"rate_hz": 128}}}, "keeps all or none"),
        ({"kinds": {"eeg": {"rate_hz": "any"}}}, "native"),
        ({"kinds": {"eeg": {"rate_hz": "native"}}, "place": "events"}, "place events needs rates"),
        ({"anchor": "end"}, "'start' or 'centre'"),
        ({"window_s": 0}, "greater than 0"),
        ({"min_quality": 1.5}, "less than or equal to 1"),
        ({"colour": "blue"}, "colour"),
    ],
)
def test_a_wrong_recipe_is_refused(changes: dict[str, object], message: str) -> None:
    assert Recipe.model_validate(RECIPE).keep == "all"
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate(RECIPE | changes)


def test_an_unknown_recipe_is_told_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'psg1': not shipped; known: .*sleep128"):
        load_recipe("psg1")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
