"""Files on a local disk or in an object store (`s3://`, any fsspec URL).

A local place is a `pathlib.Path`; a URL is a `upath.UPath`, which offers the methods of a path. What a store cannot do
(rename, append, make a folder) or does dearly is done here in another way. Credentials are fsspec's own: for S3 the
environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL` for MinIO and others) or `~/.aws`.
"""

import errno
import os
import posixpath
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import fsspec
from upath import UPath

from manifests.errors import ConfigError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]*)://")
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM})
# Packages whose errors tell of an object store and not of a fault of ours.
_STORE_CLIENTS = frozenset({"aiobotocore", "aiohttp", "botocore", "gcsfs", "google"})
# A listing that s3fs remembers would hide what another process has written since.
_OPTIONS: dict[str, Any] = {"use_listings_cache": False}


class StoreError(ConfigError):
    """A store that did not answer; it may the next time, so Ray starts the workers again."""


def is_remote(path: Path) -> bool:
    """Whether a location is in an object store: a `UPath` that is no `pathlib.Path`."""
    return not isinstance(path, Path)


def location(text: str | Path) -> Path:
    """Location of a text: an absolute `Path`, or for a URL a `UPath`, which is used like one.

    Raises:
        ConfigError: A URL of a kind that is unknown, or whose package is not installed.
    """
    if not isinstance(text, str):
        return text
    match = _URL.match(text)
    if match is None:
        return Path(text).absolute()
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


def _store(path: Path) -> tuple[fsspec.AbstractFileSystem, str]:
    """File system and key of a location in a store."""
    url = cast("UPath", path)
    return url.fs, url.path.rstrip("/")


@contextmanager
def answering(path: Path) -> Iterator[None]:
    """Turn what a full disk, or a store with a wrong name or a dead network, answers to a write into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except OSError as error:
        if not is_remote(path) and error.errno not in _DISK_ERRORS:
            raise
        remedy = "make it writable" if error.errno in {errno.EROFS, errno.EACCES, errno.EPERM} else "free space"
        kind = ConfigError
        if is_remote(path):
            remedy = "check the bucket and the rights of the credentials"
            kind = ConfigError if isinstance(error, FileNotFoundError | PermissionError) else StoreError
        reason = error.strerror or str(error) or type(error).__name__
        raise kind(f"{error.filename or path}: {reason}; {remedy} and run the same command again") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _STORE_CLIENTS:
            raise
        raise StoreError(
            f"{path}: the store does not answer ({type(error).__name__}: {error}); check the network, AWS_ENDPOINT_URL "
            "and the credentials, and run the same command again"
        ) from error


def names_below(folder: Path) -> dict[str, set[str]]:
    """Name of each folder in a folder of a store → names of the files in it, by one listing."""
    fs, key = _store(folder)
    found: dict[str, set[str]] = {}
    for name in fs.find(key):
        parent, slash, file = name.removeprefix(key).strip("/").partition("/")
        if slash:
            found.setdefault(parent, set()).add(file)
    return found


def sizes_in(folder: Path) -> dict[str, int]:
    """Name and size in bytes of every file directly in a folder; empty for no folder."""
    try:
        if is_remote(folder):
            fs, key = _store(folder)
            rows = fs.ls(key, detail=True)
            return {posixpath.basename(row["name"]): int(row["size"]) for row in rows if row["type"] == "file"}
        return {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    except FileNotFoundError:
        return {}


def names_in(folder: Path) -> list[str]:
    """Names directly in a folder; none for no folder."""
    try:
        if is_remote(folder):
            fs, key = _store(folder)
            return [posixpath.basename(name.rstrip("/")) for name in fs.ls(key, detail=False)]
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []


def remove_folder(folder: Path) -> None:
    """Remove a folder with all in it; no error if there is none."""
    if is_remote(folder):
        fs, key = _store(folder)
        if names := fs.find(key):
            fs.rm(names)
        return
    shutil.rmtree(folder, ignore_errors=True)


def create_exclusively(path: Path, content: bytes) -> None:
    """Write a file that must not exist yet: O_EXCL on a disk, `If-None-Match: *` on S3.

    A store that ignores the condition overwrites; whoever needs to know reads back.

    Raises:
        FileExistsError: It does.
    """
    if is_remote(path):
        fs, key = _store(path)
        try:
            fs.pipe_file(key, content, mode="create")
        except FileExistsError:
            if path.read_bytes() != content:  # else ours: a lost answer made the store's client try twice
                raise
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def upload(source: Path, target: Path) -> None:
    """Copy a local file to an object, which appears whole or not at all.

    A process that is killed meanwhile may leave parts of a multipart upload, which no listing shows and which cost
    money: give the bucket a lifecycle rule that aborts incomplete uploads.
    """
    fs, key = _store(target)
    fs.put_file(str(source), key)


def read_ranges(path: Path, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Blocks of an object, given as (offset, length) in bytes, by concurrent requests."""
    fs, key = _store(path)
    ends = [offset + length for offset, length in ranges]
    return fs.cat_ranges([key] * len(ranges), [offset for offset, _ in ranges], ends, on_error="raise")


def sync_folder(folder: Path) -> None:
    """Let the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
