"""The folder of a bundle from what a user calls it: a folder, `OWNER/NAME@VERSION` on the hub, or `URL@VERSION`."""

import logging
from collections.abc import Sequence
from pathlib import Path

from adapters.hub import ANYBODY, REPO, TAG, Access, cached, explained, pinned, resolve
from adapters.layout import MANIFEST_FILE, needed_files, read_manifest, verify_bundle
from adapters.store import fetch_version
from manifests.errors import ConfigError

logger = logging.getLogger(__name__)


def bundle_folder(source: Path | str, tasks: Sequence[str] | None = None, *, access: Access = ANYBODY) -> Path:
    """Folder of a bundle, fetched and checked where it is not local; ready for `load_bundle`.

    A folder that exists wins over a repository of the same name. Without a version nothing is asked of the hub: what
    `main` is changes, so the same command would give other predictions tomorrow, and a mistyped path should not leave
    the machine.

    Args:
        source: A folder; `OWNER/NAME@VERSION` with a tag, a branch or a commit; `URL@VERSION` of any fsspec store.
        tasks: Fetch only what these need; None = all.
        access: The hub, token and cache.

    Raises:
        ConfigError: Nothing of that name, no version, or no answer.
        ContractError: What came is not a whole bundle, or a version that is not what it was.
    """
    if isinstance(source, Path) or Path(source).is_dir():
        return Path(source)
    place, _, version = source.rpartition("@")
    if "://" in source:
        if "://" not in place or not TAG.fullmatch(version):
            raise ConfigError(f"{source}: names no version; write {source}@v1, the tag that kymo publish was given")
        return fetch_version(place, version, tasks, cache_dir=access.cache_dir)
    if REPO.fullmatch(place):
        return fetch_bundle(place, version, tasks, access=access)
    if REPO.fullmatch(source):
        raise ConfigError(
            f"{source}: no such folder. If a repository on the hub is meant, name its version, e.g. {source}@v1; its "
            "page lists the tags"
        )
    raise ConfigError(f"{source}: no such folder; give one, OWNER/NAME@VERSION on the hub, or URL@VERSION")


def fetch_bundle(repo_id: str, revision: str, tasks: Sequence[str] | None = None, *, access: Access = ANYBODY) -> Path:
    """Folder of a bundle on the hub, fetched and checked; only the files that `tasks` need.

    The revision is resolved once, so that a tag moved meanwhile cannot mix two bundles. What was fetched before by a
    commit or a tag needs no request.

    Raises:
        ConfigError: The hub has no such repository or revision, refuses, or cannot be reached.
        ContractError: What came is not a whole bundle, or the tag was moved.
    """
    commit = pinned(repo_id, revision, access)
    if commit is not None and (folder := _complete(repo_id, commit, tasks, access)) is not None:
        logger.info("%s@%s: commit %s, from the cache", repo_id, revision, commit)
        verify_bundle(folder, tasks)
        return folder
    commit = resolve(repo_id, revision, access)
    api = access.api()
    with explained(f"{repo_id}@{revision}: fetch {MANIFEST_FILE}"):
        path = api.hf_hub_download(repo_id, MANIFEST_FILE, revision=commit, cache_dir=access.cache_dir)
    folder = Path(path).parent
    for name in needed_files(read_manifest(folder), tasks):
        with explained(f"{repo_id}@{revision}: fetch {name}"):
            api.hf_hub_download(repo_id, name, revision=commit, cache_dir=access.cache_dir)
    verify_bundle(folder, tasks)
    return folder


def _complete(repo_id: str, commit: str, tasks: Sequence[str] | None, access: Access) -> Path | None:
    """Folder of a commit in the cache; None where a file that the tasks need is not there."""
    file = cached(repo_id, commit, MANIFEST_FILE, access)
    if file is None:
        return None
    names = needed_files(read_manifest(file.parent), tasks)
    return file.parent if all(cached(repo_id, commit, name, access) for name in names) else None
