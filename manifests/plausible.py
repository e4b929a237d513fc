"""Plausible amplitudes and levels by kind, from `plausible.yaml`: outside of them a unit or a gain is suspect."""

from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, field_validator

from manifests.channels import KINDS
from manifests.config import read_yaml

TABLE_FILE = Path(__file__).with_name("plausible.yaml")
SD_PER_MAD = 1.4826
"""Standard deviation of a Gaussian signal in units of its median absolute deviation."""


class Plausible(BaseModel):
    """Least and largest robust amplitude and level of a kind in its canonical unit; null = any."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    amplitude: tuple[float, float] | None = None
    level: tuple[float, float] | None = None

    @field_validator("amplitude", "level")
    @classmethod
    def _is_a_range(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not value[0] < value[1]:
            raise ValueError(f"{list(value)}: the least value comes first")
        return value


@cache
def plausible() -> dict[str, Plausible]:
    """The table, by kind."""
    table = TypeAdapter(dict[str, Plausible]).validate_python(read_yaml(TABLE_FILE))
    if unknown := sorted(set(table) - set(KINDS)):
        raise ValueError(f"{TABLE_FILE.name}: {', '.join(unknown)}: no kind")
    return table


def is_suspect(kind: str, *, median: float, mad: float) -> bool:
    """Whether a channel's unit or gain is doubtful: median and MAD, in the kind's unit, leave the plausible range."""
    rule = plausible().get(kind)
    if rule is None:
        return False
    checks = ((rule.amplitude, SD_PER_MAD * mad), (rule.level, median))
    return any(bounds is not None and not bounds[0] <= value <= bounds[1] for bounds, value in checks)
