"""Versions of a bundle in an object store (moto's S3 on loopback) and on a disk."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from adapters import store
from adapters.bundle import load_bundle
from adapters.hub import Access
from adapters.layout import needed_files, read_manifest
from adapters.publish import Publication, publish
from adapters.source import bundle_folder
from manifests.errors import ConfigError, ContractError


@pytest.fixture(params=["s3", "file"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty folder of versions."""
    if request.param == "file":
        return f"file://{tmp_path / 'lab'}"
    request.getfixturevalue("s3")
    return new_bucket(tmp_path)


@pytest.fixture
def bucket(s3: None, tmp_path: Path) -> str:
    return new_bucket(tmp_path)


def new_bucket(tmp_path: Path) -> str:
    name = f"bundles-{abs(hash(tmp_path)):x}"
    UPath(f"s3://{name}").fs.mkdir(name)
    return f"s3://{name}/lab"


@pytest.fixture
def pull(tmp_path: Path) -> Callable[..., Path]:
    def pull(source: str, *tasks: str) -> Path:
        return bundle_folder(source, tasks or None, access=Access(cache_dir=tmp_path / "cache"))

    return pull


@pytest.fixture
def other_bundle(bundle_dir: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(bundle_dir, tmp_path / "other"))
    (folder / "bundle.json").write_text((folder / "bundle.json").read_text() + "\n")
    return folder


def names_below(root: str) -> set[str]:
    path = UPath(root)
    return {name.removeprefix(path.path.rstrip("/")).strip("/") for name in path.fs.find(path.path)}


def test_a_version_is_a_folder_and_comes_back(root, bundle_dir, pull):
    done = publish(bundle_dir, root, tag="v1")
    names = ["bundle.json", *read_manifest(bundle_dir).files]
    assert (done.commit, set(done.uploaded)) == (None, set(names))
    assert names_below(root) == {"v1.sha256", *(f"v1/{name}" for name in names)}
    assert load_bundle(pull(f"{root}@v1")).manifest == read_manifest(bundle_dir)


def test_dry_run_writes_nothing(root, bundle_dir):
    plan = publish(bundle_dir, root, tag="v1", dry_run=True)
    assert plan.files["bundle.json"] == (bundle_dir / "bundle.json").stat().st_size
    assert names_below(root) == set()


def test_the_same_bundle_again_writes_nothing(root, bundle_dir):
    publish(bundle_dir, root, tag="v1")
    assert publish(bundle_dir, root, tag="v1").uploaded == ()


def test_a_tag_with_other_content_is_not_overwritten(root, bundle_dir, other_bundle, pull):
    publish(bundle_dir, root, tag="v1")
    with pytest.raises(ConfigError, match=r"v1\.sha256: the tag is taken by another bundle"):
        publish(other_bundle, root, tag="v1")
    assert (pull(f"{root}@v1") / "bundle.json").read_bytes() == (bundle_dir / "bundle.json").read_bytes()
    publish(other_bundle, root, tag="v2")
    assert (pull(f"{root}@v2") / "bundle.json").read_bytes() == (other_bundle / "bundle.json").read_bytes()


@pytest.fixture
def break_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """Let all writes after the first `n` fail; the names that were written, in their order."""
    real = store._put

    def arm(n: int) -> list[str]:
        written: list[str] = []

        def put(source: Path, target: Path) -> None:
            if len(written) >= n:
                raise OSError(28, "No space left on device", str(target))
            real(source, target)
            written.append(target.name)

        monkeypatch.setattr(store, "_put", put)
        return written

    return arm


def test_a_broken_upload_is_no_version_and_goes_on(root, bundle_dir, other_bundle, pull, break_after):
    break_after(3)
    with pytest.raises(ConfigError, match="run the same command again"):
        publish(bundle_dir, root, tag="v1")
    with pytest.raises(ConfigError, match="version 'v1' is not whole; the publisher has to run kymo publish again"):
        pull(f"{root}@v1")
    with pytest.raises(ConfigError, match="the tag is taken"):  # it would mix with what lies there
        publish(other_bundle, root, tag="v1")
    written = break_after(999)
    done = publish(bundle_dir, root, tag="v1")
    assert len(done.uploaded) == len(read_manifest(bundle_dir).files) + 1 - 3
    assert written[-1] == "bundle.json"
    assert load_bundle(pull(f"{root}@v1")).records


