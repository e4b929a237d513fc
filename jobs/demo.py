"""`kymo demo`: the whole way once, from recordings to predictions, with a worker killed on the way."""

import logging
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from adapters.bundle import load_bundle, write_bundle
from adapters.config import AdaptConfig
from adapters.train import adapt
from engine.config import ConvertConfig
from engine.preview import draw_sample, first_key
from engine.report import write_report
from engine.scan import scan
from engine.synthetic import synthesise
from engine.verify import verify
from jobs.adapter_verbs import show_task_scores
from jobs.console import console, show_table
from jobs.data_verbs import run_conversion
from jobs.filter_vectors import with_filters
from jobs.predict import open_file, stranger
from jobs.prediction_files import PredictionFiles
from jobs.scan_screen import show_scan
from manifests.config import load_config
from manifests.errors import ContractError
from trainer.config import PretrainConfig
from trainer.launch import launch, start_local_ray
from trainer.score import score_run

logger = logging.getLogger(__name__)

CONFIGS = Path(__file__).resolve().parent / "configs"
POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a demo runs on: its configurations, by the name of the snapshot, and a file to predict.

    Attributes:
        data: Folder of the recordings; each source's root lies in it, or it is the root of all.
        convert: Snapshot name → conversion YAML; the first one is used for the report.
        pretrain: Run name → pretraining YAML; one worker of the first one is killed.
        adapt: YAML of the adapters.
        stranger: Recordings for the prediction, relative to `data`, with options of `kymo predict`.
    """

    data: Path
    has_one_root: bool
    convert: dict[str, Path]
    pretrain: dict[str, Path]
    adapt: Path
    stranger: dict[str, dict[str, Any]]


@dataclass(slots=True)
class Ledger:
    """Seconds of each stage, and the rows of the closing table."""

    seconds: dict[str, float] = field(default_factory=dict)
    rows: list[tuple[str, str, str]] = field(default_factory=list)

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Time a stage under its headline."""
        console.rule(f"[bold]{title}", align="left")
        began = time.monotonic()
        yield
        self.seconds[title] = time.monotonic() - began

    def note(self, what: str, result: str, where: Path | str = "") -> None:
        """Add a row to the closing table."""
        self.rows.append((what, result, str(where)))


def run_demo(out: Path, *, data: Path | None = None) -> None:
    """Recordings → scan → shards → two pretrainings → adapters → bundle → prediction → report, all below `out`.

    Run again, it goes on from what is there. With `data`, the recordings of that folder take the place of the
    synthetic ones.
    """
    began = time.monotonic()
    ledger = Ledger()
    with ledger.stage("recordings"):
        plan = _synthetic(out, ledger) if data is None else _real(data)
    with ledger.stage("scan"):
        for config in plan.convert.values():
            _scan(load_config(ConvertConfig, config, _roots(config, plan)))
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its C++ side writes across the progress bar
    with ledger.stage("start Ray"):
        start_local_ray(4)  # logical: two workers or actors, Ray Train's controller, one spare
    try:
        for name, config in plan.convert.items():
            with ledger.stage(f"convert {name}"):
                _convert(name, config, plan, out, ledger)
        for number, (name, config) in enumerate(plan.pretrain.items()):
            with ledger.stage(f"pretrain {name}"):
                _pretrain(name, config, out, ledger, is_interrupted=number == 0)
    finally:
        ray.shutdown()
    with ledger.stage("adapt"):
        _adapt(plan, out, ledger)
    with ledger.stage("predict"):
        _predict(plan, out, ledger)
    with ledger.stage("report"):
        _report(plan, out, ledger)
    _close(ledger, plan, out, time.monotonic() - began)


