"""A run that dies at an awkward moment, once or twice, ends with the numbers of one that did not."""

from collections.abc import Callable
from pathlib import Path

import pytest

from trainer import loop
from trainer.config import PretrainConfig
from trainer.loop import pretrain
from trainer.metrics import read_metrics

MakeConfig = Callable[..., PretrainConfig]
EPOCH_ENDS_IN = 4  # 32 windows, 9 in a step


@pytest.mark.parametrize("save", ["sync", "async"])
@pytest.mark.parametrize(
    ("deaths", "save_every"),
    [((1, 1), 3), ((2, 3), 3), ((8,), 3), ((8, 1), 7), ((EPOCH_ENDS_IN, 1), 1), ((EPOCH_ENDS_IN + 1,), 1)],
    ids=["before any step", "before any save", "last batch", "last batch twice", "end of an epoch", "after an epoch"],
)
def test_killed_and_started_again_the_numbers_are_the_same(
    *,
    deaths: tuple[int, ...],
    save_every: int,
    save: str,
    tiny_config: MakeConfig,
    uninterrupted: list[tuple[int, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`deaths`: in which step of each start the process dies, counted from 1."""
    config = tiny_config(evaluation=None, save_every=save_every, save=save)
    original = loop.train_step
    for death in deaths:
        calls: list[int] = []

        def die(*arguments: object, calls: list[int] = calls, death: int = death, **options: object) -> object:
            calls.append(1)
            if len(calls) == death:
                raise KeyboardInterrupt
            return original(*arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(loop, "train_step", die)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config)
    monkeypatch.setattr(loop, "train_step", original)
    assert pretrain(config).is_finished
    assert [(row["step"], row["loss"]) for row in read_metrics(config.run_dir)] == uninterrupted
    attempts = sorted(path.name for path in Path(config.run_dir, "attempts").iterdir())
    assert len(attempts) == len(deaths) + 1


@pytest.fixture(scope="module")
def uninterrupted(tiny_snapshot: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    """Step and loss of the run of `tiny_config`."""
    config = PretrainConfig.model_validate(
        {
            "run_dir": str(tmp_path_factory.mktemp("uninterrupted") / "run"),
            "snapshots": [{"path": str(tiny_snapshot)}],
            "encoder": {"kind": "sleep", "width": 16, "depth": 1, "dropout": 0.1},
            "objective": {"kind": "leave_one_out", "channel_dropout": 0.3},
            "evaluation": None,
            "steps": 8,
            "global_batch": 9,
            "log_every": 1,
            "seed": 4,
        }
    )
    pretrain(config)
    return [(row["step"], row["loss"]) for row in read_metrics(config.run_dir)]
