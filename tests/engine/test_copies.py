"""Local copies of recordings on a store, here fsspec's store in memory."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from upath import UPath

from engine.copies import local_copy, local_tables
from engine.files import companions
from engine.read import READERS, sniff
from engine.storage import location
from manifests.corpora import load_corpus
from manifests.errors import ConfigError, RecordingError

MAX_BYTES = 3_000_000


@pytest.fixture
def store() -> Iterator[Path]:
    """An empty folder of a store."""
    folder = location("memory://lab")
    yield folder
    UPath("memory://lab").fs.rm("/lab", recursive=True)


def put(source: Path, root: Path, store: Path) -> Path:
    """A file of a local root on the store."""
    target = store.joinpath(*source.relative_to(root).parts)
    target.write_bytes(source.read_bytes())
    return target


def test_a_recording_comes_with_its_files_and_goes_at_the_end(tiny_root: Path, store: Path, tmp_path: Path) -> None:
    for name in ("ecg/E00001.hea", "ecg/E00001.dat"):
        put(tiny_root / name, tiny_root, store)
    corpus = load_corpus("synthetic_ecg")
    with local_copy(store / "ecg/E00001.hea", store, corpus, work=tmp_path) as (path, root):
        assert path.relative_to(root) == Path("ecg/E00001.hea")
        assert path.with_suffix(".dat").read_bytes() == (tiny_root / "ecg/E00001.dat").read_bytes()
    assert not list(tmp_path.iterdir())


def test_what_is_said_about_a_copy_is_said_about_the_original(tiny_root: Path, store: Path, tmp_path: Path) -> None:
    put(tiny_root / "ecg/E00001.hea", tiny_root, store)
    with (
        pytest.raises(RecordingError, match=r"memory://lab/ecg/E00001.hea: bad") as caught,
        local_copy(store / "ecg/E00001.hea", store, load_corpus("synthetic_ecg"), work=tmp_path) as (path, _),
    ):
        raise RecordingError("HEADER_INVALID", f"{path}: bad")
    assert caught.value.reason == "HEADER_INVALID"
    assert not list(tmp_path.iterdir())


def test_an_object_that_is_gone_costs_its_recording(store: Path, tmp_path: Path) -> None:
    (store / "x").write_bytes(b"")
    with (
        pytest.raises(RecordingError, match="no longer there") as caught,
        local_copy(store / "psg/no.edf", store, load_corpus("synthetic_psg"), work=tmp_path),
    ):
        pass
    assert caught.value.reason == "INPUT_CHANGED"


def test_nothing_is_written_outside_of_the_folder(store: Path, tmp_path: Path) -> None:
    (store / "a.hea").write_bytes(b"a 1 100 100\n../../../evil.dat 16 200 16 0 0 0 0 I\n")
    (location("memory://") / "evil.dat").write_bytes(b"x")
    try:
        with local_copy(store / "a.hea", store, load_corpus("synthetic_ecg"), work=tmp_path / "w") as (path, _):
            assert path.is_file()
    except (ConfigError, RecordingError):
        pass
    assert not [path for path in tmp_path.rglob("evil*") if "w" not in path.relative_to(tmp_path).parts]
    (location("memory://") / "evil.dat").unlink(missing_ok=True)


def test_a_local_root_is_used_as_it_is(tiny_root: Path) -> None:
    path = tiny_root / "ecg/E00001.hea"
    with local_copy(path, tiny_root, load_corpus("synthetic_ecg"), work=tiny_root) as pair:
        assert pair == (path, tiny_root)


def test_tables_of_a_corpus_are_copied_once(store: Path, tmp_path: Path) -> None:
    corpus = load_corpus("cfs")
    assert corpus.side_files
    (store / corpus.side_files[0].replace("*", "1")).write_bytes(b"a,b\n")
    with local_tables(corpus, store, work=tmp_path / "w") as (folder, tables):
        assert [path.read_bytes() for path in tables.rglob("*") if path.is_file()] == [b"a,b\n"]
        assert folder.is_dir()
    assert not list((tmp_path / "w").iterdir())


def test_every_reader_names_the_same_files_on_disk_and_store(shared_data: Path, store: Path) -> None:
    """Real files of all formats with their folders; a reader must ask through the path's own methods."""
    seen: set[str] = set()
    for path in sorted(shared_data.rglob("*")):
        reader = sniff(path) if path.is_file() and path.stat().st_size < MAX_BYTES else None
        if reader is None or reader not in READERS:
            continue
        names = companions(path, reader)
        if sum(name.stat().st_size for name in names) > 10 * MAX_BYTES:
            continue
        for name in {*names, path}:
            put(name, shared_data, store)
        found = companions(store.joinpath(*path.relative_to(shared_data).parts), reader)
        assert [str(name).removeprefix(f"{store}/") for name in found] == [
            name.relative_to(shared_data).as_posix() for name in names
        ], path
        seen.add(reader)
    assert {"edf", "wfdb"} <= seen
