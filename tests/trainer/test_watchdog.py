import threading
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.paths import HEARTBEAT_FILE
from trainer.watchdog import HANG_EXIT_CODE, Heartbeat, Watchdog, read_heartbeat


def watch(run_dir: Path, codes: list[int], **changes: Any) -> Watchdog:
    settings: dict[str, Any] = {"rank": 0, "world_size": 1, "attempt": 1, "hang_timeout_s": 0.2, "beat_s": 0.02}
    return Watchdog(run_dir, **{**settings, **changes}, leave=codes.append)


def wait_until(done: Any) -> None:
    deadline = time.monotonic() + 20
    while not done() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert done()


def a_place_to_hang(until: threading.Event) -> None:
    until.wait()


def test_a_process_without_steps_ends_itself_and_says_where_it_hangs(tmp_path: Path) -> None:
    release, codes = threading.Event(), []
    hanging = threading.Thread(target=a_place_to_hang, args=(release,), daemon=True)
    hanging.start()
    with watch(tmp_path, codes) as watchdog:
        watchdog.mark("training", 7)
        wait_until(lambda: codes)
        beat = read_heartbeat(tmp_path)
    release.set()
    assert codes == [HANG_EXIT_CODE]
    stacks = (tmp_path / "stacks" / "rank-0.txt").read_text()
    assert "rank 0 has been training for" in stacks
    assert "after step 7, faults.hang_timeout_s allows 0.2" in stacks
    assert "a_place_to_hang" in stacks
    assert beat is not None
    assert (beat.state, beat.step) == ("failed", 7)
    assert "stacks/rank-0.txt" in beat.message


def test_as_long_as_steps_come_nothing_happens(tmp_path: Path) -> None:
    codes: list[int] = []
    with watch(tmp_path, codes, hang_timeout_s=1.0) as watchdog:
        for step in range(12):
            watchdog.mark("training", step)
            time.sleep(0.12)
        beat = read_heartbeat(tmp_path)
        watchdog.mark("finished", 12)
    assert beat is not None
    assert beat.state == "training"
    assert beat.time - beat.since < 1.0
    beat = read_heartbeat(tmp_path)
    assert beat is not None
    assert (beat.state, beat.step, codes) == ("finished", 12, [])
    assert list((tmp_path / "stacks").iterdir()) == []


def test_the_start_may_take_five_times_as_long(tmp_path: Path) -> None:
    codes: list[int] = []
    with watch(tmp_path, codes, hang_timeout_s=0.4):
        time.sleep(0.8)
        assert codes == []
        wait_until(lambda: codes)
    assert "has been starting for" in (tmp_path / "stacks" / "rank-0.txt").read_text()


def test_an_error_is_the_last_word(tmp_path: Path) -> None:
    def fail() -> None:
        with watch(tmp_path, []) as watchdog:
            watchdog.mark("training", 3)
            raise ValueError("why")

    with pytest.raises(ValueError, match="why"):
        fail()
    beat = read_heartbeat(tmp_path)
    assert beat is not None
    assert (beat.state, beat.message, beat.step) == ("failed", "why", 3)


def test_without_a_limit_it_waits_and_other_ranks_write_no_heartbeat(tmp_path: Path) -> None:
    codes: list[int] = []
    with watch(tmp_path, codes, hang_timeout_s=None, rank=1):
        time.sleep(0.3)
    assert codes == []
    assert read_heartbeat(tmp_path) is None


@pytest.mark.parametrize(("state", "counted_s"), [("training", 60.0), ("stopped", 0.0)])
def test_the_time_after_a_death_counts_and_that_after_a_stop_does_not(
    state: str, counted_s: float, tmp_path: Path
) -> None:
    now = time.time()
    earlier = Heartbeat(
        state=state, step=5, since=now - 70, time=now - 60, lived_s=100.0, attempt=1, world_size=2, host="h", pid=1
    )
    (tmp_path / HEARTBEAT_FILE).write_text(earlier.model_dump_json())
    assert watch(tmp_path, []).lived_s() == pytest.approx(100.0 + counted_s, abs=5)


def test_half_a_heartbeat_is_none(tmp_path: Path) -> None:
    (tmp_path / HEARTBEAT_FILE).write_text('{"state": "trai')
    assert read_heartbeat(tmp_path) is None
    assert watch(tmp_path, []).lived_s() < 5
