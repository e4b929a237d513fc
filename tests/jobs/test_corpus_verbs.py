"""The corpora that ship, on a screen, and the download of an open one as a person runs it."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jobs import console, corpus_verbs
from manifests.config import shipped_names
from manifests.corpora import CORPORA_DIR, load_corpus

Kymo = Callable[..., tuple[int, str]]


def test_all_corpora_are_listed_with_licence_and_access(kymo: Kymo) -> None:
    code, text = kymo("corpora")
    assert code == 0
    for name in shipped_names(CORPORA_DIR):
        assert f"│ {name} " in text
    assert re.search(r"│ sleep_edf +│ fetch +│ +78 │ +153 │.*│ 50 +│ ODC-BY-1\.0 ", text)
    assert re.search(r"│ shhs1 +│ agreement ", text)
    assert re.search(r"│ tueg +│ tuab, tusl, tuev ", text)


def test_the_list_is_narrowed_by_access(kymo: Kymo) -> None:
    _, text = kymo("corpora", "--access", "fetch")
    assert "mitdb" in text
    assert "shhs1" not in text
    code, text = kymo("corpora", "--access", "free")
    assert code == 2
    assert "write open, registered, agreement or fetch" in text


def test_one_corpus_in_full(kymo: Kymo) -> None:
    code, text = kymo("corpora", "shhs1")
    assert code == 0
    for word in ("agreement", "sleepdata.org", "stage and events from nsrr_xml", "5,793 subjects", "shhs2:", "60 Hz"):
        assert word in text, word
    assert "kymo fetch mitdb --to DIR" in kymo("corpora", "mitdb")[1]
    assert kymo("corpora", "nowhere")[0] == 2


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_screen(kymo: Kymo, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    for module in (console, corpus_verbs):
        monkeypatch.setattr(module, "console", Console(width=width))
    for name in ("", "cfs", "chbmit", "ptbxl", "tuev"):
        _, text = kymo("corpora", *([name] if name else []))
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text


def test_a_corpus_under_an_agreement_is_refused_with_the_way_to_it(kymo: Kymo, tmp_path: Path) -> None:
    code, text = kymo("fetch", "tuab", "--to", tmp_path / "tuab")
    assert code == 2
    assert load_corpus("tuab").access in text
    assert not (tmp_path / "tuab").exists()


def test_fetch_then_the_commands_that_it_prints(
    kymo: Kymo,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    shared_data: Path,
    serve_files: Callable[[dict[str, bytes]], Any],
) -> None:
    server = serve_files({path.name: path.read_bytes() for path in (shared_data / "mitdb").glob("10[01].*")})
    monkeypatch.chdir(tmp_path)
    command = ("fetch", "mitdb", "--to", "my recordings", "--limit", "1", "--base-url", server.url)
    code, text = kymo(*command)
    assert code == 0
    assert "Licence: ODC-BY-1.0" in text
    assert "Cite: Moody and Mark" in text
    assert re.search(r"3 files came \([\d.]+ MB\), 0 were there", text)
    assert "0 files came (0.0 MB), 3 were there" in kymo(*command)[1]
    assert re.search(r"Task af: convert with recipe=ecg128\s", text)
    look, convert = (shlex.split(re.search(rf"{word}: +kymo (.*)", text)[1]) for word in ("Look", "Convert"))
    code, shown = kymo(*look)
    assert code == 0
    assert "ecg:MLII" in shown
    code, shown = kymo("plan", *convert[1:])
    assert (convert[0], code) == ("convert", 0)
    assert "1 unit, 0.50 h" in shown


def test_files_that_fail_are_told_and_the_next_run_goes_on(
    kymo: Kymo, tmp_path: Path, serve_files: Callable[[dict[str, bytes]], Any]
) -> None:
    server = serve_files({"100.hea": b"100 1 360 10\n", "100.dat": b"x"})
    server.faults["100.dat"] = [404]
    code, text = kymo("fetch", "mitdb", "--to", tmp_path, "--base-url", server.url)
    assert code == 2
    assert re.search(r"│ 100\.dat +│ the server answers 404 Not Found", text)
    assert "1 files did not come; run the same command again" in text
    code, text = kymo("fetch", "mitdb", "--to", tmp_path, "--base-url", server.url)
    assert code == 0
    assert "1 files came" in text
