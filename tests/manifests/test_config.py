"""YAML 1.2 scalars, duplicate keys, overrides, nearest keys, atomic writes."""

import json
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from manifests.config import (
    apply_overrides,
    code_digest,
    digest,
    dump_yaml,
    load_config,
    parse_yaml,
    read_yaml,
    start_run,
    write_atomically,
)
from manifests.errors import ConfigError, RecordingError


class Optimizer(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    learning_rate: float = 1e-3
    warmup_steps: int = 0


class Run(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    optimizer: Optimizer = Optimizer()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("22:30", "22:30"),
        ("no", "no"),
        ("off", "off"),
        ("true", True),
        ("~", None),
        ("010", 10),
        ("0x1F", 31),
        ("1_000", "1_000"),
        (".inf", float("inf")),
        ("-1.5", -1.5),
        ("2026-11-21", "2026-11-21"),
    ],
)
def test_scalars_follow_the_core_schema_of_yaml_1_2(text: str, value: object) -> None:
    parsed = parse_yaml(f"key: {text}", where="test")["key"]
    assert parsed == value
    assert type(parsed) is type(value)


def test_an_empty_value_is_null() -> None:
    assert parse_yaml("key:", where="test") == {"key": None}


def test_a_duplicate_key_names_its_line() -> None:
    with pytest.raises(ConfigError, match=r"run.yaml: line 3: key 'a' stands twice"):
        parse_yaml("a: 1\nb: 2\na: 3\n", where="run.yaml")


def test_a_missing_file_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "absent.yaml")


def test_precedence_is_defaults_then_yaml_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: first\noptimizer: {learning_rate: 1e-2}\n")
    assert load_config(Run, path).optimizer == Optimizer(learning_rate=1e-2, warmup_steps=0)
    run = load_config(Run, path, ["optimizer.learning_rate=3e-4", "name=second"])
    assert (run.name, run.optimizer.learning_rate) == ("second", 3e-4)


def test_a_wrong_key_lists_the_nearest_valid_one(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: a\noptimizer: {learning_rat: 1}\n")
    with pytest.raises(ConfigError, match=r"run.yaml: optimizer.learning_rat: no such key; nearest: learning_rate"):
        load_config(Run, path)


def test_the_valid_keys_are_listed_once(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: a\nqqq: 1\nxxx: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(Run, path)
    first, second = str(caught.value).splitlines()
    assert "qqq: no such key; valid keys: " in first
    assert second.endswith("xxx: no such key")


def test_a_wrong_value_names_place_and_value(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: a\noptimizer: {warmup_steps: many}\n")
    with pytest.raises(ConfigError, match=r"optimizer.warmup_steps: 'many'"):
        load_config(Run, path)


def test_an_override_must_be_key_equals_value() -> None:
    with pytest.raises(ConfigError, match="expected key=value"):
        apply_overrides({}, ["steps"])


def test_overrides_reach_into_lists() -> None:
    data = {"sources": [{"root": "a"}, {"root": "b"}]}
    assert apply_overrides(data, ["sources.1.root=c"])["sources"] == [{"root": "a"}, {"root": "c"}]
    for wrong in ("sources.2.root=c", "sources.first.root=c", "sources.0.root.deeper=c"):
        with pytest.raises(ConfigError, match="override"):
            apply_overrides(data, [wrong])


def test_overrides_leave_the_original_alone() -> None:
    data = {"a": {"b": 1}}
    assert apply_overrides(data, ["a.b=2"]) == {"a": {"b": 2}}
    assert data == {"a": {"b": 1}}


def test_dump_and_parse_are_inverse() -> None:
    value = {"a": [1, 2.5, None, "no"], "µV": {"b": True}}
    assert parse_yaml(dump_yaml(value), where="test") == value


def test_digest_ignores_the_order_of_keys_and_sees_values() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_a_run_folder_starts_with_config_and_version(tmp_path: Path) -> None:
    start_run(tmp_path / "run", Run(name="x"))
    assert read_yaml(tmp_path / "run" / "config.yaml")["optimizer"] == {"learning_rate": 1e-3, "warmup_steps": 0}
    assert json.loads((tmp_path / "run" / "version.json").read_text())["code_digest"] == code_digest()


def test_an_atomic_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a" / "file", "text")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


def test_recording_errors_have_known_reasons_only() -> None:
    assert RecordingError("TIMEOUT", "x").reason == "TIMEOUT"
    with pytest.raises(ValueError, match="TIMED_OUT"):
        RecordingError("TIMED_OUT", "x")
