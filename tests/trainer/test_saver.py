"""Saving beside the training: the same run and the same files; whatever goes wrong leaves the checkpoint before."""

import contextlib
import errno
import json
import os
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from manifests.errors import ConfigError
from trainer import checkpoint, loop, run
from trainer.checkpoint_store import committed_checkpoints, find_checkpoint, step_of, stored_checkpoints
from trainer.config import PretrainConfig
from trainer.loop import pretrain
from trainer.metrics import read_metrics
from trainer.zero import join_processes

MakeConfig = Callable[..., PretrainConfig]
RunRanks = Callable[..., None]
SHARD = "zero_00000_of_00001.safetensors"


def losses(config: PretrainConfig) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(config.run_dir)]


def steps_of(config: PretrainConfig) -> list[int]:
    return [step_of(path) for path in committed_checkpoints(Path(config.run_dir) / "checkpoints")]


def hashes(path: Path) -> dict[str, str]:
    """SHA-256 of the tensors of a checkpoint; meta.json also holds times."""
    manifest = json.loads((path / "MANIFEST.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest.items() if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def plain(tiny_snapshot: Path, tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    """An undisturbed run of `tiny_config` with `save: sync`."""
    config = PretrainConfig.model_validate(
        {
            "run_dir": str(tmp_path_factory.mktemp("plain") / "run"),
            "snapshots": [{"path": str(tiny_snapshot)}],
            "encoder": {"kind": "sleep", "width": 16, "depth": 1, "dropout": 0.1},
            "objective": {"kind": "leave_one_out", "channel_dropout": 0.3},
            "evaluation": None,
            "steps": 8,
            "global_batch": 9,
            "log_every": 1,
            "save_every": 3,
            "save": "sync",
            "seed": 4,
        }
    )
    pretrain(config)
    return config


@pytest.fixture
def held_writer(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Lets no tensor file be written until the event is set; counts who writes at once."""
    event, original = threading.Event(), checkpoint.save_tensors

    def save(*arguments: object, **options: object) -> None:
        assert event.wait(60)
        original(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "save_tensors", save)
    yield event
    event.set()


def test_beside_the_training_the_same_losses_and_the_same_checkpoints_come_out(
    tiny_config: MakeConfig, plain: PretrainConfig
) -> None:
    config = tiny_config(evaluation=None, save="async", save_every=1, keep=8)
    reported: list[float] = []

    def report(values: dict[str, float]) -> None:
        assert values["step"] in steps_of(config), "reported before it was committed"
        reported.append(values["step"])

    pretrain(config, report=report)
    assert losses(config) == losses(plain)
    assert steps_of(config) == [8, 7, 6, 5, 4, 3, 2, 1]
    assert reported == [1, 2, 3, 4, 5, 6, 7, 8]
    for path in committed_checkpoints(Path(plain.run_dir) / "checkpoints"):
        assert hashes(path) == hashes(Path(config.run_dir) / "checkpoints" / path.name)


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits(
    tiny_config: MakeConfig, held_writer: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(evaluation=None, save="async", save_every=3)
    seen: list[tuple[int, bool]] = []
    original = loop.train_step
    reports: list[float] = []

    def step(*arguments: object, **options: object) -> object:
        seen.append((len(seen) + 1, held_writer.is_set()))
        if len(seen) == 5:  # two steps after the save began nothing was committed, and nothing reported
            assert steps_of(config) == []
            assert reports == []
            threading.Timer(0.5, held_writer.set).start()
        return original(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "train_step", step)
    pretrain(config, report=lambda values: reports.append(values["step"]))
    assert [number for number, is_free in seen if not is_free][:5] == [1, 2, 3, 4, 5]
    assert reports == [3, 6, 8]


def test_a_failure_in_the_thread_ends_the_run_soon_and_a_rerun_completes_it(
    tiny_config: MakeConfig, plain: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(evaluation=None, save="async")
    original = checkpoint.save_tensors

    def fail_later(tensors: object, path: Path, **options: object) -> None:
        if "000006" in path.parent.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        original(tensors, path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "save_tensors", fail_later)
    with pytest.raises(ConfigError, match=rf"{SHARD}: No space left on device; free space and run the same command"):
        pretrain(config)
    assert [(s.step, s.state) for s in stored_checkpoints(Path(config.run_dir) / "checkpoints")] == [(3, "committed")]
    monkeypatch.undo()
    assert pretrain(config).is_finished
    assert losses(config) == losses(plain)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB; skips where none may be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_becomes_full_leaves_the_checkpoint_before_and_no_rubbish(
    tiny_config: MakeConfig, small_disk: Path, plain: PretrainConfig
) -> None:
    config = tiny_config(evaluation=None, storage=str(small_disk), save_every=1)
    ballast = small_disk / "ballast"

    def fill(values: dict[str, float]) -> None:
        if values["step"] == 3:
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))

    with pytest.raises(ConfigError, match=r"small/checkpoints/.*No space left on device; free space and run the same"):
        pretrain(config, report=fill)
    assert max(step_of(path) for path in committed_checkpoints(small_disk / "checkpoints")) == 3
    assert [s.state for s in stored_checkpoints(small_disk / "checkpoints")] == ["committed"] * 3
    ballast.unlink()
    assert pretrain(config).is_finished
    assert losses(config) == losses(plain)


@pytest.mark.parametrize("save", ["sync", "async"])
def test_files_that_may_not_grow_leave_the_checkpoint_before(
    save: str, tiny_config: MakeConfig, plain: PretrainConfig
) -> None:
    """The system's own limit of a file's size: what a quota answers, at the lowest level."""
    config = tiny_config(evaluation=None, save=save)
    shard = find_checkpoint(Path(plain.run_dir) / "checkpoints")
    assert shard is not None
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(values: dict[str, float]) -> None:
        if values["step"] == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, ((shard / SHARD).stat().st_size - 1, before[1]))

    try:
        with pytest.raises(ConfigError, match=r"File too large; free space"):
            pretrain(config, report=limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert steps_of(config) == [3]
    assert pretrain(config).is_finished
    assert losses(config) == losses(plain)


def train_and_hang(config: PretrainConfig, at: str) -> None:
    """Train until the checkpoint of step 6 is half written, tell so by a file, and stay there."""
    original = checkpoint.save_tensors if at == "shard" else checkpoint.commit

    def hang(*arguments: object, **options: object) -> None:
        if "step-000000006" not in str(arguments):
            original(*arguments, **options)  # type: ignore[arg-type]
            return
        if at == "shard":
            Path(str(arguments[1])).write_bytes(b"half")
        Path(config.run_dir, "hangs").touch()
        time.sleep(120)

    if at == "shard":
        checkpoint.save_tensors = hang
    else:
        checkpoint.commit = hang
    torch.set_num_threads(1)
    pretrain(config)


@pytest.mark.parametrize("at", ["shard", "commit"])
def test_killed_in_the_middle_of_a_write_the_checkpoint_before_is_the_newest(
    at: str, tiny_config: MakeConfig, plain: PretrainConfig, run_ranks: RunRanks
) -> None:
    config = tiny_config(evaluation=None, save="async", backend="gloo")
    process = get_context("forkserver").Process(target=train_and_hang, args=(config, at))
    process.start()
    try:
        deadline = time.monotonic() + 120
        while not Path(config.run_dir, "hangs").exists():
            assert time.monotonic() < deadline
            assert process.is_alive()
            time.sleep(0.05)
    finally:
        process.kill()
        process.join()
    folder = Path(config.run_dir) / "checkpoints"
    assert [(s.step, s.state) for s in stored_checkpoints(folder)] == [(6, "unfinished"), (3, "committed")]
    assert pretrain(config).is_finished
    assert losses(config) == losses(plain)
    assert [(s.step, s.attempt) for s in stored_checkpoints(folder)] == [(8, 2), (6, 2), (3, 1)]


def two_ranks(number: int, port: int, sync: PretrainConfig, beside: PretrainConfig, failing: PretrainConfig) -> None:
    torch.set_num_threads(1)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ.update({**group, "RANK": str(number), "LOCAL_RANK": str(number)})
    join_processes("gloo")
    pretrain(sync)
    pretrain(beside)
    original = checkpoint.save_tensors

    def fail(tensors: object, path: Path, **options: object) -> None:
        if number == 1 and "000006" in path.parent.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        original(tensors, path, **options)  # type: ignore[arg-type]

    checkpoint.save_tensors = fail
    told = ""
    try:
        pretrain(failing)
    except ConfigError as error:
        told = str(error)
    Path(failing.run_dir, f"told-{number}").write_text(told)


def test_two_ranks_save_beside_the_training_and_fail_together(tiny_config: MakeConfig, run_ranks: RunRanks) -> None:
    settings = {"evaluation": None, "zero_stage": 2, "steps": 7}
    sync = tiny_config("sync", **settings)
    beside, failing = (tiny_config(name, **settings, save="async") for name in ("beside", "failing"))
    run_ranks(two_ranks, sync, beside, failing, world=2)
    assert losses(beside) == losses(sync)
    assert steps_of(beside) == [7, 6, 3]
    for path in committed_checkpoints(Path(sync.run_dir) / "checkpoints"):
        assert len(hashes(path)) == 3
        assert hashes(path) == hashes(Path(beside.run_dir) / "checkpoints" / path.name)
    told = [Path(failing.run_dir, f"told-{number}").read_text() for number in (0, 1)]
    assert "rank 1 could not save" in told[0]
    assert all("zero_00001_of_00002.safetensors: No space left on device; free space" in text for text in told)
    assert [(s.step, s.state) for s in stored_checkpoints(Path(failing.run_dir) / "checkpoints")] == [(3, "committed")]


def test_the_best_by_evaluation_and_every_so_many_steps_stay(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.2, 0.9, 0.5])  # at steps 3, 6 and 8, the last
    monkeypatch.setattr(run, "retrieval_top1", lambda *_, **__: {"top1": next(scores), "chance": 0.1})
    config = tiny_config(save="async", save_every=8, eval_every=3, keep=1, keep_every=4, keep_best="top1")
    pretrain(config)
    assert steps_of(config) == [8, 6, 4]
    with pytest.raises(ConfigError, match="keep_best: top1 needs evaluation and eval_every"):
        pretrain(tiny_config("other", keep_best="top1"))
