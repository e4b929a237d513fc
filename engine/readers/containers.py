"""Arrays in MAT, HDF5, NPZ and NPY files as one tree of names: shapes without values, and only the slices asked.

Nothing here ever unpickles: a pickle runs code of whoever wrote it. A size that a file declares is checked before
anything of that size is allocated.
"""

import re
import struct
import tokenize
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from scipy import io

from manifests.errors import RecordingError

MAX_BYTES = 8 << 30  # of one array that has to be loaded as a whole
_BOMB_BYTES = 64 << 20  # below this no ratio is suspicious
_MATRIX, _COMPRESSED = 14, 15  # types of MAT 5 elements
_COMPLEX = 0x0800  # flag of an array
_BLOCK_BYTES = 1 << 22
_BOMB_RATIO = 200  # signals compress two- to tenfold

_PICKLE = re.compile(rb"\x80[\x02-\x05]|\((?:dp|lp|cnumpy)|cnumpy|\}q|\]q")
_LIBRARY_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    OSError,
    EOFError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    NameError,  # scipy's and numpy's parsers raise these two on damaged bytes
    SyntaxError,
    tokenize.TokenError,
    zlib.error,
    zipfile.BadZipFile,
    struct.error,
    io.matlab.MatReadError,
)

Names = tuple[str, ...]  # from the root of a file to a node


