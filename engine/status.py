"""How far a conversion is, read from its folder while it runs or after it ended: progress, stalls, speed, ETA."""

import socket
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from engine.commit import Quarantined, read_commit, sizes_of
from engine.heartbeat import BEAT_S, BEAT_SUFFIX, PROGRESS_DIR, STORE_BEAT_S, Heartbeat, read_heartbeat, read_progress
from engine.lock import LOCK_FILE, Holder
from engine.plan import PLAN_FILE, PlanItem, Unit, read_plan
from engine.quarantine import CONFIG_FILE, read_waivers, retried_path, settings_of
from engine.storage import is_remote, sizes_in
from manifests.errors import ConfigError
from manifests.files import is_held, read_at_once
from manifests.shards import SNAPSHOT_FILE, load_snapshot

STATES = ("done", "running", "stalled", "failed", "pending")
_SILENT_BEATS = 12  # 60 s on a disk: a process that beats every 5 s is not just busy
_HANG_FACTOR, _HANG_S = 2.0, 60.0  # a recording may be tried twice, each time up to its limit
_WINDOW_S = 60.0  # of observed speed
_MIN_WINDOW_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitRow:
    """State of one unit.

    Attributes:
        unit: Its id.
        state: One of `STATES`. Stalled: a process began it and is gone, silent or hanging. Failed: it ended with an
            error and nobody works on it.
        reason: Why it is stalled, failed or pending again; for a running one what it is doing.
        recordings: Recordings of the unit.
        done: Those dealt with.
        hours: Recorded hours.
        hours_done: Those dealt with by a process that lives, or committed.
        windows: Windows committed.
        quarantined: Recordings rejected so far.
        seconds: Time that the conversion took.
    """

    unit: str
    state: str
    reason: str = ""
    recordings: int
    done: int = 0
    hours: float
    hours_done: float = 0.0
    windows: int = 0
    quarantined: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """State of an output folder.

    Attributes:
        units: One row per unit, in the order of the plan.
        quarantine: What was rejected in committed units, with reason, message and the command that shows why.
        num_waived: Those among them that the operator has accepted.
        is_running: Whether a process holds the folder or tells that it lives.
        digest: Digest of the snapshot that stands there, or nothing.
        hours_per_s: Recorded hours converted per second, or None when nothing tells.
        eta_s: Seconds until the last unit is done, or None.
        resume: The command that goes on.
    """

    units: tuple[UnitRow, ...]
    quarantine: tuple[Quarantined, ...]
    num_waived: int
    is_running: bool
    digest: str
    hours_per_s: float | None
    eta_s: float | None
    resume: str

    @property
    def counts(self) -> dict[str, int]:
        """Units by state, all states."""
        found = Counter(row.state for row in self.units)
        return {state: found[state] for state in STATES}

    @property
    def num_done(self) -> int:
        """Units with a valid commit."""
        return self.counts["done"]

    @property
    def hours_done(self) -> float:
        """Recorded hours that are committed or in the hands of a process that lives."""
        return sum(row.hours_done for row in self.units)

    @property
    def hours_total(self) -> float:
        """Recorded hours of the plan."""
        return sum(row.hours for row in self.units)

    @property
    def is_final(self) -> bool:
        """Whether a snapshot of all units stands there."""
        return bool(self.digest) and self.num_done == len(self.units)


def _is_held(output: Path) -> bool:
    """Whether a conversion holds the lock of a folder."""
    path = output / LOCK_FILE
    if is_remote(output):
        try:
            return not Holder.model_validate_json(read_at_once(path)).is_gone()
        except (FileNotFoundError, ValueError):
            return False
    return is_held(path)


