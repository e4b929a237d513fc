"""Conversion of one recording in a child process with a time and a memory limit.

A decoder that crashes, hangs or eats memory costs one recording. The child lives as long as it behaves (starting
it costs as much as hundreds of short recordings) and is replaced after it died. Windows reach the parent through
a spool file of finished tar blocks, never through a pipe. It ends by itself when its parent is gone.

Run as `python -m engine.sandbox FD`: jobs come as JSON lines on stdin, answers go as JSON lines to descriptor FD,
so that a library that prints cannot disturb them.
"""

import contextlib
import ctypes
import errno
import faulthandler
import hashlib
import json
import logging
import os
import queue
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

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

_REPOSITORY = Path(__file__).resolve().parent.parent
_PAGE_BYTES = resource.getpagesize()
_MESSAGE_CHARACTERS = 2000
# An operating system's word for an input that cannot be read, now or on this machine.
_INPUT_ERRORS = frozenset(
    {errno.EACCES, errno.EPERM, errno.EIO, errno.ENXIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN}
)
_FROM_OUTSIDE = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
_GRACE_S = 3.0
_STOPS: dict[str, type[Exception]] = {"ConfigError": ConfigError, "ContractError": ContractError}
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # a converting process has one core


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
        return _line(
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


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


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
        reason, message = "CRASHED", f"{job.path}: {type(error).__name__}: {error}"
    return {"error": [reason, message[:_MESSAGE_CHARACTERS]]}


class _KilledFromOutsideError(Exception):
    """The child died of a signal that no decoder raises itself."""


class Sandbox:
    """A child process that converts one recording at a time; use as a context manager."""

    def __init__(self, *, time_limit_s: float, memory_limit_gb: float, module: str = "engine.sandbox") -> None:
        self._time_limit_s = time_limit_s
        self._memory_limit_bytes = int(memory_limit_gb * 1e9)
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = -1
        self._pending = b""

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    self._process.stdin.close()
            os.close(self._answers)
            self._process = None

    def start(self) -> subprocess.Popen[bytes]:
        """Start the child, which takes about a second of imports; `convert` does it where needed."""
        self._answers, write_end = os.pipe()
        # The child finds the packages where this process found them, in a Ray job's working_dir as in a checkout.
        python_path = os.pathsep.join([str(_REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._pending = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._module, str(write_end), str(self._memory_limit_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[write_end],
            start_new_session=True,  # a terminal's Ctrl-C or a kill of the group is for the job, not the recording
            env={**os.environ, **dict.fromkeys(_THREADS, "1"), "PYTHONPATH": python_path},
        )
        os.close(write_end)
        self._read_line(time.monotonic() + 120.0)  # imports done: the clock of the first recording starts now
        return self._process

    def _read_line(self, deadline: float) -> bytes:
        """Next line of the child, empty when it died; TimeoutError past the deadline."""
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                raise TimeoutError
            block = os.read(self._answers, 1 << 20)
            if not block:
                return b""
            self._pending += block
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def convert(self, job: Job) -> dict[str, Any]:
        """Answer for one recording, see `convert_recording`.

        Raises:
            RecordingError: The recording cannot be used, or its decoder crashed or went over a limit.
            ConfigError: The corpus file does not fit the recording.
        """
        try:
            return self._ask(job)
        except _KilledFromOutsideError:
            # Whoever ends a job kills its processes in any order: if that includes this one it ends here, before
            # it can blame the recording. A recording that eats all memory is killed a second time.
            time.sleep(_GRACE_S)
        try:
            return self._ask(job)
        except _KilledFromOutsideError as error:
            raise RecordingError("CRASHED", f"{job.path}: the decoder was killed twice: {error}") from None

    def _ask(self, job: Job) -> dict[str, Any]:
        process = self._process if self._process is not None else self.start()
        if process.stdin is None:
            raise RuntimeError("the sandbox has no pipe to its child")
        try:
            process.stdin.write(job.to_line())
            process.stdin.flush()
            line = self._read_line(time.monotonic() + self._time_limit_s)
        except TimeoutError:
            self.close()
            raise RecordingError(
                "TIMEOUT", f"{job.path}: not done after time_limit_s = {self._time_limit_s:g} s; raise it to convert"
            ) from None
        except BrokenPipeError:
            line = b""
        if not line:
            code = process.wait()
            self.close()
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            if -code in _FROM_OUTSIDE:
                raise _KilledFromOutsideError(how)
            raise RecordingError("CRASHED", f"{job.path}: the decoder died: {how}")
        answer = json.loads(line)
        if "error" in answer:
            if answer["error"][0] == "MEMORY":
                self.close()  # what it still holds is unknown
            raise RecordingError(*answer["error"])
        if "stop" in answer:
            name, message = answer["stop"]
            raise _STOPS[name](message)
        return answer


def _limit_memory(extra_bytes: int) -> None:
    """Allow this process `extra_bytes` of address space beyond what it has now (Linux; elsewhere no limit)."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        now = int(statm.read_text(encoding="ascii").split()[0]) * _PAGE_BYTES
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = now + extra_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))


def _jobs() -> Iterator[bytes]:
    """Lines of stdin; the process ends at once when the parent closes it, also in the middle of a recording."""
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def feed() -> None:
        for line in sys.stdin.buffer:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=feed, daemon=True).start()
    while True:
        yield lines.get()


def serve(convert: Callable[[Job], dict[str, Any]] = convert_recording) -> None:
    """Child side: answer jobs until the parent is gone."""
    faulthandler.enable()
    answers, extra_bytes = int(sys.argv[1]), int(sys.argv[2])
    np.fft.rfft(np.zeros(8))  # load what the first recording would load
    with os.fdopen(answers, "wb") as file:
        file.write(_line({"ready": os.getpid()}))
        file.flush()
        for line in _jobs():
            _limit_memory(extra_bytes)
            answer = guarded(Job.from_line(line), convert)
            file.write(_line(answer))
            file.flush()
            _release_memory()


def _release_memory() -> None:
    """Give freed memory back to the system, so that the next recording's limit counts from a small base."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    serve()
