"""What a user may call a bundle, what is asked of the hub then, and what is asked the second time: nothing."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, file_download

from adapters.bundle import load_bundle
from adapters.hub import Access, fetch_file
from adapters.layout import needed_files, read_manifest
from adapters.publish import publish
from adapters.source import bundle_folder
from manifests.errors import ConfigError, ContractError

REPO = "sleeplab/staging"
ALWAYS = 99


@pytest.fixture
def access(hub: Any, tmp_path: Path) -> Access:
    return Access(endpoint=hub.url, token=hub.TOKEN, cache_dir=tmp_path / "cache")


@pytest.fixture
def published(hub: Any, access: Access, bundle_dir: Path) -> str:
    """Commit of the bundle, tagged v1; the log is empty."""
    commit = publish(bundle_dir, REPO, tag="v1", access=access).commit
    hub.log.clear()
    assert commit is not None
    return commit


@pytest.fixture
def pull(access: Access) -> Callable[..., Path]:
    def pull(source: str = f"{REPO}@v1", *tasks: str, **changes: Any) -> Path:
        return bundle_folder(source, tasks or None, access=changes.get("access", access))

    return pull


def fetched(hub: Any) -> set[str]:
    return {line.split("/", 5)[5] for line in hub.log if line.startswith("GET") and "/resolve/" in line}


# Names


def test_a_folder_wins_over_a_repository_of_the_same_name(hub, bundle_dir, pull, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (REPO, f"{REPO}@v1"):
        shutil.copytree(bundle_dir, tmp_path / name)
        assert pull(name) == Path(name)
    assert pull(Path("anything")) == Path("anything")  # a path is never a repository
    assert list(load_bundle(f"{REPO}@v1").records) == ["sleep_staging", "rhythm"]
    assert hub.log == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("demo/bundle", r"demo/bundle: no such folder. If a repository on the hub is meant.* demo/bundle@v1"),
        ("demo/bundels/x", r"no such folder; give one, OWNER/NAME@VERSION on the hub, or URL@VERSION"),
        ("bundle@v1", r"no such folder; give one"),
        (f"{REPO}@", r"give OWNER/NAME and a tag"),
        (f"{REPO}@../../up", r"give OWNER/NAME and a tag"),
        ("s3://bucket/bundles", r"names no version; write s3://bucket/bundles@v1"),
        ("s3://me@bucket/bundles", r"names no version"),
        ("s3://bucket/bundles@..", r"names no version"),
        ("odd://bucket/bundles@v1", r"fsspec knows no odd://"),
    ],
)
def test_what_is_no_bundle_is_told_without_a_request(hub, pull, source, said):
    with pytest.raises(ConfigError, match=said):
        pull(source)
    assert hub.log == []


def test_what_the_hub_does_not_have_is_told(hub, published, pull):
    with pytest.raises(ConfigError, match=r"sleeplab/staging@v9: the hub answers 404 .*no such repository or revision"):
        pull(f"{REPO}@v9")
    with pytest.raises(ConfigError, match=r"sleeplab/other@v1: the hub answers 404"):
        pull("sleeplab/other@v1")


def test_a_private_repository_without_a_login_is_told(hub, published, pull, access):
    nobody = Access(endpoint=hub.url, token=None, cache_dir=access.cache_dir)
    with pytest.raises(ConfigError, match=r"401 .*hf auth login"):
        pull(access=nobody)


# What is asked


def test_only_the_files_of_the_wanted_task_are_fetched(hub, published, pull, bundle_dir):
    folder = pull(f"{REPO}@v1", "rhythm")
    wanted = {"bundle.json", *needed_files(read_manifest(bundle_dir), ["rhythm"])}
    assert not any("sleep_staging" in name for name in wanted)
    assert fetched(hub) == wanted
    assert list(load_bundle(folder, ["rhythm"]).records) == ["rhythm"]


@pytest.mark.parametrize("by", ["v1", "commit"])
def test_the_second_time_nothing_is_asked(hub, published, pull, by):
    source = f"{REPO}@{published if by == 'commit' else by}"
    folder = pull(source)
    hub.log.clear()
    assert pull(source) == folder
    assert hub.log == []
    hub.shutdown()
    hub.server_close()
    assert load_bundle(pull(source, "rhythm"), ["rhythm"]).records


def test_a_tag_keeps_what_was_fetched_though_it_was_moved(hub, published, pull):
    folder = pull(f"{REPO}@v1", "rhythm")
    repository = hub.repositories[REPO]
    repository.tags["v1"] = moved = repository.change(note_txt=b"x")
    hub.log.clear()
    assert pull(f"{REPO}@v1", "rhythm") == folder
    assert hub.log == []
    with pytest.raises(ContractError, match=rf"named commit {published} .*now {moved}; a tag must not move"):
        pull()  # more files are wanted: the hub is asked, and caught
    assert pull(f"{REPO}@{published}") == folder


def test_more_tasks_are_fetched_later_and_nothing_twice(hub, published, pull):
    pull(f"{REPO}@v1", "rhythm")
    first = fetched(hub)
    hub.log.clear()
    pull()
    assert fetched(hub)
    assert fetched(hub).isdisjoint(first)


def test_a_branch_is_asked_for_each_time(hub, published, pull, bundle_dir, access):
    assert pull(f"{REPO}@main").name == published
    hub.repositories[REPO].change(LICENSE_txt=b"somebody's")
    head = hub.repositories[REPO].head
    assert pull(f"{REPO}@main").name == head


@pytest.mark.parametrize("down", [503, "drop", "offline"])
def test_where_the_hub_is_away_a_branch_is_what_it_was(hub, published, pull, caplog, down):
    folder = pull(f"{REPO}@main")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", down == "offline")
        hub.fail(".", 503 if down == "offline" else down, times=ALWAYS)
        assert pull(f"{REPO}@main") == folder
    assert f"the hub cannot be reached; going on with commit {published}" in caplog.text


def test_a_hub_that_says_no_is_no_hub_that_is_away(hub, published, pull):
    pull(f"{REPO}@main")
    hub.fail("GET /api", 403, times=ALWAYS)
    with pytest.raises(ConfigError, match="403"):
        pull(f"{REPO}@main")


def test_offline_without_a_cache_says_what_to_do(published, pull, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for source in (f"{REPO}@v1", f"{REPO}@main", f"{REPO}@{published}"):
        with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set and the cache does not hold it"):
            pull(source)


def test_a_single_file_comes_by_commit_and_then_from_the_cache(hub, published, access, bundle_dir):
    name = "base/encoder.safetensors"
    path = fetch_file(REPO, published, name, access=access)
    assert path.read_bytes() == (bundle_dir / name).read_bytes()
    hub.log.clear()
    assert fetch_file(REPO, published, name, access=access) == path
    assert hub.log == []
    assert fetch_file(REPO, "v1", name, access=access) == path
    hub.log.clear()
    assert fetch_file(REPO, "v1", name, access=access) == path
    assert hub.log == []
    with pytest.raises(ConfigError, match="404"):
        fetch_file(REPO, published, "absent.txt", access=access)


# What breaks on the way


ENDPOINTS = (
    *(f"GET /api/models/{REPO}/revision", f"GET /api/models/{REPO}/refs"),
    *("HEAD .*/bundle.json", "GET .*/bundle.json", "HEAD .*/head.safetensors", "GET .*/head.safetensors"),
)


@pytest.mark.parametrize(
    ("endpoint", "fault"),
    [
        (endpoint, fault)
        for endpoint in ENDPOINTS
        for fault in (500, "drop", "cut")
        if fault != "cut" or not endpoint.startswith("HEAD")  # an answer without a body has nothing to cut
    ],
)
def test_a_fault_is_told_and_the_same_command_goes_on(hub, published, pull, endpoint, fault):
    hub.fail(endpoint, fault, times=ALWAYS)
    said = "the hub answers 500" if fault == 500 else "no answer from the hub"
    with pytest.raises(ConfigError, match=rf"^{REPO}@v1.*: {said}.*the same command goes on where it stopped"):
        pull()
    hub.faults.clear()
    assert load_bundle(pull()).records


def test_a_full_disk_is_told_and_the_same_command_goes_on(published, pull, access, monkeypatch):
    real = file_download.http_get

    def full(url: str, *args: Any, **kwargs: Any) -> None:
        if "safetensors" in url:
            raise OSError(errno.ENOSPC, "No space left on device", str(access.cache_dir))
        real(url, *args, **kwargs)

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(ConfigError, match=r"cache: No space left on device; free space.*HF_HOME.*goes on"):
        pull()
    monkeypatch.setattr(file_download, "http_get", real)
    assert load_bundle(pull()).records


def test_a_cache_that_cannot_be_written_serves_what_it_has(hub, published, pull, monkeypatch, caplog):
    folder = pull(f"{REPO}@{published}")

    def refused(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("adapters.hub.write_atomically", refused)
    assert pull(f"{REPO}@v1") == folder
    assert "cannot be kept in the cache (Read-only file system)" in caplog.text


def test_a_tampered_file_is_refused(hub, published, pull):
    name = "adapters/rhythm/head.safetensors"
    file = hub.repositories[REPO].commits[published][name]
    assert file.content is not None
    hub.repositories[REPO].change(adapters__rhythm__head_safetensors=file.content[:-1] + b"\x7f")
    with pytest.raises(ContractError, match="another SHA-256"):
        pull(f"{REPO}@main")


def test_a_repository_without_a_bundle_is_told(hub, published, pull):
    repository = hub.repositories[REPO]
    repository.commit({}, "all gone")
    with pytest.raises(ConfigError, match=r"fetch bundle.json: the hub answers 404"):
        pull(f"{REPO}@main")
