"""Which files a recording consists of and what identifies them."""

import os
from pathlib import Path

import pytest

from engine.files import companions, corpus_files, identity_of
from engine.scan import scan_folder
from manifests.corpora import load_corpus
from manifests.errors import ConfigError


def test_identity_follows_the_content_and_not_the_date(tmp_path: Path) -> None:
    path = tmp_path / "a.edf"
    path.write_bytes(bytes(300_000))
    before, size = identity_of(path, "edf")
    path.touch()
    assert identity_of(path, "edf") == (before, 300_000) == (before, size)
    path.write_bytes(bytes(299_999) + b"x")
    assert identity_of(path, "edf")[0] != before


def test_identity_covers_the_signal_file_of_a_wfdb_record(tiny_root: Path, tmp_path: Path) -> None:
    for name in ("E00001.hea", "E00001.dat"):
        (tmp_path / name).write_bytes((tiny_root / "ecg" / name).read_bytes())
    header = tmp_path / "E00001.hea"
    assert companions(header, "wfdb") == [tmp_path / "E00001.dat", header]
    before = identity_of(header, "wfdb")
    (tmp_path / "E00001.dat").write_bytes(b"\0" * (tmp_path / "E00001.dat").stat().st_size)
    assert identity_of(header, "wfdb") != before


def test_a_missing_root_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"root .* is no folder"):
        corpus_files(load_corpus("synthetic_psg"), tmp_path / "nowhere")


def test_excluded_files_are_not_scanned(tiny_root: Path) -> None:
    corpus = load_corpus("synthetic_psg").model_copy(update={"exclude": ["psg/sub-001/*"]})
    assert len(corpus_files(corpus, tiny_root)) == len(corpus_files(load_corpus("synthetic_psg"), tiny_root)) - 1


def test_names_that_are_no_utf_8_are_refused_before_anything_is_hashed(tiny_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "psg" / "sub-001"
    root.mkdir(parents=True)
    (root / os.fsdecode(b"M\xfcller_psg.edf")).write_bytes(b"0")
    with pytest.raises(ConfigError, match=r"M\\udcfcller_psg.edf is no UTF-8; rename"):
        corpus_files(load_corpus("synthetic_psg"), tmp_path)
    with pytest.raises(ConfigError, match="is no UTF-8"):
        scan_folder(tmp_path)
    (root / os.fsdecode(b"M\xfcller_psg.edf")).rename(root / "Müller_psg.edf")
    assert len(corpus_files(load_corpus("synthetic_psg"), tmp_path)) == 1


def test_identity_covers_what_a_table_says_of_the_person_and_nobody_else(tmp_path: Path) -> None:
    corpus = load_corpus("cfs")
    table = tmp_path / "datasets/cfs-visit5-dataset-0.7.0.csv"
    table.parent.mkdir()
    path = tmp_path / "polysomnography/edfs/cfs-visit5-800002.edf"
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(1000))

    def identity(first: str, second: str) -> str:
        table.write_text(f"nsrrid,familyi\n800002,{first}\n800003,{second}\n", encoding="utf-8")
        return identity_of(path, "edf", corpus)[0]

    before = identity("1", "2")
    assert identity("1", "333") == before
    assert identity("55", "2") != before
