"""Fixtures that every package's tests share."""

import importlib.util
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from huggingface_hub import constants
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


def load_beside(name: str) -> ModuleType:
    """A module of this folder, which is no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture
def serve_files() -> Iterator[Callable[[dict[str, bytes]], Any]]:
    """Function that serves files by path on loopback until the test ends; it returns a `fileserver.FileServer`."""
    fileserver = load_beside("fileserver")
    with ExitStack() as running:

        def serve(files: dict[str, bytes]) -> Any:
            server = running.enter_context(fileserver.FileServer(files))
            running.callback(server.shutdown)
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
            return server

        yield serve


@pytest.fixture
def start_hub() -> Iterator[Callable[..., Any]]:
    """Function that starts a model hub on loopback, a `hubserver.Hub`, which ends with the test or by `stop()`."""
    with ExitStack() as running:

        def start(**options: Any) -> Any:
            server = running.enter_context(load_beside("hubserver").Hub(**options))
            running.callback(server.shutdown)
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
            return server

        yield start


@pytest.fixture
def hub(start_hub: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A hub in LFS mode; this process' client has an empty cache, no login, and does not wait before it tries again."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("time.sleep", lambda _: None)
    return start_hub()


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., None]:
    """Runs `function(rank, port, *arguments)` in `world` processes and raises what one of them raised.

    The processes are forked from one that has imported already what takes each of them ten seconds.
    """
    from torch.multiprocessing import start_processes

    slow = ("deepspeed.runtime.zero.muon.muon_optimizer", "torch.distributed.fsdp")
    get_context("forkserver").set_forkserver_preload(["trainer.loop", "adapters.train", "adapters.zero", *slow])

    def run(function: Callable[..., None], *arguments: Any, world: int = 2) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        start_processes(function, args=(port, *arguments), nprocs=world, start_method="forkserver")

    return run


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
