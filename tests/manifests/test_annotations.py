"""Rules of annotations: what fits together, and how a text finds its label."""

import pytest

from manifests.annotations import AnnotationRule, rules_of


def rule(**fields: object) -> AnnotationRule:
    return AnnotationRule.model_validate({"source": "in_file", "target": "events", **fields})


def test_an_exact_text_goes_before_the_longest_beginning() -> None:
    found = rule(map={"Lights*": None, "Lights off*": "off", "Lights off!": "now", "*": "other"})
    assert found.canonical("Lights off!") == "now"
    assert found.canonical("Lights off@@EEG F4-A1") == "off"
    assert found.canonical("Lights on") is None
    assert found.lists("Lights on")
    assert found.canonical("x") == "other"
    assert not rule(map={"a": "b"}).lists("ab")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "nsrr_xml"}, "needs a pattern"),
        ({"source": "nsrr_xml", "pattern": "{scorer}.xml"}, "scorer"),
        ({"source": "nsrr_xml", "pattern": "{stem.xml"}, "stem"),
        ({"source": "table", "pattern": "a"}, "go together"),
        ({"labels": {"file": "a", "key": "b", "columns": ["c"]}}, "go together"),
        ({"source": "table_file", "labels": {"file": "a", "key": "b", "columns": ["c"]}}, "needs their times"),
        ({"target": "stage", "map": {"a": "N4"}}, "N4"),
        ({"map": {}, "epoch_s": 0}, "greater than 0"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule(**fields)


def test_one_rule_or_a_list_of_them() -> None:
    assert rules_of(rule()) == (rule(),)
    assert rules_of((rule(), rule(map={"a": "b"}))) == (rule(), rule(map={"a": "b"}))
