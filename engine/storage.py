"""Where files lie: what differs between a local disk and an object store (`s3://`, any fsspec URL).

An ordinary path is a `pathlib.Path` and behaves as ever. A URL is a `upath.UPath`, which offers the methods of a path;
what a store cannot do (rename, append, lock) or does dearly (one request per file) is done here in another way.
Credentials and options are fsspec's own and never stand in a configuration: for S3 the environment
(`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_PROFILE`, `AWS_ENDPOINT_URL` for MinIO and others), `~/.aws`, or
`FSSPEC_S3_*` and `~/.config/fsspec` (`FSSPEC_S3_ANON=true` reads public buckets).
"""

import errno
import hashlib
import os
import posixpath
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, cast

import fsspec
import psutil
from pydantic import PlainSerializer, PlainValidator, SerializationInfo
from upath import UPath

from manifests.errors import ConfigError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]*)://")
# Faults of the disk that is written to, never of a recording.
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
_RIGHTS = frozenset({errno.EACCES, errno.EPERM})
# A listing that s3fs remembers would hide what other nodes have written since.
_OPTIONS: dict[str, Any] = {"use_listings_cache": False}
_CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or ~/.aws (FSSPEC_S3_ANON=true: public bucket)"


def is_remote(path: Path) -> bool:
    """Whether a location is on an object store: a `UPath` that is no `pathlib.Path`."""
    return not isinstance(path, Path)


def location(text: str | Path) -> Path:
    """Location of a text: a `Path`, or for a URL a `UPath`, which is used like one.

    Raises:
        ConfigError: A URL of a kind that is unknown, or whose package is not installed.
    """
    if not isinstance(text, str):
        return text
    match = _URL.match(text)
    if match is None:
        return Path(text)
    protocol = match[1].lower()
    if protocol in {"file", "local"}:
        return Path(UPath(text).path)
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise ConfigError(f"{text}: {protocol}:// needs a package that is not installed: {error}") from None
    except ValueError:
        raise ConfigError(f"{text}: fsspec knows no {protocol}://; use a path, s3://bucket/folder or gs://…") from None
    return cast("Path", UPath(text, **_OPTIONS))


def _validated(value: Any) -> Path:
    if not isinstance(value, str | Path | UPath):
        raise ValueError(f"{value!r}: a path or URL is expected")
    try:
        return location(cast("str | Path", value))
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _plain(value: Path, info: SerializationInfo) -> Any:
    return str(value) if info.mode_is_json() else value


# Type of a configuration's field that takes a path or a URL.
Location = Annotated[Path, PlainValidator(_validated), PlainSerializer(_plain)]


def _store(path: Path) -> tuple[fsspec.AbstractFileSystem, str]:
    """File system and key of a location on a store."""
    url = cast("UPath", path)
    return url.fs, url.path


@contextmanager
def reachable(path: Path) -> Iterator[None]:
    """Turn what a store answers to a wrong name, missing rights or a dead network into a ConfigError."""
    try:
        yield
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such bucket; create it, or correct the URL") from None
    except PermissionError as error:
        raise ConfigError(f"{path}: access denied ({error}); check the rights of {_CREDENTIALS}") from None
    except ConfigError:
        raise
    except Exception as error:  # every store has its own classes: botocore's, aiohttp's, google.auth's
        if "Credential" in type(error).__name__:
            raise ConfigError(f"{path}: no credentials ({error}); set {_CREDENTIALS}") from error
        raise ConfigError(
            f"{path}: the store does not answer ({type(error).__name__}: {error}); "
            "check the network and AWS_ENDPOINT_URL"
        ) from error


