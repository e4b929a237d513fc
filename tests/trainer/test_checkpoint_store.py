"""Checkpoints on a disk and in a real S3 server: what counts, what is passed over, what stays, and who may write."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from upath import UPath

from manifests.errors import ConfigError, ContractError
from trainer import checkpoint_store, pieces
from trainer.checkpoint import HostState, Progress, read_weights, write_checkpoint
from trainer.checkpoint_store import (
    best_checkpoint,
    claim_attempt,
    collect_garbage,
    committed_checkpoints,
    find_checkpoint,
    newest_checkpoint,
    step_of,
    stored_checkpoints,
    verify_checkpoint,
)
from trainer.config import PretrainConfig
from trainer.data import DataState
from trainer.loop import pretrain
from trainer.metrics import read_metrics
from trainer.storage import is_remote, location

MakeConfig = Callable[..., PretrainConfig]
DATA = DataState(
    order_version=1, snapshots=("a" * 16,), config_digest="c", seed=0, global_batch=4, segments=(), batches_committed=2
)
SHARD = "zero_00000_of_00001.safetensors"


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Folder of checkpoints, of a run of its own."""
    if request.param == "disk":
        yield tmp_path / "checkpoints"
        return
    request.getfixturevalue("s3")
    UPath("s3://bucket").mkdir(exist_ok=True)
    yield location(f"s3://bucket/{tmp_path.name}/checkpoints")


def save(folder: Path, *, step: int, attempt: int = 1, value: float = 0.0, **meta: object) -> Path:
    """A checkpoint of one parameter of ten values."""
    weights = torch.arange(10.0) + value
    state = HostState(
        tensors={f"{state}::w": weights.clone() for state in ("fp32", "exp_avg", "exp_avg_sq")},
        header={"w": [0, 10, float(step)]},
        untrained={"seen": torch.ones(1)},
        meta={"format_version": 1, "shapes": {"w": [2, 5]}, "progress": {"step": step}, **meta},
        progress=Progress(step=step, windows=0, seconds=0.0, loss=None, data=DATA),
    )
    return write_checkpoint(folder, state, attempt=attempt)


def names(folder: Path) -> list[str]:
    return sorted(stored.path.name for stored in stored_checkpoints(folder))


def test_what_was_committed_is_found_and_reads_back(folder: Path) -> None:
    assert find_checkpoint(folder) is None
    save(folder, step=2)
    newer = save(folder, step=10, value=5.0)
    assert find_checkpoint(folder) == newest_checkpoint(folder) == newer
    assert [step_of(path) for path in committed_checkpoints(folder)] == [10, 2]
    weights = read_weights(newer)
    assert torch.equal(weights["w"], torch.arange(5.0, 15.0).reshape(2, 5))
    assert torch.equal(weights["seen"], torch.ones(1))
    verify_checkpoint(newer)


