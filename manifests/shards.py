"""The shard format, the only meeting place of engine and trainer.

A shard is an uncompressed, byte-reproducible tar of samples; plain `webdataset` opens it. A sample is one
window of one recording: `KEY.<kind>.npy` per kind present (int16, shape (C, T), physical = int16 × scale)
and `KEY.json` (tags, identity, labels). Beside each tar stands `.idx`: little-endian uint64 offsets of the
samples and of the end of the last one.
"""

import ast
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from manifests.config import digest
from manifests.errors import ConfigError, ContractError

FORMAT_VERSION = 1
SNAPSHOT_FILE = "snapshot.json"
SAMPLES_FILE = "samples.parquet"
KEY_PATTERN = re.compile(r"[a-z0-9_-]{1,96}")
BLOCK = 512

# Column of samples.parquet -> Arrow type. `start` and `length` count samples at rate_num/rate_den.
SAMPLE_COLUMNS: dict[str, str] = {
    "key": "string",
    "shard": "string",
    "ordinal": "int32",
    "offset": "int64",
    "num_bytes": "int64",
    "corpus": "string",
    "subject": "string",
    "recording": "string",
    "session": "string",
    "split": "string",
    "kinds": "list<string>",
    "symbols": "list<string>",
    "num_channels": "int32",
    "start": "int64",
    "length": "int64",
    "rate_num": "int64",
    "rate_den": "int64",
    "quality": "float",
    "stage": "string",
    "classes": "list<string>",
}


def npy_bytes(array: np.ndarray) -> bytes:
    """`.npy` file (format 1.0) of a C-contiguous array; the header is always 128 bytes for our shapes."""
    return _npy_header(array.dtype.str, array.shape) + array.tobytes()


@cache
def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    padding = -(len(header) + 11) % 64
    text = header + " " * padding + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def array_from_npy(buffer: memoryview | bytes) -> np.ndarray:
    """Read-only array over a `.npy` buffer, without a copy."""
    view = memoryview(buffer)
    dtype, shape, begin = npy_layout(view)
    return np.frombuffer(view[begin:], dtype=dtype, count=math.prod(shape)).reshape(shape)