@contextmanager
def _transfer(path: Path) -> Iterator[None]:
    """Let an OSError of a transfer pass (a missing object, no rights); all else is a store that does not answer."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # as in `reachable`
        raise ConfigError(
            f"{path}: the store does not answer ({type(error).__name__}: {error}); run the same command again"
        ) from error


@contextmanager
def writable(output: Path) -> Iterator[None]:
    """Turn a full disk, missing rights or a disk that went read-only into a ConfigError."""
    try:
        yield
    except OSError as error:
        is_here = error.filename is None or str(error.filename).startswith(str(output))
        if error.errno in DISK_ERRORS or (error.errno in _RIGHTS and is_here):
            raise output_error(error, output) from error
        raise


def output_error(error: OSError, output: Path) -> ConfigError:
    """What the operator is told when `output` cannot be written."""
    remedy = "make it writable" if error.errno in (errno.EROFS, *_RIGHTS) else "free space"
    return ConfigError(
        f"{error.filename or output}: {error.strerror or error}; {remedy} and run the same command again, which goes "
        "on where this one stopped"
    )


def make_folder(path: Path) -> None:
    """Make a folder with its parents; a store has none."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def work_folder(output: Path, scratch: Path | None = None) -> Path:
    """Folder on a local disk for spool files and copies: `work` in a local output, else one of its own in `scratch`.

    For an output on a store it is named after URL and host, under the system's temporary folder by default.
    """
    if scratch is None and not is_remote(output):
        return output / "work"
    name = hashlib.sha256(f"{output}/{socket.gethostname()}".encode()).hexdigest()[:12]
    return (scratch or Path(tempfile.gettempdir())) / f"kymo-{name}"


def remove_dead_work(work: Path) -> None:
    """Remove folders of processes of this host that were killed, named `UNIT-PID` as `convert_unit` names them.

    A work folder on a local disk is seen by its own node only, so whoever starts a conversion cannot clean it.
    """
    for path in work.glob("*-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def sizes_in(folder: Path) -> dict[str, int]:
    """Name and size in bytes of every file directly in a folder, by one listing; empty for no folder."""
    try:
        if is_remote(folder):
            fs, key = _store(folder)
            entries = fs.ls(key, detail=True)
            return {posixpath.basename(row["name"]): row["size"] for row in entries if row["type"] == "file"}
        with os.scandir(folder) as found:
            return {entry.name: entry.stat().st_size for entry in found if entry.is_file()}
    except FileNotFoundError:
        return {}


def names_under(root: Path) -> list[str]:
    """POSIX path relative to the root of every object below it, on a store."""
    fs, key = _store(root)
    with reachable(root):
        found = fs.find(key)
    return [name.removeprefix(key).lstrip("/") for name in found if not name.endswith("/")]


def glob_matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a file's relative path is one that a pathlib glob finds; both cut at `/`."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(glob_matches(parts[i:], pattern[1:]) for i in range(len(parts)))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and glob_matches(parts[1:], pattern[1:])


def read_ranges(path: Path, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Blocks of a file, given as (offset, length) in bytes; on a store by concurrent range requests."""
    if is_remote(path):
        fs, key = _store(path)
        ends = [offset + length for offset, length in ranges]
        with _transfer(path):
            return fs.cat_ranges([key] * len(ranges), [offset for offset, _ in ranges], ends, on_error="raise")
    blocks: list[bytes] = []
    with path.open("rb") as file:
        for offset, length in ranges:
            file.seek(offset)
            blocks.append(file.read(length))
    return blocks


def normal(path: Path) -> Path:
    """Location without `..`: a store takes them for a part of the key."""
    if not is_remote(path) or ".." not in path.parts:
        return path
    protocol, _, key = str(path).partition("://")
    return location(f"{protocol}://{posixpath.normpath(key)}")


def download(source: Path, target: Path) -> None:
    """Copy an object to a local file.

    Raises:
        FileNotFoundError: There is none.
        ConfigError: The store does not answer.
    """
    fs, key = _store(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _transfer(source):
        fs.get_file(key, str(target))


def upload(source: Path, target: Path) -> None:
    """Copy a local file to an object, which appears whole or not at all; its size checked.

    A process that is killed meanwhile may leave parts of a multipart upload, which no listing shows and which cost
    money: give the bucket a lifecycle rule that aborts incomplete uploads.

    Raises:
        ConfigError: The store does not answer, or holds another number of bytes.
    """
    fs, key = _store(target)
    with _transfer(target):
        fs.put_file(str(source), key)
        size = fs.size(key)
    if size != source.stat().st_size:
        raise ConfigError(f"{target}: {size} of {source.stat().st_size} bytes arrived; run the same command again")


def create_exclusively(path: Path, content: bytes) -> None:
    """Write an object that must not exist yet.

    Raises:
        FileExistsError: It does.
    """
    fs, key = _store(path)
    fs.pipe_file(key, content, mode="create")
