"""Verbs about the machine: doctor, submit, demo."""

import asyncio
from pathlib import Path

import typer
from rich.text import Text

from jobs.console import console, show_table


def doctor(folder: Path = typer.Argument(Path(), help="Where runs will be written.")) -> None:
    """Check Python, torch and its device, Ray, DeepSpeed, disk and memory.

    Example: kymo doctor
    """
    from jobs.doctor import examine

    checks = examine(folder)
    marks = {True: Text("ok", "green"), False: Text("FAILS", "red")}
    show_table("kymo doctor", ("check", "", "found"), [(c.name, marks[c.ok], c.found) for c in checks])
    failures = [check for check in checks if not check.ok]
    for check in failures:
        console.print(f"[red]{check.name}[/]: {check.advice}", soft_wrap=True)
    if failures:
        raise typer.Exit(1)
    console.print("This machine can run kymo. Next: kymo demo")


def submit(
    arguments: list[str] = typer.Argument(help="A verb with its arguments; paths as the cluster sees them."),
    address: str = typer.Option("http://127.0.0.1:8265", help="Job server, i.e. the dashboard's address."),
    name: str | None = typer.Option(None, help="Submission id; the same name twice is refused."),
    python: str = typer.Option("python", help="Interpreter on the cluster that has kymo's dependencies."),
    wait: bool = typer.Option(True, help="Follow the log and end with the job's exit code."),
) -> None:
    """Run a verb as a job of a Ray cluster.

    Example: kymo submit --address http://head:8265 -- pretrain /nfs/runs/sleep.yaml steps=20000
    """
    from jobs import submit as jobs_submit

    client = jobs_submit.connect(address)
    job = jobs_submit.submit(client, arguments, name=name, python=python)
    console.print(f"submitted [bold]{job}[/] to {address}")
    if not wait:
        return

    async def show() -> None:
        async for text in jobs_submit.follow(client, job):
            console.print(text, end="", markup=False, highlight=False, soft_wrap=True)

    asyncio.run(show())
    raise typer.Exit(jobs_submit.exit_code(client, job))


def demo(
    out: Path = typer.Option(Path("demo"), help="Folder for everything that the demo makes."),
    data: Path | None = typer.Option(None, help="Real recordings instead of synthetic ones (shared/data)."),
) -> None:
    """Recordings → shards → two pretrainings → adapters → bundle → prediction → report.

    Example: kymo demo --out demo
    """
    from jobs.demo import run_demo

    run_demo(out, data=data)
