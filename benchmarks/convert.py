"""CPU seconds per recording: kymo's whole conversion beside what others do with the same file, one pinned core.

Work: an 8-h night (14 signals at 1 to 512 Hz) to 128 Hz, and 2 h of 21-channel clinical EEG at 256 and 250 Hz to
0.1-75 Hz, mains notch, 200 Hz. kymo does all that it always does: scan, plan, sandbox, checks, tags, hashes, shards,
snapshot. The peers (`benchmarks/peers.py`) do what their repositories do, imports not counted. `limit` is decoding, the
transforms, hashing and writing alone. `unit` is what a recording costs kymo among the four of one unit, which share a
start of the sandbox and a snapshot as those of a real unit do (about ten nights). Contenders take turns; the table has
medians. Then: one core against two, Ray against none, and what 100,000 hours would take.

    python benchmarks/convert.py [--fast] [--runs 3] [--out FOLDER]

`--fast` measures a slow peer once and takes under five minutes. Quote ratios: machines differ and are noisy.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import inputs
import numpy as np
import peers
from scipy import fft

from engine import pipeline
from engine.config import ConvertConfig, Source
from engine.convert import convert_all
from engine.read import read_header, read_signals
from engine.sandbox import Sandbox
from engine.scan import resolve_channels
from manifests.config import dump_yaml
from manifests.corpora import Corpus
from manifests.recipes import load_recipe

HOURS = {"psg": 8.0, "eeg256": 2.0, "eeg250": 2.0}
SIGNALS = {"psg": inputs.NIGHT, "eeg256": inputs.clinical_eeg(256), "eeg250": inputs.clinical_eeg(250)}
RECIPES = {"psg": "sleep128", "eeg256": "eeg200", "eeg250": "eeg200"}
CONTENDERS = {
    "psg": ("kymo", "unit", "limit", "sleepfm", "luna", "pyedflib+scipy psg"),
    "eeg256": ("kymo", "unit", "limit", "labram", "pyedflib+scipy", "braindecode"),
    "eeg250": ("kymo", "unit", "limit", "labram", "pyedflib+scipy"),
}
SLOW = frozenset({"sleepfm", "luna"})
UNITS = 4
PRICE_PER_CORE_HOUR = 0.0504  # USD, AWS m7i.large on demand in us-east-1: 0.1008 an hour for 2 vCPUs
BLOCK = 1 << 15


def write_corpus(folder: Path) -> Path:
    """Corpus file of the recordings in a folder."""
    path = folder / "bench.yaml"
    path.write_text(dump_yaml(inputs.corpus_of("bench")), encoding="utf-8")
    return path


def config_of(folder: Path, output: Path, recipe: str, **changes: object) -> ConvertConfig:
    """Conversion of all recordings of a folder."""
    sources = [Source(corpus=str(write_corpus(folder)), root=folder)]
    return ConvertConfig.model_validate({"output": output, "recipe": recipe, "sources": sources, **changes})


def kymo(folder: Path, output: Path, recipe: str) -> None:
    """Every step of a conversion, in this process and its sandbox."""
    result = convert_all(config_of(folder, output / "shards", recipe))
    if result.snapshot is None or result.quarantine:
        raise SystemExit(f"kymo rejected a recording: {result.quarantine}")


def unit(folder: Path, output: Path, recipe: str) -> None:
    """`kymo` for `UNITS` recordings that one unit holds."""
    (recording,) = folder.glob("*/*.edf")
    for number in range(UNITS):
        link = output / "recordings" / f"s{number}" / recording.name
        link.parent.mkdir(parents=True)
        os.link(recording, link)
    kymo(output / "recordings", output, recipe)


def limit(path: Path, output: Path, recipe_name: str) -> None:
    """Decoding, one forward and one inverse transform a block, hashing and writing, and nothing else."""
    recipe = load_recipe(recipe_name)
    recording = read_header(path, "edf")
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")
    sha = hashlib.sha256()
    with (output / "limit.bin").open("wb") as file:
        corpus = Corpus.model_validate(inputs.corpus_of("bench"))
        for channel, tag in resolve_channels(recording, corpus)[0]:
            if tag.kind not in recipe.kinds:
                continue
            (values,) = read_signals(recording, [channel.index])
            length = int(BLOCK * recipe.kinds[tag.kind].stored_rate(channel.rate) / channel.rate) // 2 * 2
            for first in range(0, len(values) - 8 * BLOCK + 1, 8 * BLOCK):
                spectrum = np.asarray(fft.rfft(values[first : first + 8 * BLOCK].reshape(8, BLOCK)))
                block = np.asarray(fft.irfft(spectrum[:, : length // 2 + 1], n=length)).astype(np.int16).tobytes()
                sha.update(block)
                file.write(block)
        file.flush()
        os.fsync(file.fileno())


def cpu_seconds() -> float:
    """CPU time of this process and the children that it has waited for, in seconds."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def measure(way: str, folder: Path, scratch: Path) -> None:
    """One run in this process, pinned to one core: prints CPU seconds, wall seconds, peak MB, MB written."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    work = folder.name
    path = next(folder.glob("*/*.edf"))
    runs: dict[str, Callable[[], None]] = {
        "kymo": lambda: kymo(folder, scratch, RECIPES[work]),
        "unit": lambda: unit(folder, scratch, RECIPES[work]),
        "limit": lambda: limit(path, scratch, RECIPES[work]),
        "start": start_sandbox,
    }
    run = runs.get(way)
    if run is None:
        peers.warm_up()
        run = lambda: peers.PEERS[way](path, scratch)  # noqa: E731 - chosen by name
    path.read_bytes()  # warm page cache
    cpu, wall = cpu_seconds(), time.monotonic()
    run()
    cpu, wall = cpu_seconds() - cpu, time.monotonic() - wall
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    written = (path for path in scratch.rglob("*") if path.is_file() and "recordings" not in path.parts)
    size = sum(path.stat().st_size for path in written)
    share = UNITS if way == "unit" else 1
    row = {"cpu_s": cpu / share, "wall_s": wall / share, "peak_mb": max(peaks) / 1e3, "mb": size / 1e6 / share}
    print(json.dumps(row))


def start_sandbox() -> None:
    """Start and end the process that decodes: kymo does it once per actor, not once per recording."""
    with Sandbox(time_limit_s=60, memory_limit_gb=4) as sandbox:
        sandbox.start()


def in_a_process(*words: str) -> dict[str, float]:
    """Result of this script in a process of its own; what its children print last is JSON."""
    command = [sys.executable, __file__, *words]
    env = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """Median of each column."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def compare(work: str, folder: Path, runs: int, *, fast: bool) -> dict[str, dict[str, float]]:
    """Medians of all contenders at one kind of work, in alternating runs."""
    ways = ["start", *(way for way in CONTENDERS[work] if peers.is_at_hand(way))]
    if missing := set(CONTENDERS[work]) - set(ways):
        print(f"not installed, left out: {', '.join(sorted(missing))}", flush=True)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for number in range(runs):
        for way, rows in found.items():
            if not (fast and number and way in SLOW):
                rows.append(in_a_process("--measure", way, str(folder)))
                print(f"{work:8}{way:22}{rows[-1]['cpu_s']:8.2f} CPU s", flush=True)
    return {way: medians(rows) for way, rows in found.items()}