def test_a_later_attempt_at_the_same_step_comes_first(folder: Path) -> None:
    save(folder, step=2, attempt=10)
    save(folder, step=2, attempt=9)
    found = find_checkpoint(folder)
    assert found is not None
    assert found.name == "step-000000002-a10"


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        (SHARD, lambda content: content[:-1], "bytes"),
        (SHARD, lambda content: content[:-1] + bytes([content[-1] ^ 1]), "SHA-256"),
        (SHARD, None, "is missing"),
        ("zero_00001_of_00002.safetensors", lambda _: b"stale", "is not in its manifest"),
        ("aux.safetensors", lambda content: bytes([content[0] ^ 1]) + content[1:], "SHA-256"),
        ("MANIFEST.json", lambda content: content[: len(content) // 2], "not readable"),
    ],
    ids=["truncated shard", "flipped bit", "missing shard", "stale shard", "damaged aux", "truncated manifest"],
)
def test_a_damaged_one_is_told_set_aside_and_passed_over(
    folder: Path, file: str, change: Callable[[bytes], bytes] | None, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = save(folder, step=2), save(folder, step=4)
    if change is None:
        (newer / file).unlink()
    else:
        (newer / file).write_bytes(change((newer / file).read_bytes() if (newer / file).exists() else b""))
    with pytest.raises(ContractError, match=told):
        verify_checkpoint(newer)
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(folder) == older
    assert f"{newer.name}" in caplog.text
    assert file in caplog.text
    assert newest_checkpoint(folder) == older, "the next start need not read it again"
    # It stays, for whoever wants to know what happened.
    collect_garbage(folder, keep=1, attempt=9)
    assert [stored.state for stored in stored_checkpoints(folder)] == ["damaged", "committed"]


def test_sizes_are_checked_before_anything_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(folder, step=2)
    (path / SHARD).write_bytes((path / SHARD).read_bytes() + b"x")
    monkeypatch.setattr(checkpoint_store, "_check_hash", lambda *_: pytest.fail("read a file"))
    with pytest.raises(ContractError, match="bytes"):
        verify_checkpoint(path)


def test_an_unfinished_one_is_no_checkpoint_and_later_attempts_clear_it_away(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = save(folder, step=2)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trainer.checkpoint.commit", die)
        with pytest.raises(KeyboardInterrupt):
            save(folder, step=4, attempt=2)
    assert [(stored.step, stored.state) for stored in stored_checkpoints(folder)] == [
        (4, "unfinished"),
        (2, "committed"),
    ]
    assert find_checkpoint(folder) == older
    collect_garbage(folder, keep=5, attempt=2)
    assert len(names(folder)) == 2, "of this attempt: it may be under way"
    assert claim_attempt(folder).attempt == 3
    collect_garbage(folder, keep=5, attempt=3)
    assert names(folder) == [older.name]


def test_the_newest_the_best_and_the_permanent_ones_stay(folder: Path) -> None:
    for step, top1 in ((2, 0.1), (3, None), (4, 0.9), (5, 0.9), (6, 0.0), (7, 0.3), (8, 0.2)):
        save(folder, step=step, scores={} if top1 is None else {"top1": top1, "chance": 0.1})
    paths = committed_checkpoints(folder)
    best, worst = best_checkpoint(paths, "top1"), best_checkpoint(paths, "-top1")
    assert best is not None
    assert worst is not None
    assert (step_of(best), step_of(worst)) == (5, 6)
    assert best_checkpoint(paths, "recall") is None
    collect_garbage(folder, keep=1, keep_every=3, keep_best="top1", attempt=1)
    assert [step_of(path) for path in committed_checkpoints(folder)] == [8, 6, 5, 3]
    collect_garbage(folder, keep=1, attempt=1)
    assert [step_of(path) for path in committed_checkpoints(folder)] == [8]
    assert names(folder) == ["step-000000008-a1"]


def test_a_process_that_dies_while_it_deletes_leaves_no_half_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(folder, step=2)
    save(folder, step=4)

    def die(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_store, "remove_folder", die)
        with pytest.raises(KeyboardInterrupt):
            collect_garbage(folder, keep=1, attempt=1)
    assert [stored.state for stored in stored_checkpoints(folder)] == ["committed", "unfinished"]
    collect_garbage(folder, keep=1, attempt=2)
    assert names(folder) == ["step-000000004-a1"]


def test_of_two_writers_the_one_that_was_overruled_ends_and_changes_nothing(
    folder: Path, tiny_config: MakeConfig
) -> None:
    config = tiny_config(storage=str(folder.parent), evaluation=None)
    before: dict[str, bytes] = {}

    def start_another(values: dict[str, float]) -> None:
        """After the first commit another machine begins the same run."""
        if values["step"] == 3:
            claim_attempt(folder)
            path = newest_checkpoint(folder)
            assert path is not None
            before.update({item.name: item.read_bytes() for item in path.iterdir()})

    with pytest.raises(ConfigError, match=r"start 1 of this run was overruled by start 2 \(process \d+ on "):
        pretrain(config, report=start_another)
    (left,) = committed_checkpoints(folder)
    assert step_of(left) == 3
    assert {item.name: item.read_bytes() for item in left.iterdir()} == before
    assert pretrain(config).is_finished
    attempts = {path.name.rpartition("-a")[2] for path in committed_checkpoints(folder)}
    assert attempts == {"1", "3"}


def test_a_name_that_is_taken_is_never_overwritten(folder: Path) -> None:
    path = save(folder, step=2)
    content = (path / "MANIFEST.json").read_bytes()
    with pytest.raises(ConfigError, match=r"taken this name|holds .* and not"):
        save(folder, step=2, meaning="another")
    if not is_remote(folder):
        verify_checkpoint(path)
    assert (path / "MANIFEST.json").read_bytes() == content


@pytest.mark.usefixtures("s3")
def test_a_fresh_machine_that_has_only_the_store_goes_on(tiny_config: MakeConfig, tmp_path: Path) -> None:
    UPath("s3://bucket").mkdir(exist_ok=True)
    storage = f"s3://bucket/{tmp_path.name}"
    full, here, there = (tiny_config(name, evaluation=None) for name in ("full", "here", "there"))
    pretrain(full)
    pretrain(here.model_copy(update={"storage": storage, "stop_at": 4}))
    assert not (tmp_path / "here" / "checkpoints").exists()
    # Another machine has the configuration, and nothing of the run's folder.
    result = pretrain(there.model_copy(update={"storage": storage, "zero_stage": 1}))
    assert result.is_finished
    # Its metrics begin at the first step all the same: the rows came with the checkpoint.
    losses = [[(row["step"], row["loss"]) for row in read_metrics(run.run_dir)] for run in (there, full)]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, 9))
    curve = EventAccumulator(str(tmp_path / "there" / "tensorboard")).Reload().Scalars("loss")
    assert [(item.step, item.value) for item in curve] == [(step, pytest.approx(loss)) for step, loss in losses[0]]
    assert str(result.checkpoint).startswith(storage)
    assert result.encoder.is_dir()
    # And one that is asked for another run in the same place refuses by key.
    other = tiny_config("other", evaluation=None, storage=storage, optimizer={"lr": 0.5})
    with pytest.raises(ConfigError, match=r"s3://.*another configuration \(optimizer\.lr: 0\.001 → 0\.5\)"):
        pretrain(other)


@pytest.mark.usefixtures("s3")
def test_only_the_bytes_that_are_asked_for_are_read_from_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    UPath("s3://bucket").mkdir(exist_ok=True)
    path = save(location(f"s3://bucket/{tmp_path.name}"), step=2)
    asked: list[tuple[int, int]] = []
    original = pieces.read_ranges

    def read(file: Path, ranges: list[tuple[int, int]]) -> list[bytes]:
        asked.extend(ranges)
        return original(file, ranges)

    monkeypatch.setattr(pieces, "read_ranges", read)
    target = torch.zeros(4)
    with pieces.Pieces(path) as wanted:
        assert wanted.want("exp_avg", "w", 3, target) == 2.0
    assert target.tolist() == [3.0, 4.0, 5.0, 6.0]
    assert [length for _, length in asked][2:] == [16]


@pytest.mark.usefixtures("s3")
def test_a_store_that_cannot_be_used_is_told_with_the_remedy(tiny_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"s3://no-such-bucket/.*check the bucket"):
        pretrain(tiny_config(storage="s3://no-such-bucket/run"))
    with pytest.raises(ConfigError, match=r"fsspec knows no quux://"):
        pretrain(tiny_config(storage="quux://place/run"))
