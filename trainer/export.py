"""An encoder on its own, what adapters start from: a folder, or one file with its card in the header.

The folder, which every run keeps, holds `encoder.safetensors` and `encoder.json`. The file is what `kymo export`
writes, of the encoder or of the whole model (trainer/export_run.py).
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import nn

from manifests.channels import UCS_VERSION, site_ids, table_digest
from manifests.config import write_atomically
from manifests.errors import ConfigError, ContractError
from manifests.files import replaced_folder
from trainer.models.build import Encoder, EncoderConfig, build_encoder
from trainer.objectives.build import ObjectiveConfig, build_objective
from trainer.pretrained_on import PretrainedOn
from trainer.storage import answering
from trainer.tensor_file import save_tensors

WEIGHTS_FILE = "encoder.safetensors"
CARD_FILE = "encoder.json"
CARD_KEY = "kymo"  # of the card in the header of a file
ENCODER_PREFIX = "encoder."  # of the encoder's tensors in the whole model
FORMAT_VERSION = 1


class EncoderCard(BaseModel):
    """What the weights are and what they expect: `encoder.json`, or the header of a file.

    Attributes:
        objective: Configuration of the objective, if the weights are those of the whole model.
        sha256: Of `encoder.safetensors`, or of all bytes after a file's header.
        site_tables: Names of the tensors with one row per UCS site; rows are matched by id.
        recipes: Recipe id to the recipe that its training windows were made with.
        licence: Of the weights, e.g. `cc-by-4.0`; null = not stated.
        pretrained_on: Snapshots, corpora and persons; null = not known.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = FORMAT_VERSION
    kind: str
    config: dict[str, Any]
    objective: dict[str, Any] | None = None
    ucs_version: int
    ucs_digest: str
    site_tables: list[str]
    recipes: dict[str, dict[str, Any]]
    step: int
    sha256: str
    licence: str | None = None
    pretrained_on: PretrainedOn | None = None