def scale(way: str, cores: int, folder: Path, scratch: Path) -> None:
    """Convert a folder of `UNITS` units on 1 or 2 cores, with Ray or without; prints wall and CPU seconds."""
    if cores < len(os.sched_getaffinity(0)):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    configs = [
        config_of(part, scratch / f"{part.name}-{way}", "sleep128", num_cpus=cores, unit_bytes=1000)
        for part in (sorted(folder.glob("half*")) if way == "plain" else [folder / "all"])
    ]
    cpu, wall = cpu_seconds(), time.monotonic()
    if way == "ray":
        pipeline.run(configs[0])
    elif cores == 1:
        for config in configs:
            convert_all(config)
    else:
        children = []
        for config in configs:
            if not (child := os.fork()):
                convert_all(config)
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
    wall = time.monotonic() - wall
    print(json.dumps({"cpu_s": cpu_seconds() - cpu, "wall_s": wall}))


def scaling(root: Path, night: Path, runs: int) -> dict[str, dict[str, float]]:
    """Wall and CPU seconds of `UNITS` units: plain and Ray, one core and two."""
    for number in range(UNITS):
        for part in (root / "all", root / f"half{number % 2}"):
            target = part / f"s{number}" / "night.edf"
            target.parent.mkdir(parents=True)
            os.link(night, target)
    found: dict[str, list[dict[str, float]]] = {f"{way} {cores}": [] for way in ("plain", "ray") for cores in (1, 2)}
    for _ in range(runs):
        for name, rows in found.items():
            rows.append(in_a_process("--scale", *name.split(), str(root)))
            print(f"scaling {name:8}{rows[-1]['wall_s']:8.2f} s, {rows[-1]['cpu_s']:.2f} CPU s", flush=True)
    return {name: medians(rows) for name, rows in found.items()}


def projection(result: dict[str, dict[str, float]], hours: float) -> dict[str, float]:
    """What 100,000 recorded hours take at the cost of a recording in a unit."""
    steady = result["unit"]["cpu_s"]
    core_hours = steady / hours * 100_000 / 3600
    return {
        "cpu_s_per_hour": steady / hours,
        "core_hours": core_hours,
        "terabytes": result["kymo"]["mb"] / hours * 100_000 / 1e6,
        "usd_per_1000_h": core_hours / 100 * PRICE_PER_CORE_HOUR,
    }


