"""Publishing a bundle to a model hub and fetching one: one commit, one tag, nothing half done.

`upload_folder` may split into several commits of which only the first is guarded, so a bundle goes up in one
`create_commit` on the head that was seen; a tag then names the commit. Run again after a failure: what is there
already is not sent again, and a bundle that is published already is left as it is.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from adapters.layout import MANIFEST_FILE, bundle_files, chosen_tasks, read_manifest, verify_bundle
from manifests.errors import ConfigError

logger = logging.getLogger(__name__)

KEPT_ON_HUB = (".gitattributes",)
COMMIT_LENGTH = 40
HINTS = {
    401: "give a token with write access (HF_TOKEN or `hf auth login`)",
    403: "the token may not write there; use one that may",
    404: "no such repository or revision, or the token may not see it",
    409: "it exists already with other content; choose another tag",
    412: "somebody committed meanwhile; look at the repository and run the command again",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """Where a bundle went, or in a dry run would go; then `commit` is None."""

    repo_id: str
    tag: str
    commit: str | None
    uploaded: tuple[str, ...]
    deleted: tuple[str, ...]


def publish(
    bundle_dir: Path | str,
    repo_id: str,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    private: bool = True,
    tag: str | None = None,
    dry_run: bool = False,
) -> Publication:
    """Publish a bundle as one tagged commit.

    Args:
        bundle_dir: A bundle; every file is checked before the first request.
        repo_id: `owner/name` of a model repository, created if there is none.
        endpoint: URL of the hub; None = the client's own.
        token: Access token; None = the one the client has stored.
        private: Visibility. A repository that exists with the other one is refused, not changed.
        tag: Name of this version; None = `bundle-` and the first digits of the SHA-256 of `bundle.json`.
        dry_run: Check the bundle and list the files; no request.

    Raises:
        ContractError: The bundle is not whole.
        ConfigError: The hub refuses: rights, visibility, a tag with other content, a commit in between.
    """
    bundle_dir = Path(bundle_dir)
    manifest = verify_bundle(bundle_dir)
    files = (MANIFEST_FILE, *manifest.files)
    content = (bundle_dir / MANIFEST_FILE).read_bytes()
    tag = tag or f"bundle-{hashlib.sha256(content).hexdigest()[:12]}"
    if dry_run:
        return Publication(repo_id=repo_id, tag=tag, commit=None, uploaded=files, deleted=())
    api = HfApi(endpoint=endpoint, token=token)
    with _explained(f"{repo_id}: create"):
        api.create_repo(repo_id, private=private, exist_ok=True)
        info = api.model_info(repo_id)
        tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
    if info.private is not private:
        raise ConfigError(
            f"{repo_id}: is {'private' if info.private else 'public'}, {'private' if private else 'public'} was asked "
            "for; change it on the hub or ask for what it is"
        )
    if tag in tags:
        with _explained(f"{repo_id}: read tag {tag}"):
            published = Path(api.hf_hub_download(repo_id, MANIFEST_FILE, revision=tags[tag])).read_bytes()
        if published != content:
            raise ConfigError(f"{repo_id}: tag {tag} names another bundle; choose another tag")
        logger.info("%s: this bundle is published already as %s", repo_id, tag)
        return Publication(repo_id=repo_id, tag=tag, commit=tags[tag], uploaded=(), deleted=())
    present = {item.rfilename for item in info.siblings or ()}
    deleted = tuple(sorted(present - set(files) - set(KEPT_ON_HUB)))
    operations = [CommitOperationAdd(name, str(bundle_dir / name)) for name in files]
    with _explained(f"{repo_id}: commit on {info.sha}"):
        commit = api.create_commit(
            repo_id,
            [*operations, *(CommitOperationDelete(name) for name in deleted)],
            commit_message=f"Publish {tag}: {', '.join(manifest.tasks)}",
            parent_commit=info.sha,
        )
    with _explained(f"{repo_id}: tag {tag}"):
        api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return Publication(repo_id=repo_id, tag=tag, commit=commit.oid, uploaded=files, deleted=deleted)


def fetch_bundle(
    repo_id: str,
    revision: str,
    *,
    tasks: Sequence[str] | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    cache_dir: Path | str | None = None,
) -> Path:
    """Folder of a published bundle, fetched and checked; ready for `load_bundle`.

    Args:
        repo_id: `owner/name` of the repository.
        revision: Tag, branch or commit. A commit that was fetched before needs no request.
        tasks: Fetch only what these need; None = all.
        endpoint: URL of the hub; None = the client's own.
        token: Access token; None = the one the client has stored.
        cache_dir: The client's cache; None = its usual place.

    Raises:
        ContractError: What came is not a whole bundle.
        ConfigError: The hub has no such repository or revision, or refuses.
    """
    api = HfApi(endpoint=endpoint, token=token)
    with _explained(f"{repo_id}@{revision}: fetch"):
        # Resolved once, so that a tag moved in between cannot mix two bundles.
        is_commit = len(revision) == COMMIT_LENGTH and set(revision) <= set("0123456789abcdef")
        commit = revision if is_commit else str(api.model_info(repo_id, revision=revision).sha)
        file = Path(api.hf_hub_download(repo_id, MANIFEST_FILE, revision=commit, cache_dir=cache_dir))
        manifest = read_manifest(file.parent)
        for name in bundle_files(chosen_tasks(manifest, tasks)):
            api.hf_hub_download(repo_id, name, revision=commit, cache_dir=cache_dir)
    verify_bundle(file.parent, tasks)
    return file.parent


@contextmanager
def _explained(doing: str) -> Iterator[None]:
    """Errors of the hub as ConfigError with what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = error.server_message or str(error).splitlines()[0]
        hint = HINTS.get(status, "try again later; the same command goes on where it stopped")
        raise ConfigError(f"{doing}: the hub answers {status} ({said}); {hint}") from error
    except HFValidationError as error:
        raise ConfigError(f"{doing}: {error}") from error
    except httpx2.HTTPError as error:
        raise ConfigError(f"{doing}: no answer from the hub ({error}); look at the network and --endpoint") from error
