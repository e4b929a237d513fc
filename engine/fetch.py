"""Openly licensed corpora, downloaded file by file with the server's checksums; the same command goes on.

A file is written under `.kymo-fetch/` and takes its name when its checksum is right, so that whatever stands under
its own name is whole. A part that a broken connection or Ctrl-C left is continued by an HTTP range request. pooch
verifies and tries again with growing pauses; a file of ours never replaces another one.
"""

import contextlib
import fcntl
import hashlib
import re
import shutil
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import quote

import pooch
import requests

from engine.label_files import names_of_labels
from engine.storage import glob_matches
from manifests.corpora import Corpus, FetchRule
from manifests.errors import ConfigError

STAGING = ".kymo-fetch"
_TIMEOUT_S = (15, 60)  # to connect, and between two packets
_CHUNK_BYTES = 1 << 18
_RETRIES = 4
_MAX_COMPLETE = 2  # downloads of all bytes of a file whose checksum is wrong, then the server's list is
_PASSING = (408, 425, 429)  # answers 4xx that pass
_SPARE_BYTES = 256 << 20  # left free for everybody else
_FOR_EVERYONE = ("LICENSE*", "README*", "RECORDS*", "ANNOTATORS*", "SUBJECT*", "SHA256SUMS*")
_SYSTEM_ERROR = re.compile(r"\[Errno -?\d+\] ([^'\")]+)")
_SUM = re.compile(r"([0-9a-fA-F]{64})[ \t]+\*?(\S.*)")

Progress = Callable[[int], None]


@dataclass(slots=True, kw_only=True)
class Fetched:
    """What a download did: names of files that came, that were there, and that failed with the reason."""

    downloaded: list[str] = field(default_factory=list)
    present: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    num_bytes: int = 0


class _StoppedError(Exception):
    """The download was told to stop."""


class _RefusedError(Exception):
    """The server's answer would be the same again."""


