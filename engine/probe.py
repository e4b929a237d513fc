"""Headers of fragile readers (`engine.read.FRAGILE`), read in a child process so that a scan survives them.

Within `guarded_headers` those readers tell headers, companions and members through the child; a crash or a hang is
an error of one recording. The child starts with the first such question and is replaced after it died.
"""

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from engine.child import Child, line_of, serve
from engine.read import READERS, Reader, alone
from engine.recording import Recording
from manifests.errors import ConfigError, ContractError, RecordingError

logger = logging.getLogger(__name__)

_MODULE = "engine.probe"
_RECORDING = TypeAdapter(Recording)
_DEADLY = frozenset({"CRASHED", "KILLED", "MEMORY", "TIMEOUT"})


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderLimits:
    """Most seconds that one header may take, and most memory in GB that it may add to the process."""

    time_limit_s: float = 600.0
    memory_limit_gb: float = 4.0


class _Probe:
    """Questions to the child, one at a time; a scan on a store asks from several threads."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._lock = threading.Lock()
        self._deadly: dict[Path, RecordingError] = {}

    def ask(self, reader: str, what: str, path: Path, layout: Mapping[str, object] | None = None) -> Any:
        """What a reader tells about a path; a path that has ended the child once is not tried again."""
        with self._lock:
            if path in self._deadly:
                raise self._deadly[path]
            question = {"reader": reader, "what": what, "path": str(path), "layout": dict(layout or {})}
            try:
                answer = self._child.ask(line_of(question), path)
            except RecordingError as error:
                if error.reason in _DEADLY:
                    self._deadly[path] = error
                raise
        if "os_error" in answer:
            raise OSError(*answer["os_error"])
        return answer["told"]

    def guard(self, name: str, reader: Reader) -> Reader:
        """The reader with all that a scan asks answered by the child."""

        def read_header(path: Path, layout: Mapping[str, object]) -> Recording:
            return replace(_RECORDING.validate_python(self.ask(name, "header", path, layout)), path=path)

        def companions(path: Path) -> list[Path]:
            try:
                return [Path(text) for text in self.ask(name, "companions", path)]
            except RecordingError:
                return []  # as readers do with a file that they cannot read; its header tells why

        def members(path: Path, layout: Mapping[str, object]) -> list[str]:
            return list(self.ask(name, "members", path, layout))

        return replace(
            reader,
            read_header=read_header,
            companions=alone if reader.companions is alone else companions,
            members=members if reader.members else None,
        )


@contextmanager
def guarded_headers(limits: HeaderLimits) -> Iterator[None]:
    """Ask fragile readers in a child process, within this process and until the end of the block."""
    if READERS.guard is not None:
        yield
        return
    with Child(time_limit_s=limits.time_limit_s, memory_limit_gb=limits.memory_limit_gb, module=_MODULE) as child:
        READERS.guard = _Probe(child).guard
        try:
            yield
        finally:
            READERS.guard = None


def _tell(what: str, reader: Reader, path: Path, layout: Mapping[str, object]) -> Any:
    match what:
        case "header":
            return _RECORDING.dump_python(reader.read_header(path, layout), mode="json")
        case "companions":
            return [str(name) for name in reader.companions(path)]
        case _:
            return reader.members(path, layout) if reader.members else []


def answer(line: bytes) -> dict[str, Any]:
    """Child side: what a reader tells as plain data, or its error."""
    question = json.loads(line)
    path = Path(question["path"])
    try:
        return {"told": _tell(question["what"], READERS[question["reader"]], path, question["layout"])}
    except RecordingError as error:
        return {"error": [error.reason, str(error)]}
    except MemoryError:
        return {"error": ["MEMORY", f"{path}: its header takes more memory than memory_limit_gb allows"]}
    except (ConfigError, ContractError) as error:
        return {"stop": [type(error).__name__, str(error)]}
    except OSError as error:
        return {"os_error": [error.errno, error.strerror or str(error)]}
    except Exception as error:  # noqa: BLE001 - a decoder's fault costs one recording; its text may hold a name
        return {"error": ["CRASHED", f"{path}: {type(error).__name__} while its header was read"]}


def main(told: Callable[[bytes], dict[str, Any]] = answer) -> None:
    """Child side: answer until the parent is gone."""
    serve(told)


if __name__ == "__main__":
    main()
