"""SIGKILL at random moments of whole conversions under Ray: driver, raylet, actor, decoder child.

When the same command has run again, the digest is that of an undisturbed conversion and nothing temporary is left.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from engine.config import ConvertConfig, Source
from engine.convert import convert_all
from engine.synthetic import synthesise
from manifests.shards import load_snapshot

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_FOLDERS = int(os.environ.get("KYMO_SOAK_FOLDERS", "20"))
KILLS_PER_FOLDER = 5
SEED = 20261121
# What each kind of process is called, and how often it is chosen. A driver or raylet ends the whole run.
TARGETS = {"driver": 2, "raylet": 2, "actor": 4, "child": 6}
MARKS = {"raylet": "raylet/raylet", "actor": "ConvertActor", "child": "engine.sandbox"}
EARLY_SHARE = 0.2  # of the runs may be killed while Ray still starts
RUN_S = 240


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ConvertConfig:
    """A conversion of eight nights and a broken file into about eight units, and what it gives undisturbed."""
    root = tmp_path_factory.mktemp("recordings")
    synthesise(root, num_subjects=8, num_ecg=1, night_minutes=20)
    return ConvertConfig(
        output=tmp_path_factory.mktemp("whole") / "shards",
        recipe="sleep128",
        sources=[Source(corpus="synthetic_psg", root=root)],
        num_cpus=2,
        unit_bytes=4_000_000,
        shard_bytes=1_500_000,
        quarantine_budget=0.5,
    )


@contextmanager
def _started(config: ConvertConfig, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`kymo convert`; whatever of it still lives at the end is ended by the ids seen while it ran."""
    path.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "convert", str(path)],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def _target(kind: str, process: subprocess.Popen[bytes], random_: random.Random) -> psutil.Process | None:
    if kind == "driver":
        return psutil.Process(process.pid) if process.poll() is None else None
    found = []
    for other in _family(process):
        with suppress(psutil.Error):
            if MARKS[kind] in " ".join(other.cmdline()) or MARKS[kind] in other.name():
                found.append(other)
    return random_.choice(found) if found else None


def _disturb(process: subprocess.Popen[bytes], random_: random.Random, kills: list[str]) -> set[psutil.Process]:
    """Kill up to `KILLS_PER_FOLDER` processes at random moments of the run; returns all that were seen."""
    seen: set[psutil.Process] = set()
    began = time.monotonic()
    if random_.random() < EARLY_SHARE:
        time.sleep(random_.uniform(0.0, 8.0))
    else:  # however slow the machine is: not before the actors work
        while process.poll() is None and _target("child", process, random_) is None:
            time.sleep(0.1)
    while process.poll() is None and time.monotonic() - began < RUN_S:
        seen.update(_family(process))
        kind = random_.choices(list(TARGETS), list(TARGETS.values()))[0]
        target = _target(kind, process, random_) if len(kills) < KILLS_PER_FOLDER else None
        if target is not None:
            with suppress(psutil.Error):
                target.kill()
                kills.append(kind)
        time.sleep(random_.uniform(0.05, 1.0))
    assert process.poll() is not None, f"the conversion hangs: not over after {RUN_S} s, kills {kills}"
    return seen


def _assert_whole(output: Path, digest: str) -> None:
    assert load_snapshot(output).digest == digest
    assert not list(output.rglob("*.tmp"))
    assert not list((output / "work").glob("*"))


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_kills_cost_nothing(config: ConvertConfig, tmp_path: Path) -> None:
    assert int(convert_all(config).exit_code) == 3
    digest = load_snapshot(config.output).digest
    random_ = random.Random(SEED)
    kills: Counter[str] = Counter()
    codes: Counter[int] = Counter()
    seen: set[psutil.Process] = set()
    for number in range(NUM_FOLDERS):
        output = tmp_path / f"run{number}"
        here: list[str] = []
        code = 0
        while code != 3 or len(here) < KILLS_PER_FOLDER:
            if code == 3:  # it ended before the last kill: go on in an empty folder
                shutil.rmtree(output)
            with _started(config.model_copy(update={"output": output}), tmp_path / "config.yaml") as process:
                seen |= _disturb(process, random_, here)
            code = process.returncode
            codes[code] += 1
        # A child that was killed in both tries of a recording leaves it to the next run of the same command.
        with _started(config.model_copy(update={"output": output}), tmp_path / "config.yaml") as process:
            assert process.wait(timeout=RUN_S) == 3
        _assert_whole(output, digest)
        shutil.rmtree(output)
        kills.update(here)
        print(f"folder {number}: {' '.join(here)}")  # noqa: T201 - a soak of many minutes tells how far it is
    _, alive = psutil.wait_procs(list(seen), timeout=30)
    for orphan in alive:
        with suppress(psutil.Error):
            orphan.kill()
    alive = [orphan for orphan in alive if orphan.is_running() and orphan.status() != psutil.STATUS_ZOMBIE]
    assert not alive, f"processes outlive their conversion: {alive}"
    assert set(kills) == set(TARGETS), kills
    print(f"\n{kills.total()} kills {dict(kills)} over {codes.total()} runs, exit codes {dict(codes)}")  # noqa: T201 - the figures of the run
