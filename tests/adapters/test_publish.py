import importlib.util
import shutil
import sys
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants

from adapters.bundle import load_bundle
from adapters.layout import read_manifest
from adapters.publish import fetch_bundle, publish
from manifests.errors import ConfigError, ContractError

_spec = importlib.util.spec_from_file_location("hubserver", Path(__file__).with_name("hubserver.py"))
assert _spec is not None
assert _spec.loader is not None
hubserver = importlib.util.module_from_spec(_spec)
sys.modules["hubserver"] = hubserver
_spec.loader.exec_module(hubserver)

REPO = "sleeplab/staging"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    server = hubserver.Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.fixture
def access(hub):
    return {"endpoint": hub.url, "token": hubserver.TOKEN}


def test_round_trip(hub, access, bundle_dir, tmp_path):
    done = publish(bundle_dir, REPO, **access)
    repository = hub.repositories[REPO]
    assert repository.private
    assert len(repository.commits) == 2  # the initial one and ours
    assert repository.tags == {done.tag: done.commit}
    assert set(done.uploaded) == {"bundle.json", *read_manifest(bundle_dir).files}

    folder = fetch_bundle(REPO, done.tag, cache_dir=tmp_path / "other", **access)
    fetched = load_bundle(folder)
    assert fetched.manifest == read_manifest(bundle_dir)

    hub.log.clear()
    assert fetch_bundle(REPO, done.commit, cache_dir=tmp_path / "other", **access) == folder
    assert hub.log == []


def test_one_task_fetches_its_files_only(hub, access, bundle_dir, tmp_path):
    done = publish(bundle_dir, REPO, **access)
    folder = fetch_bundle(REPO, done.tag, tasks=["rhythm"], cache_dir=tmp_path / "other", **access)
    assert not (folder / "adapters" / "sleep_staging").exists()
    assert list(load_bundle(folder, ["rhythm"]).records) == ["rhythm"]


def test_dry_run_asks_nothing(hub, access, bundle_dir):
    done = publish(bundle_dir, REPO, dry_run=True, **access)
    assert done.commit is None
    assert "adapters/rhythm/head.safetensors" in done.uploaded
    assert hub.log == []


def test_broken_bundle_is_refused_before_any_request(hub, access, bundle_dir, tmp_path):
    copy = Path(shutil.copytree(bundle_dir, tmp_path / "copy"))
    (copy / "model.pkl").write_bytes(b"x")
    with pytest.raises(ContractError, match="does not list"):
        publish(copy, REPO, **access)
    assert hub.log == []


def test_same_bundle_again_changes_nothing(hub, access, bundle_dir):
    first = publish(bundle_dir, REPO, **access)
    again = publish(bundle_dir, REPO, **access)
    assert (again.commit, again.uploaded) == (first.commit, ())
    assert len(hub.repositories[REPO].commits) == 2


def test_tag_of_another_bundle_is_not_moved(hub, access, bundle_dir, tmp_path):
    publish(bundle_dir, REPO, tag="v1.0.0", **access)
    other = Path(shutil.copytree(bundle_dir, tmp_path / "copy"))
    (other / "bundle.json").write_text((other / "bundle.json").read_text() + "\n")
    with pytest.raises(ConfigError, match=r"tag v1\.0\.0 names another bundle"):
        publish(other, REPO, tag="v1.0.0", **access)
    assert len(hub.repositories[REPO].commits) == 2


def test_commit_in_between_is_not_overwritten(hub, access, bundle_dir):
    def intrude(line: str) -> None:
        if "/commit/" in line:
            hub.before = None
            hub.repositories[REPO].commit({"README.md": b"other"}, "intruder")

    hub.before = intrude
    with pytest.raises(ConfigError, match=r"412 .*somebody committed meanwhile"):
        publish(bundle_dir, REPO, **access)
    assert hub.repositories[REPO].tags == {}
    done = publish(bundle_dir, REPO, **access)  # looked at it, ran it again
    assert hub.repositories[REPO].head == done.commit


def test_lost_answer_to_the_tag_is_made_good_by_running_again(hub, access, bundle_dir):
    hub.fail["/tag/"] = 500
    with pytest.raises(ConfigError, match="500"):
        publish(bundle_dir, REPO, **access)
    hub.log.clear()
    done = publish(bundle_dir, REPO, **access)
    assert not any(line.startswith("PUT") or "/commit/" in line for line in hub.log)
    assert hub.repositories[REPO].tags == {done.tag: done.commit}


def test_files_of_an_earlier_bundle_are_removed(hub, access, bundle_dir):
    publish(bundle_dir, REPO, tag="v1", **access)
    repository = hub.repositories[REPO]
    repository.commit({**repository.commits[repository.head], "adapters/old/head.safetensors": b"x"}, "older task")
    done = publish(bundle_dir, REPO, tag="v2", **access)
    assert done.deleted == ("adapters/old/head.safetensors",)
    assert set(repository.commits[done.commit]) == {".gitattributes", "bundle.json", *read_manifest(bundle_dir).files}


def test_visibility_is_never_changed_in_silence(hub, access, bundle_dir):
    publish(bundle_dir, REPO, **access)
    with pytest.raises(ConfigError, match="is private, public was asked for"):
        publish(bundle_dir, REPO, private=False, tag="v2", **access)


def test_wrong_token_and_unknown_revision_say_what_to_do(hub, access, bundle_dir):
    with pytest.raises(ConfigError, match=r"401 .*token with write access"):
        publish(bundle_dir, REPO, endpoint=hub.url, token="hf_wrong")
    publish(bundle_dir, REPO, **access)
    with pytest.raises(ConfigError, match=r"404 .*no such repository or revision"):
        fetch_bundle(REPO, "v9", **access)


def test_tampered_file_on_the_hub_is_refused(hub, access, bundle_dir, tmp_path):
    publish(bundle_dir, REPO, **access)
    repository = hub.repositories[REPO]
    files = dict(repository.commits[repository.head])
    files["adapters/rhythm/head.safetensors"] = files["adapters/rhythm/head.safetensors"][:-1] + b"\x7f"
    repository.commit(files, "tampered")
    with pytest.raises(ContractError, match="another SHA-256"):
        fetch_bundle(REPO, "main", cache_dir=tmp_path / "other", **access)
