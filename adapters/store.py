"""Bundles in an object store or on a shared disk (any fsspec URL): one folder per version, never changed.

`ROOT/TAG.sha256` claims a tag for one `bundle.json` before the first file goes up, by a write that must create it. So
two publishers cannot mix their files, and whoever continues a broken upload knows that what lies there is his own.
`ROOT/TAG/bundle.json` comes last: a version that has it is whole.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pooch
from upath import UPath

from adapters.layout import MANIFEST_FILE, needed_files, read_manifest, verify_bundle
from manifests.config import write_atomically
from manifests.errors import ConfigError, ContractError
from trainer.storage import answering, create_exclusively, is_remote, location, names_in, upload

logger = logging.getLogger(__name__)


def put_version(
    bundle_dir: Path, root: str, tag: str, files: Sequence[str], *, progress: Callable[[int], None] | None = None
) -> tuple[str, ...]:
    """Write a checked bundle as a version; names of the files that were not there yet.

    Args:
        bundle_dir: The bundle.
        root: URL of the folder of all versions.
        tag: Name of the version.
        files: Its files but `bundle.json`.
        progress: Called with the bytes of each file that is done.

    Raises:
        ConfigError: The tag is taken by another bundle, or the store refuses.
    """
    folder = location(root) / tag
    content = (bundle_dir / MANIFEST_FILE).read_bytes()
    sent: list[str] = []
    with answering(folder):
        _claim(location(root) / f"{tag}.sha256", hashlib.sha256(content).hexdigest())
        present = _sizes(folder)
        for name in [*(name for name in files if name != MANIFEST_FILE), MANIFEST_FILE]:
            source = bundle_dir / name
            if present.get(name) != source.stat().st_size or (folder / name).read_bytes() != source.read_bytes():
                _put(source, folder / name)
                sent.append(name)
            if progress is not None:
                progress(source.stat().st_size)
    return tuple(sent)


def _claim(file: Path, digest: str) -> None:
    with suppress(FileExistsError):
        create_exclusively(file, f"{digest}\n".encode())
    # Read back: also a store that ignores the condition of the write says whose the tag is.
    if (found := file.read_text().strip()) != digest:
        raise ConfigError(
            f"{file}: the tag is taken by another bundle (bundle.json {found[:12]}, not {digest[:12]}); choose another"
        )


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder by its path there."""
    if not is_remote(folder):
        return {
            path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()
        }
    url = cast("UPath", folder)
    found = cast("dict[str, dict[str, Any]]", url.fs.find(url.path, detail=True))
    return {name.removeprefix(url.path.rstrip("/")).strip("/"): int(row["size"]) for name, row in found.items()}


def _put(source: Path, target: Path) -> None:
    if is_remote(target):
        upload(source, target)
    else:
        write_atomically(target, source.read_bytes())


def fetch_version(
    root: str, version: str, tasks: Sequence[str] | None = None, *, cache_dir: Path | str | None = None
) -> Path:
    """Folder of a version, checked: in place on a disk, else in the cache; a version fetched before needs no request.

    Args:
        root: URL of the folder of all versions.
        version: Its tag.
        tasks: Fetch only what these need; None = all.
        cache_dir: Folder of fetched files; None = `kymo` in the user's cache.

    Raises:
        ConfigError: No such version, or the store does not answer.
        ContractError: What came is not a whole bundle, or another than was fetched before by this name.
    """
    folder = location(root) / version
    if not is_remote(folder):
        if not (folder / MANIFEST_FILE).is_file():
            raise _no_version(root, version)
        verify_bundle(folder, tasks)
        return folder
    key = hashlib.sha256(str(location(root)).encode()).hexdigest()[:16]
    kept = Path(cache_dir or pooch.os_cache("kymo")) / "bundles" / key / version
    if _missing(kept, tasks):
        with answering(folder):
            _fetch(folder, kept, tasks, root=root)
    else:
        logger.info("%s@%s: from the cache", root, version)
    verify_bundle(kept, tasks)
    return kept


def _missing(kept: Path, tasks: Sequence[str] | None) -> list[str]:
    if not (kept / MANIFEST_FILE).is_file():
        return [MANIFEST_FILE]
    names = needed_files(read_manifest(kept), tasks)
    return [name for name in names if not (kept / name).is_file()]


def _fetch(folder: Path, kept: Path, tasks: Sequence[str] | None, *, root: str) -> None:
    try:
        content = (folder / MANIFEST_FILE).read_bytes()
        claimed = (folder.parent / f"{folder.name}.sha256").read_text().strip()
    except FileNotFoundError:
        raise _no_version(root, folder.name) from None
    known = (kept / MANIFEST_FILE).read_bytes() if (kept / MANIFEST_FILE).is_file() else content
    if content != known or hashlib.sha256(content).hexdigest() != claimed:
        raise ContractError(
            f"{folder}: another {MANIFEST_FILE} than was {'fetched before' if content != known else 'published'}; a "
            f"version must not change. Ask the publisher why; remove {kept} to accept the one that is there now"
        )
    write_atomically(kept / MANIFEST_FILE, content)
    manifest = read_manifest(kept)
    for name in _missing(kept, tasks):
        try:
            content = (folder / name).read_bytes()
        except FileNotFoundError:
            raise ContractError(f"{folder / name}: missing though {MANIFEST_FILE} lists it; publish it again") from None
        if hashlib.sha256(content).hexdigest() != manifest.files[name].sha256:
            raise ContractError(f"{folder / name}: another SHA-256 than {MANIFEST_FILE} lists; the version is damaged")
        write_atomically(kept / name, content)


def _no_version(root: str, version: str) -> ConfigError:
    with answering(location(root)):
        tags = sorted(name.removesuffix(".sha256") for name in names_in(location(root)) if name.endswith(".sha256"))
    if version in tags:
        return ConfigError(f"{root}: version {version!r} is not whole; the publisher has to run kymo publish again")
    return ConfigError(f"{root}: no version {version!r} there; it has {', '.join(tags) or 'none'}")