def save_encoder(
    folder: Path,
    encoder: Encoder,
    *,
    state: Mapping[str, torch.Tensor] | None = None,
    recipes: Mapping[str, Mapping[str, Any]],
    step: int,
    licence: str | None = None,
    pretrained_on: PretrainedOn | None = None,
) -> EncoderCard:
    """Write an encoder to `folder`, replacing an earlier export as a whole.

    Args:
        folder: Made if absent.
        encoder: Gives the configuration and, without `state`, the weights.
        state: Whole fp32 weights by name, for an encoder whose own are partitioned.
        recipes: Recipe id to recipe of the training windows.
        step: Optimizer steps it was trained for.
        licence: Of the weights.
        pretrained_on: Of `read_pretrained_on`.
    """
    weights = {name: t.detach().cpu().contiguous() for name, t in (state or encoder.state_dict()).items()}
    with replaced_folder(folder) as temporary:
        save_tensors(weights, temporary / WEIGHTS_FILE)
        card = EncoderCard(
            kind=encoder.config.kind,
            config=encoder.config.model_dump(mode="json"),
            ucs_version=UCS_VERSION,
            ucs_digest=table_digest(),
            site_tables=site_tables_of(encoder),
            recipes={name: dict(recipe) for name, recipe in recipes.items()},
            step=step,
            sha256=hashlib.sha256((temporary / WEIGHTS_FILE).read_bytes()).hexdigest(),
            licence=licence,
            pretrained_on=pretrained_on,
        )
        (temporary / CARD_FILE).write_text(card.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return card


def site_tables_of(encoder: nn.Module) -> list[str]:
    """Names of an encoder's tensors with one row per UCS site."""
    rows = site_ids()
    return sorted(
        f"{name}.weight"
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings == rows
    )


def write_file(path: Path, weights: Mapping[str, torch.Tensor], card: EncoderCard) -> EncoderCard:
    """Write one file, local or in a store, with the card in its header; the card gets the weights' digest."""
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    card = card.model_copy(update={"sha256": _data_sha256(save(tensors))})
    with answering(path):
        write_atomically(path, save(tensors, metadata={CARD_KEY: card.model_dump_json()}))
    return card


def _data_sha256(content: bytes) -> str:
    """SHA-256 of what follows the header of a safetensors file."""
    return hashlib.sha256(memoryview(content)[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def read_card(source: Path | str) -> EncoderCard:
    """Card of an exported encoder or model.

    Args:
        source: Folder `encoder` of a run, or a file of `kymo export`.

    Raises:
        ConfigError: There is none.
        ContractError: It is of another format.
    """
    source = Path(source)
    if source.is_file():
        return _read_file(source)[0]
    path = source / CARD_FILE
    if not path.is_file():
        raise ConfigError(f"{source}: no {CARD_FILE}; give the folder `encoder` of a pretraining run")
    try:
        card = EncoderCard.model_validate(json.loads(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise ContractError(f"{path}: not an exported encoder: {error}") from None
    return _known(card, path)


def _known(card: EncoderCard, path: Path) -> EncoderCard:
    if card.format_version != FORMAT_VERSION:
        raise ContractError(f"{path}: format {card.format_version}, this kymo reads {FORMAT_VERSION}")
    return card


def _read_file(path: Path) -> tuple[EncoderCard, dict[str, torch.Tensor]]:
    """Card and tensors of a file that `kymo export` wrote."""
    content = path.read_bytes()
    try:
        weights = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        card = EncoderCard.model_validate_json(header.get("__metadata__", {}).get(CARD_KEY, ""))
    except (SafetensorError, ValueError) as error:
        raise ContractError(f"{path}: not a file that kymo export wrote: {error}") from None
    if _data_sha256(content) != card.sha256:
        raise ContractError(f"{path}: its SHA-256 is not the one in its header; export it again")
    return _known(card, path), weights


def _read_folder(folder: Path, path: Path) -> tuple[EncoderCard, dict[str, torch.Tensor]]:
    card = read_card(folder)
    try:
        if hashlib.sha256(path.read_bytes()).hexdigest() != card.sha256:
            raise ContractError(f"{path}: its SHA-256 is not the one in {CARD_FILE}; export the encoder again")
        return card, load_file(path)
    except (OSError, SafetensorError) as error:
        raise ContractError(f"{path}: not readable: {error}") from None


def load_encoder(source: Path | str, *, weights_file: Path | None = None) -> Encoder:
    """Encoder with the exported weights, in evaluation mode, fp32, on the CPU. Strict: every name and shape must fit.

    A UCS table that has grown since is fine: its first rows are the exported ones (ids are never renumbered), the
    new sites' rows are zero.

    Args:
        source: Folder `encoder` of a run, or a file of `kymo export`, also of a whole model.
        weights_file: The weights of a folder that holds the card alone.

    Raises:
        ContractError: The weights were changed, belong to another channel table, or do not fit the encoder.
    """
    source = Path(source)
    if source.is_file():
        card, weights = _read_file(source)
    else:
        card, weights = _read_folder(source, weights_file or source / WEIGHTS_FILE)
    if card.objective is not None:
        parts = {name.partition(ENCODER_PREFIX)[2]: t for name, t in weights.items() if name.startswith(ENCODER_PREFIX)}
        weights = parts
    encoder, weights = _built(source, card, weights, prefix="")
    fill(encoder, weights, where=source)
    return encoder.eval()


def load_model(path: Path | str) -> nn.Module:
    """Objective with encoder from a file that `kymo export --what model` wrote; as `load_encoder`."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give one that kymo export --what model wrote")
    card, weights = _read_file(path)
    if card.objective is None:
        raise ConfigError(f"{path}: holds an encoder only; export again with --what model")
    encoder, weights = _built(path, card, weights, prefix=ENCODER_PREFIX)
    model = build_objective(encoder, TypeAdapter(ObjectiveConfig).validate_python(card.objective))
    fill(model, weights, where=path)
    return model.eval()


def _built(
    source: Path, card: EncoderCard, weights: dict[str, torch.Tensor], *, prefix: str
) -> tuple[Encoder, dict[str, torch.Tensor]]:
    """Encoder without the weights, and the weights with site tables as long as today's."""
    _check_channels(source, card)
    with torch.random.fork_rng(devices=[]):  # building draws weights; the caller's generator stays as it is
        try:
            encoder = build_encoder(TypeAdapter(EncoderConfig).validate_python(card.config))
        except ValidationError as error:
            raise ContractError(f"{source}: not readable: {error}") from None
    weights = dict(weights)
    for name in (f"{prefix}{table}" for table in card.site_tables):
        if name in weights:
            grown = weights[name].new_zeros(max(site_ids(), len(weights[name])), weights[name].shape[1])
            grown[: len(weights[name])] = weights[name]
            weights[name] = grown
    return encoder, weights


def fill(module: nn.Module, weights: Mapping[str, torch.Tensor], *, where: Path) -> None:
    """Copy weights into a module; ContractError where a name or shape differs."""
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ContractError(f"{where}: does not fit a {type(module).__name__}: {error}") from None


def _check_channels(folder: Path, card: EncoderCard) -> None:
    if card.ucs_version > UCS_VERSION:
        raise ContractError(
            f"{folder}: made with UCS version {card.ucs_version}, this kymo has {UCS_VERSION}; update kymo"
        )
    if card.ucs_version == UCS_VERSION and card.ucs_digest != table_digest():
        raise ContractError(
            f"{folder}: made with another channel table of the same version {UCS_VERSION} "
            f"({card.ucs_digest[:12]}, here {table_digest()[:12]}); ids may mean other sites: restore the table"
        )