def test_two_publishers_at_once_do_not_mix(root, bundle_dir, other_bundle, pull, monkeypatch):
    real = store._put
    refused = []

    def put(source: Path, target: Path) -> None:
        if not refused:
            refused.append("tried")
            with pytest.raises(ConfigError, match="the tag is taken"):
                publish(other_bundle, root, tag="v1")
        real(source, target)

    monkeypatch.setattr(store, "_put", put)
    publish(bundle_dir, root, tag="v1")
    assert refused
    assert load_bundle(pull(f"{root}@v1")).manifest == read_manifest(bundle_dir)


def test_what_is_not_there_is_told_with_what_is(root, bundle_dir, pull):
    publish(bundle_dir, root, tag="v1")
    with pytest.raises(ConfigError, match=r"no version 'v9' there; it has v1"):
        pull(f"{root}@v9")


def test_only_the_wanted_task_is_fetched_and_the_second_time_nothing(bucket, bundle_dir, pull, monkeypatch):
    publish(bundle_dir, bucket, tag="v1")
    folder = pull(f"{bucket}@v1", "rhythm")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {"bundle.json", *needed_files(read_manifest(bundle_dir), ["rhythm"])}
    asked = []
    monkeypatch.setattr(store, "_fetch", lambda *_args, **_kwargs: asked.append("asked"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert pull(f"{bucket}@v1", "rhythm") == folder
    assert load_bundle(folder, ["rhythm"]).records
    assert asked == []


def test_a_damaged_file_is_refused_and_not_kept(bucket, bundle_dir, pull):
    publish(bundle_dir, bucket, tag="v1")
    file = UPath(bucket) / "v1/adapters/rhythm/head.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"\x7f")
    with pytest.raises(ContractError, match=r"head\.safetensors: another SHA-256"):
        pull(f"{bucket}@v1")
    file.unlink()
    with pytest.raises(ContractError, match=r"head\.safetensors: missing"):
        pull(f"{bucket}@v1")
    file.write_bytes(content)
    assert load_bundle(pull(f"{bucket}@v1")).records


def test_a_version_that_was_replaced_is_refused(bucket, bundle_dir, other_bundle, pull):
    publish(bundle_dir, bucket, tag="v1")
    pull(f"{bucket}@v1", "rhythm")
    publish(other_bundle, bucket, tag="v2")
    for name in ("bundle.json", "adapters/rhythm/task.json"):
        content = (UPath(bucket) / "v2" / name).read_bytes()
        (UPath(bucket) / "v1" / name).write_bytes(content)
    with pytest.raises(ContractError, match=r"another bundle\.json than was fetched before"):
        pull(f"{bucket}@v1")
    with pytest.raises(ContractError, match=r"another bundle\.json than was published"):
        bundle_folder(f"{bucket}@v1", access=Access(cache_dir=pull(f"{bucket}@v1", "rhythm").parent / "new"))


def test_a_store_without_rights_or_network_is_told(bundle_dir, bucket, pull, monkeypatch):
    with pytest.raises(ConfigError, match="check the bucket and the rights"):
        publish(bundle_dir, "s3://no-such-bucket-here/lab", tag="v1")
    with pytest.raises(ConfigError, match="no version 'v1' there; it has none"):
        pull(f"{bucket}@v1")


def test_progress_tells_every_byte(bucket, bundle_dir):
    told: list[int] = []
    done: Publication = publish(bundle_dir, bucket, tag="v1", progress=told.append)
    assert sum(told) == sum(done.files.values())


def test_what_a_wrong_manifest_lists_is_never_written_outside(bucket, bundle_dir, pull, tmp_path):
    publish(bundle_dir, bucket, tag="v1")
    manifest: dict[str, Any] = json.loads((bundle_dir / "bundle.json").read_text())
    manifest["files"]["../../escaped"] = manifest["files"].pop("README.md")
    content = json.dumps(manifest).encode()
    (UPath(bucket) / "v1/bundle.json").write_bytes(content)
    (UPath(bucket) / "v1.sha256").write_text(hashlib.sha256(content).hexdigest())
    with pytest.raises(ContractError, match="not the files of a bundle"):
        pull(f"{bucket}@v1")
    assert not list(tmp_path.rglob("escaped"))
