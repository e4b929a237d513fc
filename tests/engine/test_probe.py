import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from engine import probe
from engine.config import Source
from engine.files import companions
from engine.probe import HeaderLimits, guarded_headers
from engine.read import READERS, read_header
from engine.scan import scan, scan_folder
from manifests.config import dump_yaml
from manifests.errors import ConfigError

# What a library may do to its process while it reads a header, by the name of the file.
EVIL = """
    import ctypes, json, os, time
    from pathlib import Path
    from engine import probe

    def told(line):
        match Path(json.loads(line)["path"]).stem:
            case "segfault": ctypes.string_at(0)
            case "killed": os.kill(os.getpid(), 9)
            case "hang": time.sleep(600)
            case "glutton": return {"told": [bytearray(64 << 20) for _ in range(100)]}
        return probe.answer(line)

    def careful(line):
        try:
            return told(line)
        except MemoryError:
            return {"error": ["MEMORY", "too much"]}

    probe.main(careful)
"""
CORPUS = {
    "id": "lab",
    "title": "A lab",
    "homepage": "https://example.org",
    "license": "CC0",
    "citation": "none",
    "modalities": ["eeg"],
    "reader": "eeglab",
    "files": ["*.set"],
    "subject": {"pattern": r"(?P<subject>[a-z]+)\.set"},
    "split": {"kind": "hash", "salt": "lab", "percent": {"train": 100}},
}


def write_set(path: Path) -> Path:
    """An EEGLAB set of two channels and 2 s."""
    sites = np.array([("C3",), ("C4",)], dtype=[("labels", object)])
    fields = {"nbchan": 2.0, "trials": 1.0, "pnts": 256.0, "srate": 128.0, "xmin": 0.0, "chanlocs": sites}
    scipy.io.savemat(path, {"EEG": {**fields, "data": np.zeros((2, 256), np.float32)}})
    return path


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HeaderLimits]:
    (tmp_path / "evil_header.py").write_text(textwrap.dedent(EVIL), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(probe, "_MODULE", "evil_header")
    monkeypatch.setattr("engine.child._GRACE_S", 0.1)
    limits = HeaderLimits(time_limit_s=3, memory_limit_gb=0.5)
    monkeypatch.setattr("engine.scan.HeaderLimits", lambda: limits)
    yield limits
    assert READERS.guard is None


def test_a_scan_outlives_a_header_that_crashes_hangs_or_eats_memory(evil: HeaderLimits, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for name in ("glutton", "good", "hang", "killed", "other", "segfault"):
        write_set(root / f"{name}.set")
    result = scan_folder(root)
    assert {row.path: row.reason for row in result.rows} == {
        "glutton.set": "MEMORY",
        "good.set": "",
        "hang.set": "TIMEOUT",
        "killed.set": "KILLED",
        "other.set": "",
        "segfault.set": "CRASHED",
    }
    assert "SIGSEGV" in next(row.message for row in result.rows if row.reason == "CRASHED")
    assert [len(row.channels) for row in result.readable] == [2, 2]


def test_a_guarded_header_is_the_same_and_keeps_the_process_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_set(tmp_path / "a.set")
    plain = read_header(path, "eeglab")
    with guarded_headers(HeaderLimits(time_limit_s=60, memory_limit_gb=2)):
        assert read_header(path, "eeglab") == plain
        assert companions(path, "eeglab") == [path]
        with pytest.raises(ConfigError, match="layout"):
            read_header(path, "arrays", {"nonsense": 1})
        guarded = READERS["eeglab"]
        assert READERS["edf"].read_header.__module__ == "engine.readers.edf"
    assert guarded.read_header is not READERS["eeglab"].read_header


def test_no_child_is_started_for_formats_that_cannot_crash(tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_MODULE", "no_such_module")
    result = scan_folder(tiny_root)
    assert len(result.readable) == 6


def test_a_damaged_set_costs_one_row(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    content = write_set(root / "good.set").read_bytes()
    for number in range(40):
        damaged = bytearray(content)
        for place in range(136 + 8 * number, 136 + 8 * number + 8):
            damaged[place] = 0xEE
        (root / f"bad{number:02d}.set").write_bytes(damaged)
    result = scan_folder(root)
    assert len(result.rows) == 41
    assert next(row.reason for row in result.rows if row.path == "good.set") == ""
    assert sum(bool(row.reason) for row in result.rows) > 20


def test_one_recording_of_a_corpus_is_looked_at_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "lab.yaml").write_text(dump_yaml(CORPUS), encoding="utf-8")
    for name in ("good", "other"):
        write_set(tmp_path / f"{name}.set")
    sources = [Source(corpus=str(tmp_path / "lab.yaml"), root=tmp_path)]
    assert [row.path for row in scan(sources, only="other.set").rows] == ["other.set"]
    with pytest.raises(ConfigError, match=r"--only none\.set: no recording of lab has that path"):
        scan(sources, only="none.set")
