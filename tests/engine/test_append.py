"""What a second conversion into the same folder does: only what is new or changed, and what it replaces is kept."""

import shutil
from pathlib import Path

import pytest

from engine.config import ConvertConfig, Source
from engine.convert import convert_all
from engine.difference import difference
from engine.history import HISTORY_DIR, earlier, history_path, keep
from engine.plan import read_plan
from engine.repack import repack
from engine.synthetic import synthesise
from engine.verify import verify
from manifests.config import dump_yaml, read_yaml
from manifests.corpora import CORPORA_DIR
from manifests.errors import ConfigError
from manifests.shards import SAMPLES_FILE, load_snapshot

NIGHTS = "psg/sub-00{}"


@pytest.fixture(scope="session")
def more_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five nights of ten minutes and a broken one, two ECG records."""
    root = tmp_path_factory.mktemp("more")
    synthesise(root, num_subjects=5, num_ecg=2, night_minutes=10)
    return root


@pytest.fixture(scope="session")
def _grown_from(more_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ConvertConfig, Path]:
    """A conversion of three nights, each about a unit, and its recordings."""
    folder = tmp_path_factory.mktemp("before")
    for number in (1, 2, 3):
        shutil.copytree(more_root / NIGHTS.format(number), folder / "root" / NIGHTS.format(number))
    config = config_of(folder)
    convert_all(config)
    return config, folder


def config_of(folder: Path, **changes: object) -> ConvertConfig:
    values = {
        "output": folder / "out",
        "recipe": "sleep128",
        "sources": [Source(corpus="synthetic_psg", root=folder / "root")],
        "unit_bytes": 1_500_000,
        "shard_bytes": 800_000,
        "quarantine_budget": 0.5,
    }
    return ConvertConfig.model_validate(values | changes)


@pytest.fixture
def folder(_grown_from: tuple[ConvertConfig, Path], tmp_path: Path) -> Path:
    """A folder of its own with `root` (three nights) and `out` (their conversion)."""
    shutil.copytree(_grown_from[1], tmp_path / "case")
    convert_all(config_of(tmp_path / "case"))  # nothing to do but to name the new folder
    return tmp_path / "case"


def stamps(out: Path) -> dict[str, tuple[int, bytes]]:
    """Time and bytes of every shard and index."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted((out / "shards").iterdir())}


def units_by_path(out: Path) -> dict[str, str]:
    return {item.path: unit.id for unit in read_plan(out) for item in unit.recordings}


def untouched(before: dict[str, tuple[int, bytes]], after: dict[str, tuple[int, bytes]]) -> set[str]:
    """Units all of whose files stand as they did."""
    units = {name.split("-")[0] for name in before}
    return {unit for unit in units if all(after.get(n) == v for n, v in before.items() if n.startswith(unit))}


def test_new_recordings_add_shards_and_the_replaced_snapshot_still_serves(
    folder: Path, more_root: Path, tmp_path: Path
) -> None:
    out = folder / "out"
    before, old, rows = stamps(out), load_snapshot(out), (out / SAMPLES_FILE).read_bytes()
    assert earlier(out) == []
    for number in (4, 5):
        shutil.copytree(more_root / NIGHTS.format(number), folder / "root" / NIGHTS.format(number))
        convert_all(config_of(folder))
    after = stamps(out)
    assert {name: after[name] for name in before} == before
    assert set(after) > set(before)
    assert [item.counts["windows"] for item in earlier(out)] == [60, 80]
    assert load_snapshot(out).counts["windows"] == 100

    kept = history_path(out, old.digest)
    assert load_snapshot(kept) == old
    assert (kept / SAMPLES_FILE).read_bytes() == rows
    assert verify(kept, deep=True).is_sound
    found = difference(kept, out)
    assert (len(found.added), found.removed, found.num_equal, found.num_read) == (40, (), 60, 0)
    assert found.corpora[0]["recordings_added"] == 2
    repack(kept, tmp_path / "again")
    moved = shutil.move(out, tmp_path / "moved")
    assert verify(history_path(Path(moved), old.digest)).is_sound


def test_a_rerun_with_nothing_new_touches_nothing(folder: Path) -> None:
    out = folder / "out"
    paths = [out / SAMPLES_FILE, out / "snapshot.json", *out.glob("shards/*"), *out.glob("commits/*")]
    times = [path.stat().st_mtime_ns for path in paths]
    convert_all(config_of(folder))
    assert [path.stat().st_mtime_ns for path in paths] == times
    assert earlier(out) == []


