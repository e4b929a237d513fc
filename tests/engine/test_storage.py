"""Locations on a disk and on an object store: a real S3 server on loopback, started here."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import cast

import pytest
from upath import UPath

from engine import copies, lock, storage
from engine.commit import read_commit
from engine.config import ConvertConfig, Source
from engine.convert import convert_all
from engine.files import corpus_files, identity_of
from engine.heartbeat import Pulse, append_progress, read_heartbeat, read_progress
from engine.lock import Holder, locked
from engine.plan import read_plan
from engine.preview import first_key, read_window
from engine.report_data import read_report_data
from engine.status import status
from engine.storage import (
    download,
    glob_matches,
    is_remote,
    location,
    read_ranges,
    remove_dead_work,
    sizes_in,
    upload,
    work_folder,
)
from engine.verify import verify
from manifests.config import dump_yaml, load_config
from manifests.corpora import load_corpus
from manifests.errors import ConfigError
from manifests.shards import load_snapshot

REPOSITORY = Path(__file__).resolve().parents[2]
BUCKET = "lab"


@pytest.fixture(scope="module")
def server(s3: None) -> str:
    """URL of an empty bucket on an S3 server."""
    UPath(f"s3://{BUCKET}").fs.mkdir(BUCKET)
    return f"s3://{BUCKET}"


@pytest.fixture
def folder(server: str, request: pytest.FixtureRequest) -> Path:
    """A folder of the test's own on the server."""
    return location(f"{server}/{hashlib.sha256(request.node.name.encode()).hexdigest()[:8]}")


@pytest.fixture(scope="module")
def raw(server: str, tiny_root: Path) -> Path:
    """The tiny recordings on the server."""
    root = location(f"{server}/raw")
    for path in tiny_root.rglob("*"):
        if path.is_file():
            upload(path, root.joinpath(*path.relative_to(tiny_root).parts))
    return root


def on_store(config: ConvertConfig, output: Path, root: Path | None = None) -> ConvertConfig:
    """A conversion that writes to `output`, and reads from `root` if it is given."""
    sources = [Source(corpus="synthetic_psg", root=root)] if root else config.sources
    return config.model_copy(update={"output": output, "sources": sources})


def test_an_ordinary_path_stays_one_and_a_url_becomes_a_upath() -> None:
    for text in ("/data/x", "out", "~/x", "C:odd", "file:///data/x"):
        assert type(location(text)) is type(Path(text)), text
        assert not is_remote(location(text))
    assert location("file:///data/x") == Path("/data/x")
    assert is_remote(location("memory://x/y"))
    data = {"output": "memory://x/y", "recipe": "psg128", "sources": [{"corpus": "ucddb_epochs", "root": "raw"}]}
    config = ConvertConfig.model_validate(data)
    assert is_remote(config.output)
    assert config.sources[0].root == Path("raw")
    again = ConvertConfig.model_validate(config.model_dump(mode="json"))
    assert again == config
    assert config.model_dump(mode="json")["output"] == "memory://x/y"


@pytest.mark.parametrize(
    ("url", "said"),
    [("gs://lab/x", r"output: .*gs:// needs a package .*gcsfs"), ("odd://x", r"output: .*fsspec knows no odd://")],
)
def test_a_url_of_another_kind_is_refused_with_what_to_install(tmp_path: Path, url: str, said: str) -> None:
    path = tmp_path / "c.yaml"
    sources = [{"corpus": "ucddb_epochs", "root": "raw"}]
    path.write_text(dump_yaml({"output": url, "recipe": "psg128", "sources": sources}))
    with pytest.raises(ConfigError, match=said):
        load_config(ConvertConfig, path)


@pytest.mark.parametrize(
    ("pattern", "found", "not_found"),
    [
        ("**/*.edf", ["a.edf", "x/y/a.edf", ".h.edf"], ["a.edf.x", "x.edf/b.bdf"]),
        ("psg/*/*_psg.edf", ["psg/a/b_psg.edf"], ["psg/b_psg.edf", "psg/a/c/b_psg.edf"]),
        ("[12][0-9]?.hea", ["10x.hea"], ["30x.hea", "1.hea"]),
    ],
)
def test_globs_find_what_pathlib_finds(tmp_path: Path, pattern: str, found: list[str], not_found: list[str]) -> None:
    for name in (*found, *not_found):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    expected = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob(pattern) if path.is_file()}
    assert expected == set(found)
    for name in (*found, *not_found):
        assert glob_matches(name.split("/"), pattern.split("/")) == (name in expected)


def test_spool_files_lie_on_a_local_disk(tmp_path: Path) -> None:
    assert work_folder(tmp_path) == tmp_path / "work"
    remote = work_folder(location("s3://lab/a"), tmp_path)
    assert remote.parent == tmp_path
    assert remote != work_folder(location("s3://lab/b"), tmp_path)
    assert not is_remote(work_folder(location("s3://lab/a")))


