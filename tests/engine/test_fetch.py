"""Download of an open corpus from a server on loopback: checksums, resume, faults, what stays on the disk."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pooch.core
import pytest

from engine import fetch as engine_fetch
from engine.config import Source
from engine.fetch import STAGING, fetch, read_checksums, select
from engine.scan import scan
from manifests.corpora import Corpus, load_corpus
from manifests.errors import ConfigError

BIG = bytes(range(256)) * 8192  # 2 MiB: its half is a whole number of the pieces that are written
FILES = {
    "LICENSE.txt": b"open",
    "RECORDS": b"a/100\na/101\n",
    "a/100.hea": b"100 1 360 10\n",
    "a/100.dat": BIG,
    "a/100.atr": b"atr",
    "a/1001.dat": b"another record",
    "a/101.hea": b"101 1 360 10\n",
    "a/101.dat": b"101",
    "x/mitdbdir.pdf": b"%PDF",
    "b/102 with blank#.hea": b"102",
}
CORPUS = Corpus.model_validate(
    {
        "id": "tiny",
        "title": "t",
        "licence": "ODC-By",
        "access": "open",
        "reader": "wfdb",
        "files": ["*/1*.hea"],
        "subject": {"pattern": r"(?P<subject>\d+)[^/]*\.hea$"},
        "annotations": {"source": "wfdb", "pattern": "{stem}.atr", "target": "events"},
        "fetch": {"base_url": "http://127.0.0.1:9/"},
    }
)


@pytest.fixture
def server(serve_files: Callable[[dict[str, bytes]], Any]) -> Any:
    """FILES on loopback."""
    return serve_files(FILES)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other at once."""
    monkeypatch.setattr(pooch.core.time, "sleep", lambda _: None)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_recordings_come_with_what_belongs_to_them(server: Any, tmp_path: Path) -> None:
    came: list[int] = []
    found = fetch(CORPUS, tmp_path, base_url=server.url, progress=came.append)
    expected = {name: data for name, data in FILES.items() if name not in {"a/1001.dat", "x/mitdbdir.pdf"}}
    assert tree(tmp_path) == expected
    assert found.downloaded == sorted(expected)
    assert found.num_bytes == sum(came) == sum(map(len, expected.values()))
    assert (found.present, found.failed) == ([], {})
    # Once more: nothing is asked for but the list.
    server.log.clear()
    again = fetch(CORPUS, tmp_path, base_url=server.url.rstrip("/"))
    assert (again.downloaded, again.present) == ([], sorted(expected))
    assert [name for name, _ in server.log] == ["SHA256SUMS.txt"]


def test_only_and_limit(server: Any, tmp_path: Path) -> None:
    fetch(CORPUS, tmp_path / "one", base_url=server.url, limit=1)
    first = {"LICENSE.txt", "RECORDS", "a/100.hea", "a/100.dat", "a/100.atr"}
    assert set(tree(tmp_path / "one")) == first
    fetch(CORPUS, tmp_path / "pdf", base_url=server.url, only=["x/*"])
    assert set(tree(tmp_path / "pdf")) == {"LICENSE.txt", "RECORDS", "x/mitdbdir.pdf"}
    fetch(CORPUS, tmp_path / "rec", base_url=server.url, only=["a/101*"], limit=5)
    assert set(tree(tmp_path / "rec")) == {"LICENSE.txt", "RECORDS", "a/101.hea", "a/101.dat"}
    with pytest.raises(ConfigError, match="none of the 10 files"):
        fetch(CORPUS, tmp_path / "none", base_url=server.url, only=["y/*"])
    assert tree(tmp_path / "none") == {}


def test_the_hypnogram_of_a_night_is_found_by_the_corpus_pattern() -> None:
    names = ["SC4001E0-PSG.edf", "SC4001EC-Hypnogram.edf", "SC4002E0-PSG.edf", "SC4002EC-Hypnogram.edf", "x.xls"]
    cassette = [f"sleep-cassette/{name}" for name in names]
    assert select(cassette, load_corpus("sleep_edf"), limit=1) == cassette[:2]


def test_a_cut_connection_is_continued_where_it_ended(server: Any, tmp_path: Path) -> None:
    server.faults["a/100.dat"] = ["cut"]
    found = fetch(CORPUS, tmp_path, base_url=server.url)
    assert found.failed == {}
    assert (tmp_path / "a/100.dat").read_bytes() == BIG
    assert server.asked("a/100.dat") == ["", f"bytes={len(BIG) // 2}-"]