def test_a_changed_input_invalidates_its_unit_and_no_other(folder: Path, more_root: Path) -> None:
    out = folder / "out"
    before, units = stamps(out), units_by_path(out)
    old = load_snapshot(out)
    shutil.copytree(more_root / NIGHTS.format(4), folder / "root" / NIGHTS.format(4))
    convert_all(config_of(folder))
    (changed,) = (path for path in units if "sub-002" in path)
    shutil.copy(more_root / changed.replace("002", "005"), folder / "root" / changed)
    convert_all(config_of(folder))
    assert untouched(before, stamps(out)) == set(units.values()) - {units[changed]}
    assert units_by_path(out)[changed] != units[changed]
    assert not history_path(out, old.digest).exists()
    assert earlier(out) == []
    assert verify(out, deep=True, source=True).is_sound


def test_a_removed_recording_goes_with_its_unit_only(folder: Path) -> None:
    out = folder / "out"
    before, units = stamps(out), units_by_path(out)
    (gone,) = (path for path in units if "sub-003" in path)
    shutil.rmtree(folder / "root" / NIGHTS.format(3))
    with pytest.raises(ConfigError, match=r"1 of the 3 recordings .*sub-003.*not mounted.*replace=true"):
        convert_all(config_of(folder))
    assert stamps(out) == before
    assert verify(out).is_sound
    snapshot = convert_all(config_of(folder, replace=True)).snapshot
    assert snapshot is not None
    assert snapshot.counts["recordings"] == 2
    assert untouched(before, stamps(out)) == set(units.values()) - {units[gone]}
    assert gone not in units_by_path(out)
    assert earlier(out) == []


def test_another_recipe_invalidates_all(folder: Path) -> None:
    out = folder / "out"
    before = stamps(out)
    (folder / "salt").write_text("0123456789abcdef", encoding="utf-8")
    for other in ({"recipe": "eeg200"}, {"salt_file": folder / "salt"}):
        with pytest.raises(ConfigError, match="all its shards would go"):
            convert_all(config_of(folder, **other))
    assert stamps(out) == before
    convert_all(config_of(folder, recipe="eeg200", replace=True))
    assert untouched(before, stamps(out)) == set()
    assert not set(before) & set(stamps(out))
    assert verify(out, deep=True).is_sound


def test_a_changed_corpus_file_invalidates_its_own_units(folder: Path, more_root: Path) -> None:
    out, corpus = folder / "out", folder / "other.yaml"
    corpus.write_text(dump_yaml(read_yaml(CORPORA_DIR / "synthetic_psg.yaml") | {"id": "other"}), encoding="utf-8")
    shutil.copytree(more_root / NIGHTS.format(4), folder / "others" / NIGHTS.format(4))
    roots = {"synthetic_psg": folder / "root", str(corpus): folder / "others"}
    config = config_of(folder, sources=[Source(corpus=name, root=root) for name, root in roots.items()])
    first = units_by_path(out)
    convert_all(config)
    before, units = stamps(out), units_by_path(out)
    assert {path: units[path] for path in first} == first
    corpus.write_text(dump_yaml(read_yaml(corpus) | {"mains_hz": 60}), encoding="utf-8")
    convert_all(config)
    assert untouched(before, stamps(out)) == set(first.values())
    assert set(units_by_path(out).values()) - set(first.values()) != set(units.values()) - set(first.values())


def test_half_made_history_and_foreign_folders_go(folder: Path) -> None:
    out = folder / "out"
    for name in (".abc.1.tmp", "0123456789abcdef"):
        (out / HISTORY_DIR / name).mkdir(parents=True)
    keep(out, load_snapshot(out))
    assert list((out / HISTORY_DIR).iterdir()) == []


def test_a_conversion_never_writes_into_a_repacked_folder(folder: Path, tmp_path: Path) -> None:
    repack(folder / "out", tmp_path / "mixed")
    before = stamps(tmp_path / "mixed")
    with pytest.raises(ConfigError, match="repacked"):
        convert_all(config_of(folder, output=tmp_path / "mixed"))
    assert stamps(tmp_path / "mixed") == before
