"""`kymo export`: a checkpoint of a run, local or in an object store, as one safetensors file with its configuration."""

import logging
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError
from torch import nn

from manifests.config import read_yaml
from manifests.errors import ConfigError, ContractError
from trainer.checkpoint import read_meta, read_weights
from trainer.checkpoint_store import best_checkpoint, committed_checkpoints, step_of, verify_checkpoint
from trainer.config import PretrainConfig
from trainer.export import ENCODER_PREFIX, EncoderCard, fill, site_tables_of, write_file
from trainer.models.build import build_encoder
from trainer.objectives.build import build_objective
from trainer.paths import CHECKPOINT_FOLDER, CONFIG_FILE
from trainer.pretrained_on import read_pretrained_on
from trainer.storage import is_remote, location

logger = logging.getLogger(__name__)

BEST = "best"


def find_sound(run: str, *, step: str | None = None) -> Path:
    """A checkpoint of a run that verifies. Changes nothing.

    Args:
        run: Run folder, or the `storage` of a run, a path or URL.
        step: Its number of steps, or `best` by the run's `keep_best`; None: the newest one that verifies.

    Raises:
        ConfigError: No run, or no such checkpoint.
        ContractError: The one that was asked for does not verify.
    """
    folder = _checkpoint_folder(run)
    paths = committed_checkpoints(folder)
    if not paths:
        raise ConfigError(f"{folder}: no checkpoint; give the folder of a pretraining run, or its storage")
    if step is not None:
        found = _best(paths) if step == BEST else next((path for path in paths if str(step_of(path)) == step), None)
        if found is None:
            known = ", ".join(str(step_of(path)) for path in paths)
            raise ConfigError(f"{folder}: no checkpoint of step {step!r}; there are: {known}")
        verify_checkpoint(found)
        return found
    for path in paths:
        try:
            verify_checkpoint(path)
        except ContractError as error:
            logger.warning("%s; taking the checkpoint before it", error)
        else:
            return path
    raise ContractError(f"{folder}: none of {len(paths)} checkpoints verifies")


def _checkpoint_folder(run: str) -> Path:
    root = location(run)
    if not is_remote(root) and (root / CONFIG_FILE).exists():
        storage = read_yaml(root / CONFIG_FILE).get("storage")
        root = root if storage is None else location(storage)
    return root / CHECKPOINT_FOLDER


def _best(paths: list[Path]) -> Path | None:
    score = read_meta(paths[0])["config"].get("keep_best")
    if score is None:
        raise ConfigError(f"{paths[0].parent}: the run has no keep_best, so none is the best; give a step")
    return best_checkpoint(paths, score)


def export_run(
    run: str,
    out: Path,
    *,
    step: str | None = None,
    what: Literal["encoder", "model"] = "encoder",
    dtype: torch.dtype = torch.float32,
    licence: str | None = None,
) -> EncoderCard:
    """Write the encoder, or the whole model, of a checkpoint to the file `out`.

    Args:
        run: As in `find_sound`.
        out: File, local or in a store.
        step: As in `find_sound`.
        what: The encoder is what adapters start from.
        dtype: Of all tensors that are not integers.
        licence: Of the weights, e.g. `cc-by-4.0`; None = as the run's configuration says.

    Raises:
        ConfigError: No such run or checkpoint; `out` exists or cannot be written.
        ContractError: The checkpoint does not verify, or does not fit the model of its own configuration.
    """
    if out.suffix != ".safetensors":
        raise ConfigError(f"{out}: one safetensors file is written; let its name end in .safetensors")
    if out.exists():
        raise ConfigError(f"{out}: exists; remove it or give another name")
    checkpoint = find_sound(run, step=step)
    meta = read_meta(checkpoint)
    try:
        config = PretrainConfig.model_validate(meta["config"])
        encoder, objective = build_encoder(config.encoder), config.objective
    except ValidationError as error:
        raise ContractError(f"{checkpoint}: its configuration is not one of this kymo: {error}") from None
    model: nn.Module = build_objective(encoder, objective) if what == "model" else encoder
    weights = read_weights(checkpoint, prefix="" if what == "model" else ENCODER_PREFIX)
    fill(model, weights, where=checkpoint)
    card = EncoderCard(
        kind=encoder.config.kind,
        config=meta["config"]["encoder"],
        objective=meta["config"]["objective"] if what == "model" else None,
        ucs_version=meta["ucs"]["version"],
        ucs_digest=meta["ucs"]["digest"],
        site_tables=site_tables_of(encoder),
        recipes=meta.get("recipes", {}),
        step=step_of(checkpoint),
        sha256="",
        licence=licence or config.licence,
        pretrained_on=read_pretrained_on(config),
    )
    return write_file(out, {n: t.to(dtype) if t.is_floating_point() else t for n, t in weights.items()}, card)
