"""The pretraining objectives by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from trainer.models.build import Encoder
from trainer.objectives.leave_one_out import LeaveOneOut, LeaveOneOutConfig
from trainer.objectives.nt_xent import NtXent, NtXentConfig

ObjectiveConfig = Annotated[LeaveOneOutConfig | NtXentConfig, Field(discriminator="kind")]
Objective = LeaveOneOut | NtXent

OBJECTIVES: dict[str, Callable[[Encoder, Any], Objective]] = {
    "leave_one_out": LeaveOneOut,
    "nt_xent": NtXent,
}


def build_objective(encoder: Encoder, config: ObjectiveConfig) -> Objective:
    """The objective around `encoder`: collate windows, then loss and metrics of a batch."""
    return OBJECTIVES[config.kind](encoder, config)
