"""An encoder on its own: `encoder.safetensors` and `encoder.json`, what adapters start from."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from manifests.channels import UCS_VERSION, site_ids, table_digest
from manifests.errors import ConfigError, ContractError
from trainer.models.build import Encoder, EncoderConfig, build_encoder

WEIGHTS_FILE = "encoder.safetensors"
CARD_FILE = "encoder.json"
FORMAT_VERSION = 1


class EncoderCard(BaseModel):
    """`encoder.json`: what the weights are and what they expect.

    Attributes:
        site_tables: Names of the tensors with one row per UCS site; rows are matched by id.
        recipes: Recipe id to the recipe that its training windows were made with.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = FORMAT_VERSION
    kind: str
    config: dict[str, Any]
    ucs_version: int
    ucs_digest: str
    site_tables: list[str]
    recipes: dict[str, dict[str, Any]]
    step: int
    sha256: str


def save_encoder(
    folder: Path,
    encoder: Encoder,
    *,
    state: Mapping[str, torch.Tensor] | None = None,
    recipes: Mapping[str, Mapping[str, Any]],
    step: int,
) -> EncoderCard:
    """Write an encoder to `folder`, replacing an earlier export as a whole.

    Args:
        folder: Made if absent.
        encoder: Gives the configuration and, without `state`, the weights.
        state: Whole fp32 weights by name, for an encoder whose own are partitioned.
        recipes: Recipe id to recipe of the training windows.
        step: Optimizer steps it was trained for.
    """
    temporary, old = folder.with_name(f".{folder.name}-new"), folder.with_name(f".{folder.name}-old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {name: t.detach().cpu().contiguous() for name, t in (state or encoder.state_dict()).items()}
    save_file(weights, temporary / WEIGHTS_FILE)
    card = EncoderCard(
        kind=encoder.config.kind,
        config=encoder.config.model_dump(mode="json"),
        ucs_version=UCS_VERSION,
        ucs_digest=table_digest(),
        site_tables=_site_tables(encoder),
        recipes={name: dict(recipe) for name, recipe in recipes.items()},
        step=step,
        sha256=hashlib.sha256((temporary / WEIGHTS_FILE).read_bytes()).hexdigest(),
    )
    (temporary / CARD_FILE).write_text(card.model_dump_json(indent=1) + "\n", encoding="utf-8")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return card


def _site_tables(encoder: nn.Module) -> list[str]:
    rows = site_ids()
    return sorted(
        f"{name}.weight"
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings == rows
    )


def read_card(folder: Path | str) -> EncoderCard:
    """`encoder.json` of an exported encoder.

    Raises:
        ConfigError: There is none.
        ContractError: It is of another format.
    """
    path = Path(folder) / CARD_FILE
    if not path.is_file():
        raise ConfigError(f"{folder}: no {CARD_FILE}; give the folder `encoder` of a pretraining run")
    try:
        card = EncoderCard.model_validate(json.loads(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise ContractError(f"{path}: not an exported encoder: {error}") from None
    if card.format_version != FORMAT_VERSION:
        raise ContractError(f"{path}: format {card.format_version}, this kymo reads {FORMAT_VERSION}")
    return card


def load_encoder(folder: Path | str) -> Encoder:
    """Encoder with the exported weights, in evaluation mode, on the CPU. Strict: every name and shape must fit.

    A UCS table that has grown since is fine: its first rows are the exported ones (ids are never renumbered), the
    new sites' rows are zero.

    Raises:
        ContractError: The weights were changed, belong to another channel table, or do not fit the encoder.
    """
    folder = Path(folder)
    card = read_card(folder)
    _check_channels(folder, card)
    path = folder / WEIGHTS_FILE
    try:
        if hashlib.sha256(path.read_bytes()).hexdigest() != card.sha256:
            raise ContractError(f"{path}: its SHA-256 is not the one in {CARD_FILE}; export the encoder again")
        weights = load_file(path)
        config = TypeAdapter(EncoderConfig).validate_python(card.config)
    except (OSError, SafetensorError, ValidationError) as error:
        raise ContractError(f"{path}: not readable: {error}") from None
    with torch.random.fork_rng(devices=[]):  # building draws weights; the caller's generator stays as it is
        encoder = build_encoder(config)
    for name in card.site_tables:
        if name in weights:
            grown = weights[name].new_zeros(max(site_ids(), len(weights[name])), weights[name].shape[1])
            grown[: len(weights[name])] = weights[name]
            weights[name] = grown
    try:
        encoder.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ContractError(f"{path}: does not fit a {card.kind!r} encoder: {error}") from None
    return encoder.eval()


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
