"""Two runs in one folder: the second is refused while the first lives; on two machines the later start overrules."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from upath import UPath

from manifests.errors import ConfigError
from trainer import lock
from trainer.lock import Fence, claim, hold
from trainer.storage import location


def test_the_second_run_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    first = hold(tmp_path / "run" / "lock")
    with pytest.raises(ConfigError, match="another run is training here"):
        hold(tmp_path / "run" / "lock")
    first.close()
    hold(tmp_path / "run" / "lock", patience_s=1.0).close()


def test_every_start_gets_a_number_of_its_own_and_overrules_the_earlier_ones(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        fences = list(pool.map(lambda _: claim(tmp_path / "attempts"), range(24)))
    assert sorted(fence.attempt for fence in fences) == list(range(1, 25))
    newest = max(fences, key=lambda fence: fence.attempt)
    newest.check()
    for fence in fences:
        if fence is not newest:
            with pytest.raises(ConfigError, match=rf"start {fence.attempt} .* overruled by start 24 \(process \d+ on "):
                fence.check()


def test_a_number_is_not_given_again_and_may_have_to_be_higher(tmp_path: Path) -> None:
    assert claim(tmp_path).attempt == 1
    assert claim(tmp_path, at_least=7).attempt == 7
    assert claim(tmp_path).attempt == 8
    (tmp_path / "000009.json").write_bytes(b"not readable")
    assert claim(tmp_path).attempt == 10
    (tmp_path / "000010.json").write_bytes(b"not readable")
    with pytest.raises(ConfigError, match=r"start 10 \(by whom cannot be read\)"):
        Fence(folder=tmp_path, attempt=9).check()


def test_where_the_condition_is_ignored_reading_back_tells_who_won(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store without conditional writes: another process writes the same number a moment later."""
    writes: list[Path] = []

    def overwrite(path: Path, content: bytes) -> None:
        writes.append(path)
        path.write_bytes(b"another's" if len(writes) == 1 else content)

    monkeypatch.setattr(lock, "create_exclusively", overwrite)
    assert claim(tmp_path).attempt == 2


@pytest.mark.usefixtures("s3")
def test_in_a_store_too_no_number_is_given_twice(tmp_path: Path) -> None:
    UPath("s3://bucket").mkdir(exist_ok=True)
    folder = location(f"s3://bucket/{tmp_path.name}")
    with ThreadPoolExecutor(4) as pool:
        fences = list(pool.map(lambda _: claim(folder), range(8)))
    assert sorted(fence.attempt for fence in fences) == list(range(1, 9))
    with pytest.raises(ConfigError, match="overruled by start 8"):
        Fence(folder=folder, attempt=7).check()
