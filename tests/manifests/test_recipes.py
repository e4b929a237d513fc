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
    for rule in recipe.kinds.values():
        assert (rule.high_hz or 0) <= rule.rate_hz / 2
        assert (rule.low_hz or 0) < (rule.high_hz or rule.rate_hz / 2)


def test_the_recipes_that_others_build_on_are_there() -> None:
    assert {"sleep128", "ecg128", "eeg200"} <= set(shipped_names(RECIPES_DIR))
    assert load_recipe("sleep128").window_s == 30
    assert {rule.rate_hz for rule in load_recipe("sleep128").kinds.values()} == {128}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": {}}, "expected some of"),
        ({"kinds": {"brain": {"rate_hz": 128}}}, "brain"),
        ({"kinds": {"eeg": {"rate_hz": 128, "high_hz": 75}}}, "above half of rate_hz"),
        ({"kinds": {"eeg": {"rate_hz": 128, "low_hz": 64}}}, "not below the upper edge"),
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
