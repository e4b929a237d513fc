"""`kymo doctor`: is this machine fit to run kymo, and what to do where it is not."""

import importlib
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

GIB = 2**30
MIN_DISK_GIB = 5
MIN_MEMORY_GIB = 4
MIN_TORCH = (2, 11)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the report; `advice` is empty when nothing needs doing."""

    name: str
    ok: bool
    found: str
    advice: str = ""


def check_python() -> Check:
    """Interpreter of 3.11 or later."""
    ok = sys.version_info >= (3, 11)
    return Check(
        name="Python", ok=ok, found=platform.python_version(), advice="" if ok else "install Python 3.11 or 3.12"
    )


def check_torch() -> Check:
    """Torch of 2.11 or later that computes on its device."""
    try:
        torch = importlib.import_module("torch")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        product = float((torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)).sum())
    except (ImportError, OSError, RuntimeError) as error:
        advice = "pip install -c constraints.txt torch; with a GPU: does the driver fit torch's CUDA?"
        return Check(name="torch", ok=False, found=str(error).splitlines()[0], advice=advice)
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    name = torch.cuda.get_device_name(0) if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    ok = version >= MIN_TORCH and product == 8.0
    advice = "" if ok else f"install torch {'.'.join(map(str, MIN_TORCH))} or later: make .venv/.ready"
    return Check(name="torch", ok=ok, found=f"{torch.__version__} on {name}", advice=advice)


def check_library(name: str) -> Check:
    """A library that imports, with its version."""
    try:
        importlib.import_module(name)
        return Check(name=name, ok=True, found=metadata.version(name))
    except Exception as error:  # noqa: BLE001 (a broken installation raises anything at all)
        advice = f"pip install -c constraints.txt {name}, then kymo doctor again"
        return Check(name=name, ok=False, found=f"{type(error).__name__}: {error}".splitlines()[0], advice=advice)


def check_disk(folder: Path) -> Check:
    """Free space where `folder` lies."""
    if not folder.is_dir():
        return Check(name=f"disk {folder}", ok=False, found="no such folder", advice=f"make it: mkdir -p {folder}")
    free = shutil.disk_usage(folder).free / GIB
    ok = free >= MIN_DISK_GIB and os.access(folder, os.W_OK)
    advice = "" if ok else f"free {MIN_DISK_GIB} GiB, or work in a folder that you may write to"
    return Check(name=f"disk {folder}", ok=ok, found=f"{free:.1f} GiB free", advice=advice)


def check_memory() -> Check:
    """Memory that a job can still take."""
    memory = psutil.virtual_memory()
    ok = memory.available >= MIN_MEMORY_GIB * GIB
    advice = "" if ok else f"close programs until {MIN_MEMORY_GIB} GiB are available, or set num_cpus: 1"
    found = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available"
    return Check(name="memory", ok=ok, found=found, advice=advice)


def check_build_locks() -> Check:
    """No lock of a torch extension build that was killed: every later job would wait for it for ever."""
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")).expanduser()
    locks = sorted(cache.glob("**/lock"))
    advice = f"if no build runs now: rm {' '.join(map(str, locks))}" if locks else ""
    return Check(name="stale build locks", ok=not locks, found=f"{len(locks)} in {cache.name}", advice=advice)


def examine(folder: Path) -> list[Check]:
    """All checks, for a run that works in `folder`."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if Path("/dev/nvidia0").exists() else "cpu")
    libraries = [check_library(name) for name in ("ray", "deepspeed", "peft", "webdataset", "mne", "wfdb")]
    machine = [check_disk(folder), check_disk(Path("/tmp")), check_memory(), check_build_locks()]  # noqa: S108 (Ray's folder)
    return [check_python(), check_torch(), *libraries, *machine]
