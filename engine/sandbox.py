"""Conversion of one recording in a child process with a time and a memory limit.

`engine.child` keeps the process and its limits. Windows reach the parent through a spool file of finished tar
blocks, never through a pipe.
"""

import errno
import hashlib
import json
import logging
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from engine.child import Child, line_of
from engine.child import serve as serve_questions
from engine.files import companions, identity_of
from engine.recording import split_member
from engine.rows import Losses
from engine.storage import DISK_ERRORS, output_error
from engine.windows import Sample, window_recording
from manifests.corpora import Corpus
from manifests.errors import ConfigError, ContractError, RecordingError
from manifests.recipes import Recipe
from manifests.shards import npy_bytes, tar_sample

logger = logging.getLogger(__name__)

_MESSAGE_CHARACTERS = 2000
# An operating system's word for an input that cannot be read, now or on this machine.
_INPUT_ERRORS = frozenset(
    {errno.EACCES, errno.EPERM, errno.EIO, errno.ENXIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One recording to convert: corpus and recipe as plain data, paths, and the files to write.

    `identity` is that of the scan (`engine.files.identity_of`); empty: whatever lies there is converted.
    """

    path: Path
    root: Path
    corpus: Corpus
    recipe: Recipe
    spool: Path
    identity: str = ""

    def to_line(self) -> bytes:
        """JSON line for the child."""
        return line_of(
            {
                "path": str(self.path),
                "root": str(self.root),
                "corpus": self.corpus.model_dump_json(),
                "salt": self.corpus.salt.hex(),  # no dump holds it; the pipe is the only way it goes
                "recipe": self.recipe.model_dump_json(),
                "spool": str(self.spool),
                "identity": self.identity,
            }
        )

    @classmethod
    def from_line(cls, line: bytes) -> "Job":
        """Job of a JSON line."""
        data = json.loads(line)
        return cls(
            path=Path(data["path"]),
            root=Path(data["root"]),
            corpus=_corpus(data["corpus"], data["salt"]),
            recipe=_recipe(data["recipe"]),
            spool=Path(data["spool"]),
            identity=data["identity"],
        )


@cache
def _corpus(text: str, salt: str) -> Corpus:
    return Corpus.model_validate_json(text).model_copy(update={"salt": bytes.fromhex(salt)})


@cache
def _recipe(text: str) -> Recipe:
    return Recipe.model_validate_json(text)


def sample_row(key: str, meta: dict[str, Any]) -> dict[str, Any]:
    """Columns of samples.parquet that are known before the sample of a JSON has its place in a shard."""
    tags = [tag for rows in meta["ucs"].values() for tag in rows]
    stages = set(meta["labels"].get("stage", ()))
    return {
        "key": key,
        **{name: meta[name] for name in ("corpus", "subject", "recording", "session", "split")},
        "kinds": list(meta["ucs"]),
        "symbols": [tag["symbol"] for tag in tags],
        "num_channels": len(tags),
        "start": meta["start"],
        "length": meta["length"],
        "rate_num": meta["rate"][0],
        "rate_den": meta["rate"][1],
        "quality": meta["quality"],
        "stage": stages.pop() if len(stages) == 1 and "?" not in stages else None,
        "classes": meta["labels"].get("classes", []),
    }


def encode(sample: Sample) -> bytes:
    """Tar blocks of a sample."""
    members: dict[str, bytes] = {f"{kind}.npy": npy_bytes(array) for kind, array in sample.arrays.items()}
    members["json"] = sample.to_json()
    return tar_sample(sample.key, members)


def _digests(job: Job) -> dict[str, str]:
    """SHA-256 of each file that a recording consists of; a file of many recordings is read once."""
    digests: dict[str, str] = {}
    for path in companions(job.path, job.corpus.reader_of(job.path), job.corpus):
        stat = path.stat()
        once = _sha256_once if split_member(job.path)[1] else _sha256_once.__wrapped__
        digests[path.name] = once(path, stat.st_size, stat.st_mtime_ns)
    return digests


@lru_cache(maxsize=8)
def _sha256_once(path: Path, _size: int, _mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _marks(job: Job) -> list[tuple[str, int, int, int]]:
    """Name, size, date and inode of each file of a recording: whoever writes to one changes its mark."""
    paths = companions(job.path, job.corpus.reader_of(job.path), job.corpus)
    stats = [(path.name, path.stat()) for path in paths]
    return [(name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats]


def _checked_marks(job: Job) -> list[tuple[str, int, int, int]]:
    """Marks of the files, which are those that were scanned.

    With the marks unchanged at the end, the bytes that were scanned, converted and hashed are the same.
    """
    marks = _marks(job)
    if job.identity and identity_of(job.path, job.corpus.reader_of(job.path), job.corpus)[0] != job.identity:
        raise _changed(job)
    return marks


def _changed(job: Job) -> RecordingError:
    return RecordingError(
        "INPUT_CHANGED",
        f"{job.path}: is not the file that was scanned; wait until nobody writes to it and run the same command again",
    )


def convert_recording(job: Job) -> dict[str, Any]:
    """Spool file with the tar blocks of every window; the answer tells rows, places, losses and input digests.

    Raises:
        RecordingError: The recording cannot be used, or is not the one that was scanned.
    """
    marks = _checked_marks(job)
    losses = Losses()
    rows: list[dict[str, Any]] = []
    offset = 0
    with job.spool.open("wb") as file:
        for sample in window_recording(job.path, corpus=job.corpus, recipe=job.recipe, root=job.root, losses=losses):
            block = encode(sample)
            file.write(block)
            rows.append({**sample_row(sample.key, sample.meta), "offset": offset, "num_bytes": len(block)})
            offset += len(block)
    digests = _digests(job)
    if _marks(job) != marks:
        raise _changed(job)
    return {
        "rows": rows,
        "dropped": {reason: count for reason, count in sorted(losses.dropped.items()) if count},
        "unresolved": [[*name, count] for name, count in sorted(losses.unresolved.items())],
        "unmapped": losses.unmapped.total(),
        "unit_suspect": {kind: count for kind, count in sorted(losses.unit_suspect.items()) if count},
        "labels": losses.labels,
        "sha256": digests,
    }


def where_of(error: Exception) -> str:
    """Type of an error and the line that raised it: what may stand in a ledger, for its words may be of a header."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return " ".join([type(error).__name__, *(f"at {Path(frame.filename).name}:{frame.lineno}" for frame in last)])


def guarded(job: Job, convert: Callable[[Job], dict[str, Any]] = convert_recording) -> dict[str, Any]:
    """The answer of `convert`, or `{"error": [reason, message]}`: the one place where a recording's fault ends.

    Errors of kymo's own contracts and configuration pass: they are not this recording's fault.
    """
    try:
        return convert(job)
    except RecordingError as error:
        reason, message = error.reason, str(error)
    except MemoryError:
        reason, message = "MEMORY", f"{job.path}: more memory than memory_limit_gb allows; raise it to convert"
    except (ConfigError, ContractError) as error:
        return {"stop": [type(error).__name__, str(error)]}
    except Exception as error:
        if isinstance(error, OSError) and (error.errno in DISK_ERRORS or error.filename == str(job.spool)):
            return {"stop": ["ConfigError", str(output_error(error, job.spool.parent))]}
        if isinstance(error, FileNotFoundError) and not split_member(job.path)[0].is_file():
            return {"error": ["INPUT_CHANGED", f"{job.path}: {error}; it was there when it was scanned; run again"]}
        if isinstance(error, OSError) and error.errno in _INPUT_ERRORS:
            return {"error": ["UNREADABLE", f"{job.path}: {error}; check its rights and the disk, then run again"]}
        logger.warning("%s: %s", job.path, error, exc_info=True)
        reason, message = "CRASHED", f"{job.path}: {where_of(error)}; the log of the run has its words"
    return {"error": [reason, message[:_MESSAGE_CHARACTERS]]}


class Sandbox(Child):
    """A child process that converts one recording at a time; use as a context manager."""

    def __init__(self, *, time_limit_s: float, memory_limit_gb: float, module: str = "engine.sandbox") -> None:
        super().__init__(time_limit_s=time_limit_s, memory_limit_gb=memory_limit_gb, module=module)

    def convert(self, job: Job) -> dict[str, Any]:
        """Answer for one recording, see `convert_recording`.

        Raises:
            RecordingError: The recording cannot be used, or its decoder crashed or went over a limit.
            ConfigError: The corpus file does not fit the recording.
        """
        return self.ask(job.to_line(), job.path)


def serve(convert: Callable[[Job], dict[str, Any]] = convert_recording) -> None:
    """Child side: convert recordings until the parent is gone."""
    np.fft.rfft(np.zeros(8))  # load what the first recording would load
    serve_questions(lambda line: guarded(Job.from_line(line), convert))


if __name__ == "__main__":
    serve()
