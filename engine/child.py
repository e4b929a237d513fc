"""A child process that answers one question at a time, with a time and a memory limit for each.

A decoder that crashes, hangs or eats memory costs one recording. The child lives as long as it behaves (starting
it costs as much as hundreds of short recordings) and is replaced after it died. It ends by itself when its parent
is gone.

A module that is run as a child calls `serve`; `python -m MODULE FD BYTES` then gets questions as lines on stdin, and
answers JSON lines to descriptor FD, so that a library that prints cannot disturb them.
"""

import contextlib
import ctypes
import faulthandler
import json
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
from pathlib import Path
from typing import Any, Self

from manifests.errors import ConfigError, ContractError, RecordingError

_REPOSITORY = Path(__file__).resolve().parent.parent
_PAGE_BYTES = resource.getpagesize()
_FROM_OUTSIDE = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
_GRACE_S = 3.0
_START_LIMIT_S = 120.0
_NUM_TRIES = 3  # of a start: imports are no recording's work
_STOPS: dict[str, type[Exception]] = {"ConfigError": ConfigError, "ContractError": ContractError}
# Whole channels come and go: glibc would map and unmap each, and page faults cost a third of a night's CPU time.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(4 << 30)}
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # a converting process has one core


class _KilledFromOutsideError(Exception):
    """The child died of a signal that no decoder raises itself."""


class Child:
    """A process that answers questions about recordings; use as a context manager, it starts when it is needed."""

    def __init__(self, *, time_limit_s: float, memory_limit_gb: float, module: str) -> None:
        self._time_limit_s = time_limit_s
        self._memory_limit_bytes = int(memory_limit_gb * 1e9)
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = -1
        self._pending = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    self._process.stdin.close()
            os.close(self._answers)
            self._process = None

    def start(self) -> subprocess.Popen[bytes]:
        """Start the process, which takes about a second of imports; `ask` does it where needed.

        Raises:
            RecordingError: `KILLED`: it was killed from outside each time that it started.
            ConfigError: It ends by itself before it is ready, or is not ready in time.
        """
        how = ""
        for _ in range(_NUM_TRIES):
            process = self._spawn()
            try:
                if self._read_line(time.monotonic() + _START_LIMIT_S):
                    return process  # imports done: the clock of the first recording starts now
                how = _how_it_died(process)
            except TimeoutError:
                self.close()
                raise ConfigError(
                    f"python -m {self._module}: not ready after {_START_LIMIT_S:g} s of imports; the machine or the "
                    "disk with the packages hangs; run the same command again"
                ) from None
            except _KilledFromOutsideError as error:
                how = str(error)
                self.close()
                time.sleep(_GRACE_S)
                continue
            self.close()
            raise ConfigError(
                f"python -m {self._module}: ended while it started ({how}); its words stand above; mend what it lacks"
            )
        raise RecordingError("KILLED", f"{self._module}: killed from outside at each start ({how}); run again")

    def _spawn(self) -> subprocess.Popen[bytes]:
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
            env={**os.environ, **_MALLOC, **dict.fromkeys(_THREADS, "1"), "PYTHONPATH": python_path},
        )
        os.close(write_end)
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

    def ask(self, question: bytes, path: Path) -> dict[str, Any]:
        """Answer to a question about the recording at `path`.

        Raises:
            RecordingError: The recording cannot be used, or its decoder crashed or went over a limit; `KILLED` where
                somebody else ended the process twice.
            ConfigError: What the answer names as no fault of the recording.
        """
        try:
            return self._ask(question, path)
        except _KilledFromOutsideError:
            # Whoever ends a job kills its processes in any order: if that includes this one it ends here, before
            # it can blame the recording. A recording that eats all memory is killed a second time.
            time.sleep(_GRACE_S)
        try:
            return self._ask(question, path)
        except _KilledFromOutsideError as error:
            raise RecordingError(
                "KILLED",
                f"{path}: its process was killed twice from outside ({error}), perhaps for want of memory; run again, "
                "with fewer num_cpus or a lower memory_limit_gb if it comes back",
            ) from None

    def _ask(self, question: bytes, path: Path) -> dict[str, Any]:
        process = self._process if self._process is not None else self.start()
        if process.stdin is None:
            raise RuntimeError("the child has no pipe")
        try:
            process.stdin.write(question)
            process.stdin.flush()
            line = self._read_line(time.monotonic() + self._time_limit_s)
        except TimeoutError:
            self.close()
            raise RecordingError(
                "TIMEOUT", f"{path}: not done after time_limit_s = {self._time_limit_s:g} s; raise it to convert"
            ) from None
        except BrokenPipeError:
            line = b""
        if not line:
            try:
                how = _how_it_died(process)
            finally:
                self.close()
            raise RecordingError("CRASHED", f"{path}: the decoder died: {how}")
        answer = json.loads(line)
        if "error" in answer:
            if answer["error"][0] == "MEMORY":
                self.close()  # what it still holds is unknown
            raise RecordingError(*answer["error"])
        if "stop" in answer:
            name, message = answer["stop"]
            raise _STOPS[name](message)
        return answer


def _how_it_died(process: subprocess.Popen[bytes]) -> str:
    """Signal or exit code of a process that is gone; `_KilledFromOutsideError` where somebody else ended it."""
    code = process.wait()
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    if -code in _FROM_OUTSIDE:
        raise _KilledFromOutsideError(how)
    return how


def line_of(value: dict[str, Any]) -> bytes:
    """A question or answer as one line."""
    return json.dumps(value).encode() + b"\n"


def _limit_memory(extra_bytes: int) -> None:
    """Allow this process `extra_bytes` of address space beyond what it has now (Linux; elsewhere no limit)."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        now = int(statm.read_text(encoding="ascii").split()[0]) * _PAGE_BYTES
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = now + extra_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))


def _questions() -> Iterator[bytes]:
    """Lines of stdin; the process ends at once when the parent closes it, also in the middle of a recording."""
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def feed() -> None:
        for line in sys.stdin.buffer:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=feed, daemon=True).start()
    while True:
        yield lines.get()


def serve(answer: Callable[[bytes], dict[str, Any]]) -> None:
    """Child side: answer questions until the parent is gone."""
    faulthandler.enable()
    answers, extra_bytes = int(sys.argv[1]), int(sys.argv[2])
    with os.fdopen(answers, "wb") as file:
        file.write(line_of({"ready": os.getpid()}))
        file.flush()
        for line in _questions():
            _limit_memory(extra_bytes)
            file.write(line_of(answer(line)))
            file.flush()
            _release_memory()


def _release_memory() -> None:
    """Give freed memory back to the system, so that the next recording's limit counts from a small base."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