def _is_gone(beat: Heartbeat) -> bool:
    """Whether the process of a heartbeat ran on this machine and has ended."""
    if beat.host != socket.gethostname():
        return False
    try:
        return psutil.Process(beat.pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _ago(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def stall(beat: Heartbeat, *, now: float, silent_s: float, hang_s: float) -> str:
    """Why the process of a heartbeat does not get on, or nothing.

    Args:
        beat: Its last word.
        now: Wall clock in s.
        silent_s: A process that has not told for so long is not trusted to live.
        hang_s: A recording that takes so long hangs, although the process tells that it lives.
    """
    if _is_gone(beat):
        return f"process {beat.pid} on {beat.host} has ended; last heard {_ago(now - beat.time)} ago"
    if now - beat.time > silent_s:
        return f"process {beat.pid} on {beat.host} has been silent for {_ago(now - beat.time)}"
    if beat.recording is not None and now - beat.since > hang_s:
        return f"no result for {_ago(now - beat.since)}, which is over twice time_limit_s; its process {beat.pid} lives"
    return ""


def _doing(beat: Heartbeat, recordings: tuple[PlanItem, ...], num_done: int, now: float) -> str:
    if beat.recording is None:
        what = "writing shards" if num_done == beat.recordings else "starting"
        return f"{what} for {_ago(now - beat.since)}"
    name = recordings[beat.recording].path if beat.recording < len(recordings) else "?"
    return f"recording {beat.recording + 1} of {beat.recordings} for {_ago(now - beat.since)}: {name}"


class Reader:
    """Reads the state of a folder again and again; what is committed is read once."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._committed: dict[str, tuple[UnitRow, list[Quarantined]]] = {}
        self._seen: deque[tuple[float, float]] = deque()
        self._hang_s = float("inf")
        if (output / CONFIG_FILE).exists():
            self._hang_s = _HANG_FACTOR * settings_of(output).time_limit_s + _HANG_S
        self._silent_s = _SILENT_BEATS * BEAT_S if not is_remote(output) else _SILENT_BEATS / 2 * STORE_BEAT_S

    def read(self) -> Status:
        """State now.

        Raises:
            ConfigError: There is no plan in the folder, and nobody is about to write one.
        """
        is_locked = _is_held(self._output)
        if not is_locked and not (self._output / PLAN_FILE).exists():
            found = f"no {PLAN_FILE}" if self._output.exists() else "no such folder"
            raise ConfigError(
                f"{self._output}: {found}; give the output of kymo convert, or the run_dir of kymo pretrain or adapt"
            )
        units = read_plan(self._output)
        beats = {name for name in sizes_in(self._output / PROGRESS_DIR) if name.endswith(BEAT_SUFFIX)}
        sizes = sizes_of(self._output)
        rows = [self._row(unit, beats, sizes) for unit in units]
        quarantine = [item for unit in units for item in self._committed.get(unit.id, (None, []))[1]]
        waivers = read_waivers(self._output)
        is_running = is_locked or any(row.state == "running" for row in rows)
        speed = self._speed(rows) if is_running else None
        left = sum(row.hours - row.hours_done for row in rows)
        return Status(
            units=tuple(rows),
            quarantine=tuple(quarantine),
            num_waived=sum((item.corpus, item.path, item.reason) in waivers for item in quarantine),
            is_running=is_running,
            digest=load_snapshot(self._output).digest if (self._output / SNAPSHOT_FILE).exists() else "",
            hours_per_s=speed,
            eta_s=left / speed if speed else None,
            resume=f"kymo convert {self._output / CONFIG_FILE}",
        )

    def _row(self, unit: Unit, beats: set[str], sizes: dict[str, int] | None) -> UnitRow:
        """State of one unit; a heartbeat counts more than a commit, which may be an older one that is made again."""
        beat = read_heartbeat(self._output, unit.id) if f"{unit.id}{BEAT_SUFFIX}" in beats else None
        blank = UnitRow(unit=unit.id, state="pending", recordings=len(unit.recordings), hours=unit.seconds / 3600)
        if beat is not None:
            self._committed.pop(unit.id, None)
            return self._working(unit, beat, blank)
        if unit.id not in self._committed:
            commit = read_commit(self._output, unit.id, sizes)
            if commit is None:
                return self._waiting(unit, blank)
            row = replace(
                blank,
                state="done",
                done=len(unit.recordings),
                hours_done=blank.hours,
                windows=commit.counts.windows,
                quarantined=commit.counts.quarantined,
                seconds=commit.seconds,
            )
            self._committed[unit.id] = row, commit.quarantine
        return self._committed[unit.id][0]

    def _working(self, unit: Unit, beat: Heartbeat, blank: UnitRow) -> UnitRow:
        """A unit that some process has in its hands, or had when it was killed."""
        now = time.time()
        lines = [line for line in read_progress(self._output, unit.id) if "seconds" in line]
        why = stall(beat, now=now, silent_s=self._silent_s, hang_s=self._hang_s)
        doing = _doing(beat, unit.recordings, len(lines), now)
        return replace(
            blank,
            state="stalled" if why else "running",
            reason=f"{why}; {doing}" if why else doing,
            done=len(lines),
            hours_done=0.0 if _is_gone(beat) else sum(line["seconds"] for line in lines) / 3600,
            quarantined=sum(bool(line["reason"]) for line in lines),
        )

    def _waiting(self, unit: Unit, blank: UnitRow) -> UnitRow:
        """A unit that nobody works on: it failed, was interrupted, is marked, or has its turn yet to come."""
        lines = read_progress(self._output, unit.id)
        errors = [line["error"] for line in lines if "error" in line]
        if errors:
            return replace(blank, state="failed", reason=errors[-1])
        if retried_path(self._output, unit.id).exists():
            return replace(blank, reason="marked by kymo quarantine retry")
        done = sum("seconds" in line for line in lines)
        return replace(blank, reason=f"interrupted after {done} of {blank.recordings} recordings" if done else "")

    def _speed(self, rows: list[UnitRow]) -> float | None:
        """Hours per second as observed over the last minute; before, as committed units took times what runs now."""
        now, hours = time.monotonic(), sum(row.hours_done for row in rows)
        self._seen.append((now, hours))
        while now - self._seen[0][0] > _WINDOW_S:
            self._seen.popleft()
        began, before = self._seen[0]
        if now - began >= _MIN_WINDOW_S and hours > before:
            return (hours - before) / (now - began)
        done = [row for row in rows if row.seconds > 0]
        workers = sum(row.state == "running" for row in rows)
        if not done or not workers:
            return None
        return workers * sum(row.hours for row in done) / sum(row.seconds for row in done)


def status(output: Path) -> Status:
    """State of a conversion's output folder.

    Raises:
        ConfigError: There is no plan in it.
    """
    return Reader(output).read()


def watch(output: Path, *, interval_s: float = 1.0) -> Iterator[Status]:
    """State of a folder again and again, until no conversion runs there any more; that last state is yielded too."""
    reader = Reader(output)
    while True:
        state = reader.read()
        yield state
        if not state.is_running:
            return
        time.sleep(interval_s)
