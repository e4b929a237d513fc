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


def find_subject(run: Path | str) -> Subject:
    """The encoder of a run's folder, or of a folder that holds `encoder.json` itself.

    Raises:
        ConfigError: Neither, or a run that has not exported an encoder yet.
        ContractError: Weights that were changed or belong to another channel table.
    """
    folder = Path(run)
    exported = folder if (folder / CARD_FILE).is_file() else folder / ENCODER_FOLDER
    origin = folder if exported != folder else folder.parent
    if not (exported / CARD_FILE).is_file():
        if (folder / "config.yaml").is_file() and "objective" not in read_yaml(folder / "config.yaml"):
            raise ConfigError(f"{folder}: not a pretraining run (its config.yaml has no objective); give one of those")
        raise ConfigError(
            f"{folder}: no exported encoder; give the folder of a pretraining run that has saved a checkpoint, "
            f"or one that holds {CARD_FILE}"
        )
    path = origin / "config.yaml"
    is_run = path.is_file() and "objective" in read_yaml(path)
    return Subject(
        folder=folder,
        encoder=load_encoder(exported),
        card=read_card(exported),
        config=load_config(PretrainConfig, path) if is_run else None,
    )
