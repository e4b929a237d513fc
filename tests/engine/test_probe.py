import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
from typer.testing import CliRunner

from engine import probe
from engine.config import ConvertConfig, Source
from engine.convert import convert_all
from engine.files import companions
from engine.probe import HeaderLimits, guarded_headers
from engine.quarantine import evidence
from engine.read import READERS, read_header
from engine.scan import scan, scan_folder
from jobs.cli import app
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


def write_set(path: Path, **more: object) -> Path:
    """An EEGLAB set of two channels and 2 s."""
    sites = np.array([("C3",), ("C4",)], dtype=[("labels", object)])
    fields = {"nbchan": 2.0, "trials": 1.0, "pnts": 256.0, "srate": 128.0, "xmin": 0.0, "chanlocs": sites}
    scipy.io.savemat(path, {"EEG": {**fields, **more, "data": np.zeros((2, 256), np.float32)}})
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


def test_a_damaged_set_that_ends_its_decoder_costs_one_row(tmp_path: Path) -> None:
    """SciPy 1.17 takes the values of an array in a cell for compressed ones and reads past its buffers."""
    root = tmp_path / "root"
    root.mkdir()
    cells = np.empty((1, 1), dtype=object)
    cells[0, 0] = np.zeros((2, 2))
    content = write_set(root / "good.set", cells=cells).read_bytes()
    four_doubles = b"\x09\0\0\0\x20\0\0\0"
    assert content.count(four_doubles) == 1
    (root / "bad.set").write_bytes(content.replace(four_doubles, b"\x0f" + four_doubles[1:]))
    rows = {row.path: row for row in scan_folder(root).rows}
    assert rows["good.set"].reason == ""
    assert rows["bad.set"].reason == "CRASHED"
    assert "SIGSEGV" in rows["bad.set"].message


@pytest.mark.parametrize("name", ["exams_part0.hdf5#102", "exams_part1.hdf5"])
def test_the_command_of_a_rejected_recording_shows_its_reason_again(tmp_path: Path, name: str) -> None:
    """An exam of zeros, a member of its file; and a file of which no member can be listed."""
    config = code15_conversion(tmp_path)
    (bad,) = [item for item in convert_all(config).quarantine if item.path == name]
    words = shlex.split(bad.command)
    assert words[:2] == ["kymo", "scan"]
    shown = CliRunner().invoke(app, [*words[1:], "--limit", "0"], env={"COLUMNS": "400"})
    assert shown.exit_code == 0, shown.output
    assert bad.reason in shown.output
    assert name in shown.output
    assert "exams_part0.hdf5#101" not in shown.output
    found = evidence(config.output, name)
    assert not found.is_changed
    assert found.files[0][0] == name.partition("#")[0]


def code15_conversion(root: Path) -> ConvertConfig:
    """Two good exams, one of zeros, and a damaged file."""
    tracings = np.random.default_rng(0).normal(size=(3, 4096, 12)).astype(np.float32)
    tracings[2] = 0
    with h5py.File(root / "exams_part0.hdf5", "w") as file:
        file["tracings"], file["exam_id"] = tracings, [100, 101, 102]
    (root / "exams_part1.hdf5").write_bytes((root / "exams_part0.hdf5").read_bytes()[:1000])
    lines = [
        "exam_id,patient_id,1dAVb,RBBB,LBBB,SB,ST,AF,normal_ecg",
        *(f"{exam},{exam},0,0,0,0,0,0,1" for exam in (100, 101, 102)),
    ]
    (root / "exams.csv").write_text("\n".join(lines), encoding="utf-8")
    return ConvertConfig(
        output=root / "out",
        recipe="ecg128",
        sources=[Source(corpus="code15", root=root)],
        quarantine_budget=1.0,
    )


def test_one_recording_of_a_corpus_is_looked_at_by_its_path(tmp_path: Path) -> None:
    sources = code15_conversion(tmp_path).sources
    assert [row.path for row in scan(sources, only="exams_part0.hdf5#101").rows] == ["exams_part0.hdf5#101"]
    with pytest.raises(ConfigError, match=r"--only none\.set: no recording of code15 has that path"):
        scan(sources, only="none.set")
