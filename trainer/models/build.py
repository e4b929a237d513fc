"""The encoders by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from trainer.models.sleep import SleepEncoder, SleepEncoderConfig
from trainer.models.univariate import UnivariateEncoder, UnivariateEncoderConfig

EncoderConfig = Annotated[SleepEncoderConfig | UnivariateEncoderConfig, Field(discriminator="kind")]
Encoder = SleepEncoder | UnivariateEncoder

ENCODERS: dict[str, Callable[[Any], Encoder]] = {
    "sleep": SleepEncoder,
    "univariate": UnivariateEncoder,
}


def build_encoder(config: EncoderConfig) -> Encoder:
    """An encoder with fresh weights, drawn from torch's global generator."""
    return ENCODERS[config.kind](config)
