import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from engine import convert
from engine.commit import commit_path, pending, read_commit
from engine.config import ConvertConfig, Source
from engine.convert import Context, ProgressRow, convert_all, convert_unit, limits_of, prepare
from engine.finalise import ExitCode
from engine.plan import read_plan
from engine.sandbox import Job, Sandbox
from manifests.config import dump_yaml, read_yaml
from manifests.corpora import load_corpus
from manifests.errors import ConfigError, RecordingError
from manifests.shards import SAMPLES_FILE, SNAPSHOT_FILE, load_snapshot

REPOSITORY = Path(__file__).resolve().parents[2]


HEADER = ("config.yaml", "version.json")


def content(output: Path) -> dict[str, bytes]:
    """Every file that a reader may see, the commits without the time that they took, but for the run's header.

    `config.yaml` names the output folder and the number of CPUs, which are what differs between the runs.
    """
    files = {
        path.relative_to(output).as_posix(): path.read_bytes()
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.parent.name != "progress" and path.name not in {SNAPSHOT_FILE, *HEADER}
    }
    for name in [name for name in files if name.startswith("commits/commit-")]:
        commit = json.loads(files[name])
        files[name] = json.dumps({**commit, "seconds": 0}).encode()
    if (output / SNAPSHOT_FILE).exists():
        files["digest"] = load_snapshot(output).digest.encode()
    return files


def test_a_corrupt_recording_is_quarantined_and_the_rest_goes_on(tiny_config: ConvertConfig) -> None:
    rows: list[ProgressRow] = []
    result = convert_all(tiny_config, progress=rows.append)
    assert result.exit_code is ExitCode.WITH_QUARANTINE
    assert result.counts["recordings"] == 4
    assert result.counts["windows"] == 60
    assert result.counts["seconds"] == 1800
    (bad,) = result.quarantine
    assert bad.reason in {"TRUNCATED", "HEADER_INVALID"}
    assert bad.command.startswith("kymo scan ")
    assert len(read_plan(tiny_config.output)) > 1
    assert len(load_snapshot(tiny_config.output).shards) > len(read_plan(tiny_config.output))
    assert [row.recordings_done for row in rows] == [1, 2, 3, 4]
    assert rows[-1].hours_done == rows[-1].hours_total == pytest.approx(0.5)
    assert rows[-1].quarantined == 1
    assert rows[-1].eta_s == 0


def test_a_recording_whose_process_was_killed_comes_with_the_next_run(
    tiny_config: ConvertConfig, converted: ConvertConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Sandbox, job: Job) -> dict[str, Any]:
        if "sub-002" in job.path.name:
            raise RecordingError("KILLED", f"{job.path}: killed")
        return sandboxed(self, job)

    sandboxed = Sandbox.convert
    monkeypatch.setattr(Sandbox, "convert", killed)
    assert sorted(item.reason for item in convert_all(tiny_config).quarantine)[0] == "KILLED"
    assert content(tiny_config.output)["digest"] != content(converted.output)["digest"]
    monkeypatch.undo()
    convert_all(tiny_config)
    assert content(tiny_config.output)["digest"] == content(converted.output)["digest"]


def test_commits_account_for_every_recording(converted: ConvertConfig) -> None:
    commits = [read_commit(converted.output, unit.id) for unit in read_plan(converted.output)]
    inputs = [item for commit in commits if commit for item in commit.inputs]
    assert len(inputs) == 4
    for item in inputs:
        assert (item.windows == 20) == bool(item.sha256)
    labels = {item.label for commit in commits if commit for item in commit.unresolved}
    assert "X7" in labels


def test_rerun_converts_nothing_and_touches_nothing(converted: ConvertConfig) -> None:
    prepare(converted)  # the fixture's copy lies in a folder of another name, which the header now says
    before = {path: path.stat().st_ctime_ns for path in converted.output.rglob("*") if path.name != ".lock"}
    files = {path: mark for path, mark in before.items() if path.is_file() and path.name != "plan.jsonl"}
    _, units = prepare(converted)
    assert pending(converted.output, units, limits_of(converted)) == []
    result = convert_all(converted)
    assert result.counts["windows"] == 60
    assert {path: path.stat().st_ctime_ns for path in files} == files


def test_bytes_do_not_depend_on_the_order_of_units(converted: ConvertConfig, tmp_path: Path) -> None:
    other = converted.model_copy(update={"output": tmp_path / "other"})
    other.output.mkdir()
    _, units = prepare(other)
    context = Context.of(other)
    with context.sandbox() as sandbox:
        for unit in reversed(units):
            convert_unit(unit, context=context, sandbox=sandbox)
    convert_all(other)
    assert content(other.output) == content(converted.output)


