"""The fragments in the files of a checkpoint, whatever world size wrote them: only the bytes that are asked for."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

from manifests.errors import ContractError
from trainer.storage import is_remote, read_ranges, sizes_in

SEPARATOR = "::"
_BATCH_BYTES = 256 * 2**20  # of one round of requests to a store
_NUM_PREFIX_BYTES = 8  # of a safetensors file, with the length of its header


class _File(Protocol):
    def metadata(self) -> dict[str, str]: ...

    def read(self, wanted: Sequence[tuple[str, slice, torch.Tensor]]) -> None:
        """Copy ranges of 1-D tensors by name into tensors."""


class _LocalFile:
    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(path, framework="pt")  # mapped: what is not asked for is not read

    def metadata(self) -> dict[str, str]:
        return self._file.metadata()

    def read(self, wanted: Sequence[tuple[str, slice, torch.Tensor]]) -> None:
        for key, there, target in wanted:
            target.copy_(self._file.get_slice(key)[there])


class _StoredFile:
    """A safetensors file in an object store, read by ranges. Source: the format's description of safetensors."""

    def __init__(self, path: Path) -> None:
        self._path = path
        (prefix,) = read_ranges(path, [(0, _NUM_PREFIX_BYTES)])
        num_bytes = int.from_bytes(prefix, "little")
        (header,) = read_ranges(path, [(_NUM_PREFIX_BYTES, num_bytes)])
        self._begin = _NUM_PREFIX_BYTES + num_bytes
        try:
            self._header: dict[str, Any] = json.loads(header)
        except ValueError as error:
            raise ContractError(f"{path}: not a safetensors file ({error}); delete the checkpoint") from None

    def metadata(self) -> dict[str, str]:
        return self._header["__metadata__"]

    def read(self, wanted: Sequence[tuple[str, slice, torch.Tensor]]) -> None:
        batch: list[tuple[tuple[int, int], torch.Tensor]] = []
        size = 0
        for key, there, target in wanted:
            entry = self._header[key]
            if entry["dtype"] != "F32":
                raise ContractError(f"{self._path}: {key} is {entry['dtype']}, F32 is expected; delete the checkpoint")
            length = 4 * (there.stop - there.start)
            batch.append(((self._begin + entry["data_offsets"][0] + 4 * there.start, length), target))
            size += length
            if size >= _BATCH_BYTES:
                self._fetch(batch)
                batch, size = [], 0
        self._fetch(batch)

    def _fetch(self, batch: Sequence[tuple[tuple[int, int], torch.Tensor]]) -> None:
        if not batch:
            return
        for content, (_, target) in zip(read_ranges(self._path, [place for place, _ in batch]), batch, strict=True):
            target.copy_(torch.frombuffer(bytearray(content), dtype=torch.float32))


class Pieces:
    """Context in which values are asked for; when it is left they have been read.

    Raises:
        ContractError: The files do not cover a parameter.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._wanted: dict[str, list[tuple[str, slice, torch.Tensor]]] = {}
        names = sorted(name for name in sizes_in(path) if name.startswith("zero_"))
        self._files: dict[str, _File] = {
            name: (_StoredFile if is_remote(path) else _LocalFile)(path / name) for name in names
        }
        self._index: dict[str, list[tuple[str, int, int, float]]] = {}
        for file, opened in self._files.items():
            for name, (start, numel, step) in json.loads(opened.metadata()["fragments"]).items():
                self._index.setdefault(name, []).append((file, start, numel, step))

    def __enter__(self) -> "Pieces":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            for file, wanted in self._wanted.items():
                self._files[file].read(wanted)
        self._files.clear()  # the last reference unmaps a file

    def want(self, state: str, name: str, start: int, target: torch.Tensor) -> float:
        """Have `target` filled with a state of the flattened parameter `name` from `start` on; return Adam's step."""
        covered, adam_step = 0, 0.0
        numel = target.numel()
        for file, piece_start, piece_numel, step in self._index.get(name, ()):
            low, high = max(start, piece_start), min(start + numel, piece_start + piece_numel)
            if low < high:
                there = slice(low - piece_start, high - piece_start)
                place = (f"{state}{SEPARATOR}{name}", there, target[low - start : high - start])
                self._wanted.setdefault(file, []).append(place)
                covered += high - low
                adam_step = step
        if covered != numel:
            raise ContractError(f"{self._path}: {covered} of {numel} values of {name} from {start} on")
        return adam_step
