import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engine.commit import commit_path
from engine.config import ConvertConfig
from engine.heartbeat import Heartbeat, append_progress, heartbeat_path
from engine.lock import locked
from engine.quarantine import retry, waive
from engine.status import Reader, Status, UnitRow, stall, status, watch
from manifests.errors import ConfigError

HOST = socket.gethostname()


def beat(**changes: object) -> Heartbeat:
    now = time.time()
    values = {"unit": "u", "recording": 1, "recordings": 4, "since": now, "time": now, "host": HOST, "pid": os.getpid()}
    return Heartbeat.model_validate(values | changes)


def put_beat(output: Path, unit: str, **changes: object) -> None:
    heartbeat_path(output, unit).write_text(beat(unit=unit, **changes).model_dump_json(), encoding="utf-8")


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def row_of(state: Status, unit: str) -> UnitRow:
    return next(row for row in state.units if row.unit == unit)


@pytest.fixture
def pending(converted: ConvertConfig) -> tuple[Path, str]:
    """Output folder and a unit of it that has no commit any more."""
    unit = status(converted.output).units[0].unit
    commit_path(converted.output, unit).unlink()
    (converted.output / "progress" / f"{unit}.jsonl").unlink(missing_ok=True)
    return converted.output, unit


def test_a_finished_conversion(converted: ConvertConfig, tmp_path: Path) -> None:
    done = status(converted.output)
    assert done.is_final
    assert not done.is_running
    assert done.num_done == len(done.units) > 1
    assert done.hours_done == done.hours_total == pytest.approx(0.5)
    assert (done.hours_per_s, done.eta_s) == (None, None)
    assert [item.reason for item in done.quarantine] == ["TRUNCATED"]
    assert done.num_waived == 0
    waive(converted.output, [], note="accepted", reason="TRUNCATED")
    assert status(converted.output).num_waived == 1
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        status(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no plan\.jsonl"):
        status(tmp_path)


def test_units_wait_fail_and_are_marked(pending: tuple[Path, str], converted: ConvertConfig) -> None:
    output, unit = pending
    state = status(output)
    assert (row_of(state, unit).state, row_of(state, unit).reason) == ("pending", "")
    assert not state.is_final
    assert state.digest
    append_progress(output, unit, {"seconds": 600, "reason": ""})
    row = row_of(status(output), unit)
    assert (row.state, row.hours_done) == ("pending", 0.0)
    assert row.reason.startswith("interrupted after 1 of")
    append_progress(output, unit, {"error": "OSError: disk on fire"})
    assert (row_of(status(output), unit).state, row_of(status(output), unit).reason) == (
        "failed",
        "OSError: disk on fire",
    )
    (other,) = retry(output, [], reason="TRUNCATED") if status(output).quarantine else [unit]
    if other != unit:
        assert row_of(status(output), other).reason == "marked by kymo quarantine retry"


def test_a_running_unit_tells_what_it_does(pending: tuple[Path, str]) -> None:
    output, unit = pending
    append_progress(output, unit, {"seconds": 600, "reason": ""})
    append_progress(output, unit, {"seconds": 0, "reason": "TRUNCATED"})
    put_beat(output, unit, recording=0, recordings=2, since=time.time() - 7)
    state = status(output)
    row = row_of(state, unit)
    assert (row.state, row.done, row.quarantined) == ("running", 2, 1)
    assert row.reason.startswith("recording 1 of 2 for 7 s: psg/")
    assert row.hours_done == pytest.approx(600 / 3600)
    assert state.is_running
    put_beat(output, unit, recording=None, recordings=2)
    assert row_of(status(output), unit).reason.startswith("writing shards")
    put_beat(output, unit, recording=None, recordings=3)
    assert row_of(status(output), unit).reason.startswith("starting")


def test_a_committed_unit_that_is_made_again_is_running(converted: ConvertConfig) -> None:
    reader = Reader(converted.output)
    unit = reader.read().units[0].unit
    put_beat(converted.output, unit)
    assert row_of(reader.read(), unit).state == "running"
    heartbeat_path(converted.output, unit).unlink()
    assert row_of(reader.read(), unit).state == "done"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"time": time.time() - 3600, "host": "elsewhere"}, "has been silent for 6"),
        ({"pid": dead_pid()}, "has ended"),
        ({"pid": dead_pid(), "host": "elsewhere"}, ""),
        ({"since": time.time() - 2000}, "over twice time_limit_s"),
        ({"since": time.time() - 2000, "recording": None}, ""),
    ],
)
def test_why_a_process_does_not_get_on(changes: dict[str, object], words: str) -> None:
    found = stall(beat(**changes), now=time.time(), silent_s=600, hang_s=1260)
    assert words in found
    assert bool(words) == bool(found)


def test_a_stalled_unit_counts_its_hours_only_while_its_process_lives(pending: tuple[Path, str]) -> None:
    output, unit = pending
    append_progress(output, unit, {"seconds": 600, "reason": ""})
    put_beat(output, unit, pid=dead_pid())
    row = row_of(status(output), unit)
    assert (row.state, row.hours_done) == ("stalled", 0.0)
    assert "has ended" in row.reason
    assert not status(output).is_running
    put_beat(output, unit, since=time.time() - 1300)
    assert row_of(status(output), unit).state == "stalled"
    put_beat(output, unit, since=time.time() - 1200)
    assert row_of(status(output), unit).state == "running"


def test_speed_comes_from_committed_units_first_and_from_the_clock_later(
    pending: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, unit = pending
    put_beat(output, unit)
    reader = Reader(output)
    first = reader.read()
    done = [row for row in first.units if row.state == "done"]
    expected = sum(row.hours for row in done) / sum(row.seconds for row in done)
    assert first.hours_per_s == pytest.approx(expected)
    assert first.eta_s == pytest.approx((first.hours_total - first.hours_done) / expected)
    append_progress(output, unit, {"seconds": 60, "reason": ""})
    now = time.monotonic()
    monkeypatch.setattr("engine.status.time.monotonic", lambda: now + 30)
    assert reader.read().hours_per_s == pytest.approx(60 / 3600 / 30, rel=0.05)


def test_a_lock_tells_that_a_conversion_scans(tmp_path: Path) -> None:
    with locked(tmp_path):
        state = status(tmp_path)
        assert (state.is_running, state.units, state.is_final) == (True, (), False)
    with pytest.raises(ConfigError):
        status(tmp_path)


def test_watching_ends_with_the_conversion(converted: ConvertConfig) -> None:
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(converted.output):
            held.set()
            release.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(5)
    seen: list[bool] = []
    for state in watch(converted.output, interval_s=0.01):
        seen.append(state.is_running)
        if len(seen) == 3:
            release.set()
            holder.join()
    assert seen[:3] == [True, True, True]
    assert seen[-1] is False
    assert all(seen[:-1])


def test_progress_files_hold_no_name(converted: ConvertConfig) -> None:
    for path in (converted.output / "progress").glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert set(json.loads(line)) <= {"seconds", "reason", "error"}
