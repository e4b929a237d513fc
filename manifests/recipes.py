"""What conversion bakes into a shard: rate and band per kind, window, labels. One YAML each in `recipes/`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from manifests.channels import KINDS
from manifests.config import load_shipped

RECIPES_DIR = Path(__file__).resolve().parent / "recipes"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KindRule(_Strict):
    """Rate and band of one kind; null leaves that side of the band open.

    The upper edge of the anti-alias filter is set by the rate; `high_hz` lowers it.
    """

    rate_hz: Annotated[int, Field(gt=0)]
    low_hz: Annotated[float, Field(gt=0)] | None = None
    high_hz: Annotated[float, Field(gt=0)] | None = None
    notch: bool = False

    @model_validator(mode="after")
    def _is_a_band(self) -> "KindRule":
        if self.high_hz is not None and self.high_hz > self.rate_hz / 2:
            raise ValueError(f"high_hz {self.high_hz} lies above half of rate_hz {self.rate_hz}")
        if self.low_hz is not None and self.low_hz >= (self.high_hz or self.rate_hz / 2):
            raise ValueError(f"low_hz {self.low_hz} is not below the upper edge")
        return self


class Recipe(_Strict):
    """A recipe. Windows start every `hop_s` seconds inside each contiguous segment.

    Attributes:
        keep: `all` windows, or only `labelled` ones.
        min_quality: Least share of good channel-samples of a window (not flat, clipped or missing).
    """

    id: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{1,31}$")]
    title: str
    citation: str = ""
    window_s: Annotated[int, Field(gt=0)]
    hop_s: Annotated[int, Field(gt=0)]
    kinds: dict[str, KindRule]
    keep: Literal["all", "labelled"] = "all"
    min_quality: Annotated[float, Field(ge=0, le=1)] = 0.0

    @field_validator("kinds")
    @classmethod
    def _known(cls, value: dict[str, KindRule]) -> dict[str, KindRule]:
        unknown = sorted(set(value) - set(KINDS))
        if unknown or not value:
            raise ValueError(f"kinds {', '.join(unknown) or '(none)'}: expected some of {', '.join(KINDS)}")
        return value


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Recipe by the name of a shipped file, or by the path of one's own YAML.

    Raises:
        ConfigError: No such recipe, or a file that breaks the schema.
    """
    return load_shipped(Recipe, RECIPES_DIR, name_or_path, noun="recipe")
