import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from engine.config import ConvertConfig
from engine.finalise import read_samples
from engine.repack import layout_of, repack
from engine.verify import verify
from manifests.errors import ConfigError, ContractError
from manifests.shards import SNAPSHOT_FILE, Snapshot, load_snapshot

SHARD_BYTES = 400_000


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder that may be compared by bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def samples(folder: Path) -> dict[str, bytes]:
    """Tar blocks by key."""
    rows = read_samples(folder).to_pylist()
    tars = {name: (folder / name).read_bytes() for name in {row["shard"] for row in rows}}
    return {row["key"]: tars[row["shard"]][row["offset"] : row["offset"] + row["num_bytes"]] for row in rows}


@pytest.mark.parametrize("spill_bytes", [1_000_000_000, 600_000])
def test_every_sample_moves_as_it_is_into_shards_of_equal_numbers(
    converted: ConvertConfig, tmp_path: Path, spill_bytes: int
) -> None:
    parent = load_snapshot(converted.output)
    new = repack(converted.output, tmp_path / "new", shard_bytes=SHARD_BYTES, spill_bytes=spill_bytes)
    assert load_snapshot(tmp_path / "new").digest == new.digest != parent.digest
    assert samples(tmp_path / "new") == samples(converted.output)
    numbers = [shard.num_samples for shard in new.shards]
    assert len(numbers) == round(parent.counts["num_bytes"] / SHARD_BYTES) > 3
    assert max(numbers) - min(numbers) <= 1
    same = parent.counts | {name: new.counts[name] for name in ("shards", "num_bytes")}
    assert new.counts == same
    assert (new.recipe, new.corpora) == (parent.recipe, parent.corpora)
    assert new.provenance["parent"] == parent.digest
    assert verify(tmp_path / "new", deep=True).is_sound
    assert not (tmp_path / "new" / "work").exists()


def test_a_shard_mixes_the_whole_snapshot(converted: ConvertConfig, tmp_path: Path) -> None:
    repack(converted.output, tmp_path / "new", shard_bytes=SHARD_BYTES)
    before, after = (read_samples(folder) for folder in (converted.output, tmp_path / "new"))
    old_unit = {row["key"]: row["shard"].split("-")[0] for row in before.to_pylist()}
    mixed = Counter((row["shard"], old_unit[row["key"]]) for row in after.to_pylist())
    shards = {shard for shard, _ in mixed}
    units = set(old_unit.values())
    assert len(units) > 1
    assert sum(len({unit for name, unit in mixed if name == shard}) == len(units) for shard in shards) > len(shards) / 2


def test_bytes_depend_on_parent_seed_and_size_and_on_nothing_else(converted: ConvertConfig, tmp_path: Path) -> None:
    first = repack(converted.output, tmp_path / "a", shard_bytes=SHARD_BYTES, spill_bytes=300_000)
    second = repack(converted.output, tmp_path / "b", shard_bytes=SHARD_BYTES)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    other = repack(converted.output, tmp_path / "c", shard_bytes=SHARD_BYTES, seed=1)
    assert first.digest == second.digest != other.digest
    assert samples(tmp_path / "c") == samples(tmp_path / "a")
    with pytest.raises(ConfigError, match="holds another snapshot"):
        repack(converted.output, tmp_path / "a", shard_bytes=SHARD_BYTES, seed=1)
    with pytest.raises(ConfigError, match=r"holds a conversion"):
        repack(tmp_path / "a", converted.output)


def test_a_finished_repack_is_left_alone(converted: ConvertConfig, tmp_path: Path) -> None:
    repack(converted.output, tmp_path / "a", shard_bytes=SHARD_BYTES)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.tar")}
    repack(converted.output, tmp_path / "a", shard_bytes=SHARD_BYTES)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.tar")} == times


@pytest.mark.parametrize("spill_bytes", [1_000_000_000, 300_000])
def test_an_interrupted_repack_goes_on_and_gives_the_same_bytes(
    converted: ConvertConfig, tmp_path: Path, spill_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tmp_path / "expected"
    repack(converted.output, expected, shard_bytes=SHARD_BYTES)
    from engine import repack as module

    real, written = module.write_durably, []

    def failing(path: Path, *rest: object) -> tuple[int, str]:
        written.append(path.name)
        if len(written) == 5:
            path.with_name(f".{path.name}.1.tmp").write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        return real(path, *rest)

    monkeypatch.setattr(module, "write_durably", failing)
    with pytest.raises(OSError, match="No space"):
        repack(converted.output, tmp_path / "out", shard_bytes=SHARD_BYTES, spill_bytes=spill_bytes)
    assert not (tmp_path / "out" / SNAPSHOT_FILE).exists()
    kept = [path for path in (tmp_path / "out/shards").glob("*.tar") if not path.name.startswith(".")]
    times = {path: path.stat().st_mtime_ns for path in kept}
    assert times
    repack(converted.output, tmp_path / "out", shard_bytes=SHARD_BYTES, spill_bytes=spill_bytes)
    assert content(tmp_path / "out") == content(expected)
    assert {path: path.stat().st_mtime_ns for path in kept} == times


def test_killed_at_any_moment_the_same_call_gives_the_same_bytes(converted: ConvertConfig, tmp_path: Path) -> None:
    expected, out = tmp_path / "expected", tmp_path / "out"
    repack(converted.output, expected, shard_bytes=SHARD_BYTES)
    script = (
        "import sys; from pathlib import Path; from engine import repack as r\n"
        "real = r.write_durably\n"
        "def told(path, *rest):\n    print(path.name, flush=True)\n    return real(path, *rest)\n"
        "r.write_durably = told\n"
        f"source, out = Path({str(converted.output)!r}), Path({str(out)!r})\n"
        f"r.repack(source, out, shard_bytes={SHARD_BYTES}, spill_bytes=600_000)\n"
    )
    for lines in (1, 6):
        child = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).resolve().parents[2]
        )
        assert child.stdout is not None
        for _ in range(lines):
            assert child.stdout.readline()
        time.sleep(0.001)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
    repack(converted.output, out, shard_bytes=SHARD_BYTES, spill_bytes=600_000)
    assert content(out) == content(expected)


@pytest.mark.parametrize("spill_bytes", [1_000_000_000, 600_000])
def test_a_damaged_parent_is_never_copied(converted: ConvertConfig, tmp_path: Path, spill_bytes: int) -> None:
    shard = converted.output / load_snapshot(converted.output).shards[-1].path
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ContractError, match="SHA-256 differs"):
        repack(converted.output, tmp_path / "new", spill_bytes=spill_bytes)
    assert not (tmp_path / "new" / SNAPSHOT_FILE).exists()


def test_a_disk_without_room_is_told_before(
    converted: ConvertConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("engine.repack.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match=r"are needed"):
        repack(converted.output, tmp_path / "new")


def test_layout_is_a_permutation_cut_into_equal_parts(converted: ConvertConfig) -> None:
    snapshot = load_snapshot(converted.output)
    layout = layout_of(snapshot, shard_bytes=SHARD_BYTES, seed=3)
    assert np.array_equal(np.sort(layout.order), np.arange(60))
    assert layout.bounds[0] == 0
    assert layout.bounds[-1] == 60
    empty: Snapshot = snapshot.model_copy(update={"counts": snapshot.counts | {"windows": 0}, "shards": []})
    assert layout_of(empty, shard_bytes=SHARD_BYTES, seed=3).num_shards == 0
