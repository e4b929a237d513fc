"""How far a conversion is, read from its folder while it runs or after it ended."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.commit import Quarantined, progress_errors, read_commit, read_progress
from engine.plan import PLAN_FILE, Unit, read_plan
from manifests.errors import ConfigError
from manifests.shards import SNAPSHOT_FILE


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """State of an output folder.

    Attributes:
        units: One row per unit: unit, state (`done`, `running`, `pending`), recordings, done, hours, windows,
            quarantined, seconds.
        hours_done: Recorded hours of committed units and of the recordings that running units have finished.
        hours_total: Recorded hours of the plan.
        quarantine: What was rejected, with reason, message and the command that shows why.
        errors: What stopped a unit, if anything did.
        is_final: Whether a snapshot stands there.
    """

    units: list[dict[str, Any]]
    hours_done: float
    hours_total: float
    quarantine: list[Quarantined]
    errors: list[str]
    is_final: bool

    @property
    def num_done(self) -> int:
        """Units with a valid commit."""
        return sum(row["state"] == "done" for row in self.units)

    def quarantine_rows(self) -> list[dict[str, Any]]:
        """One row per rejected recording for a table."""
        return [item.model_dump() for item in self.quarantine]


def _unit_row(output: Path, unit: Unit, quarantine: list[Quarantined]) -> dict[str, Any]:
    row = {"unit": unit.id, "recordings": len(unit.recordings), "hours": unit.seconds / 3600}
    commit = read_commit(output, unit.id)
    if commit is not None:
        quarantine += commit.quarantine
        return {
            **row,
            "state": "done",
            "done": len(unit.recordings),
            "hours_done": row["hours"],
            "windows": commit.counts.windows,
            "quarantined": commit.counts.quarantined,
            "seconds": commit.seconds,
        }
    lines = [line for line in read_progress(output, unit.id) if "seconds" in line]
    return {
        **row,
        "state": "running" if lines else "pending",
        "done": len(lines),
        "hours_done": sum(line["seconds"] for line in lines) / 3600,
        "windows": 0,
        "quarantined": sum(bool(line["reason"]) for line in lines),
        "seconds": 0.0,
    }


def status(output: Path) -> Status:
    """State of a conversion's output folder.

    Raises:
        ConfigError: There is no plan in it.
    """
    if not (output / PLAN_FILE).exists():
        raise ConfigError(f"{output}: no {PLAN_FILE}; give the output folder of a kymo convert")
    units = read_plan(output)
    quarantine: list[Quarantined] = []
    rows = [_unit_row(output, unit, quarantine) for unit in units]
    open_units = [row["unit"] for row in rows if row["state"] != "done"]
    return Status(
        units=rows,
        hours_done=sum(row["hours_done"] for row in rows),
        hours_total=sum(row["hours"] for row in rows),
        quarantine=quarantine,
        errors=[error for unit in open_units for error in progress_errors(output, unit)],
        is_final=(output / SNAPSHOT_FILE).exists(),
    )
