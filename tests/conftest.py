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
from moto.server import ThreadedMotoServer
from upath import UPath

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


@pytest.fixture(scope="module")
def s3() -> Iterator[None]:
    """An S3 server on this machine; its address and keys stand in the environment. Its buckets outlive it."""
    with pytest.MonkeyPatch.context() as patch:
        moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        moto.start()
        host, port = moto.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield
        moto.stop()
        UPath("s3://").fs.clear_instance_cache()