def npy_layout(view: memoryview) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Data type and shape of a `.npy` member, and the byte where its data begin; its header is enough."""
    if bytes(view[:8]) != b"\x93NUMPY\x01\x00":
        raise ContractError("not a .npy member of format 1.0; the shard is damaged or was not written by kymo")
    begin = 10 + int.from_bytes(view[8:10], "little")
    dtype, shape = _parse_header(bytes(view[10:begin]))
    return dtype, shape, begin


@cache
def _parse_header(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    # Cached: the windows of a snapshot share a handful of headers, and literal_eval costs 20 µs.
    fields = ast.literal_eval(header.decode())
    if fields["fortran_order"]:
        raise ContractError("a .npy member in Fortran order; shards hold C order only")
    return np.dtype(fields["descr"]), tuple(fields["shape"])


@lru_cache(maxsize=1024)
def _blank_tar_header(size: int) -> tuple[bytes, int]:
    """Header without a name and without its checksum, and the sum of its bytes: a snapshot has few sizes."""
    header = bytearray(BLOCK)
    header[100:108] = b"0000644\0"
    header[108:116] = b"0000000\0"
    header[116:124] = b"0000000\0"
    header[124:136] = f"{size:011o}\0".encode()
    header[136:148] = b"00000000000\0"
    header[148:156] = b" " * 8
    header[156:157] = b"0"
    header[257:265] = b"ustar\x0000"
    return bytes(header), sum(header)


def _tar_header(name: str, size: int) -> bytes:
    """Header of the ustar format with mtime 0 and a fixed owner."""
    if len(name) > 100:
        raise ContractError(f"member name {name!r}: {len(name)} characters, 100 is the most a ustar header holds")
    blank, total = _blank_tar_header(size)
    raw = name.encode("ascii")
    checksum = f"{total + sum(raw):06o}\0 ".encode()
    return b"".join((raw, blank[len(raw) : 148], checksum, blank[156:]))


def tar_sample(key: str, members: Mapping[str, bytes]) -> bytes:
    """Tar blocks of one sample, members sorted by extension.

    Args:
        key: Globally unique, of the grammar `[a-z0-9_-]{1,96}`, no dots.
        members: Extension (`eeg.npy`, `json`) to content.
    """
    if not KEY_PATTERN.fullmatch(key):
        raise ContractError(f"sample key {key!r}: must match {KEY_PATTERN.pattern}")
    parts: list[bytes] = []
    for extension in sorted(members):
        content = members[extension]
        parts += (_tar_header(f"{key}.{extension}", len(content)), content, bytes(-len(content) % BLOCK))
    return b"".join(parts)


# Two zero blocks end a tar.
TAR_END = bytes(2 * BLOCK)


def parse_sample(buffer: memoryview | bytes) -> tuple[str, dict[str, memoryview]]:
    """Key and members (extension to content) of the tar blocks of one sample, without a copy.

    Raises:
        ContractError: A header that is not ustar, or members of different keys.
    """
    view = memoryview(buffer)
    members: dict[str, memoryview] = {}
    key = ""
    position = 0
    while position < len(view):
        member_key, extension, size = parse_member(view[position : position + BLOCK])
        if key and member_key != key:
            raise ContractError(f"members of {key!r} and {member_key!r} in one sample; the index is wrong")
        key = member_key
        position += BLOCK
        members[extension] = view[position : position + size]
        position += size + (-size % BLOCK)
    return key, members


def parse_member(block: memoryview) -> tuple[str, str, int]:
    """Key, extension and size in bytes of the member that a tar header stands before.

    Raises:
        ContractError: A header that is not ustar.
    """
    header = bytes(block)
    if header[257:262] != b"ustar":
        raise ContractError("no tar header where one of a sample should be; run kymo verify on the snapshot")
    key, _, extension = header[: header.index(b"\0")].decode("ascii").partition(".")
    return key, extension, int(header[124:135], 8)


def index_bytes(offsets: Sequence[int]) -> bytes:
    """`.idx` content: N sample offsets and the end of the last sample, little-endian uint64."""
    return np.asarray(offsets, dtype="<u8").tobytes()


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardEntry(_Strict):
    """One shard: path relative to the snapshot, size, SHA-256, number of samples, unit that wrote it."""

    path: str
    num_bytes: Annotated[int, Field(ge=0)]
    sha256: str
    num_samples: Annotated[int, Field(ge=0)]
    unit: str


class Snapshot(_Strict):
    """`snapshot.json`: the only thing a reader trusts.

    `digest` covers what the samples are (shards, recipe, channel table, format) and not who made them, so
    that the same input gives the same digest on any machine; `provenance` tells the rest.
    """

    format_version: int
    shards: list[ShardEntry]
    corpora: dict[str, dict[str, Any]]
    recipe: dict[str, Any]
    recipe_digest: str
    ucs_version: int
    ucs_digest: str
    samples_sha256: str
    counts: dict[str, int]
    provenance: dict[str, Any] = {}
    digest: str = ""

    def content_digest(self) -> str:
        """SHA-256 (hex) over everything but the provenance and the digest itself."""
        return digest(self.model_dump(mode="json", exclude={"provenance", "digest"}))


def load_snapshot(directory: Path | str) -> Snapshot:
    """Snapshot of a folder, its own digest checked (the shards' are checked by `kymo verify`).

    Raises:
        ContractError: The file was changed after it was written, or is of another format version.
        ConfigError: There is no snapshot in the folder.
    """
    path = (Path(directory) if isinstance(directory, str) else directory) / SNAPSHOT_FILE  # a UPath stays one
    if not path.exists():
        raise ConfigError(f"{directory}: no {SNAPSHOT_FILE}; give a folder that kymo convert has finished")
    try:
        snapshot = Snapshot.model_validate_json(path.read_bytes())
    except ValueError as error:
        raise ContractError(f"{path}: breaks the snapshot format: {error}") from None
    if snapshot.format_version != FORMAT_VERSION:
        raise ContractError(f"{path}: format {snapshot.format_version}, this kymo reads {FORMAT_VERSION}")
    if snapshot.digest != snapshot.content_digest():
        raise ContractError(f"{path}: digest {snapshot.digest[:12]} does not fit its content; restore the file")
    return snapshot