def _synthetic(out: Path, ledger: Ledger) -> Plan:
    recordings = out / "recordings"
    mark = recordings / "complete"
    if not mark.exists():
        synthesise(recordings)
        mark.touch()
    strangers = out / "stranger"
    if not (strangers / "complete").exists():
        synthesise(strangers, num_subjects=1, num_ecg=1, night_minutes=30, seed=77)
        (strangers / "complete").touch()
    ledger.note("recordings", "14 nights EDF+, 1 broken file, 120 WFDB records", recordings)
    return Plan(
        data=recordings,
        has_one_root=True,
        convert={"psg": CONFIGS / "convert_psg.yaml", "ecg": CONFIGS / "convert_ecg.yaml"},
        pretrain={
            "sleep": CONFIGS / "pretrain_sleep.yaml",
            "univariate": CONFIGS / "pretrain_univariate.yaml",
        },
        adapt=CONFIGS / "adapt.yaml",
        stranger={
            str((strangers / "psg" / "sub-001" / "sub-001_psg.edf").absolute()): {"mains_hz": 50},
            str((strangers / "ecg" / "E00001.hea").absolute()): {"mains_hz": 50},
        },
    )


def _real(data: Path) -> Plan:
    folder = CONFIGS / "real"
    return Plan(
        data=data,
        has_one_root=False,
        convert={name: folder / f"convert_{name}.yaml" for name in ("psg", "ecg", "eeg")},
        pretrain={name: folder / f"pretrain_{name}.yaml" for name in ("sleep", "univariate")},
        adapt=folder / "adapt.yaml",
        stranger={
            "sleep_edf/short_psg_SC4001_first5min.edf": {"mains_hz": 50},
            "mitdb/100.hea": {"mains_hz": 60},
        },
    )


def _roots(config: Path, plan: Plan) -> list[str]:
    """Overrides that put the roots of a conversion's sources below the plan's data."""
    sources = load_config(ConvertConfig, config).sources
    roots = [plan.data if plan.has_one_root else plan.data / source.root for source in sources]
    return [f"sources.{n}.root={root}" for n, root in enumerate(roots)]


def _scan(config: ConvertConfig) -> None:
    result = scan(config.sources)
    show_scan(result.corpus_rows(), result.channel_rows(), result.rate_rows())
    for row in result.unreadable_rows():
        console.print(f"[yellow]{row['path']}: {row['reason']}[/]: {row['message']}", soft_wrap=True)


def _convert(name: str, config: Path, plan: Plan, out: Path, ledger: Ledger) -> None:
    folder = out / "shards" / name
    settings = load_config(ConvertConfig, config, [f"output={folder}", *_roots(config, plan)])
    result = run_conversion(settings)
    found = verify(folder, deep=True)
    if not found.is_sound:
        raise ContractError(f"{folder}: {'; '.join(found.problems)}")
    quarantine = f", {result.counts['quarantined']} recordings quarantined" if result.quarantine else ""
    ledger.note(
        f"shards {name}", f"{found.samples:,} windows, {found.num_bytes / 1e6:.0f} MB, verified{quarantine}", folder
    )


def _pretrain(name: str, config: Path, out: Path, ledger: Ledger, *, is_interrupted: bool) -> None:
    run = out / "runs" / name
    settings = load_config(PretrainConfig, config, [f"run_dir={run}", *_snapshots(config, "snapshots", out)])
    killer = _Killer(run, after_step=settings.save_every) if is_interrupted and not run.exists() else None
    result = launch(settings)
    if settings.evaluation is None:
        ledger.note(f"pretrain {name}", f"{result.step} steps, loss {result.loss:.2f}; no subject to hold out", run)
    else:
        scores = score_run(run, split="test", num_windows=256)
        times = scores["top1"] / scores["chance"]
        console.print(f"retrieval among {scores['n']:.0f} windows of held-out subjects: {scores['top1']:.3f}, ", end="")
        console.print(f"{times:.1f} × chance ({scores['chance']:.4f})")
        ledger.note(f"pretrain {name}", f"{result.step} steps; held-out top-1 {times:.1f} × chance", run)
    if killer is not None and killer.killed_at is not None:
        ledger.note("", f"a worker was killed (-9) at step {killer.killed_at}; resumed from its checkpoint")


