"""Publishing to a hub on loopback: what is sent, what happens when something breaks, and that it never breaks silently.

Every broken run is run again and has to end with one commit and one tag that are the bundle.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants, hf_hub_download, whoami

from adapters.bundle import load_bundle
from adapters.hub import Access
from adapters.layout import Manifest, read_manifest
from adapters.publish import Publication, publish
from adapters.source import fetch_bundle
from manifests.errors import ConfigError, ContractError

REPO = "sleeplab/staging"
ALWAYS = 99


@pytest.fixture
def access(hub: Any) -> Access:
    return Access(endpoint=hub.url, token=hub.TOKEN)


@pytest.fixture
def push(bundle_dir: Path, access: Access) -> Callable[..., Publication]:
    """Publish the bundle as v1."""

    def push(**changes: Any) -> Publication:
        return publish(changes.pop("bundle", bundle_dir), REPO, **{"tag": "v1", "access": access, **changes})

    return push


@pytest.fixture
def other_bundle(bundle_dir: Path, tmp_path: Path) -> Path:
    """A bundle with another manifest and one more difference."""
    folder = Path(shutil.copytree(bundle_dir, tmp_path / "other"))
    (folder / "bundle.json").write_text((folder / "bundle.json").read_text() + "\n")
    return folder


def contents(hub: Any, commit: str) -> dict[str, bytes]:
    return {path: file.content for path, file in hub.repositories[REPO].commits[commit].items()}


def assert_published(hub: Any, bundle_dir: Path, *, tag: str = "v1", commits: int = 2) -> None:
    """The tag is the bundle, file by file, and so is `main`."""
    repository = hub.repositories[REPO]
    files = {name: (bundle_dir / name).read_bytes() for name in ["bundle.json", *read_manifest(bundle_dir).files]}
    assert repository.private
    assert len(repository.commits) == commits
    found = contents(hub, repository.tags[tag])
    found.pop(".gitattributes")
    assert found == files
    assert repository.head == repository.tags[tag]


def sent(hub: Any) -> list[str]:
    """Requests that change something, but for the creation that finds the repository there."""
    return [line for line in hub.log if line.startswith("PUT") or "/commit/" in line or "/tag/" in line]


def test_one_commit_one_tag_private(hub, access, push, bundle_dir, tmp_path):
    done = push()
    assert_published(hub, bundle_dir)
    assert done.commit == hub.repositories[REPO].tags["v1"]
    assert set(done.uploaded) == {"bundle.json", *read_manifest(bundle_dir).files}
    folder = fetch_bundle(REPO, "v1", access=Access(endpoint=hub.url, token=hub.TOKEN, cache_dir=tmp_path / "cache"))
    assert load_bundle(folder).manifest == read_manifest(bundle_dir)


def test_without_a_tag_the_version_is_named_after_its_content(hub, push):
    done = push(tag=None)
    assert done.tag.startswith("bundle-")
    assert hub.repositories[REPO].tags == {done.tag: done.commit}


def test_dry_run_lists_the_files_with_their_sizes_and_asks_nobody(hub, push, bundle_dir):
    plan = push(dry_run=True)
    names = ["bundle.json", *read_manifest(bundle_dir).files]
    assert plan.files == {name: (bundle_dir / name).stat().st_size for name in names}
    assert (plan.tag, plan.is_private, plan.licence, plan.commit) == ("v1", True, "other", None)
    assert hub.log == []


@pytest.mark.parametrize("tag", ["a/b", "..", "v1..2", "x.lock", "0" * 40, "", "-v"])
def test_a_tag_that_is_none_is_refused_before_any_request(hub, push, tag):
    with pytest.raises(ConfigError, match="give letters, digits"):
        push(tag=tag)
    assert hub.log == []


@pytest.mark.parametrize("target", ["staging", "a/b/c", "/tmp/x", "../up", "a/.b"])
def test_a_target_that_is_none_is_refused_before_any_request(hub, access, bundle_dir, target):
    with pytest.raises(ConfigError, match="give OWNER/NAME"):
        publish(bundle_dir, target, access=access)
    assert hub.log == []


def test_a_broken_bundle_is_refused_before_any_request(hub, push, other_bundle):
    (other_bundle / "model.pkl").write_bytes(b"x")
    with pytest.raises(ContractError, match="does not list"):
        push(bundle=other_bundle)
    assert hub.log == []


def test_the_same_bundle_again_changes_nothing(hub, push, bundle_dir):
    first = push()
    hub.log.clear()
    again = push()
    assert (again.commit, again.uploaded) == (first.commit, ())
    assert sent(hub) == []
    assert_published(hub, bundle_dir)


def test_the_same_bundle_under_another_tag_needs_no_commit(hub, push, bundle_dir):
    first = push()
    assert push(tag="v1.0.1").commit == first.commit
    assert_published(hub, bundle_dir, tag="v1.0.1")


def test_a_tag_with_other_content_is_not_moved(hub, push, other_bundle):
    first = push()
    hub.log.clear()
    with pytest.raises(ConfigError, match=rf"tag v1 names another bundle, commit {first.commit}; choose another tag"):
        push(bundle=other_bundle)
    assert sent(hub) == []


def test_the_name_of_a_branch_is_no_tag(hub, push):
    with pytest.raises(ConfigError, match="main is the name of a branch"):
        push(tag="main")
    assert sent(hub) == []


def test_files_of_an_earlier_bundle_are_removed(hub, push, bundle_dir):
    push()
    hub.repositories[REPO].change(adapters__old__head_safetensors=b"x")
    done = push(tag="v2")
    assert done.deleted == ("adapters/old/head.safetensors",)
    assert_published(hub, bundle_dir, tag="v2", commits=4)


def test_a_repository_of_the_other_visibility_is_refused_and_nothing_is_sent(hub, push, bundle_dir):
    push()
    hub.log.clear()
    with pytest.raises(ConfigError, match="is private, public was asked for; nothing was sent"):
        push(private=False, tag="v2")
    hub.repositories[REPO].private = False
    with pytest.raises(ConfigError, match="is public, private was asked for; nothing was sent"):
        push(tag="v2")
    assert sent(hub) == []


@pytest.fixture
def restricted_bundle(bundle_dir: Path, tmp_path: Path) -> Path:
    """A whole bundle with a corpus under an agreement."""
    folder = Path(shutil.copytree(bundle_dir, tmp_path / "restricted"))
    name = "adapters/rhythm/task.json"
    record = json.loads((folder / name).read_text())
    for facts in record["data"]["corpora"].values():
        facts["licence"] = "data use agreement"
    content = json.dumps(record).encode()
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    changed = Manifest.model_validate(manifest)
    manifest["digest"] = changed.content_digest()
    (folder / "bundle.json").write_text(json.dumps(manifest))
    return folder


def test_a_doubtful_licence_is_refused_before_any_request_unless_private_or_confirmed(hub, push, restricted_bundle):
    with pytest.raises(ConfigError, match=r"not published: corpus .*agreement.*--confirm-rights"):
        push(bundle=restricted_bundle, private=False)
    with pytest.raises(ConfigError, match="not published"):
        push(bundle=restricted_bundle, private=False, dry_run=True)
    assert hub.log == []
    assert any("agreement" in sentence for sentence in push(bundle=restricted_bundle).rights)
    hub.repositories[REPO].private = False
    assert push(bundle=restricted_bundle, private=False, confirm_rights=True, tag="v2").commit


# What breaks on the way


ENDPOINTS = {
    "create": "POST /api/repos/create",
    "info": f"GET /api/models/{REPO}$",
    "refs": f"GET /api/models/{REPO}/refs",
    "tree": f"GET /api/models/{REPO}/tree/",
    "card": "POST /api/validate-yaml",
    "preupload": "POST .*/preupload/main",
    "batch": "POST .*/info/lfs/objects/batch",
    "put": "PUT /lfs/",
    "verify": "POST /lfs/.*/verify",
    "commit": "POST .*/commit/main",
    "tag": "POST .*/tag/",
}


@pytest.mark.parametrize("fault", [500, 503, "drop"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_fault_is_told_and_the_same_command_goes_on(hub, push, bundle_dir, endpoint, fault):
    hub.fail(ENDPOINTS[endpoint], fault, times=ALWAYS)
    said = "no answer from the hub" if fault == "drop" else rf"the hub answers {fault} \(injected\)"
    with pytest.raises(ConfigError, match=rf"^{REPO}: .*{said}.*the same command goes on where it stopped"):
        push()
    assert not (REPO in hub.repositories and hub.repositories[REPO].tags)
    hub.faults.clear()
    push()
    assert_published(hub, bundle_dir)


def test_what_was_uploaded_is_not_sent_again(hub, push, bundle_dir):
    hub.fail(ENDPOINTS["commit"], 500)
    with pytest.raises(ConfigError):
        push()
    assert any(line.startswith("PUT") for line in hub.log)
    hub.log.clear()
    push()
    assert not any(line.startswith("PUT") for line in hub.log)
    assert_published(hub, bundle_dir)


def test_an_upload_that_broke_in_the_middle_goes_on_with_the_rest(hub, push, bundle_dir):
    def one_then_none(line: str) -> None:
        if line.startswith("PUT") and hub.stored:
            hub.fail("PUT", "drop", times=1)

    hub.before = one_then_none
    with pytest.raises(ConfigError, match="no answer"):
        push()
    hub.before = None
    hub.faults.clear()
    already = set(hub.stored)
    assert already
    hub.log.clear()
    push()
    assert already.isdisjoint(line.removeprefix("PUT /lfs/") for line in hub.log)
    assert_published(hub, bundle_dir)


@pytest.mark.parametrize("fault", [500, "drop"])
def test_a_commit_whose_answer_is_lost_is_found_and_not_made_twice(hub, push, bundle_dir, fault):
    hub.fail(ENDPOINTS["commit"], fault, after=True)
    push()
    assert_published(hub, bundle_dir)
    assert sum("/commit/" in line for line in hub.log) == 1


def test_a_commit_whose_answer_is_lost_is_found_by_the_next_run_too(hub, push, bundle_dir):
    hub.fail(ENDPOINTS["commit"], "drop", after=True)
    hub.fail("GET .*/commits/", 500, times=ALWAYS)  # nor can it be looked up now
    with pytest.raises(ConfigError, match="no answer"):
        push()
    hub.faults.clear()
    hub.log.clear()
    done = push()
    assert [line for line in sent(hub) if "/tag/" not in line] == []
    assert done.uploaded == ()
    assert_published(hub, bundle_dir)


def test_a_lost_commit_is_found_below_one_of_somebody_else(hub, push):
    def intrude(line: str) -> None:
        if "GET" in line and "/commits/" in line:
            hub.repositories[REPO].change(README_md=b"somebody's note")

    hub.before = intrude
    hub.fail(ENDPOINTS["commit"], "drop", after=True)
    done = push()
    repository = hub.repositories[REPO]
    assert repository.tags == {"v1": done.commit}
    assert repository.head != done.commit


@pytest.mark.parametrize("fault", [500, "drop"])
def test_a_tag_whose_answer_is_lost_is_found(hub, push, bundle_dir, fault):
    hub.fail(ENDPOINTS["tag"], fault, after=True)
    push()
    assert_published(hub, bundle_dir)


def test_a_commit_in_between_is_not_overwritten(hub, push, bundle_dir):
    def intrude(line: str) -> None:
        if "/commit/" in line:
            hub.before = None
            hub.repositories[REPO].change(README_md=b"other")

    hub.before = intrude
    with pytest.raises(ConfigError, match=r"412 .*somebody committed meanwhile"):
        push()
    assert hub.repositories[REPO].tags == {}
    push()  # looked at it, ran it again
    assert_published(hub, bundle_dir, commits=3)


def test_a_commit_that_is_not_the_bundle_is_not_tagged(hub, push):
    def intrude(line: str) -> None:
        if "/tree/" in line and len(hub.repositories[REPO].commits) == 2:
            repository = hub.repositories[REPO]
            repository.commits[repository.head].pop("README.md")

    hub.before = intrude
    with pytest.raises(ConfigError, match=r"is not this bundle.*it was not tagged"):
        push()
    assert hub.repositories[REPO].tags == {}


def test_two_publishers_of_one_bundle_make_one_commit(hub, push, bundle_dir):
    def second(line: str) -> None:
        if "/commit/" in line:
            hub.before = None
            push()

    hub.before = second
    push()
    assert_published(hub, bundle_dir)


def test_of_two_publishers_of_one_tag_one_is_told_that_it_is_taken(hub, push, bundle_dir, other_bundle):
    def second(line: str) -> None:
        if "/tag/" in line:
            hub.before = None
            push(bundle=other_bundle)

    hub.before = second
    with pytest.raises(ConfigError, match="tag v1 names another bundle"):
        push()
    assert (
        contents(hub, hub.repositories[REPO].tags["v1"])["bundle.json"] == (other_bundle / "bundle.json").read_bytes()
    )


# Who may


@pytest.mark.parametrize(
    ("token", "said"),
    [("EXPIRED", "401 .*hf auth login"), ("READER", "403 .*may not do that"), (False, "401 .*hf auth login")],
)
def test_a_token_without_rights_is_told_what_is_missing(hub, push, token, said):
    text = getattr(hub, token) if token else token
    with pytest.raises(ConfigError, match=said):
        push(access=Access(endpoint=hub.url, token=text))
    assert hub.repositories == {}


def test_a_login_that_ends_on_the_way_is_told_and_the_next_run_goes_on(hub, push, bundle_dir):
    hub.fail(ENDPOINTS["commit"], 401)
    with pytest.raises(ConfigError, match=r"401 .*hf auth login"):
        push()
    push()
    assert_published(hub, bundle_dir)


def test_the_token_is_nowhere(hub, push, tmp_path, caplog, capfd):
    secret = "hf_" + "s3cr3t" * 5
    access = Access(endpoint=hub.url, token=secret)
    caplog.set_level("DEBUG")
    with pytest.raises(ConfigError) as failed:
        push(access=access)  # the hub repeats it in its answer
    assert "hf_***" in str(failed.value)
    push()
    said = "".join(capfd.readouterr()) + caplog.text + str(failed.value) + repr(access)
    for text in (secret, hub.TOKEN):
        assert text not in said
        holders = [path for path in tmp_path.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]
        assert holders == []


# Xet, and the real hub


def test_in_xet_mode_chunks_go_to_the_xet_store_and_come_back(start_hub, bundle_dir, monkeypatch, tmp_path):
    pytest.importorskip("hf_xet", reason="hf_xet is not installed: the client then speaks LFS only")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet-cache"))
    (tmp_path / "cas").mkdir()
    hub = start_hub(xet_dir=tmp_path / "cas")
    access = Access(endpoint=hub.url, token=hub.TOKEN, cache_dir=tmp_path / "cache")
    hub.fail(ENDPOINTS["commit"], "drop", after=True)
    done = publish(bundle_dir, REPO, tag="v1", access=access)
    assert not any("lfs" in line for line in hub.log)
    assert any("xet-write-token" in line for line in hub.log)
    folder = fetch_bundle(REPO, "v1", access=access)
    assert folder.name == done.commit
    assert any("xet-read-token" in line for line in hub.log)
    for name in ["bundle.json", *read_manifest(bundle_dir).files]:
        assert (folder / name).read_bytes() == (bundle_dir / name).read_bytes()
    hub.log.clear()
    assert publish(bundle_dir, REPO, tag="v1", access=access).uploaded == ()
    assert not any("xet-write-token" in line for line in hub.log)


@pytest.mark.skipif(
    "KYMO_HUB_REPO" not in os.environ,
    reason="asks the real hub: set KYMO_HUB_REPO=OWNER/NAME, a private repository that may be filled, and log in",
)
def test_the_real_hub_takes_it_and_gives_it_back(bundle_dir, tmp_path):
    repo_id = os.environ["KYMO_HUB_REPO"]
    assert whoami()["name"]
    done = publish(bundle_dir, repo_id)
    assert publish(bundle_dir, repo_id).uploaded == ()
    assert HfApi().model_info(repo_id, revision=done.tag).sha == done.commit
    folder = fetch_bundle(repo_id, done.tag, access=Access(cache_dir=tmp_path))
    assert load_bundle(folder).manifest == read_manifest(bundle_dir)
    assert json.loads(Path(hf_hub_download(repo_id, "bundle.json", revision=done.tag)).read_text())
