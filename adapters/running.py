"""How a run that learns tasks is carried out: processes, device, precision."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from adapters.sampling import Sampling
from trainer.cache import CacheConfig
from trainer.config import NumWorkers, RayConfig

# May change between two starts of one run: they decide where numbers are computed. Summation order follows them.
FREE_KEYS = frozenset(
    {"zero_stage", "num_workers", "device", "threads", "collective_timeout_s", "ray", "cache", "log_every", "storage"}
)


class Running(BaseModel):
    """Keys that every run that learns tasks has, whatever it trains.

    Attributes:
        sampling: How the windows of a step are shared among tasks; null = every task gives its own batch.
        zero_stage: 0 = plain torch: the gradients of all processes are added up once a step. 1, 2 = DeepSpeed ZeRO,
            which splits the optimizer's state (and with 2 the gradients) among them. All give the same weights up to
            the order of summation.
        num_workers: Processes that Ray Train starts, or [least, most]; 1 = this process alone, without Ray. Under
            torchrun it is torchrun that says.
        device: `auto` = a GPU where there is one.
        precision: fp32, or bf16 = autocast of the forward pass, with weights, moments and loss in fp32.
        threads: CPU threads of a process; results are bit-identical for equal numbers only. One is enough for small
            encoders, and two on a busy machine wait for each other.
        collective_timeout_s: Then a process that does not answer ends the others. They wait while the first one scores.
        storage: Where checkpoints and result lie: s3://bucket/folder, any fsspec URL, or a path; null = run_dir. On
            another machine the same command goes on from there.
        cache: Where shards of snapshots in an object store are kept; without effect on those on a disk.
        ray: How Ray Train runs the processes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sampling: Sampling | None = None
    zero_stage: Annotated[int, Field(ge=0, le=2)] = 0
    num_workers: NumWorkers = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: Annotated[int, Field(ge=1)] = 1
    collective_timeout_s: Annotated[int, Field(ge=1)] = 900
    storage: str | None = None
    cache: CacheConfig | None = None
    ray: RayConfig = RayConfig()

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _no_stage_three(cls, value: object) -> object:
        if value == 3:
            raise ValueError(
                "ZeRO-3 applies the last gradient again to every weight without a new one, in silence, and splits "
                "weights that adapters do not train or that are under a few megabytes; choose 0, 1 or 2"
            )
        return value