def test_a_server_without_ranges_begins_again(server: Any, tmp_path: Path) -> None:
    server.takes_ranges = False
    server.faults["a/100.dat"] = ["cut"]
    assert fetch(CORPUS, tmp_path, base_url=server.url).failed == {}
    assert (tmp_path / "a/100.dat").read_bytes() == BIG


def test_an_outage_passes_and_a_longer_one_leaves_a_part(server: Any, tmp_path: Path) -> None:
    server.faults["a/100.dat"] = [503, "cut", 503]
    server.faults["a/101.dat"] = [503] * 5
    found = fetch(CORPUS, tmp_path, base_url=server.url)
    assert (tmp_path / "a/100.dat").read_bytes() == BIG
    assert found.failed == {"a/101.dat": "the server answers 503 Service Unavailable"}
    server.faults["b/102 with blank#.hea"] = []
    assert fetch(CORPUS, tmp_path, base_url=server.url).downloaded == ["a/101.dat"]


def test_parts_outlive_the_process_and_nothing_else_does(server: Any, tmp_path: Path) -> None:
    server.faults["a/100.dat"] = ["cut", 503, 503, 503, 503]
    assert set(fetch(CORPUS, tmp_path, base_url=server.url).failed) == {"a/100.dat"}
    assert not (tmp_path / "a/100.dat").exists()
    (part,) = (tmp_path / STAGING).iterdir()
    assert part.stat().st_size == len(BIG) // 2
    server.log.clear()
    assert fetch(CORPUS, tmp_path, base_url=server.url).downloaded == ["a/100.dat"]
    assert server.asked("a/100.dat") == [f"bytes={len(BIG) // 2}-"]
    assert (tmp_path / "a/100.dat").read_bytes() == BIG
    assert not (tmp_path / STAGING).exists()


