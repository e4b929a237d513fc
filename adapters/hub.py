"""The model hub as reader and publisher need it: a revision as a commit, a file by commit, errors with what to do.

A tag is asked for once. What it named then stands in the client's cache as `refs/refs/tags/TAG`, so the same words give
the same bytes ever after, without a request. Whenever the hub has to be asked for more, it has to name the same commit.
"""

import errno
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.file_download import repo_folder_name

from manifests.config import write_atomically
from manifests.errors import ConfigError, ContractError

logger = logging.getLogger(__name__)

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")
REVISION = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*")
TAG = re.compile(r"(?![0-9a-f]{40}$)(?!.*\.(\.|lock$|$))[A-Za-z0-9][\w.-]{0,99}")
"""Names of versions: what git takes, a folder can be called, and nobody holds for a commit."""
HINTS = {
    401: "log in with a token that is valid and may write there (`hf auth login`, or HF_TOKEN)",
    403: "the token may not do that there; use one that may",
    404: "no such repository or revision, or the token may not see it (`hf auth login`)",
    409: "it exists already with other content; choose another tag",
    412: "somebody committed meanwhile; look at the repository and run the command again",
    429: "the hub limits how often it is asked; wait a few minutes",
}
AGAIN = "the same command goes on where it stopped"
CLIENT_ERRORS = (HfHubHTTPError, httpx2.HTTPError, OSError, RuntimeError, ValueError)
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM})
_TOKEN = re.compile(r"hf_\w+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Where the hub is, who asks, and where files are kept.

    Attributes:
        endpoint: URL of the hub; None = the client's own (HF_ENDPOINT).
        token: Access token; None = the client's own (HF_TOKEN, or its login). Never printed, never stored.
        cache_dir: Folder of fetched files; None = the client's own (HF_HUB_CACHE, HF_HOME).
    """

    endpoint: str | None = None
    token: str | None = field(default=None, repr=False)
    cache_dir: Path | str | None = None

    def api(self) -> HfApi:
        """The hub's client."""
        return HfApi(endpoint=self.endpoint, token=self.token)


ANYBODY = Access()


def fetch_file(repo_id: str, revision: str, filename: str, *, access: Access = ANYBODY) -> Path:
    """One file of a repository, from the cache where it is there; no request then for a commit or a tag seen before.

    Args:
        repo_id: `owner/name` of a model repository.
        revision: Commit, tag or branch; who wants the same bytes tomorrow names a commit.
        filename: Path in the repository.
        access: The hub, token and cache.

    Raises:
        ConfigError: The hub has no such file, refuses, or cannot be reached.
        ContractError: The tag names another commit than it did before.
    """
    commit = pinned(repo_id, revision, access)
    if commit is None or cached(repo_id, commit, filename, access) is None:
        commit = resolve(repo_id, revision, access)
    with explained(f"{repo_id}@{revision}: fetch {filename}"):
        return Path(access.api().hf_hub_download(repo_id, filename, revision=commit, cache_dir=access.cache_dir))


def cached(repo_id: str, commit: str, filename: str, access: Access) -> Path | None:
    """A file of a commit in the cache; None where it is not there."""
    found = try_to_load_from_cache(repo_id, filename, cache_dir=access.cache_dir, revision=commit)
    return Path(found) if isinstance(found, str) else None


def pinned(repo_id: str, revision: str, access: Access) -> str | None:
    """Commit that a revision names without asking: a commit itself, or a tag that was resolved before."""
    return revision if COMMIT.fullmatch(revision) else _remembered(repo_id, f"refs/tags/{revision}", access)


def resolve(repo_id: str, revision: str, access: Access = ANYBODY) -> str:
    """Commit that a revision names on the hub; where the hub cannot be reached, the one that it named last.

    Raises:
        ConfigError: No such repository or revision, no rights, or no answer and nothing remembered.
        ContractError: A tag that was moved.
    """
    if COMMIT.fullmatch(revision):
        return revision
    tag = f"refs/tags/{revision}"
    before = _remembered(repo_id, tag, access)
    api = access.api()
    try:
        commit = str(api.model_info(repo_id, revision=revision).sha)
        is_tag = any(ref.name == revision for ref in api.list_repo_refs(repo_id).tags)
    except CLIENT_ERRORS as error:
        last = before or _remembered(repo_id, revision, access)
        if last is None or not is_unreachable(error):
            raise explain(f"{repo_id}@{revision}", error) from error
        logger.warning(
            "%s@%s: the hub cannot be reached; going on with commit %s as it was then", repo_id, revision, last
        )
        return last
    if before not in (None, commit):
        raise ContractError(
            f"{repo_id}@{revision}: the tag named commit {before} when it was fetched first, now {commit}; a tag must "
            f"not move. Ask the publisher why; name {repo_id}@{before} to stay, {repo_id}@{commit} to follow"
        )
    _remember(repo_id, tag if is_tag else revision, commit, access)
    logger.info("%s@%s is commit %s", repo_id, revision, commit)
    return commit


def _ref_file(repo_id: str, ref: str, access: Access) -> Path:
    if not REPO.fullmatch(repo_id) or not REVISION.fullmatch(ref):  # both become parts of a path
        raise ConfigError(f"{repo_id}@{ref}: give OWNER/NAME and a tag, a branch or a commit")
    cache = Path(access.cache_dir or constants.HF_HUB_CACHE).expanduser()
    return cache / repo_folder_name(repo_id=repo_id, repo_type="model") / "refs" / ref


def _remembered(repo_id: str, ref: str, access: Access) -> str | None:
    try:
        text = _ref_file(repo_id, ref, access).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text if COMMIT.fullmatch(text) else None


def _remember(repo_id: str, ref: str, commit: str, access: Access) -> None:
    try:
        write_atomically(_ref_file(repo_id, ref, access), commit)
    except OSError as error:  # a cache that others fill: the hub is then asked each time
        logger.warning("%s: what %s is cannot be kept in the cache (%s)", repo_id, ref, error.strerror)


def is_unreachable(error: BaseException) -> bool:
    """Whether an error tells of a hub that is down, far away or switched off, not of one that says no."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, httpx2.TransportError | OfflineModeIsEnabled)


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """Errors of the hub's client as ConfigError with what to do."""
    try:
        yield
    except CLIENT_ERRORS as error:
        raise explain(doing, error) from error


def explain(doing: str, error: BaseException) -> ConfigError:
    """What an error of the hub's client means and what to do; any token in it blanked."""
    # The client wraps what happened: uploads in a RuntimeError, downloads in a LocalEntryNotFoundError.
    while isinstance(error, RuntimeError | LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = error.server_message or (str(error).splitlines() or [""])[0]
        message = f"the hub answers {status} ({said}); {HINTS.get(status, f'try again later: {AGAIN}')}"
    elif isinstance(error, OfflineModeIsEnabled):
        message = "HF_HUB_OFFLINE is set and the cache does not hold it; unset it and run the command once"
    elif isinstance(error, httpx2.HTTPError):
        message = f"no answer from the hub ({error}); look at the network and the endpoint: {AGAIN}"
    elif isinstance(error, HFValidationError):
        message = str(error)
    elif isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        message = (
            f"{error.filename or 'cache'}: {error.strerror}; free space, or give another cache by HF_HOME: {AGAIN}"
        )
    else:
        message = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}; {AGAIN}"
    return ConfigError(f"{doing}: {_TOKEN.sub('hf_***', message)}")
