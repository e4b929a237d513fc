"""Publishing a bundle: to a model hub in one commit and one tag, or to a store as one folder; nothing half done.

`upload_folder` may split into several commits of which only the first is guarded, so a bundle goes up in one
`create_commit` on the head that was seen; a tag then names the commit. What counts is never an answer but what the hub
has: before and after each step its tree is held against the bundle. So run again after a failure, the command sends
only what is missing, an answer that was lost does no harm, and a bundle that is published already is left as it is.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from adapters.hub import ANYBODY, CLIENT_ERRORS, REPO, TAG, Access, explain, explained, is_unreachable
from adapters.layout import MANIFEST_FILE, verify_bundle
from adapters.provenance import check_rights
from adapters.store import put_version
from manifests.errors import ConfigError

logger = logging.getLogger(__name__)

KEPT_ON_HUB = frozenset({".gitattributes"})
CONFLICT, STALE_PARENT = 409, 412


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """Where a bundle went, or in a dry run would go.

    Attributes:
        target: `owner/name`, or the URL of a store's folder.
        tag: Name of the version.
        files: Every file of the bundle with its bytes.
        licence: Of the weights, as the bundle states it.
        rights: What the publisher should read about the licences of base and corpora.
        is_private: Visibility on the hub; for a store, whose own rights hold, what the publisher says.
        commit: Commit on the hub; None in a dry run and for a store.
        uploaded: Files of the new commit, or written to the store; none where all was there.
        deleted: Files of an earlier bundle that the new commit removes.
    """

    target: str
    tag: str
    files: Mapping[str, int]
    licence: str
    rights: tuple[str, ...]
    is_private: bool
    commit: str | None = None
    uploaded: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()


def publish(
    bundle_dir: Path | str,
    target: str,
    *,
    tag: str | None = None,
    private: bool = True,
    confirm_rights: bool = False,
    dry_run: bool = False,
    access: Access = ANYBODY,
    progress: Callable[[int], None] | None = None,
) -> Publication:
    """Publish a bundle as one immutable version.

    Args:
        bundle_dir: A bundle; its files and its licence are checked before the first request.
        target: `owner/name` of a model repository, created if there is none; or the URL of a folder (any fsspec
            store), in which each version is a folder.
        tag: Name of this version; None = `bundle-` and the first digits of the SHA-256 of `bundle.json`.
        private: Visibility on the hub. A repository that exists with the other one is refused, not changed. A store
            has rights of its own; say False where everybody may read it.
        confirm_rights: The publisher holds the rights, or has the consent of those who do; asked for where a licence of
            base or corpora leaves a doubt and everybody may read it.
        dry_run: Check the bundle and say what would be sent; no request.
        access: The hub and the token.
        progress: For a store: called with the bytes of each file that is done. The hub's client draws its own bars.

    Raises:
        ContractError: The bundle is not whole.
        ConfigError: Its licence does not allow it, or the target refuses: rights, visibility, a tag with other content,
            a commit in between.
    """
    bundle_dir = Path(bundle_dir)
    plan = _plan(bundle_dir, target, tag=tag, private=private, confirm_rights=confirm_rights)
    if dry_run:
        return plan
    if "://" in target:
        return replace(plan, uploaded=put_version(bundle_dir, target, plan.tag, list(plan.files), progress=progress))
    return _publish_to_hub(bundle_dir, plan, access.api())


def _plan(bundle_dir: Path, target: str, *, tag: str | None, private: bool, confirm_rights: bool) -> Publication:
    """What would be sent, all that can be checked here checked."""
    if "://" not in target and not REPO.fullmatch(target):
        raise ConfigError(f"{target}: give OWNER/NAME of a repository on the hub, or a URL such as s3://bucket/folder")
    if tag is not None and not TAG.fullmatch(tag):
        raise ConfigError(f"tag {tag!r}: give letters, digits and . _ -, e.g. v1.0.0; 40 hex digits would be a commit")
    manifest = verify_bundle(bundle_dir)
    content = (bundle_dir / MANIFEST_FILE).read_bytes()
    return Publication(
        target=target,
        tag=tag or f"bundle-{hashlib.sha256(content).hexdigest()[:12]}",
        files={MANIFEST_FILE: len(content)} | {name: entry.size for name, entry in manifest.files.items()},
        licence=manifest.card.licence.lower(),
        rights=tuple(check_rights(bundle_dir, manifest, is_public=not private, is_confirmed=confirm_rights)),
        is_private=private,
    )


def _publish_to_hub(bundle_dir: Path, plan: Publication, api: HfApi) -> Publication:
    repo_id, tag = plan.target, plan.tag
    with explained(f"{repo_id}: create"):
        api.create_repo(repo_id, private=plan.is_private, exist_ok=True)
        info = api.model_info(repo_id)
        refs = api.list_repo_refs(repo_id)
    if info.private is not plan.is_private:
        is_now, asked = ("private", "public") if info.private else ("public", "private")
        raise ConfigError(
            f"{repo_id}: is {is_now}, {asked} was asked for; nothing was sent. Change it there or ask for what it is"
        )
    if tag in {ref.name for ref in refs.branches}:
        raise ConfigError(f"{repo_id}: {tag} is the name of a branch; choose another tag")
    tags = {ref.name: ref.target_commit for ref in refs.tags}
    if tag in tags:
        _check_tag(api, bundle_dir, plan, tags[tag])
        return replace(plan, commit=tags[tag])
    head = str(info.sha)
    deleted = tuple(sorted({item.rfilename for item in info.siblings or ()} - set(plan.files) - KEPT_ON_HUB))
    if _holds(api, repo_id, head, bundle_dir):
        logger.info("%s: the files are there already as commit %s", repo_id, head)
        done = replace(plan, commit=head)
    else:
        commit = _commit(api, bundle_dir, plan, head=head, deleted=deleted)
        done = replace(plan, commit=commit, uploaded=tuple(plan.files), deleted=deleted)
    _create_tag(api, bundle_dir, done)
    return done


def _commit(api: HfApi, bundle_dir: Path, plan: Publication, *, head: str, deleted: tuple[str, ...]) -> str:
    """Commit of the bundle on `head`, sent or, where only its answer was lost, found."""
    repo_id = plan.target
    operations = [CommitOperationAdd(name, str(bundle_dir / name)) for name in plan.files]
    logger.info("%s: sending %d files, %.1f MB", repo_id, len(plan.files), sum(plan.files.values()) / 1e6)
    try:
        commit = api.create_commit(
            repo_id,
            [*operations, *(CommitOperationDelete(name) for name in deleted)],
            commit_message=f"Publish {plan.tag}",
            parent_commit=head,
        ).oid
    except CLIENT_ERRORS as error:
        # A commit whose answer was lost must not be made twice; another publisher may have sent the same bundle.
        found = _landed(api, repo_id, head, bundle_dir) if _may_have_landed(error) else None
        if found is None:
            raise explain(f"{repo_id}: commit on {head}", error) from error
        logger.info("%s: the answer to the commit was lost, but it is there as %s", repo_id, found)
        return found
    if not _holds(api, repo_id, commit, bundle_dir):
        raise ConfigError(
            f"{repo_id}: commit {commit} is not this bundle: somebody committed meanwhile, or .gitignore there leaves "
            "files out; it was not tagged. Look at the repository and run the command again"
        )
    return commit


def _may_have_landed(error: BaseException) -> bool:
    is_stale = isinstance(error, HfHubHTTPError) and error.response.status_code == STALE_PARENT
    return is_stale or is_unreachable(error)


def _landed(api: HfApi, repo_id: str, head: str, bundle_dir: Path) -> str | None:
    """The commit after `head` that is this bundle; None where there is none, or the hub does not say."""
    try:
        for item in api.list_repo_commits(repo_id):
            if item.commit_id == head:
                return None
            if _holds(api, repo_id, item.commit_id, bundle_dir):
                return item.commit_id
    except (HfHubHTTPError, httpx2.HTTPError, ConfigError) as error:
        logger.info("%s: whether the commit is there cannot be told now (%s)", repo_id, type(error).__name__)
    return None


def _holds(api: HfApi, repo_id: str, commit: str, bundle_dir: Path) -> bool:
    """Whether a commit is the bundle, file by file."""
    with explained(f"{repo_id}: compare with commit {commit}"):
        found = api.verify_repo_checksums(repo_id, revision=commit, local_dir=bundle_dir)
    changed = {item["path"] for item in found.mismatches}
    return not (changed | set(found.missing_paths) | set(found.extra_paths)) - KEPT_ON_HUB


def _create_tag(api: HfApi, bundle_dir: Path, done: Publication) -> None:
    repo_id = done.target
    try:
        api.create_tag(repo_id, tag=done.tag, revision=str(done.commit))
    except CLIENT_ERRORS as error:
        conflict = isinstance(error, HfHubHTTPError) and error.response.status_code == CONFLICT
        if not conflict and not is_unreachable(error):
            raise explain(f"{repo_id}: tag {done.tag}", error) from error
        try:
            found = next((ref.target_commit for ref in api.list_repo_refs(repo_id).tags if ref.name == done.tag), None)
        except CLIENT_ERRORS:
            found = None
        if found is None:
            raise explain(f"{repo_id}: tag {done.tag}", error) from error
        _check_tag(api, bundle_dir, done, found)


def _check_tag(api: HfApi, bundle_dir: Path, plan: Publication, commit: str) -> None:
    if not _holds(api, plan.target, commit, bundle_dir):
        raise ConfigError(f"{plan.target}: tag {plan.tag} names another bundle, commit {commit}; choose another tag")
    logger.info("%s: this bundle is there already as %s", plan.target, plan.tag)