def test_new_recordings_go_into_new_units(tiny_root: Path, tiny_config: ConvertConfig, tmp_path: Path) -> None:
    root = tmp_path / "growing"
    for number in (1, 2, 3):
        folder = root / f"psg/sub-00{number}"
        folder.mkdir(parents=True)
        if number < 3:
            os.link(tiny_root / f"psg/sub-00{number}/sub-00{number}_psg.edf", folder / f"sub-00{number}_psg.edf")
    config = tiny_config.model_copy(
        update={"sources": [Source(corpus="synthetic_psg", root=root)], "output": tmp_path / "grown"}
    )
    convert_all(config)
    first = content(config.output)
    os.link(tiny_root / "psg/sub-003/sub-003_psg.edf", root / "psg/sub-003/sub-003_psg.edf")
    assert convert_all(config).counts["windows"] == 60
    second = content(config.output)
    kept = [name for name in first if name.startswith("shards/")]
    assert {name: second[name] for name in kept} == {name: first[name] for name in kept}
    assert len([name for name in second if name.startswith("shards/")]) > len(kept)


def test_a_changed_recording_replaces_its_own_shards(
    tiny_root: Path, tiny_config: ConvertConfig, tmp_path: Path
) -> None:
    root = tmp_path / "changing"
    for number in (1, 2):
        path = root / f"psg/sub-00{number}/sub-00{number}_psg.edf"
        path.parent.mkdir(parents=True)
        path.write_bytes((tiny_root / path.relative_to(root)).read_bytes())
    config = tiny_config.model_copy(
        update={"sources": [Source(corpus="synthetic_psg", root=root)], "unit_bytes": 1_000_000}
    )
    convert_all(config)
    first = content(config.output)
    data = bytearray(path.read_bytes())
    data[-100_000:] = bytes(100_000)
    path.write_bytes(data)
    convert_all(config)
    second = content(config.output)
    shards = [{name for name in files if name.startswith("shards/")} for files in (first, second)]
    assert shards[0] & shards[1]
    assert shards[0] - shards[1]
    assert first["digest"] != second["digest"]
    assert len({json.loads(value)["unit"] for name, value in second.items() if "commit-" in name}) == 2


def run_in_process(config: ConvertConfig, path: Path) -> "subprocess.Popen[bytes]":
    path.write_text(dump_yaml(config.model_dump(mode="json")), encoding="utf-8")
    script = (
        "import sys\n"
        "from engine.config import ConvertConfig\nfrom engine.convert import convert_all\n"
        "from manifests.config import load_config\n"
        "convert_all(load_config(ConvertConfig, sys.argv[1]))\n"
    )
    return subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=REPOSITORY, stderr=subprocess.DEVNULL)


MOMENTS = {"a spool grows": "work/*/*.bin", "a shard is written": "shards/*", "a commit stands": "commits/commit-*"}


def is_reached(output: Path, pattern: str, since: float) -> bool:
    """Whether a file of the pattern was written after `since`, in s of the wall clock."""
    try:
        return any(path.stat().st_mtime > since for path in [*output.glob(pattern)])
    except FileNotFoundError:  # renamed or removed meanwhile
        return False


def test_a_sigkill_at_any_moment_and_a_rerun_give_the_same_bytes(converted: ConvertConfig, tmp_path: Path) -> None:
    killed = converted.model_copy(update={"output": tmp_path / "killed"})
    codes = []
    for pattern in MOMENTS.values():
        since = time.time()
        process = run_in_process(killed, tmp_path / "config.yaml")
        while not is_reached(killed.output, pattern, since) and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        codes.append(process.wait())
    assert codes.count(-signal.SIGKILL) >= 2
    assert convert_all(killed).counts["windows"] == 60
    assert content(killed.output) == content(converted.output)
    assert not list(killed.output.rglob("*.tmp"))
    assert not list((killed.output / "work").glob("*"))


def test_plain_webdataset_opens_the_shards(converted: ConvertConfig) -> None:
    shards = sorted(str(path) for path in (converted.output / "shards").glob("*.tar"))
    count = 0
    for sample in webdataset.WebDataset(shards, shardshuffle=False).decode():
        count += 1
        assert sample["json"]["key"] == sample["__key__"]
        for kind, tags in sample["json"]["ucs"].items():
            array = sample[f"{kind}.npy"]
            assert array.dtype == np.int16
            assert array.shape == (len(tags), 3840)
    assert count == 60


