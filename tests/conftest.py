"""Fixtures that every package's tests share."""

import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The same examples on every machine: what fails once fails again. tests/engine/fuzz_edf_header.py seeks new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real recordings beside the checkout; its tests skip where it is absent."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real recordings at {folder}")
    return folder


@pytest.fixture
def serve_files() -> Iterator[Callable[[dict[str, bytes]], Any]]:
    """Function that serves files by path on loopback until the test ends; it returns a `fileserver.FileServer`."""
    spec = importlib.util.spec_from_file_location("fileserver", Path(__file__).with_name("fileserver.py"))
    assert spec is not None
    assert spec.loader is not None
    fileserver = importlib.util.module_from_spec(spec)
    sys.modules["fileserver"] = fileserver
    spec.loader.exec_module(fileserver)
    with ExitStack() as running:

        def serve(files: dict[str, bytes]) -> Any:
            server = running.enter_context(fileserver.FileServer(files))
            running.callback(server.shutdown)
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
            return server

        yield serve