def table(report: dict[str, object]) -> str:
    """The report as markdown."""
    works: dict[str, dict[str, dict[str, float]]] = report["works"]  # type: ignore[assignment] # plain JSON
    hours: dict[str, float] = report["hours"]  # type: ignore[assignment] # plain JSON
    lines = [f"{report['date']}, {report['machine']}, medians of {report['runs']} alternating runs, one pinned core\n"]
    for work, result in works.items():
        ours, start, in_unit = (result[way]["cpu_s"] for way in ("kymo", "start", "unit"))
        lines += [
            f"### {work}: {hours[work]:g} h to {RECIPES[work]}\n",
            "| | CPU s | CPU s per recorded hour | times kymo in a unit | peak MB | output MB |",
            "|---|---|---|---|---|---|",
        ]
        for way, row in result.items():
            name = {
                "start": "start of kymo's sandbox, part of the next line",
                "kymo": "kymo, one recording",
                "unit": f"kymo, a recording among {UNITS} of a unit",
            }.get(way, way)
            lines.append(
                f"| {name} | {row['cpu_s']:.2f} | {row['cpu_s'] / hours[work]:.3f} | {row['cpu_s'] / in_unit:.2f} | "
                f"{row['peak_mb']:,.0f} | {row['mb']:,.0f} |"
            )
        limit_s = result["limit"]["cpu_s"]
        lines.append(
            f"\nAgainst the limit: {in_unit / limit_s:.2f} times in a unit, {ours / limit_s:.2f} alone, "
            f"{(ours - start) / limit_s:.2f} alone without the start.\n"
        )
        peer = {way: row["cpu_s"] for way, row in result.items() if way not in {"kymo", "unit", "start", "limit"}}
        lines.append(
            "; ".join(
                f"{way}: {s / in_unit:.1f} times kymo in a unit, {s / ours:.1f} alone, "
                f"{s / (ours - start):.1f} alone without the start"
                for way, s in peer.items()
            )
            + "\n"
        )
        row = projection(result, hours[work])
        lines.append(
            f"100,000 h: {row['core_hours']:,.0f} core-hours, {row['terabytes']:.2f} TB, "
            f"{row['usd_per_1000_h']:.3f} USD per 1,000 h at {PRICE_PER_CORE_HOUR} USD a core-hour.\n"
        )
    scales: dict[str, dict[str, float]] = report["scaling"]  # type: ignore[assignment] # plain JSON
    if scales:
        lines += [f"### {UNITS} units of one night\n", "| | wall s | CPU s |", "|---|---|---|"]
        lines += [f"| {name} | {row['wall_s']:.2f} | {row['cpu_s']:.2f} |" for name, row in scales.items()]
        plain, ray_ = (scales[f"{way} 1"]["wall_s"] / scales[f"{way} 2"]["wall_s"] for way in ("plain", "ray"))
        extra = (scales["ray 1"]["wall_s"] - scales["plain 1"]["wall_s"]) / UNITS
        lines.append(f"\nOne core to two: plain {plain:.2f} times, Ray {ray_:.2f} times as fast, its start included.")
        lines.append(f"Ray adds {extra:.2f} s of wall time per unit on one core, its start shared among them.\n")
    return "\n".join(lines)


def machine() -> str:
    """Processor and cores, nothing that names the machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.machine()}, {os.cpu_count()} cores"


def main() -> None:
    """Measure, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--fast", action="store_true", help="slow peers once, scaling once: under five minutes")
    parser.add_argument("--only", choices=[*RECIPES, "scaling"], action="append")
    parser.add_argument("--out", type=Path, help="folder for convert.json and convert.md")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--write", nargs=2, metavar=("WORK", "PATH"), help=argparse.SUPPRESS)
    parser.add_argument("--scale", nargs=3, metavar=("WAY", "CORES", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if arguments.measure:
            measure(arguments.measure[0], Path(arguments.measure[1]), scratch)
            return
        if arguments.write:
            work, path = arguments.write
            print(json.dumps({"mb": inputs.write_edf(Path(path), SIGNALS[work], HOURS[work]).stat().st_size / 1e6}))
            return
        if arguments.scale:
            scale(arguments.scale[0], int(arguments.scale[1]), Path(arguments.scale[2]), scratch)
            return
        report = measured(arguments, scratch)
    print(table(report))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "convert.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (arguments.out / "convert.md").write_text(table(report) + "\n", encoding="utf-8")


def measured(arguments: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """All measurements as plain data."""
    began = time.monotonic()
    wanted = arguments.only or [*RECIPES, "scaling"]
    files = {
        work: scratch / work / "s1" / "recording.edf"
        for work in RECIPES
        if work in wanted or (work == "psg" and "scaling" in wanted)
    }
    for work, path in files.items():  # in another process: a child's peak memory begins with its parent's
        in_a_process("--write", work, str(path))
    print(f"{time.monotonic() - began:.0f} s to write the recordings", flush=True)
    works = {
        work: compare(work, path.parent.parent, arguments.runs, fast=arguments.fast)
        for work, path in files.items()
        if work in wanted
    }
    scales = {}
    if "scaling" in wanted:
        scales = scaling(scratch / "scaling", files["psg"], 1 if arguments.fast else arguments.runs)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "runs": arguments.runs,
        "hours": HOURS,
        "works": works,
        "scaling": scales,
        "seconds": time.monotonic() - began,
    }


if __name__ == "__main__":
    main()
