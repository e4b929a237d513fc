"""What a pretraining run is made of: everything that decides its numbers, in one file."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from manifests.config import digest
from trainer.data import SampleFilter, SnapshotSource
from trainer.models.build import EncoderConfig
from trainer.objectives.build import ObjectiveConfig

# May change between two starts of one run: they shape how it is run, not what is computed.
FREE_KEYS = frozenset(
    {
        "run_dir",
        "steps",
        "stop_at",
        "log_every",
        "save_every",
        "eval_every",
        "keep",
        "num_workers",
        "num_threads",
        "read_threads",
        "prefetch",
        "max_replaced",
        "ray",
    }
)
# What the order of samples depends on, beside the snapshots, the seed and the batch size, which its state names.
ORDER_KEYS = ("split", "filter", "snapshots")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OptimizerConfig(_Section):
    """AdamW with linear warm-up, then cosine decay to `final_lr_ratio × lr` at the last step."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.05  # on parameters of two and more dimensions
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["cosine", "constant"] = "cosine"
    final_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1


class EvaluationConfig(_Section):
    """Retrieval among held-out windows: `num_windows` of split `split`, the same ones every time."""

    split: str = "val"
    num_windows: Annotated[int, Field(ge=2)] = 64


class RayConfig(_Section):
    """How Ray Train runs the workers; without effect in a single process or under torchrun."""

    address: str | None = None  # of a running cluster; None: the one of RAY_ADDRESS, else a local one
    max_failures: Annotated[int, Field(ge=0)] = 3
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    health_check_s: Annotated[float, Field(gt=0)] = 0.5
    start_timeout_s: Annotated[int, Field(gt=0)] = 60


class PretrainConfig(_Section):
    """One pretraining run. The folder `run_dir` holds all it writes; the same command resumes it."""

    run_dir: str
    snapshots: Annotated[list[SnapshotSource], Field(min_length=1)]
    split: str = "train"
    filter: SampleFilter = SampleFilter()
    encoder: EncoderConfig
    objective: ObjectiveConfig
    global_batch: Annotated[int, Field(ge=2)] = 64  # windows of one optimizer step, over all workers
    gradient_accumulation: Annotated[int, Field(ge=1)] = 1
    steps: Annotated[int, Field(ge=1)]
    stop_at: Annotated[int, Field(ge=1)] | None = None  # stop early after this step, as SIGTERM would
    optimizer: OptimizerConfig = OptimizerConfig()
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0  # 0 = none
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast, parameters and moments stay fp32
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    evaluation: EvaluationConfig | None = EvaluationConfig()  # null: no held-out evaluation
    log_every: Annotated[int, Field(ge=1)] = 10
    save_every: Annotated[int, Field(ge=1)] = 100
    eval_every: Annotated[int, Field(ge=1)] | None = None  # None: at the last step only
    keep: Annotated[int, Field(ge=1)] = 3  # checkpoints
    num_workers: Annotated[int, Field(ge=1)] = 1
    num_threads: Annotated[int, Field(ge=1)] = 1  # of torch, per worker
    read_threads: Annotated[int, Field(ge=1)] = 1
    prefetch: Annotated[int, Field(ge=1)] = 4  # batches
    max_replaced: Annotated[int, Field(ge=0)] = 100  # samples that may fail their read
    ray: RayConfig = RayConfig()


def run_digest(config: PretrainConfig) -> str:
    """SHA-256 of all keys that must stay the same between two starts of one run."""
    return digest(fixed_keys(config.model_dump(mode="json")))


def order_digest(config: PretrainConfig) -> str:
    """SHA-256 of the keys that the order of samples depends on; paths may move, weights may not."""
    plain = config.model_dump(mode="json")
    plain["snapshots"] = [source["weight"] for source in plain["snapshots"]]
    return digest({key: plain[key] for key in ORDER_KEYS})


def fixed_keys(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key to value of a configuration as plain data, without `FREE_KEYS` and the snapshots' paths."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            flat[prefix] = value

    walk("", {key: value for key, value in plain.items() if key not in FREE_KEYS})
    # A snapshot is known by its digest, which the data state holds, and may be moved to another folder.
    flat["snapshots"] = [source.get("weight") for source in plain.get("snapshots", [])]
    return flat


def differing_keys(config: PretrainConfig, earlier: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ from an earlier configuration of the same run, `key: was → is`."""
    now, then = fixed_keys(config.model_dump(mode="json")), fixed_keys(earlier)
    return [
        f"{key}: {then.get(key)!r} → {now.get(key)!r}"
        for key in sorted(now.keys() | then.keys())
        if now.get(key) != then.get(key)
    ]
