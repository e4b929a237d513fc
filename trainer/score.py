"""Retrieval scores of a pretrained run on any split, from its newest checkpoint."""

from pathlib import Path

from manifests.config import load_config, read_yaml
from manifests.errors import ConfigError
from trainer.checkpoint import read_weights
from trainer.config import EvaluationConfig, PretrainConfig
from trainer.evaluate import retrieval_top1
from trainer.export_run import find_sound
from trainer.models.build import build_encoder
from trainer.objectives.build import build_objective
from trainer.run import held_out_windows


def score_run(run_dir: Path | str, *, split: str, num_windows: int) -> dict[str, float]:
    """Held-out retrieval (`top1`, `chance`, `n`, …) of the newest sound checkpoint of a run.

    Args:
        run_dir: Folder of the run; its `config.yaml` names snapshots, encoder and objective.
        split: Split of the snapshots whose windows are scored.
        num_windows: At most so many windows, the same ones every time.

    Raises:
        ConfigError: No run or no checkpoint in the folder.
        ContractError: A snapshot or checkpoint that breaks its contract.
    """
    run_dir = Path(run_dir)
    if "objective" not in read_yaml(run_dir / "config.yaml"):
        raise ConfigError(f"{run_dir}: not a pretraining run (its config.yaml has no objective); give one of those")
    config = load_config(PretrainConfig, run_dir / "config.yaml")
    checkpoint = find_sound(str(run_dir))
    objective = build_objective(build_encoder(config.encoder), config.objective)
    objective.load_state_dict(read_weights(checkpoint), strict=True)
    scored = config.model_copy(update={"evaluation": EvaluationConfig(split=split, num_windows=num_windows)})
    return retrieval_top1(objective, held_out_windows(scored))
