"""What is evaluated: the exported encoder of a run, and what the run's configuration says of how it was pretrained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from manifests.config import load_config, read_yaml
from manifests.errors import ConfigError
from trainer.config import PretrainConfig
from trainer.export import CARD_FILE, EncoderCard, load_encoder, read_card
from trainer.models.build import Encoder
from trainer.run_folder import ENCODER_FOLDER


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """An encoder with its origin; `config` is None for one that came without its run."""

    folder: Path
    encoder: Encoder
    card: EncoderCard
    config: PretrainConfig | None


def exported_folder(run: Path | str) -> Path:
    """Folder of the encoder that a run has exported, or the given one where that holds `encoder.json` itself.

    Raises:
        ConfigError: Neither.
    """
    folder = Path(run)
    for place in (folder, folder / ENCODER_FOLDER):
        if (place / CARD_FILE).is_file():
            return place
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: no such folder; give the run_dir of a kymo pretrain, or one that holds {CARD_FILE}"
        )
    path = folder / "config.yaml"
    if path.is_file() and "objective" not in read_yaml(path):
        raise ConfigError(f"{folder}: not a pretraining run (its config.yaml has no objective); give one of those")
    if path.is_file():
        raise ConfigError(
            f"{folder}: this run has saved no encoder yet, which it does with its first checkpoint; "
            "kymo status tells how it is and the command that goes on"
        )
    raise ConfigError(
        f"{folder}: no exported encoder; give the folder of a pretraining run that has saved a checkpoint, "
        f"or one that holds {CARD_FILE}"
    )


def find_subject(run: Path | str) -> Subject:
    """The encoder of a run's folder, or of a folder that holds `encoder.json` itself.

    Raises:
        ConfigError: Neither, or a run that has not exported an encoder yet.
        ContractError: Weights that were changed or belong to another channel table.
    """
    folder, exported = Path(run), exported_folder(run)
    origin = folder if exported != folder else folder.parent
    path = origin / "config.yaml"
    is_run = path.is_file() and "objective" in read_yaml(path)
    return Subject(
        folder=folder,
        encoder=load_encoder(exported),
        card=read_card(exported),
        config=load_config(PretrainConfig, path) if is_run else None,
    )