def test_no_header_text_in_any_output(tiny_root: Path, tiny_config: ConvertConfig, tmp_path: Path) -> None:
    path = tmp_path / "private/psg/sub-001/sub-001_psg.edf"
    path.parent.mkdir(parents=True)
    data = bytearray((tiny_root / "psg/sub-001/sub-001_psg.edf").read_bytes())
    data[8:88] = b"MCH-0234567 F 02-MAY-1951 Erika_Mustermann".ljust(80)
    data[88:168] = b"Startdate 02-MAR-2002 EMG561 BK/JOP Sony_of_Dr_Quacksalber".ljust(80)
    num_signals = int(data[252:256])
    transducers = slice(256 + 16 * num_signals, 256 + 96 * num_signals)
    data[transducers] = b"AgAgCl of Erika_Mustermann".ljust(80) * num_signals
    prefilters = slice(256 + 136 * num_signals, 256 + 216 * num_signals)
    data[prefilters] = b"HP:0.1Hz by Quacksalber".ljust(80) * num_signals
    annotation = data.index(b"Sleep stage W")
    data[annotation : annotation + 13] = b"E. Mustermann"
    path.write_bytes(data)
    broken = path.parents[1] / "sub-002/sub-002_psg.edf"
    broken.parent.mkdir()
    broken.write_bytes(data[: 256 + 100])
    config = tiny_config.model_copy(
        update={"sources": [Source(corpus="synthetic_psg", root=tmp_path / "private")], "output": tmp_path / "out"}
    )
    result = convert_all(config)
    assert (result.counts["windows"], result.counts["quarantined"]) == (20, 1)
    commits = [read_commit(config.output, unit.id) for unit in read_plan(config.output)]
    assert [commit.unmapped for commit in commits if commit and commit.unmapped] == [{"synthetic_psg": 1}]
    everything = b"".join(path.read_bytes() for path in config.output.rglob("*") if path.is_file())
    assert b"HP:0.1Hz" in everything
    for word in (b"Mustermann", b"Quacksalber", b"MCH-0234567", b"1951", b"2002", b"AgAgCl", b"EMG561"):
        assert word not in everything
    published = b"".join(
        (config.output / name).read_bytes()
        for name in (SNAPSHOT_FILE, SAMPLES_FILE, *(shard.path for shard in load_snapshot(config.output).shards))
    )
    assert b"sub-001" not in published


def test_over_budget_gives_no_snapshot(converted: ConvertConfig) -> None:
    strict = converted.model_copy(update={"quarantine_budget": 0.1})
    result = convert_all(strict)
    assert result.exit_code is ExitCode.OVER_BUDGET
    assert result.snapshot is None
    assert not (converted.output / SNAPSHOT_FILE).exists()
    assert convert_all(converted).exit_code is ExitCode.WITH_QUARANTINE


def test_a_corpus_without_files_or_with_too_many_unknown_labels_is_refused(
    tiny_root: Path, tiny_config: ConvertConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tiny_config.model_copy(update={"sources": [Source(corpus="synthetic_psg", root=tmp_path)]})
    with pytest.raises(ConfigError, match="synthetic_psg: no file matches psg/"):
        convert_all(empty)
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        load_corpus("synthetic_psg").model_copy(update={"id": "mine", "max_unresolved": 0.001}).model_dump_json(),
        encoding="utf-8",
    )
    strict = tiny_config.model_copy(update={"sources": [Source(corpus=str(mine), root=tiny_root)]})
    with pytest.raises(ConfigError, match=r"mine.yaml: .* labels that nobody knows \(X7\)"):
        convert_all(strict)


def test_a_unit_tells_small_rows_only(tiny_config: ConvertConfig) -> None:
    tiny_config.output.mkdir()
    _, units = prepare(tiny_config)
    context = Context.of(tiny_config)
    with context.sandbox() as sandbox:
        row = convert_unit(units[0], context=context, sandbox=sandbox)
    assert len(json.dumps(row)) < 200
    assert commit_path(tiny_config.output, units[0].id).exists()
    assert len(json.dumps(asdict(units[0]))) < 1500


def test_real_recordings_of_several_corpora_share_a_snapshot(shared_data: Path, tmp_path: Path) -> None:
    sources = {
        "ucddb_epochs_mat": "ucddb_epochs",
        "dreams_psg": "dreams_spindles",
        "dreams_spindles": "dreams_spindles",
    }
    config = ConvertConfig(
        output=tmp_path / "out",
        recipe="sleep128",
        sources=[Source(corpus=name, root=shared_data / folder) for name, folder in sources.items()],
    )
    result = convert.convert_all(config)
    assert result.exit_code is ExitCode.COMPLETE
    assert result.snapshot is not None
    assert set(result.snapshot.corpora) == set(sources)
    assert all(entry["windows"] > 0 for entry in result.snapshot.corpora.values())


def test_the_output_starts_with_the_resolved_configuration(converted: ConvertConfig) -> None:
    assert read_yaml(converted.output / "config.yaml")["recipe"] == converted.recipe
    assert json.loads((converted.output / "version.json").read_text())["code_digest"]


def test_what_a_killed_actor_left_goes_at_the_end_of_the_run(tiny_config: ConvertConfig) -> None:
    output = tiny_config.output

    def leave(_: object) -> None:
        (output / "work" / "0123-99999").mkdir(parents=True, exist_ok=True)
        (output / "shards").mkdir(exist_ok=True)
        (output / "shards" / ".0123-00000.tar.99999.tmp").write_bytes(b"half a shard")

    convert_all(tiny_config, progress=leave)
    assert not list(output.rglob("*.tmp"))
    assert not list((output / "work").glob("*"))