class Container(ABC):
    """A file as a tree: a name leads to further names or to an array. Numbers count from 1, as MATLAB's cells do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def children(self, names: Names) -> list[str]:
        """Names below a node; none below an array of numbers."""

    @abstractmethod
    def shape(self, names: Names) -> tuple[int, ...]:
        """Shape of an array, axes in the order of its writer; its size is checked."""

    @abstractmethod
    def read(self, names: Names, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """Values of an array, or the part that `index` asks for."""

    def texts(self, names: Names) -> list[str]:
        """Texts of an array of texts or numbers, or of a MATLAB cell of texts."""
        values = np.asarray(self.read(names))
        return [_text(value) for value in values.ravel(order="F")]

    def attribute(self, names: Names, name: str) -> object | None:  # noqa: ARG002 - only HDF5 has attributes
        """Attribute of a node, or else of the nearest node above it that has it."""
        return None


@contextmanager
def opened(path: Path) -> Iterator[Container]:
    """Container of a file by its content; whatever its library says about a damaged file becomes one error.

    Raises:
        RecordingError: `NOT_A_RECORDING`, `FORMAT_UNSUPPORTED`, `HEADER_INVALID` or `SIGNAL_INVALID`.
    """
    try:
        stat = path.stat()
        container = _hdf5(path) or _open(path, stat.st_size, stat.st_mtime_ns)
    except _LIBRARY_ERRORS as error:
        raise RecordingError("NOT_A_RECORDING", f"{path}: no readable array file: {_said(error)}") from error
    try:
        yield container
    except _LIBRARY_ERRORS as error:
        raise RecordingError("SIGNAL_INVALID", f"{path}: {_said(error)}") from error
    finally:
        if isinstance(container, _Hdf5):
            container.close()


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def _hdf5(path: Path) -> Container | None:
    if not h5py.is_hdf5(path):
        return None
    with path.open("rb") as stream:
        return _Hdf5(path, is_matlab=stream.read(10) == b"MATLAB 7.3")


@lru_cache(maxsize=1)  # a MAT variable is loaded as a whole, and the recordings in it are read one after another
def _open(path: Path, _size: int, _mtime_ns: int) -> Container:
    with path.open("rb") as stream:
        start = stream.read(128)
    if start.startswith(b"PK\x03\x04"):
        return _Numpy(path, zipped=True)
    if start.startswith(b"\x93NUMPY"):
        return _Numpy(path, zipped=False)
    if start.startswith(b"MATLAB 5.0") or (path.suffix.lower() == ".mat" and start[:4] != b"vers"):
        return _Mat(path)
    if _PICKLE.match(start):
        raise RecordingError(
            "FORMAT_UNSUPPORTED",
            f"{path}: a Python pickle; loading one runs code of its writer, so kymo never unpickles: "
            "take the corpus' MAT version, or save the arrays as NPZ or HDF5",
        )
    raise RecordingError("NOT_A_RECORDING", f"{path}: neither MAT, HDF5, NPZ nor NPY; it begins with {start[:8]!r}")


def _check_size(path: Path, what: str, declared: int, stored: int) -> None:
    """Refuse an array before it is allocated."""
    if declared > _BOMB_BYTES and declared > _BOMB_RATIO * max(1, stored):
        raise RecordingError(
            "HEADER_INVALID",
            f"{path}: {what} declares {declared} bytes in {stored} stored ones; no signal compresses "
            f"{_BOMB_RATIO}-fold: a decompression bomb or a damaged header",
        )
    if declared > MAX_BYTES:
        raise RecordingError(
            "FORMAT_UNSUPPORTED",
            f"{path}: {what} takes {declared} bytes at once, at most {MAX_BYTES} are read; split it into recordings",
        )


def _text(value: Any) -> str:
    while isinstance(value, np.ndarray) and value.size:
        value = value.flat[0] if value.size == 1 else "".join(str(item) for item in value.ravel())
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace").strip()
    return "" if isinstance(value, np.ndarray) else str(value).strip()


def _numbers(path: Path, names: Sequence[str], values: np.ndarray) -> np.ndarray:
    if values.dtype.kind not in "fiubUSO":
        raise RecordingError("HEADER_INVALID", f"{path}: {'/'.join(names)} holds {values.dtype}, expected real numbers")
    return values


class _Hdf5(Container):
    """HDF5, and MATLAB 7.3, whose arrays lie there with their axes turned round and whose cells are references."""

    def __init__(self, path: Path, *, is_matlab: bool) -> None:
        super().__init__(path)
        self._file = h5py.File(path, "r")
        self._turned = is_matlab
        self._datasets: dict[Names, h5py.Dataset] = {}
        self._shapes: dict[Names, tuple[int, ...]] = {}

    def close(self) -> None:
        self._file.close()

    def _node(self, names: Names) -> h5py.Group | h5py.Dataset:
        node: Any = self._file
        for position, name in enumerate(names):
            if isinstance(node, h5py.Dataset):  # a cell array of references
                node = self._file[node[()].ravel()[int(name) - 1]]
                continue
            link = node.get(name, getlink=True)
            if link is None:
                raise RecordingError("HEADER_INVALID", f"{self.path}: no {'/'.join(names[: position + 1])!r} in it")
            if isinstance(link, h5py.ExternalLink):
                raise RecordingError("FORMAT_UNSUPPORTED", f"{self.path}: {name!r} is a link to another file")
            node = node[name]
        return node

    def children(self, names: Names) -> list[str]:
        node = self._node(names)
        if isinstance(node, h5py.Dataset):
            return [str(1 + i) for i in range(node.size or 0)] if h5py.check_ref_dtype(node.dtype) else []
        return [
            name for name in map(str, node) if not name.startswith("#")
        ]  # MATLAB keeps what cells refer to in #refs#

    def shape(self, names: Names) -> tuple[int, ...]:
        if names not in self._shapes:
            shape = self._dataset(names).shape
            self._shapes[names] = shape[::-1] if self._turned else shape
        return self._shapes[names]

    def _dataset(self, names: Names) -> h5py.Dataset:
        if names not in self._datasets:
            self._datasets[names] = self._checked(names)
        return self._datasets[names]

    def _checked(self, names: Names) -> h5py.Dataset:
        node = self._node(names)
        if not isinstance(node, h5py.Dataset):
            raise RecordingError("HEADER_INVALID", f"{self.path}: {'/'.join(names)} is a group, expected an array")
        if node.is_virtual or node.external:
            raise RecordingError("FORMAT_UNSUPPORTED", f"{self.path}: {'/'.join(names)} keeps its values elsewhere")
        declared = (node.size or 0) * node.dtype.itemsize
        if declared > _BOMB_BYTES:
            stored = node.id.get_storage_size()
            _check_size(self.path, "/".join(names), min(declared, MAX_BYTES), stored)  # it is read in slices
        return node

    def read(self, names: Names, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        dataset = self._dataset(names)
        full = (*index, *[slice(None)] * (len(dataset.shape) - len(index)))
        counts = [
            len(range(*part.indices(size))) if isinstance(part, slice) else 1
            for part, size in zip(full[::-1] if self._turned else full, dataset.shape, strict=True)
        ]
        _check_size(self.path, "/".join(names), int(np.prod(counts, dtype=object)) * dataset.dtype.itemsize, MAX_BYTES)
        values = np.asarray(dataset[full[::-1] if self._turned else full])
        if h5py.check_ref_dtype(dataset.dtype):
            raise RecordingError("HEADER_INVALID", f"{self.path}: {'/'.join(names)} is a cell array; number its parts")
        return _numbers(self.path, names, values.T if self._turned else values)

    def texts(self, names: Names) -> list[str]:
        node = self._dataset(names)
        if h5py.check_ref_dtype(node.dtype):
            parts: list[Any] = [self._file[ref] for ref in node[()].ravel()]
            return ["".join(map(chr, np.asarray(part).ravel().tolist())) for part in parts]
        if self._turned and node.attrs.get("MATLAB_class") == b"char":
            return ["".join(map(chr, np.asarray(node[()]).ravel().tolist()))]
        return super().texts(names)

    def attribute(self, names: Names, name: str) -> object | None:
        for depth in range(len(names), -1, -1):
            attributes = self._node(names[:depth]).attrs
            if name in attributes:
                value = np.asarray(attributes[name])
                return _text(value) if value.dtype.kind in "SUO" else value.ravel()[0].item()
        return None


class _Numpy(Container):
    """NPZ, and NPY under the name of its stem."""

    def __init__(self, path: Path, *, zipped: bool) -> None:
        super().__init__(path)
        self._zipped = zipped
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._last: tuple[str, np.ndarray] | None = None
        if not zipped:
            with path.open("rb") as stream:
                self._shapes[path.stem] = self._header(path.stem, stream, path.stat().st_size)
            return
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.filename.endswith(".npy"):
                    with archive.open(info) as stream:
                        name = info.filename.removesuffix(".npy")
                        self._shapes[name] = self._header(name, stream, info.compress_size)

    def _header(self, name: str, stream: Any, stored: int) -> tuple[int, ...]:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
        if dtype.hasobject:
            raise RecordingError("FORMAT_UNSUPPORTED", f"{self.path}: {name} holds pickled objects; save plain arrays")
        _check_size(self.path, name, int(np.prod(shape, dtype=object)) * dtype.itemsize, stored)
        return tuple(shape)

    def children(self, names: Names) -> list[str]:
        return [] if names else list(self._shapes)

    def shape(self, names: Names) -> tuple[int, ...]:
        if "/".join(names) not in self._shapes:
            raise RecordingError(
                "HEADER_INVALID", f"{self.path}: no array {'/'.join(names)!r}; it holds {sorted(self._shapes)}"
            )
        return self._shapes["/".join(names)]

    def read(self, names: Names, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        self.shape(names)
        name = "/".join(names)
        if not self._zipped:
            return _numbers(self.path, names, np.load(self.path, mmap_mode="r", allow_pickle=False)[index])
        if self._last is None or self._last[0] != name:
            with np.load(self.path, allow_pickle=False) as archive:
                self._last = (name, archive[name])
        return _numbers(self.path, names, self._last[1][index])


class _Mat(Container):
    """MATLAB up to version 7: a variable is loaded as a whole, its shape is known before."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._is_checked = False
        _check_mat_elements(path)
        self._top = {name: (shape, kind) for name, shape, kind in io.whosmat(path)}
        self._last: tuple[str, Any] | None = None

    def _variable(self, name: str) -> Any:
        if name not in self._top:
            raise RecordingError("HEADER_INVALID", f"{self.path}: no variable {name!r}; it holds {sorted(self._top)}")
        if self._last is None or self._last[0] != name:
            if not self._is_checked:
                _check_streams(self.path)
                self._is_checked = True
            self._last = None  # let go of it before the next one comes
            self._last = (name, io.loadmat(self.path, variable_names=[name])[name])
        return self._last[1]

    def _node(self, names: Names) -> Any:
        node = self._variable("".join(names[:1]))
        for position, name in enumerate(names[1:], start=2):
            node = _mat_step(node, name)
            if node is None:
                raise RecordingError("HEADER_INVALID", f"{self.path}: no {'/'.join(names[:position])!r} in it")
        return node

    def children(self, names: Names) -> list[str]:
        if not names:
            return list(self._top)
        node = self._node(names)
        if node.dtype.names and node.size == 1:
            return list(node.dtype.names)
        return [str(1 + i) for i in range(node.size)] if node.dtype == object or node.dtype.names else []

    def shape(self, names: Names) -> tuple[int, ...]:
        name = names[0] if names else ""
        if len(names) > 1 or name not in self._top:
            return self._node(names).shape
        shape, kind = self._top[name]
        width = {"double": 8, "int64": 8, "uint64": 8, "single": 4, "int32": 4, "uint32": 4, "int16": 2, "uint16": 2}
        num_bytes = int(np.prod(shape, dtype=object)) * width.get(kind, 1)
        _check_size(self.path, name, num_bytes, self.path.stat().st_size)
        return tuple(shape)

    def read(self, names: Names, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        self.shape(names[:1])
        return _numbers(self.path, names, self._node(names)[index])


def _mat_step(node: Any, name: str) -> Any:
    """Field of a struct, or part of a cell or struct array by its number; None where there is none."""
    if name.isdecimal() and (node.dtype == object or node.dtype.names):
        parts = node.reshape(-1, order="F")
        if not 1 <= int(name) <= parts.size:
            return None
        part = parts[int(name) - 1]
        return part if node.dtype == object else np.asarray(part)
    if node.dtype == object and node.size == 1:
        return _mat_step(node.flat[0], name)
    if node.dtype.names and name in node.dtype.names and node.size == 1:
        return node.flat[0][name]
    return None


def _check_mat_elements(path: Path) -> None:
    """Compare the size that each compressed element of a MAT 5 file declares with the bytes that it has.

    Source: MATLAB "MAT-File Format", level 5: a tag of type and byte count before each element.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(128)
        if len(head) < 128 or head[126:128] not in {b"IM", b"MI"}:
            return  # version 4, which is never compressed
        order = "<" if head[126:128] == b"IM" else ">"
        total = 0
        while len(tag := stream.read(8)) == 8:
            kind, count = struct.unpack(f"{order}II", tag)
            here = stream.tell()
            if here + count > size:
                raise RecordingError(
                    "TRUNCATED", f"{path}: an element of {count} bytes at byte {here} of {size}: the file is cut off"
                )
            if kind == _COMPRESSED:
                inner = zlib.decompressobj().decompress(stream.read(min(count, 4096)), 8)
                total += struct.unpack(f"{order}II", inner)[1] if len(inner) == 8 else 0
            stream.seek(here + count)
        _check_size(path, "the file", total, size)


def _check_streams(path: Path) -> None:
    """Unpack the compressed elements of a MAT 5 file once, so that their checksums vouch for them.

    SciPy parses a stream before it has come to the checksum, and crashes the process on some damaged ones.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(128)
        order = {b"IM": "<", b"MI": ">"}.get(head[126:128])
        while order and stream.tell() < size:
            kind, count = struct.unpack(f"{order}II", stream.read(8))
            end = stream.tell() + count
            if kind == _MATRIX and count >= 16 and struct.unpack(f"{order}4I", stream.read(16))[2] & _COMPLEX:
                raise RecordingError("SIGNAL_INVALID", f"{path}: the array before byte {end} says it is complex")
            unpacker = zlib.decompressobj()
            while kind == _COMPRESSED and not unpacker.eof:
                block = unpacker.unconsumed_tail or stream.read(min(_BLOCK_BYTES, end - stream.tell()))
                if not block:
                    raise RecordingError("SIGNAL_INVALID", f"{path}: the element that ends at byte {end} is incomplete")
                unpacker.decompress(block, _BLOCK_BYTES)
            stream.seek(end)