def read_checksums(text: str, *, where: str) -> dict[str, str]:
    """Path to `sha256:…` from the lines `digest  path` of a SHA256SUMS file.

    Raises:
        ConfigError: A line of another form, or a path that leads out of the folder.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        match = _SUM.fullmatch(line.strip())
        if match is None:
            raise ConfigError(f"{where}: line {number} is not 'sha256  path'; is it the list of checksums?")
        found[match[2].removeprefix("./")] = f"sha256:{match[1].lower()}"
    for name in found:
        _check_name(name, where=where)
    if not found:
        raise ConfigError(f"{where}: lists no file")
    return found


def select(names: Sequence[str], corpus: Corpus, *, only: Sequence[str] = (), limit: int | None = None) -> list[str]:
    """Files to download: recordings, what belongs to each, and the tables of the corpus.

    To a recording belong the files of its folder that carry its stem (`100.dat` and `100.atr` to `100.hea`) and its
    label files. A server's list has no more to tell: `only` reaches everything else by name.

    Args:
        names: All files that the server lists.
        corpus: Its `files`, `exclude` and `annotations` say what a recording is.
        only: Globs; with them, only recordings and other files that one of them finds.
        limit: Most recordings, in order of their paths.
    """

    def fits(name: str, patterns: Sequence[str]) -> bool:
        return any(glob_matches(name.split("/"), pattern.split("/")) for pattern in patterns)

    listed = set(names)
    recordings = sorted(name for name in names if fits(name, corpus.files) and not fits(name, corpus.exclude))
    if only:
        recordings = [name for name in recordings if fits(name, only)]
    recordings = recordings[:limit]
    others = [name for name in names if fits(name, only)] if limit is None else []
    if not recordings and not others:
        return []
    ordered = sorted(names)
    wanted = {*recordings, *others}
    for name in recordings:
        wanted.update(_of_stem(ordered, str(PurePosixPath(name).with_suffix(""))))
        for label in names_of_labels(name, corpus):
            folder = label.rpartition("/")[0]
            siblings = _beginning(ordered, f"{folder}/" if folder else "") if label not in listed else ()
            wanted.update([label] if label in listed else [other for other in siblings if fits(other, [label])])
    wanted.update(name for name in names if fits(name, [*corpus.side_files, *_FOR_EVERYONE]))
    return sorted(wanted)


def fetch(
    corpus: Corpus,
    to: Path,
    *,
    only: Sequence[str] = (),
    limit: int | None = None,
    base_url: str | None = None,
    jobs: int = 4,
    progress: Progress | None = None,
) -> Fetched:
    """Download an openly licensed corpus into a folder.

    Args:
        corpus: Its `fetch` says from where.
        to: Folder; becomes the `root` of the corpus.
        only: Globs of files.
        limit: Most recordings.
        base_url: Mirror to use in place of the corpus' own server.
        jobs: Files at the same time.
        progress: Gets the bytes that came.

    Raises:
        ConfigError: The corpus may not be downloaded, nothing fits, a different file is in the way, or no space is
            left. Files that only failed are in the result: run it again.
    """
    rule = corpus.fetch
    if rule is None:
        how = f"{corpus.access}; see {corpus.homepage}" if corpus.homepage not in corpus.access else corpus.access
        raise ConfigError(f"{corpus.id}: kymo does not download it ({corpus.access_kind}). To get it: {how}")
    url = base_url or rule.base_url
    url = url if url.endswith("/") else f"{url}/"
    staging = to / STAGING
    with _alone(staging):
        listed = _listed(rule, url)
        wanted = select(list(listed), corpus, only=only, limit=limit)
        if not wanted:
            raise ConfigError(
                f"{corpus.id}: none of the {len(listed)} files of {url} is asked for; the globs are "
                f"{', '.join(only or corpus.files)}"
            )
        download = _Download(url=url, to=to, staging=staging, registry=listed, progress=progress or (lambda _: None))
        return download.run(wanted, jobs=jobs)


def _listed(rule: FetchRule, url: str) -> dict[str, str]:
    """Path to checksum of every file on the server."""
    if rule.checksums is None:
        for name in rule.files:
            _check_name(name, where=url)
        return dict(rule.files)
    where = url + rule.checksums
    try:
        response = requests.get(where, timeout=_TIMEOUT_S)
        response.raise_for_status()
    except requests.RequestException as error:
        raise ConfigError(f"{where}: {_reason(error)}; is the server reachable from here?") from error
    return read_checksums(response.content.decode("utf-8", errors="replace"), where=where)


class _Download:
    """Files of one corpus on their way; several threads."""

    def __init__(self, *, url: str, to: Path, staging: Path, registry: Mapping[str, str], progress: Progress) -> None:
        self.to = to
        self.staging = staging
        self.registry = registry
        self.progress = progress
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.claimed_bytes = 0  # of files on their way, not on the disk yet
        self.result = Fetched()
        self.complete: Counter[str] = Counter()  # attempts that brought all bytes, by URL
        pooch.get_logger().setLevel("WARNING")
        self.pooch = pooch.create(
            path=staging,
            base_url=url,
            registry={_staged(name): checksum for name, checksum in registry.items()},
            urls={_staged(name): url + quote(name) for name in registry},
            retry_if_failed=_RETRIES,
        )

    def run(self, names: Sequence[str], *, jobs: int) -> Fetched:
        """Every file; the first error that concerns all of them stops the others."""
        with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
            futures = [pool.submit(self.one, name) for name in names]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                self.stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        for names_done in (self.result.downloaded, self.result.present):
            names_done.sort()
        return self.result

    def one(self, name: str) -> None:
        """One file, in its place when this returns; what went wrong with it alone stands in the result."""
        if self.stop.is_set():
            return
        target = self.to / name
        if target.exists():
            if not target.is_file() or not self._is_right(target, name):
                raise ConfigError(f"{target}: differs from the file of the server; move it away and run again")
            with self.lock:
                self.result.present.append(name)
            return
        try:
            whole = Path(self.pooch.fetch(_staged(name), downloader=self._get))
        except _StoppedError:
            return
        except (requests.RequestException, ValueError, _RefusedError) as error:
            with self.lock:
                self.result.failed[name] = _reason(error)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        whole.replace(target)
        with self.lock:
            self.result.downloaded.append(name)
            self.result.num_bytes += target.stat().st_size

    def _is_right(self, path: Path, name: str) -> bool:
        kind, _, expected = self.registry[name].partition(":")
        return pooch.file_hash(str(path), alg=kind) == expected

    def _get(self, fname: str, action: Any, pooch: Any, *, check_only: bool | None = None) -> None:  # noqa: ARG002
        """Download the URL `fname` into the file `action`, beginning where an earlier attempt ended.

        The names are those of `pooch.typing.Downloader`.
        """
        url = fname
        if self.complete[url] >= _MAX_COMPLETE:
            raise _RefusedError("the checksum differs from the one in the server's list")
        part = self.staging / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.part"
        begun = part.stat().st_size if part.exists() else 0
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={begun}-"} if begun else {})}
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as response:
            # A part may hold every byte: the process was killed before it took its name.
            if not begun or response.headers.get("Content-Range") != f"bytes */{begun}":
                self._check_answer(response, part)
                is_continued = response.status_code == requests.codes.partial_content
                with part.open("ab" if is_continued else "wb") as file:
                    self._receive(response, file)
        self.complete[url] += 1
        part.replace(action)

    def _check_answer(self, response: requests.Response, part: Path) -> None:
        """Tell what is worth another attempt (pooch makes it after a `RequestException`) from what is not."""
        code = response.status_code
        if code == requests.codes.requested_range_not_satisfiable:
            part.unlink(missing_ok=True)  # longer than the file of the server: begin again
            raise requests.ConnectionError("the server's file is shorter than the part here")
        if 400 <= code < 500 and code not in _PASSING:
            raise _RefusedError(f"the server answers {code} {response.reason}")
        response.raise_for_status()

    def _receive(self, response: requests.Response, file: BinaryIO) -> None:
        missing = int(response.headers.get("Content-Length", 0))
        self._claim(missing)
        try:
            for chunk in response.iter_content(chunk_size=_CHUNK_BYTES):
                file.write(chunk)
                came = min(len(chunk), missing)
                missing -= came
                self._claim(-came)
                self.progress(len(chunk))
                if self.stop.is_set():
                    raise _StoppedError
        finally:
            self._claim(-missing)
        if missing:
            raise requests.ConnectionError(f"the connection ended {missing:,} bytes early")

    def _claim(self, num_bytes: int) -> None:
        """Count bytes that are to come, or that came.

        Raises:
            ConfigError: They would not fit on the disk.
        """
        with self.lock:
            free = shutil.disk_usage(self.to).free - self.claimed_bytes
            if num_bytes > 0 and num_bytes + _SPARE_BYTES > free:
                raise ConfigError(
                    f"{self.to}: {free / 1e6:,.0f} MB free, the next file takes {num_bytes / 1e6:,.0f} MB and "
                    f"{_SPARE_BYTES / 1e6:,.0f} MB stay free; make room and run the same command again"
                )
            self.claimed_bytes += num_bytes


@contextlib.contextmanager
def _alone(staging: Path) -> Iterator[None]:
    """Only one download at a time writes to a folder; what it leaves in `staging` are parts that can be continued."""
    staging.mkdir(parents=True, exist_ok=True)
    with (staging / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"{staging.parent}: another kymo fetch writes there; wait for it") from error
        try:
            yield
        finally:
            for path in staging.iterdir():
                if path.suffix != ".part" or not path.stat().st_size:
                    path.unlink()
            if not any(staging.iterdir()):
                staging.rmdir()


def _staged(name: str) -> str:
    """Name of a whole file before it takes its own; it matches no glob of recordings."""
    return f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.whole"


def _beginning(ordered: Sequence[str], prefix: str) -> Sequence[str]:
    """Names, of a sorted list, that begin so."""
    return ordered[bisect_left(ordered, prefix) : bisect_left(ordered, prefix + "\U0010ffff")]


def _of_stem(ordered: Sequence[str], stem: str) -> list[str]:
    """Files that carry a recording's stem: `SC4001E0.hyp`, `a.edf.st` and `a_events.tsv`, not `a1.edf`."""
    return [name for name in _beginning(ordered, stem) if not name[len(stem) : len(stem) + 1].isalnum()]


def _check_name(name: str, *, where: str) -> None:
    parts = PurePosixPath(name).parts
    is_odd = name.startswith("/") or ".." in parts or "\\" in name or not name.isprintable() or STAGING in parts
    if is_odd or not parts:
        raise ConfigError(f"{where}: {name!r} leads out of the folder or is no plain name; nothing was downloaded")


def _reason(error: Exception) -> str:
    """What went wrong with one file, without pooch's advice."""
    response = error.response if isinstance(error, requests.RequestException) else None
    if response is not None:
        return f"the server answers {response.status_code} {response.reason}"
    text = str(error)
    if isinstance(error, requests.ConnectionError) and (system := _SYSTEM_ERROR.search(text)):
        return f"no connection: {system[1]}"
    return text if isinstance(error, _RefusedError) else f"{type(error).__name__}: {text}"