def test_work_of_dead_processes_is_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    for name in (f"u-{ended.pid}", f"u-{os.getpid()}", "scan-abc"):
        (tmp_path / name).mkdir()
    remove_dead_work(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"u-{os.getpid()}", "scan-abc"}


def test_identities_are_equal_on_disk_and_store(raw: Path, tiny_root: Path) -> None:
    for name in ("synthetic_psg", "synthetic_ecg"):
        corpus = load_corpus(name)
        here, there = corpus_files(corpus, tiny_root), corpus_files(corpus, raw)
        assert [path.relative_to(tiny_root).as_posix() for path in here] == [
            str(path).removeprefix(f"{raw}/") for path in there
        ]
        for one, other in zip(here, there, strict=True):
            assert identity_of(one, corpus.reader, corpus) == identity_of(other, corpus.reader, corpus)


def test_blocks_are_read_alike(raw: Path, tiny_root: Path) -> None:
    ranges = [(0, 10), (100, 7), (5, 1)]
    assert read_ranges(raw / "ecg/E00001.dat", ranges) == read_ranges(tiny_root / "ecg/E00001.dat", ranges)


def test_store_to_store_and_store_to_disk_give_the_digest_of_the_disk(
    converted: ConvertConfig, folder: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_snapshot(converted.output)
    config = on_store(converted, folder / "out", raw).model_copy(update={"scratch": tmp_path / "scratch"})
    result = convert_all(config)
    assert result.snapshot is not None
    assert result.snapshot.digest == expected.digest
    assert load_snapshot(config.output).shards == expected.shards
    assert load_snapshot(str(converted.output)).digest == expected.digest
    names = sizes_in(config.output / "shards")
    assert names == sizes_in(converted.output / "shards")
    assert not list((tmp_path / "scratch").glob("*/*"))
    assert not sizes_in(config.output / "progress").keys() & {f"{unit.id}.beat" for unit in read_plan(config.output)}
    assert ".lock" not in sizes_in(config.output)
    commits = [read_commit(config.output, unit.id) for unit in read_plan(config.output)]
    assert str(tmp_path) not in json.dumps([commit.model_dump() for commit in commits if commit])
    assert verify(config.output, deep=True).is_sound

    before = {str(path): path.stat().st_mtime for path in config.output.glob("**/*") if path.is_file()}
    time.sleep(1.1)  # the store tells whole seconds
    with monkeypatch.context() as patch:  # of the headers only what could not be read is copied again
        copied: list[str] = []
        patch.setattr(copies, "download", lambda *names: (copied.append(str(names[0])), download(*names)))
        assert convert_all(config).counts == result.counts
    assert copied == [f"{raw}/psg/sub-004/sub-004_psg.edf"]
    after = {str(path): path.stat().st_mtime for path in config.output.glob("**/*") if path.is_file()}
    header = {f"{config.output}/version.json"}  # names the state of the checkout, which may change meanwhile
    assert {name for name in after if after[name] != before.get(name)} <= header

    local = on_store(converted, tmp_path / "local", raw)
    assert convert_all(local).snapshot == result.snapshot

    assert first_key(str(config.output)) == first_key(converted.output)
    assert read_window(config.output, first_key(config.output))[1]["key"] == first_key(config.output)
    assert read_report_data(config.output).samples.equals(read_report_data(converted.output).samples)
    assert status(config.output).is_final

    shard = config.output / expected.shards[0].path
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(bytes(content))
    (problem,) = verify(config.output).problems
    assert "a byte has changed" in problem
    shard.unlink()
    assert convert_all(config).snapshot == result.snapshot
    assert verify(config.output).is_sound


def test_what_a_store_holds_is_checked_after_upload(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(bytes(100))
    upload(tmp_path / "a", folder / "a")
    download(folder / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == bytes(100)
    monkeypatch.setattr(cast("UPath", folder).fs, "size", lambda _: 99)
    with pytest.raises(ConfigError, match="99 of 100 bytes arrived"):
        upload(tmp_path / "a", folder / "a")


def test_progress_and_heartbeat_on_a_store(folder: Path) -> None:
    with Pulse(folder, "u", 2, interval_s=0.05) as pulse:
        pulse.at(1)
        pulse.record({"seconds": 3})
        deadline = time.time() + 10
        while not read_progress(folder, "u") or (beat := read_heartbeat(folder, "u")) is None or beat.recording != 1:
            assert time.time() < deadline
            time.sleep(0.02)
        pulse.record({"seconds": 4})
    append_progress(folder, "u", {"error": "e"})
    assert read_progress(folder, "u") == [{"seconds": 3}, {"seconds": 4}, {"error": "e"}]
    assert read_heartbeat(folder, "u") is None


def test_two_writers_at_once_are_refused(folder: Path) -> None:
    script = "import sys; from engine.lock import locked; from engine.storage import location\n"
    script += "with locked(location(sys.argv[1])): pass"
    with locked(folder) as check:
        with (
            pytest.raises(ConfigError, match=r"another kymo convert is writing here \(process \d+ on "),
            locked(folder),
        ):
            pass
        other = subprocess.run(
            [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False, cwd=REPOSITORY
        )
        assert "another kymo convert is writing here" in other.stderr
        check()
    assert not (folder / ".lock").exists()
    with locked(folder):
        pass


def test_a_lock_whose_holder_is_gone_is_taken_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_SETTLE_S", 0.01)
    mine = Holder.of_this_process("other")
    far = mine.model_copy(update={"host": "elsewhere"})
    for holder, is_gone in [
        (mine, False),
        (mine.model_copy(update={"started": mine.started - 5}), True),  # the number was given to another process
        (far, False),
        (far.model_copy(update={"time": time.time() - lock.STALE_S - 1}), True),
    ]:
        assert holder.is_gone() is is_gone
        (folder / ".lock").write_bytes(holder.to_bytes())
        if is_gone:
            with locked(folder):
                pass
        else:
            with pytest.raises(ConfigError, match="another kymo convert"), locked(folder):
                pass
    (folder / ".lock").write_bytes(b"{")
    with pytest.raises(ConfigError, match="not a lock of this kymo"), locked(folder):
        pass


def test_a_conversion_that_lost_its_lock_publishes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LOCK_BEAT_S", 0.01)
    with locked(folder) as check:
        (folder / ".lock").write_bytes(Holder.of_this_process("other").to_bytes())
        time.sleep(0.3)
        with pytest.raises(ConfigError, match="the lock was taken"):
            check()
    assert (folder / ".lock").exists()


def test_a_wrong_bucket_missing_credentials_and_a_dead_server_say_what_to_do(
    server: str, tiny_config: ConvertConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"s3://nobody/x: no such bucket; create it"):
        convert_all(on_store(tiny_config, location("s3://nobody/x")))
    with pytest.raises(ConfigError, match=r"s3://nobody/raw: .*no such bucket|s3://nobody/raw holds nothing"):
        convert_all(on_store(tiny_config, tiny_config.output, location("s3://nobody/raw")))
    monkeypatch.setattr(storage, "_OPTIONS", {"use_listings_cache": False, "skip_instance_cache": True})
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("HOME", str(tiny_config.output))
    with pytest.raises(ConfigError, match=r"no credentials .*AWS_ACCESS_KEY_ID"):
        convert_all(on_store(tiny_config, location(f"{server}/x")))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    dead = location(f"{server}/x")
    monkeypatch.setattr(type(cast("UPath", dead).fs), "retries", 1)
    with pytest.raises(ConfigError, match=r"the store does not answer .*AWS_ENDPOINT_URL"):
        convert_all(on_store(tiny_config, dead))


def test_a_kill_in_the_middle_and_a_rerun_give_the_same_digest(
    converted: ConvertConfig, folder: Path, raw: Path, tmp_path: Path
) -> None:
    config = on_store(converted, folder / "out", raw).model_copy(update={"scratch": tmp_path / "scratch"})
    (tmp_path / "c.yaml").write_text(dump_yaml(config.model_dump(mode="json")))
    script = (
        "import sys\nfrom engine.config import ConvertConfig\nfrom engine.convert import convert_all\n"
        "from manifests.config import load_config\nconvert_all(load_config(ConvertConfig, sys.argv[1]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "c.yaml")], cwd=REPOSITORY)
    while not any(name.startswith("commit-") for name in sizes_in(config.output / "commits")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert ".lock" in sizes_in(config.output)
    result = convert_all(config)  # the holder was on this host, so nobody waits for its lock to grow old
    assert result.snapshot is not None
    assert result.snapshot.digest == load_snapshot(converted.output).digest
    assert sizes_in(config.output / "shards") == sizes_in(converted.output / "shards")
    assert not [name for name in sizes_in(config.output / "progress") if name.endswith(".beat")]
    assert not list((tmp_path / "scratch").glob("*/*"))


@pytest.mark.slow
def test_ray_workers_convert_from_store_to_store(
    converted: ConvertConfig, folder: Path, raw: Path, tmp_path: Path
) -> None:
    config = on_store(converted, folder / "out", raw).model_copy(update={"scratch": tmp_path / "s", "num_cpus": 2})
    (tmp_path / "c.yaml").write_text(dump_yaml(config.model_dump(mode="json")))
    script = (
        "import sys\nfrom engine.config import ConvertConfig\nfrom engine import pipeline\n"
        "from manifests.config import load_config\npipeline.run(load_config(ConvertConfig, sys.argv[1]))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "c.yaml")], cwd=REPOSITORY, env=environment, check=True
    )
    assert load_snapshot(config.output).digest == load_snapshot(converted.output).digest
    assert verify(config.output, deep=True).is_sound
    assert not list((tmp_path / "s").glob("*/*"))


def test_a_file_of_several_recordings_is_not_read_from_a_store(raw: Path, folder: Path) -> None:
    (folder / "code15/exams_part0.hdf5").write_bytes(b"x")
    with pytest.raises(ConfigError, match="copy the corpus to a disk"):
        corpus_files(load_corpus("code15").model_copy(update={"files": ["**/*.hdf5"]}), folder)