def test_a_part_that_is_too_long_or_wrong_is_begun_again(server: Any, tmp_path: Path) -> None:
    for content in (BIG + b"more", b"wrong" + BIG[5:-7]):
        folder = tmp_path / hashlib.md5(content).hexdigest()
        url = f"{server.url}a/100.dat"
        (folder / STAGING).mkdir(parents=True)
        (folder / STAGING / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.part").write_bytes(content)
        assert fetch(CORPUS, folder, base_url=server.url).failed == {}
        assert (folder / "a/100.dat").read_bytes() == BIG


def test_a_part_that_is_whole_only_takes_its_name(server: Any, tmp_path: Path) -> None:
    name = f"{hashlib.sha256(f'{server.url}a/100.dat'.encode()).hexdigest()[:16]}.part"
    (tmp_path / STAGING).mkdir()
    (tmp_path / STAGING / name).write_bytes(BIG)
    came: list[int] = []
    assert fetch(CORPUS, tmp_path, base_url=server.url, only=["a/100*"], progress=came.append).failed == {}
    assert (tmp_path / "a/100.dat").read_bytes() == BIG
    assert sum(came) < 1000
    assert server.asked("a/100.dat") == [f"bytes={len(BIG)}-"]


def test_a_wrong_checksum_takes_no_name_and_is_not_asked_for_without_end(server: Any, tmp_path: Path) -> None:
    server.files["a/101.dat"] = b"tampered"
    found = fetch(CORPUS, tmp_path, base_url=server.url)
    assert found.failed == {"a/101.dat": "the checksum differs from the one in the server's list"}
    assert not (tmp_path / "a/101.dat").exists()
    assert len(server.asked("a/101.dat")) == 2
    assert (tmp_path / "a/100.dat").read_bytes() == BIG
    assert not (tmp_path / STAGING).exists()


def test_a_missing_file_is_asked_for_once(server: Any, tmp_path: Path) -> None:
    del server.files["a/100.atr"]
    found = fetch(CORPUS, tmp_path, base_url=server.url)
    assert found.failed == {"a/100.atr": "the server answers 404 Not Found"}
    assert len(server.asked("a/100.atr")) == 1


def test_a_different_file_is_never_overwritten(server: Any, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/101.dat").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"101\.dat: differs from the file of the server; move it away"):
        fetch(CORPUS, tmp_path, base_url=server.url)
    assert (tmp_path / "a/101.dat").read_bytes() == b"mine"


def test_no_room_is_told_before_a_file_is_written(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_fetch, "_SPARE_BYTES", 1 << 60)
    with pytest.raises(ConfigError, match="make room"):
        fetch(CORPUS, tmp_path, base_url=server.url)
    assert set(tree(tmp_path)) <= {"LICENSE.txt", "RECORDS"}


def test_only_open_corpora_are_downloaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"shhs1: kymo does not download it \(agreement\)\. To get it: .*sleepdata"):
        fetch(load_corpus("shhs1"), tmp_path / "shhs1")
    assert not (tmp_path / "shhs1").exists()


def test_two_downloads_into_one_folder_are_refused(server: Any, tmp_path: Path) -> None:
    server.hold = threading.Event()
    first = threading.Thread(target=fetch, args=(CORPUS, tmp_path), kwargs={"base_url": server.url})
    first.start()
    while server.held not in {name for name, _ in server.log}:  # whoever downloads holds the lock
        time.sleep(0.01)
    try:
        with pytest.raises(ConfigError, match="another kymo fetch"):
            fetch(CORPUS, tmp_path, base_url=server.url)
    finally:
        server.hold.set()
        first.join()
    assert (tmp_path / "a/100.dat").read_bytes() == BIG


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL])
def test_the_same_command_goes_on_after_a_blow(server: Any, tmp_path: Path, blow: signal.Signals) -> None:
    server.hold = threading.Event()
    code = (
        # Who was started in the background by a shell ignores Ctrl-C, and so do its children.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys; from pathlib import Path; from engine.fetch import fetch; from manifests.corpora import Corpus\n"
        "corpus = Corpus.model_validate_json(sys.argv[1])\n"
        "fetch(corpus, Path(sys.argv[2]), base_url=sys.argv[3], only=['a/100*'], jobs=2)"
    )
    command = [sys.executable, "-c", code, CORPUS.model_dump_json(), str(tmp_path), server.url]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    part = tmp_path / STAGING / f"{hashlib.sha256(f'{server.url}a/100.dat'.encode()).hexdigest()[:16]}.part"
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, blow)
    time.sleep(2)  # the blow is felt before the server goes on, also on a busy machine
    server.hold.set()
    process.wait(timeout=60)
    assert not (tmp_path / "a/100.dat").exists()
    begun = part.stat().st_size
    assert 0 < begun < len(BIG)
    server.log.clear()
    server.hold = None
    fetch(CORPUS, tmp_path, base_url=server.url, only=["a/100*"])
    assert server.asked("a/100.dat") == [f"bytes={begun}-"]
    assert (tmp_path / "a/100.dat").read_bytes() == BIG
    assert not (tmp_path / STAGING).exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<html>login</html>", "line 1 is not"),
        ("", "lists no file"),
        (f"{'0' * 64}  ../../etc/passwd\n", "leads out"),
        (f"{'0' * 64}  /etc/passwd\n", "leads out"),
        (f"{'0' * 64}  a\\..\\b\n", "leads out"),
        (f"{'0' * 64}  {STAGING}/a\n", "leads out"),
    ],
)
def test_a_list_that_cannot_be_one_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_checksums(text, where="u")


def test_lists_as_sha256sum_writes_them() -> None:
    text = f"{'A' * 64} *./a b.hea\n\n{'0' * 64}  c/d.dat\n"
    assert read_checksums(text, where="u") == {"a b.hea": f"sha256:{'a' * 64}", "c/d.dat": f"sha256:{'0' * 64}"}


def test_files_with_md5_sums_of_a_corpus_file(server: Any, tmp_path: Path) -> None:
    sums = {name: f"md5:{hashlib.md5(FILES[name]).hexdigest()}" for name in ("a/101.hea", "a/101.dat")}
    rule = {"base_url": server.url, "checksums": None, "files": sums}
    corpus = Corpus.model_validate({**CORPUS.model_dump(), "fetch": rule})
    assert fetch(corpus, tmp_path).downloaded == ["a/101.dat", "a/101.hea"]
    assert [name for name, _ in server.log if name == "SHA256SUMS.txt"] == []


def test_an_unreachable_server_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"SHA256SUMS\.txt: no connection: Connection refused; is the server reachable"
    ):
        fetch(CORPUS, tmp_path)


def test_a_real_record_is_fetched_and_scanned(
    shared_data: Path, tmp_path: Path, serve_files: Callable[[dict[str, bytes]], Any]
) -> None:
    files = {f"{path.name}": path.read_bytes() for path in (shared_data / "mitdb").glob("100.*")}
    fetch(load_corpus("mitdb"), tmp_path, base_url=serve_files(files).url)
    (row,) = scan([Source(corpus="mitdb", root=tmp_path)]).rows
    assert round(float(row.duration)) == 1806
