"""What a pretraining run is made of: everything that decides its numbers, in one file."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from manifests.config import digest
from trainer.cache import CacheConfig
from trainer.filters import SampleFilter
from trainer.mixture import CorpusWeights, CurriculumStep
from trainer.models.build import EncoderConfig
from trainer.objectives.build import ObjectiveConfig
from trainer.samples import Shape, SnapshotSource
from trainer.storage import is_remote, location

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
        "keep_every",
        "keep_best",
        "storage",
        "save",
        "compile",
        "collective_timeout_s",
        "num_workers",
        "num_threads",
        "read_threads",
        "prefetch",
        "max_replaced",
        "cache",
        "licence",
        "curriculum",  # of the steps to come: trainer/data.py refuses a change of those that were done
        "faults",
        "ray",
    }
)
# What the order of samples depends on, beside the snapshots, the seed and the batch size, which its state names.
ORDER_KEYS = ("split", "filter", "bucket_by", "block_samples", "snapshots")


_Count = Annotated[int, Field(ge=1)]


def _in_order(value: int | tuple[int, int]) -> int | tuple[int, int]:
    if isinstance(value, tuple) and value[0] > value[1]:
        raise ValueError(f"the least number stands first: [{value[1]}, {value[0]}]")
    return value


NumWorkers = Annotated[_Count | tuple[_Count, _Count], AfterValidator(_in_order)]


def _on_disk(folder: str) -> str:
    if is_remote(location(folder)):
        raise ValueError(
            f"{folder} is in an object store, and locks, metrics and caches need a disk; give a folder of this machine "
            f"and storage={folder}, where checkpoints lie and another machine goes on from"
        )
    return folder


FolderOnDisk = Annotated[str, AfterValidator(_on_disk)]


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


class FaultConfig(_Section):
    """When a run that is not well ends itself, so that Ray, torchrun or a person starts it again."""

    max_skipped: Annotated[int, Field(ge=0)] = 10  # steps without a finite loss and gradient, over the whole run
    hang_timeout_s: Annotated[float, Field(gt=0)] | None = 600.0  # without a step; null: wait for ever


class RayConfig(_Section):
    """How Ray Train runs the workers; without effect in a single process or under torchrun."""

    address: str | None = None  # of a running cluster; None: the one of RAY_ADDRESS, else a local one
    use_gpu: bool | None = None  # None: when the cluster has any
    max_failures: Annotated[int, Field(ge=0)] = 3
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    health_check_s: Annotated[float, Field(gt=0)] = 0.5
    start_timeout_s: Annotated[int, Field(gt=0)] = 15  # for places alone, not for what starts there
    resize_every_s: Annotated[float, Field(gt=0)] = 60.0  # how often an elastic run looks for room to grow


class PretrainConfig(_Section):
    """One pretraining run. The folder `run_dir` holds all it writes; the same command resumes it."""

    run_dir: FolderOnDisk
    snapshots: Annotated[list[SnapshotSource], Field(min_length=1)]
    split: str = "train"
    filter: SampleFilter = SampleFilter()
    weights: CorpusWeights | None = None  # of corpora in the mixture; null: the snapshots' weights
    curriculum: list[CurriculumStep] = []  # other weights from later steps on; may be changed for steps to come
    # All windows of a step have one rate, length (in samples) or number of channels (up to 1, 2, 4, 8, …).
    bucket_by: list[Shape] = []
    # Samples of a corpus that are shuffled among each other, and so the shards that must be at hand: `kymo simulate`.
    block_samples: Annotated[int, Field(ge=1)] = 100_000
    encoder: EncoderConfig
    objective: ObjectiveConfig
    global_batch: Annotated[int, Field(ge=2)] = 64  # windows of one optimizer step, over all workers
    # Micro-batches of one step. Each is contrasted with itself, so more of them means fewer negatives, unless
    # cached_gradients: then all of global_batch are negatives of each other, at the price of a second forward pass.
    gradient_accumulation: Annotated[int, Field(ge=1)] = 1
    cached_gradients: bool = False
    licence: str | None = None  # of the exported encoder, e.g. cc-by-4.0; bundles on it may not grant more
    steps: Annotated[int, Field(ge=1)]
    stop_at: Annotated[int, Field(ge=1)] | None = None  # stop early after this step, as SIGTERM would
    optimizer: OptimizerConfig = OptimizerConfig()
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0  # 0 = none
    # bf16: autocast, parameters, moments and the loss stay fp32; auto: bf16 on a GPU, fp32 on a CPU
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False  # torch.compile of the encoder's parts; costs a minute at the start
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    evaluation: EvaluationConfig | None = EvaluationConfig()  # null: no held-out evaluation
    log_every: Annotated[int, Field(ge=1)] = 10
    save_every: Annotated[int, Field(ge=1)] = 100
    eval_every: Annotated[int, Field(ge=1)] | None = None  # None: at the last step only
    # sync: training waits until a checkpoint is committed; async: only until its copy lies in the host's memory
    save: Literal["sync", "async"] = "async"
    storage: str | None = None  # of the checkpoints: s3://bucket/folder, any fsspec URL, or a path; null: run_dir
    keep: Annotated[int, Field(ge=1)] = 3  # newest checkpoints
    keep_every: Annotated[int, Field(ge=1)] | None = None  # save every so many steps as well, and keep those for good
    keep_best: str | None = (
        None  # save after every evaluation and keep the best: top1 = the highest, -top1 = the lowest
    )
    collective_timeout_s: Annotated[int, Field(ge=1)] = 900  # then a rank that does not answer ends the others
    num_workers: NumWorkers = 1  # under Ray [min, max] as well: as many as there is room for
    num_threads: Annotated[int, Field(ge=1)] = 1  # of torch, per worker
    read_threads: Annotated[int, Field(ge=1)] = 1
    prefetch: Annotated[int, Field(ge=1)] = 4  # batches
    max_replaced: Annotated[int, Field(ge=0)] = 100  # samples that may fail their read
    cache: CacheConfig | None = None  # required for snapshots in an object store, without effect on others
    faults: FaultConfig = FaultConfig()
    ray: RayConfig = RayConfig()


def run_digest(config: PretrainConfig) -> str:
    """SHA-256 of all keys that must stay the same between two starts of one run."""
    return digest(_fixed_keys(config))


def order_digest(config: PretrainConfig) -> str:
    """SHA-256 of the keys that the order of samples depends on; paths may move, weights may not."""
    # Without defaults: a key that a later kymo adds leaves the digest of older runs as it is.
    plain = config.model_dump(mode="json", include=set(ORDER_KEYS), exclude_defaults=True)
    plain["snapshots"] = [source.weight for source in config.snapshots]
    return digest(plain)


def _fixed_keys(config: PretrainConfig) -> dict[str, Any]:
    """Dotted key to value of a configuration, without `FREE_KEYS` and the snapshots' paths."""
    plain = flatten(config.model_dump(mode="json", exclude=set(FREE_KEYS)))
    # A snapshot is known by its digest, which the data state holds, and may be moved to another folder.
    return plain | {"snapshots": [source.weight for source in config.snapshots]}


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key to value of nested mappings."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def differing_keys(config: PretrainConfig, earlier: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ from an earlier configuration of the same run, `key: was → is`.

    A key that the earlier kymo did not know counts as its default, which is what that kymo did.
    """
    now = _fixed_keys(config)
    try:
        then = _fixed_keys(PretrainConfig.model_validate(earlier))
    except ValidationError:  # a key or value of an earlier kymo that this one does not know
        then = {key: value for key, value in flatten(earlier).items() if key.partition(".")[0] not in FREE_KEYS}
        then["snapshots"] = [source.get("weight") for source in earlier.get("snapshots", [])]
    return differences(then, now)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`key: was → is` for the keys whose values differ; a missing key is None."""
    return [
        f"{key}: {then.get(key)!r} → {now.get(key)!r}"
        for key in sorted(now.keys() | then.keys())
        if now.get(key) != then.get(key)
    ]
