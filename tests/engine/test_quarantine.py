import shutil
from pathlib import Path

import pytest

from engine.config import ConvertConfig, Source
from engine.convert import convert_all
from engine.finalise import ExitCode
from engine.lock import locked
from engine.plan import read_plan
from engine.quarantine import budget_line, chosen, evidence, read_waivers, rejected, retry, waive
from engine.synthetic import synthesise
from manifests.errors import ConfigError, ContractError
from manifests.shards import load_snapshot


def times(folder: Path, *, without: str = "nothing") -> dict[str, int]:
    """Time stamps of all shards but those of some unit."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("shards/*") if without not in path.name}


def test_the_rejected_recordings_with_what_counts(converted: ConvertConfig) -> None:
    (item,) = rejected(converted.output)
    assert (item.reason, item.state, item.note) == ("TRUNCATED", "counted", "")
    assert item.unit in {unit.id for unit in read_plan(converted.output)}
    assert budget_line(converted.output, [item]) == (
        "1 of 4 recordings count against quarantine_budget = 0.5 (2 allowed): within budget"
    )


def test_evidence_shows_files_with_their_hashes_and_whether_they_changed(
    converted: ConvertConfig, tiny_root: Path, tmp_path: Path
) -> None:
    (item,) = rejected(converted.output)
    found = evidence(converted.output, item.path)
    assert found.item == item
    assert not found.is_changed
    ((name, size, sha),) = found.files
    assert (name, size) == (Path(item.path).name, (tiny_root / item.path).stat().st_size)
    assert len(sha) == 64
    assert found.alike == ()

    root = Path(shutil.copytree(tiny_root, tmp_path / "root"))
    moved = converted.model_copy(update={"sources": [Source(corpus="synthetic_psg", root=root)]})
    convert_all(moved)
    (root / item.path).write_bytes(b"mended")
    assert evidence(converted.output, item.path).is_changed
    (root / item.path).unlink()
    assert evidence(converted.output, item.recording).files == ()


def test_names_that_fit_nothing_are_refused_with_the_nearest(converted: ConvertConfig) -> None:
    items = rejected(converted.output)
    (item,) = items
    assert chosen(items, [f"synthetic_psg/{item.path}", item.path, item.recording]) == [item]
    assert chosen(items, [], reason="TRUNCATED") == [item]
    with pytest.raises(ConfigError, match=f"nearest: {item.path}"):
        chosen(items, [item.path.replace("004", "005")])
    with pytest.raises(ConfigError, match="reasons here: TRUNCATED"):
        chosen(items, [], reason="TIMEOUT")
    with pytest.raises(ConfigError, match="no recording named"):
        chosen(items, [])
    with pytest.raises(ConfigError, match=r"no plan\.jsonl"):
        rejected(converted.output / "nowhere")


def test_retry_converts_the_unit_again_and_no_other(converted: ConvertConfig) -> None:
    (item,) = rejected(converted.output)
    before, digest = times(converted.output, without=item.unit), load_snapshot(converted.output).digest
    assert retry(converted.output, [item.path]) == [item.unit]
    (marked,) = rejected(converted.output)
    assert (marked.state, marked.path) == ("retry", item.path)
    assert retry(converted.output, [item.path]) == [item.unit]
    assert load_snapshot(converted.output).digest == digest
    own = times(converted.output)
    convert_all(converted)
    assert rejected(converted.output) == [item]
    after = times(converted.output)
    assert {name: after[name] for name in before} == before
    assert all(after[name] != time for name, time in own.items() if name.startswith(item.unit))
    assert load_snapshot(converted.output).digest == digest
    assert not list(converted.output.glob("commits/retry-*"))


def test_a_mended_recording_needs_no_retry(tiny_config: ConvertConfig, tiny_root: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tiny_root, tmp_path / "root"))
    sources = [Source(corpus="synthetic_psg", root=root)]
    config = tiny_config.model_copy(update={"sources": sources, "unit_bytes": 1_000_000})
    convert_all(config)
    (item,) = rejected(config.output)
    kept = times(config.output, without=item.unit)
    whole = tmp_path / "whole"
    synthesise(whole, num_subjects=5, num_ecg=1, night_minutes=10)
    shutil.copy(whole / item.path, root / item.path)
    result = convert_all(config)
    assert result.exit_code is ExitCode.COMPLETE
    assert rejected(config.output) == []
    after = times(config.output)
    assert {name: after.get(name) for name in kept} == kept
    assert len(after) > len(kept)


def test_a_waiver_frees_the_budget_and_changes_no_byte(converted: ConvertConfig) -> None:
    strict = converted.model_copy(update={"quarantine_budget": 0.1})
    digest, before = load_snapshot(converted.output).digest, times(converted.output)
    assert convert_all(strict).exit_code is ExitCode.OVER_BUDGET
    (item,) = rejected(converted.output)
    assert "over budget" in budget_line(converted.output, [item])
    with pytest.raises(ConfigError, match="--note: empty"):
        waive(converted.output, [item.path], note="  ")
    assert waive(converted.output, [item.path], note="the amplifier was off") == [item]
    (waived,) = rejected(converted.output)
    assert (waived.state, waived.note) == ("waived", "the amplifier was off")
    assert "0 of 4" in budget_line(converted.output, [waived])
    assert convert_all(strict).exit_code is ExitCode.WITH_QUARANTINE
    assert load_snapshot(converted.output).digest == digest
    assert times(converted.output) == before
    (waiver,) = read_waivers(converted.output).values()
    assert waiver.time.endswith("+00:00")


def test_a_waiver_is_about_one_reason(converted: ConvertConfig) -> None:
    (item,) = rejected(converted.output)
    waive(converted.output, [], note="no", reason="TRUNCATED")
    path = converted.output / "waivers.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("TRUNCATED", "TIMEOUT"), encoding="utf-8")
    assert rejected(converted.output) == [item]
    path.write_text("{}\n", encoding="utf-8")
    with pytest.raises(ContractError, match="a line is no waiver"):
        rejected(converted.output)


def test_decisions_wait_for_a_running_conversion(converted: ConvertConfig) -> None:
    (item,) = rejected(converted.output)
    with locked(converted.output):
        with pytest.raises(ConfigError, match="another kymo convert"):
            retry(converted.output, [item.path])
        with pytest.raises(ConfigError, match="another kymo convert"):
            waive(converted.output, [item.path], note="x")
