"""Ray is tried twice, and never from a folder whose code its workers would take for ours."""

from pathlib import Path

import pytest

from manifests.errors import ConfigError
from manifests.ray_start import ROOT, check_working_folder, start_ray

SLOW = "The current node timed out during startup. This could happen because some of the raylet failed to startup"


class Machine:
    """A Ray that comes up at the given attempt, or fails with another error."""

    def __init__(self, *, ready_at: int, message: str = SLOW) -> None:
        self.starts = self.stops = 0
        self._ready_at = ready_at
        self._message = message

    def start(self) -> None:
        self.starts += 1
        if self.starts < self._ready_at:
            raise RuntimeError(self._message)

    def stop(self) -> None:
        self.stops += 1


@pytest.mark.parametrize(("ready_at", "stops"), [(1, 0), (2, 1)])
def test_a_busy_machine_gets_a_second_try(ready_at: int, stops: int) -> None:
    machine = Machine(ready_at=ready_at)
    start_ray(machine.start, machine.stop)
    assert (machine.starts, machine.stops) == (ready_at, stops)


def test_a_machine_that_stays_busy_is_told_in_one_line() -> None:
    machine = Machine(ready_at=3)
    with pytest.raises(ConfigError, match=r"too busy .*run the same command again"):
        start_ray(machine.start, machine.stop)
    assert machine.stops == 2


def test_another_error_is_not_tried_again() -> None:
    machine = Machine(ready_at=2, message="no such address")
    with pytest.raises(RuntimeError, match="no such address"):
        start_ray(machine.start, machine.stop)
    assert machine.starts == 1


@pytest.mark.parametrize("name", ["engine/__init__.py", "jobs.py"])
def test_a_folder_whose_code_would_be_taken_for_ours_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.touch()
    with pytest.raises(ConfigError, match="run the command from another folder"):
        check_working_folder(tmp_path)


def test_our_own_folder_and_one_with_like_folders_are_fine(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()  # without __init__.py Python looks further
    check_working_folder(tmp_path)
    check_working_folder(ROOT)
