"""Faults of disks and inputs around a conversion: a clear message, and a rerun gives what an undisturbed run gives."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import convert, files, sandbox
from engine.commit import COMMITS_DIR, read_commit
from engine.config import ConvertConfig, Source
from engine.convert import convert_all
from engine.heartbeat import PROGRESS_DIR
from engine.plan import read_plan
from engine.sandbox import Job, guarded
from engine.scan_result import ScanResult
from engine.verify import verify
from engine.windows import Sample
from manifests.config import dump_yaml
from manifests.corpora import load_corpus
from manifests.errors import ConfigError
from manifests.recipes import load_recipe
from manifests.shards import load_snapshot

REPOSITORY = Path(__file__).resolve().parents[2]


def temporary_files(output: Path) -> list[Path]:
    """Whatever no finished conversion leaves behind."""
    return [
        *output.rglob("*.tmp"),
        *output.rglob("*.beat"),
        *(path for path in (output / "work").rglob("*") if path.is_file()),
    ]


def is_complete(config: ConvertConfig, undisturbed: ConvertConfig) -> bool:
    """Whether a rerun gives the digest of an undisturbed run and leaves nothing behind."""
    result = convert_all(config)
    assert result.snapshot is not None
    assert verify(config.output, deep=True).is_sound
    assert not temporary_files(config.output)
    return result.snapshot.digest == load_snapshot(undisturbed.output).digest


@pytest.fixture
def own_root(tiny_root: Path, tiny_config: ConvertConfig, tmp_path: Path) -> tuple[Path, ConvertConfig]:
    """Copies of the recordings that a test may spoil, and a conversion of them."""
    root = tmp_path / "raw"
    shutil.copytree(tiny_root / "psg", root / "psg")
    return root, tiny_config.model_copy(update={"sources": [Source(corpus="synthetic_psg", root=root)]})


def full_disk(config: ConvertConfig, tmp_path: Path, max_bytes: int) -> "subprocess.CompletedProcess[str]":
    """A conversion in a process (and its child) that may write files of `max_bytes` only; the error is EFBIG."""
    path = tmp_path / "c.yaml"
    path.write_text(dump_yaml(config.model_dump(mode="json")))
    script = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({max_bytes}, {max_bytes}))\n"
        "from engine.config import ConvertConfig\nfrom engine.convert import convert_all\n"
        "from manifests.config import load_config\nfrom manifests.errors import ConfigError\n"
        "try: convert_all(load_config(ConvertConfig, sys.argv[1]))\n"
        "except ConfigError as error: sys.exit(f'CONFIG {error}')\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script, str(path)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("max_bytes", [500, 100_000, 700_000])
def test_a_disk_that_takes_no_more_stops_the_run_and_a_rerun_completes_it(
    converted: ConvertConfig, tmp_path: Path, max_bytes: int
) -> None:
    """The limit meets the plan, a spool file, or a shard."""
    config = converted.model_copy(update={"output": tmp_path / "full"})
    done = full_disk(config, tmp_path, max_bytes)
    assert "CONFIG " in done.stderr, done.stderr[-2000:]
    assert "File too large; free space and run the same command again" in done.stderr
    assert not temporary_files(config.output)
    assert is_complete(config, converted)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB; skips where none may be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_names_itself_and_more_room_completes_the_run(
    converted: ConvertConfig, small_disk: Path, tmp_path: Path
) -> None:
    config = converted.model_copy(update={"output": small_disk / "out"})
    with pytest.raises(ConfigError, match=r"No space left on device; free space and run the same command again"):
        convert_all(config)
    assert not temporary_files(config.output)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert is_complete(config, converted)


def test_an_output_that_became_read_only_is_named(converted: ConvertConfig, small_disk: Path) -> None:
    config = converted.model_copy(update={"output": small_disk / "out"})
    subprocess.run(["mount", "-o", "remount,size=64m,ro", str(small_disk)], check=True)
    with pytest.raises(ConfigError, match=r"out: Read-only file system; make it writable"):
        convert_all(config)
    subprocess.run(["mount", "-o", "remount,size=64m,rw", str(small_disk)], check=True)
    assert is_complete(config, converted)


@pytest.mark.parametrize(
    "folder",
    ["shards", COMMITS_DIR, PROGRESS_DIR],
)
def test_lost_rights_to_the_output_are_named(
    converted: ConvertConfig, tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, so the system's answer is played."""
    config = converted.model_copy(update={"output": tmp_path / "out"})
    opened = Path.open

    def refuse(path: Path, mode: str = "r", *args: Any, **others: Any) -> Any:
        if path.parent == config.output / folder and mode[0] in "wa":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, mode, *args, **others)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match=rf"{folder}/.*Permission denied; make it writable and run the same command"):
        convert_all(config)
    monkeypatch.undo()
    assert is_complete(config, converted)


