"""Recordings inside one file: their names, and the way from a scan to a snapshot with one recording for each."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from upath import UPath

from engine.config import ConvertConfig, Source
from engine.convert import convert_all
from engine.files import companions, corpus_files, identity_of
from engine.finalise import ExitCode
from engine.recording import split_member
from engine.sandbox import _sha256_once
from engine.scan import scan
from engine.verify import verify
from manifests.corpora import load_corpus
from manifests.errors import ConfigError

EXAMS = {"11": ("900", 4000), "12": ("900", 4000), "13": ("901", 4000), "14": ("902", 2800)}


def ecg(length: int, seed: int) -> np.ndarray:
    """Twelve leads of noise and beats in mV at 400 Hz."""
    signal = 0.05 * np.random.default_rng(seed).normal(size=(length, 12)).cumsum(axis=0) / 20
    signal[::400] += 1.0
    return signal.astype(np.float32)


@pytest.fixture
def code15(tmp_path: Path) -> Path:
    """Two parts of CODE-15: three exams of 10 s, two of one person, one of 7 s, a filler row, and a damaged part."""
    root = tmp_path / "code15"
    root.mkdir()
    tracings = np.zeros((len(EXAMS) + 1, 4096, 12), dtype=np.float32)
    for row, (exam, (_, length)) in enumerate(EXAMS.items()):
        start = (4096 - length) // 2
        tracings[row, start : start + length] = ecg(length, int(exam))
    with h5py.File(root / "exams_part0.hdf5", "w") as file:
        file["tracings"], file["exam_id"] = tracings, [*map(int, EXAMS), 0]
    (root / "exams_part1.hdf5").write_bytes((root / "exams_part0.hdf5").read_bytes()[:5000])
    columns = ["1dAVb", "RBBB", "LBBB", "SB", "ST", "AF"]
    rows = [
        ",".join([exam, person, *(str(exam == "12" and name == "AF") for name in columns), "False"])
        for exam, (person, _) in EXAMS.items()
    ]
    (root / "exams.csv").write_text("\n".join([",".join(["exam_id", "patient_id", *columns, "normal_ecg"]), *rows]))
    return root


def test_a_member_is_told_from_a_file_name(tmp_path):
    assert split_member(tmp_path / "a.h5#7") == (tmp_path / "a.h5", "7")
    assert split_member(tmp_path / "a.h5") == (tmp_path / "a.h5", "")
    assert split_member(tmp_path / "#7") == (tmp_path / "#7", "")
    (tmp_path / "night #2.edf").touch()
    assert split_member(tmp_path / "night #2.edf") == (tmp_path / "night #2.edf", "")


def test_every_recording_of_a_file_is_listed_with_an_identity_of_its_own(code15):
    corpus = load_corpus("code15")
    paths = corpus_files(corpus, code15)
    assert [path.name for path in paths] == [
        *(f"exams_part0.hdf5#{exam}" for exam in EXAMS),
        "exams_part1.hdf5",
    ]
    identities = {identity_of(path, "arrays", corpus)[0] for path in paths}
    assert len(identities) == len(paths)
    assert code15 / "exams_part0.hdf5" in companions(paths[0], "arrays", corpus)
    before = identity_of(paths[0], "arrays", corpus)
    with (code15 / "exams_part0.hdf5").open("ab") as file:
        file.write(b"more")
    assert identity_of(paths[0], "arrays", corpus) != before


def test_recordings_of_one_file_become_one_snapshot(code15, tmp_path):
    result = scan([Source(corpus="code15", root=code15)])
    (row,) = result.corpus_rows()
    assert (row["recordings"], row["subjects"], row["unreadable"]) == (4, 3, 1)
    assert row["megabytes"] < 1.1 * sum(path.stat().st_size for path in code15.glob("*")) / 1e6
    config = ConvertConfig(
        output=tmp_path / "out",
        recipe="ecg128",
        sources=[Source(corpus="code15", root=code15)],
        num_cpus=1,
        unit_bytes=20_000,
        quarantine_budget=0.9,
    )
    first = convert_all(config)
    assert first.exit_code is ExitCode.WITH_QUARANTINE
    assert first.snapshot is not None
    commits = [json.loads(path.read_text()) for path in (config.output / "commits").glob("commit-*.json")]
    inputs = {item["path"]: item for commit in commits for item in commit["inputs"]}
    assert set(inputs) == {*(f"exams_part0.hdf5#{exam}" for exam in EXAMS), "exams_part1.hdf5"}
    assert {path: item["windows"] for path, item in inputs.items() if item["windows"]} == {
        f"exams_part0.hdf5#{exam}": 1 for exam in ("11", "12", "13")
    }
    reasons = {item["path"]: item["reason"] for commit in commits for item in commit["quarantine"]}
    assert reasons == {"exams_part0.hdf5#14": "TOO_SHORT", "exams_part1.hdf5": "NOT_A_RECORDING"}
    assert inputs["exams_part0.hdf5#11"]["sha256"]["exams_part0.hdf5"]
    second = convert_all(config)
    assert second.snapshot is not None
    assert second.snapshot.digest == first.snapshot.digest
    assert not verify(config.output, source=True).problems


def test_a_file_of_many_recordings_on_a_store_is_refused_and_a_file_of_one_is_not():
    root = UPath("memory://emotions")
    for name in ("exams_part0.hdf5", "1_20131027.mat"):
        (root / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match="holds several recordings"):
        corpus_files(load_corpus("code15"), root)
    assert [path.name for path in corpus_files(load_corpus("seed"), root)] == ["1_20131027.mat"]


def test_a_file_of_many_recordings_is_hashed_once(tmp_path):
    path = tmp_path / "a.h5"
    path.write_bytes(b"x" * 100)
    _sha256_once.cache_clear()
    stat = path.stat()
    digests = {_sha256_once(path, stat.st_size, stat.st_mtime_ns) for _ in range(5)}
    assert len(digests) == 1
    assert _sha256_once.cache_info().misses == 1
