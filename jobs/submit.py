"""`kymo submit`: run any verb as a job of a Ray cluster."""

import os
import shlex
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from manifests.errors import ConfigError

# Never shipped: results, environments, version history, real recordings.
EXCLUDES = [".git/", ".venv/", "demo/", "runs/", "shared/", "*.tar", "*.edf"]
AGENT_PATIENCE_S = 60.0


def connect(address: str) -> JobSubmissionClient:
    """Client of a cluster's job server.

    Ray 2.60 clusters ask for a token by default. Ray's own client sends one only when RAY_AUTH_MODE=token stood in
    the environment before ray was imported, so the header is given here.

    Raises:
        ConfigError: Nobody answers at the address, or the token is refused.
    """
    token = read_token()
    try:
        return JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"} if token else None)
    except (ConnectionError, RuntimeError, AuthenticationError) as error:
        raise ConfigError(
            f"{address}: no job server answers ({str(error).splitlines()[0]}); give the dashboard's address, "
            "e.g. http://127.0.0.1:8265, and for a cluster with authentication its token in RAY_AUTH_TOKEN"
        ) from None


def read_token() -> str:
    """Token of the cluster from where Ray keeps it: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token; or none."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def submit(
    client: JobSubmissionClient, arguments: Sequence[str], *, name: str | None = None, python: str = "python"
) -> str:
    """Id of the job that runs `kymo ARGUMENTS` on the cluster; the repository goes along as working_dir.

    Args:
        client: Of `connect`.
        arguments: Verb, its configuration and overrides; paths must exist on the cluster.
        name: Submission id. The same name twice is refused by Ray, so it is safe to repeat a command.
        python: Interpreter on the cluster; a path when `python` there is not the one with kymo's dependencies.
    """
    deadline = time.monotonic() + AGENT_PATIENCE_S
    while True:
        try:
            return client.submit_job(
                entrypoint=f"{shlex.quote(python)} -m jobs.cli {shlex.join(arguments)}",
                submission_id=name,
                runtime_env={"working_dir": str(Path(__file__).resolve().parent.parent), "excludes": EXCLUDES},
                metadata={"kymo": " ".join(arguments)[:200]},
            )
        except RuntimeError as error:
            if name and "already exists" in str(error):
                raise ConfigError(f"--name {name}: a job of this name was submitted before; choose another") from None
            # A cluster that has just come up takes jobs some seconds after its dashboard answers.
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(1.0)


async def follow(client: JobSubmissionClient, job: str) -> AsyncIterator[str]:
    """Log text of a job as it comes, until the job ends."""
    async for text in client.tail_job_logs(job):
        yield text


def exit_code(client: JobSubmissionClient, job: str) -> int:
    """Exit code of an ended job's driver."""
    if client.get_job_status(job) == JobStatus.SUCCEEDED:
        return 0
    return client.get_job_info(job).driver_exit_code or 1