def test_an_unreadable_recording_is_quarantined_and_comes_in_once_it_can_be_read(
    own_root: tuple[Path, ConvertConfig], converted: ConvertConfig
) -> None:
    root, config = own_root
    victim = root / "psg/sub-002/sub-002_psg.edf"
    content = victim.read_bytes()
    victim.unlink()
    victim.symlink_to("/proc/self/mem")  # a file that opens, and whose reading is an I/O error for everybody
    result = convert_all(config)
    reasons = {item.path: item.reason for item in result.quarantine}
    assert reasons["psg/sub-002/sub-002_psg.edf"] == "UNREADABLE"
    assert "check its rights and the disk" in next(i.message for i in result.quarantine if "002" in i.path)
    assert result.counts["windows"] == 40
    victim.unlink()
    victim.write_bytes(content)
    assert is_complete(config, converted)


def test_rights_that_a_recording_loses_after_the_scan_cost_that_recording_only(
    own_root: tuple[Path, ConvertConfig], converted: ConvertConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, config = own_root
    victim, away = root / "psg/sub-002/sub-002_psg.edf", root / "away"
    scan = convert.scan

    def scan_then_lose(*args: Any, **others: Any) -> ScanResult:
        result = scan(*args, **others)
        victim.rename(away)
        victim.symlink_to("/proc/self/mem")
        return result

    monkeypatch.setattr(convert, "scan", scan_then_lose)
    result = convert_all(config)
    assert {item.path: item.reason for item in result.quarantine}["psg/sub-002/sub-002_psg.edf"] == "UNREADABLE"
    monkeypatch.undo()
    victim.unlink()
    away.rename(victim)
    assert is_complete(config, converted)


@pytest.mark.parametrize("change", ["edited", "longer", "gone"])
def test_a_recording_that_changes_after_the_scan_is_never_committed_as_the_one_that_was_scanned(
    own_root: tuple[Path, ConvertConfig], converted: ConvertConfig, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    root, config = own_root
    victim = root / "psg/sub-002/sub-002_psg.edf"
    content = victim.read_bytes()
    scan = convert.scan

    def scan_then_change(*args: Any, **others: Any) -> ScanResult:
        result = scan(*args, **others)
        match change:
            case "longer":
                victim.write_bytes(content + bytes(100))
            case "edited":
                victim.write_bytes(content[:-1000] + bytes(1000))
            case _:
                victim.unlink()
        return result

    monkeypatch.setattr(convert, "scan", scan_then_change)
    result = convert_all(config)
    (bad,) = [item for item in result.quarantine if "002" in item.path]
    assert bad.reason == "INPUT_CHANGED"
    assert "run" in bad.message
    commits = [read_commit(config.output, unit.id) for unit in read_plan(config.output)]
    (row,) = [item for commit in commits if commit for item in commit.inputs if "002" in item.path]
    assert (row.windows, row.sha256) == (0, {})
    monkeypatch.undo()
    victim.write_bytes(content)
    assert is_complete(config, converted)


def test_a_recording_that_changes_while_it_is_decoded_is_found_at_the_end(
    tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes between the sampled blocks are caught by the date of the file."""
    path = tmp_path / "psg/sub-001/sub-001_psg.edf"
    path.parent.mkdir(parents=True)
    shutil.copy(tiny_root / path.relative_to(tmp_path), path)
    corpus = load_corpus("synthetic_psg")
    job = Job(
        path=path,
        root=tmp_path,
        corpus=corpus,
        recipe=load_recipe("sleep128"),
        spool=tmp_path / "spool.bin",
        identity=files.identity_of(path, "edf", corpus)[0],
    )
    decode = sandbox.window_recording

    def overwritten(*args: Any, **others: Any) -> Iterator[Sample]:
        for number, sample in enumerate(decode(*args, **others)):
            if number == 3:
                with path.open("r+b") as file:
                    file.seek(100_001)
                    file.write(b"x")
            yield sample

    assert len(guarded(job)["rows"]) == 20
    monkeypatch.setattr(sandbox, "window_recording", overwritten)
    reason, message = guarded(job)["error"]
    assert reason == "INPUT_CHANGED"
    assert "wait until nobody writes to it" in message