class _Killer:
    """Ends one training worker with SIGKILL, once, soon after the first checkpoint: Ray Train has to recover."""

    def __init__(self, run: Path, *, after_step: int) -> None:
        self.killed_at: int | None = None
        self._run = run
        self._after_step = after_step
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self.killed_at is None:
            time.sleep(POLL_S)
            step = self._last_step()
            pids = sorted((self._run / "workers").glob("rank-*.pid"))
            if step <= self._after_step or not pids:
                continue
            pid = int(pids[-1].read_text())
            logger.info("demo: kill -9 of worker %d after step %d, on purpose: the run has to go on", pid, step)
            os.kill(pid, signal.SIGKILL)
            self.killed_at = step

    def _last_step(self) -> int:
        metrics = self._run / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
        return int(lines[-1].partition('"step": ')[2].partition(",")[0] or 0) if lines else 0


def _snapshots(config: Path, key: str, out: Path) -> Sequence[str]:
    """Overrides that put a pretraining's snapshots below `out`."""
    sources = load_config(PretrainConfig, config).snapshots
    return [f"{key}.{n}.path={out / 'shards' / Path(source.path).name}" for n, source in enumerate(sources)]


def _adapt(plan: Plan, out: Path, ledger: Ledger) -> None:
    first = load_config(AdaptConfig, plan.adapt)
    paths = [
        f"tasks.{n}.snapshots=[{', '.join(str(out / 'shards' / Path(path).name) for path in task.snapshots)}]"
        for n, task in enumerate(first.tasks)
    ]
    run, encoder = out / "runs" / "adapt", out / "runs" / Path(first.encoder).parent.name / "encoder"
    result = adapt(load_config(AdaptConfig, plan.adapt, [f"run_dir={run}", f"encoder={encoder}", *paths]))
    show_task_scores(result.scores)
    for task, splits in result.scores.items():
        entry = ((splits.get("test") or splits.get("val")) or {}).get("metrics", {}).get("balanced_accuracy")
        if entry and entry["value"] is not None:
            found = splits.get("test") or splits.get("val") or {}
            people = f"{found['subjects']} held-out subject{'s' if found['subjects'] != 1 else ''}"
            text = f"balanced accuracy {entry['value']:.3f} on {people}, chance {entry['chance']:.2f}"
            ledger.note(f"task {task}", text, run)
    write_bundle(with_filters(result), out / "bundle")
    ledger.note("bundle", f"{len(result.tasks)} adapters, checked and read back", out / "bundle")


def _predict(plan: Plan, out: Path, ledger: Ledger) -> None:
    bundle = load_bundle(out / "bundle")
    for name, options in plan.stranger.items():
        path = plan.data / name
        run = open_file(bundle, path, stranger(path, **options))
        with PredictionFiles(run, out / "predictions", ["csv", "edf", "png"]) as files:
            for prediction in run.predictions():
                files.add(prediction)
            files.commit()
        for task, track in files.tracks.items():
            labels = ", ".join(sorted(set(track.labels)))
            ledger.note(f"predict {path.name}", f"{task}: {len(track)} windows; {labels}", files.names(task)[0])


def _report(plan: Plan, out: Path, ledger: Ledger) -> None:
    snapshot = out / "shards" / next(iter(plan.convert))
    runs = [out / "runs" / name for name in plan.pretrain] + [out / "runs" / "adapt"]
    write_report(snapshot, out / "report.html", runs=runs)
    draw_sample(snapshot, first_key(snapshot), out / "preview.png")
    ledger.note("report", "coverage, losses, quarantine, examples, loss curves", out / "report.html")


def _close(ledger: Ledger, plan: Plan, out: Path, seconds: float) -> None:
    show_table("seconds", ("stage", "value"), [(name, f"{value:.0f}") for name, value in ledger.seconds.items()])
    show_table("what was made", ("what", "result", "where"), ledger.rows)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    console.print(f"{seconds / 60:.1f} minutes; this process took at most {memory:.1f} GiB")
    console.print("What to try next:")
    console.print(f"  open {out}/report.html and {out}/preview.png")
    console.print(f"  kymo predict {out}/bundle YOUR.edf")
    name, config = list(plan.pretrain.items())[-1]
    places = " ".join(_snapshots(config, "snapshots", out))
    shown = config.relative_to(CONFIGS.parent.parent)
    console.print(f"  kymo pretrain {shown} run_dir={out}/runs/{name}_longer steps=2000 {places}", soft_wrap=True)
