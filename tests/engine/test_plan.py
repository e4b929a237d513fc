from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from engine.config import ConvertConfig, Source
from engine.plan import Unit, plan, plan_rows, read_plan, write_plan
from engine.scan_result import ScanChannel, ScanResult, ScanRow
from manifests.corpora import load_corpus
from manifests.errors import ContractError
from manifests.recipes import load_recipe

RECIPE = load_recipe("sleep128")
CHANNELS = (ScanChannel(label="C3", symbol="eeg:C3-M2", kind="eeg", rate=Fraction(256), unit="uV"),)


def scan_of(names: list[str]) -> ScanResult:
    rows = tuple(
        ScanRow(
            corpus="synthetic_psg",
            path=name,
            subject="0" * 12,
            session="",
            identity=f"id-{name}",
            num_bytes=1,
            duration=Fraction(8 * 3600),
            channels=CHANNELS,
        )
        for name in names
    )
    return ScanResult(rows=rows, corpora={"synthetic_psg": load_corpus("synthetic_psg")})


def config(**changes: object) -> ConvertConfig:
    values = {"output": Path("out"), "recipe": "sleep128", "unit_bytes": 25_000_000, **changes}
    return ConvertConfig.model_validate({"sources": [Source(corpus="synthetic_psg", root=Path())], **values})


def paths(units: list[Unit]) -> list[str]:
    return sorted(item.path for unit in units for item in unit.recordings)


def test_every_recording_stands_in_exactly_one_unit_of_about_the_asked_size() -> None:
    names = [f"r{i}.edf" for i in range(20)]
    units = plan(scan_of(names), RECIPE, config())
    assert paths(units) == sorted(names)
    assert len(units) > 5
    assert max(unit.num_bytes for unit in units) < 2 * 25_000_000
    assert sum(row["hours"] for row in plan_rows(units)) == pytest.approx(160)


def test_estimate_is_the_size_of_int16_windows() -> None:
    (unit,) = plan(scan_of(["a.edf"]), RECIPE, config())
    samples = 2 * 128 * 8 * 3600
    assert samples < unit.num_bytes < 2 * samples


def test_plan_is_a_pure_function_and_the_seed_deals_anew() -> None:
    names = [f"r{i}.edf" for i in range(20)]
    assert plan(scan_of(names), RECIPE, config()) == plan(scan_of(names[::-1]), RECIPE, config())
    assert plan(scan_of(names), RECIPE, config(seed=1)) != plan(scan_of(names), RECIPE, config())


def test_the_plan_only_grows() -> None:
    first = plan(scan_of(["a.edf", "b.edf", "c.edf"]), RECIPE, config())
    grown = plan(scan_of(["a.edf", "b.edf", "c.edf", "d.edf"]), RECIPE, config(), existing=first)
    assert grown[: len(first)] == first
    assert paths(grown[len(first) :]) == ["d.edf"]


def test_a_changed_input_supersedes_its_own_unit_only() -> None:
    scan = scan_of([f"r{i}.edf" for i in range(9)])
    first = plan(scan, RECIPE, config(unit_bytes=30_000_000))
    changed = replace(scan, rows=(replace(scan.rows[0], identity="other"), *scan.rows[1:]))
    second = plan(changed, RECIPE, config(unit_bytes=30_000_000), existing=first)
    hit = next(unit for unit in first if any(item.path == "r0.edf" for item in unit.recordings))
    assert [unit for unit in first if unit in second] == [unit for unit in first if unit is not hit]
    assert paths(second) == paths(first)


@pytest.mark.parametrize("change", [{"shard_bytes": 1000}, {"recipe": "eeg200"}])
def test_what_decides_the_bytes_decides_the_unit(change: dict[str, object]) -> None:
    scan = scan_of(["a.edf"])
    first = plan(scan, RECIPE, config())
    recipe = load_recipe(str(change.get("recipe", "sleep128")))
    second = plan(scan, recipe, config(**change), existing=first)
    assert {unit.id for unit in first}.isdisjoint(unit.id for unit in second)


def test_a_changed_corpus_file_supersedes_its_units() -> None:
    scan = scan_of(["a.edf"])
    first = plan(scan, RECIPE, config())
    corpus = load_corpus("synthetic_psg").model_copy(update={"mains_hz": 60})
    second = plan(replace(scan, corpora={"synthetic_psg": corpus}), RECIPE, config(), existing=first)
    assert first[0].id != second[0].id


def test_unreadable_recordings_are_planned_too() -> None:
    scan = scan_of(["a.edf"])
    broken = replace(scan.rows[0], path="b.edf", duration=Fraction(0), channels=(), reason="TRUNCATED")
    assert paths(plan(replace(scan, rows=(*scan.rows, broken)), RECIPE, config())) == ["a.edf", "b.edf"]


def test_a_plan_survives_its_file_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    units = plan(scan_of(["a.edf", "b.edf"]), RECIPE, config())
    assert read_plan(tmp_path) == []
    write_plan(tmp_path, units)
    assert read_plan(tmp_path) == units
    (tmp_path / "plan.jsonl").write_text('{"id": 1}\n', encoding="utf-8")
    with pytest.raises(ContractError, match=r"plan\.jsonl: not a plan"):
        read_plan(tmp_path)
