"""What conversion bakes into a shard: rate and band per kind, window, labels. One YAML each in `recipes/`."""

from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from manifests.channels import KINDS
from manifests.config import load_shipped

RECIPES_DIR = Path(__file__).resolve().parent / "recipes"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


NATIVE = "native"
"""A kind's `rate_hz` that keeps whatever rate a channel was recorded at."""


class KindRule(_Strict):
    """Rate and band of one kind; null leaves that side of the band open.

    The upper edge of the anti-alias filter is set by the rate; `high_hz` lowers it. `rate_hz: native` keeps the
    recorded rate.
    """

    rate_hz: Annotated[int, Field(gt=0)] | Literal["native"]
    low_hz: Annotated[float, Field(gt=0)] | None = None
    high_hz: Annotated[float, Field(gt=0)] | None = None
    notch: bool = False

    @model_validator(mode="after")
    def _is_a_band(self) -> "KindRule":
        nyquist = float("inf") if self.rate_hz == NATIVE else self.rate_hz / 2
        if self.high_hz is not None and self.high_hz > nyquist:
            raise ValueError(f"high_hz {self.high_hz} lies above half of rate_hz {self.rate_hz}")
        if self.low_hz is not None and self.low_hz >= (self.high_hz or nyquist):
            raise ValueError(f"low_hz {self.low_hz} is not below the upper edge")
        return self

    def stored_rate(self, recorded: Fraction) -> Fraction:
        """Rate in Hz at which a channel is stored that was recorded at `recorded` Hz."""
        return recorded if self.rate_hz == NATIVE else Fraction(self.rate_hz)

    @property
    def least_recorded_hz(self) -> float:
        """Least recorded rate in Hz that holds the band which the rule promises."""
        if self.high_hz is not None:
            return 2 * self.high_hz
        return 2 * (self.low_hz or 0.0) if self.rate_hz == NATIVE else self.rate_hz


class Recipe(_Strict):
    """A recipe. Windows start every `hop_s` seconds inside each contiguous segment.

    With native rates a window becomes one sample for each rate that its channels have, so that the arrays of a sample
    share one time axis. A window at 1000/3 Hz holds the whole samples that fit: 3333 in 10 s; the rate stays exact.

    Attributes:
        place: `grid` (every `hop_s` seconds) or `events`: one window per labelled event, its anchor on the event's
            start or centre. A corpus without annotations, such as a stranger's file, has the grid all the same.
        anchor: Point of a window, `start` or `centre`, whose event gives it its class. A window on the grid with the
            anchor in its centre has the class that fills most of it, as long as there are two at most.
        keep: `all` windows, or only `labelled` ones.
        min_quality: Least share of good channel-samples of a window (not flat, clipped or missing).
    """

    id: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{1,31}$")]
    title: str
    citation: str = ""
    window_s: Annotated[int, Field(gt=0)]
    hop_s: Annotated[int, Field(gt=0)]
    kinds: dict[str, KindRule]
    place: Literal["grid", "events"] = "grid"
    anchor: Literal["start", "centre"] = "start"
    keep: Literal["all", "labelled"] = "all"
    min_quality: Annotated[float, Field(ge=0, le=1)] = 0.0

    @field_validator("kinds")
    @classmethod
    def _known(cls, value: dict[str, KindRule]) -> dict[str, KindRule]:
        unknown = sorted(set(value) - set(KINDS))
        if unknown or not value:
            raise ValueError(f"kinds {', '.join(unknown) or '(none)'}: expected some of {', '.join(KINDS)}")
        return value

    @model_validator(mode="after")
    def _all_native_or_none(self) -> "Recipe":
        if len({rule.rate_hz == NATIVE for rule in self.kinds.values()}) > 1:
            raise ValueError("kinds: rate_hz is native for some and a number for others; a recipe keeps all or none")
        if self.place == "events" and self.is_native:
            raise ValueError("place events needs rates of the recipe's own: with native ones two windows may be one")
        return self

    @property
    def anchor_s(self) -> Fraction:
        """Seconds from a window's start to its anchor."""
        return Fraction(self.window_s, 2) if self.anchor == "centre" else Fraction(0)

    @property
    def is_native(self) -> bool:
        """Whether channels keep their recorded rates."""
        return any(rule.rate_hz == NATIVE for rule in self.kinds.values())

    @property
    def lowest_rate(self) -> Fraction:
        """Rate in Hz below which two windows would begin with the same sample, or a window hold none."""
        return Fraction(1, min(self.window_s, self.hop_s))

    def window_samples(self, rate: Fraction) -> int:
        """Samples of a window at `rate` Hz."""
        return self.window_s * rate.numerator // rate.denominator


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Recipe by the name of a shipped file, or by the path of one's own YAML.

    Raises:
        ConfigError: No such recipe, or a file that breaks the schema.
    """
    return load_shipped(Recipe, RECIPES_DIR, name_or_path, noun="recipe")
