"""`kymo submit` against a real Ray head on loopback, which the test starts and ends."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from jobs import submit
from manifests.errors import ConfigError


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _end(head: subprocess.Popen[bytes]) -> None:
    """End the head and every process below it; some change their title, so the tree is taken first."""
    family = psutil.Process(head.pid).children(recursive=True)
    head.send_signal(signal.SIGTERM)
    try:
        head.wait(20)
    except subprocess.TimeoutExpired:
        head.kill()
    for process in family:
        if process.is_running():
            process.kill()
    psutil.wait_procs(family, timeout=10)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Job server of a Ray head that asks for a token."""
    token = "0123456789abcdef" * 4
    port, dashboard = _free_port(), _free_port()
    with (
        tempfile.TemporaryDirectory(prefix="kr", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_AUTH_TOKEN", token)
        patch.delenv("RAY_ADDRESS", raising=False)
        command = ["-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
        command += [f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        command += [f"--temp-dir={folder}", "--num-cpus=1", "--disable-usage-stats", "--include-dashboard=true"]
        log = Path(folder) / "head.log"
        with log.open("wb") as file:
            environment = {**os.environ, "RAY_AUTH_MODE": "token"}
            head = subprocess.Popen([sys.executable, *command], stdout=file, stderr=file, env=environment)
        try:
            url = f"http://127.0.0.1:{dashboard}"
            deadline = time.monotonic() + 90
            while True:
                try:
                    submit.connect(url)
                    break
                except ConfigError:
                    assert head.poll() is None, log.read_text()
                    assert time.monotonic() < deadline, log.read_text()
                    time.sleep(0.5)
            yield url
        finally:
            _end(head)


async def _log(client: submit.JobSubmissionClient, job: str) -> str:
    return "".join([text async for text in submit.follow(client, job)])


def test_a_submitted_verb_runs_on_the_cluster_and_its_exit_code_comes_back(address: str) -> None:
    client = submit.connect(address)
    job = submit.submit(client, ["--help"], name="help-1", python=sys.executable)
    assert "pretrain" in asyncio.run(_log(client, job))
    assert submit.exit_code(client, job) == 0

    with pytest.raises(ConfigError, match="submitted before"):
        submit.submit(client, ["--help"], name="help-1", python=sys.executable)

    job = submit.submit(client, ["pretrain", "absent.yaml"], python=sys.executable)
    assert "absent.yaml: cannot be read" in asyncio.run(_log(client, job)).replace("\n", "")
    assert submit.exit_code(client, job) == 2


def test_a_wrong_token_is_said_clearly(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN"):
        submit.connect(address)


def test_nobody_at_the_address_is_said_clearly() -> None:
    with pytest.raises(ConfigError, match="no job server answers"):
        submit.connect(f"http://127.0.0.1:{_free_port()}")
