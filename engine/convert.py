"""One unit of conversion, and a whole conversion in one process, both without Ray."""

import logging
import os
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.commit import (
    Commit,
    Counts,
    Input,
    Limits,
    Quarantined,
    UnresolvedLabel,
    pending,
    remove_leftovers,
    write_commit,
)
from engine.config import PUBLIC_SALT, ConvertConfig
from engine.copies import local_copy
from engine.finalise import ConvertResult, finalise
from engine.heartbeat import PROGRESS_DIR, Pulse, progress_path, read_progress
from engine.history import refuse_repacked, sound_snapshot
from engine.lock import locked
from engine.plan import PlanItem, Unit, plan, read_plan, write_plan
from engine.probe import HeaderLimits
from engine.sandbox import Job, Sandbox
from engine.scan import load_sources, scan
from engine.scan_result import ScanResult
from engine.shardwriter import Spooled, write_shards
from engine.storage import is_remote, sizes_in, work_folder, writable
from engine.windows import recording_id
from manifests.config import code_digest, digest, start_run
from manifests.corpora import Corpus
from manifests.errors import ConfigError, RecordingError
from manifests.recipes import Recipe, load_recipe
from manifests.shards import ShardEntry, Snapshot

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressRow:
    """How far a conversion is: recorded hours and recordings done of all, hours per second of this run, ETA in s.

    `eta_s` is None until the first recording of this run is done.
    """

    hours_done: float
    hours_total: float
    recordings_done: int
    recordings_total: int
    quarantined: int
    hours_per_s: float
    eta_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What all units of a conversion share; `names` are the corpora as the configuration calls them."""

    config: ConvertConfig
    recipe: Recipe
    corpora: dict[str, Corpus]
    roots: dict[str, Path]
    names: dict[str, str]

    @classmethod
    def of(cls, config: ConvertConfig) -> "Context":
        """Context of a configuration, the corpus and recipe files read."""
        loaded = load_sources(config.sources, salt=config.salt())
        return cls(
            config=config,
            recipe=load_recipe(config.recipe),
            corpora={corpus.id: corpus for corpus, _ in loaded},
            roots={corpus.id: root for corpus, root in loaded},
            names={corpus.id: source.corpus for (corpus, _), source in zip(loaded, config.sources, strict=True)},
        )

    def sandbox(self) -> Sandbox:
        """Sandbox with the limits of the configuration."""
        return Sandbox(time_limit_s=self.config.time_limit_s, memory_limit_gb=self.config.memory_limit_gb)


@dataclass(slots=True)
class _Tally:
    """What a unit has gathered so far."""

    inputs: list[Input]
    quarantine: list[Quarantined]
    samples: list[Spooled]
    rows: dict[str, dict[str, Any]]
    dropped: Counter[str]
    unresolved: Counter[tuple[str, str, str]]
    unmapped: Counter[str]
    unit_suspect: Counter[tuple[str, str]]


def _take(tally: _Tally, item: PlanItem, answer: dict[str, Any], spool: Path) -> None:
    """Add one converted recording to a unit's tally."""
    for row in answer["rows"]:
        place = {name: row.pop(name) for name in ("offset", "num_bytes")}
        tally.samples.append(Spooled(key=row["key"], spool=spool, **place))
        tally.rows[row["key"]] = row
    tally.dropped.update(answer["dropped"])
    tally.unmapped[item.corpus] += answer["unmapped"]
    tally.unit_suspect.update({(item.corpus, kind): count for kind, count in answer["unit_suspect"].items()})
    for label, reason, count in answer["unresolved"]:
        tally.unresolved[item.corpus, label, reason] += count


def _convert_item(item: PlanItem, tally: _Tally, *, context: Context, sandbox: Sandbox, spool: Path) -> str:
    """Convert one recording into the tally; returns the reason code of a quarantine, or nothing."""
    corpus = context.corpora[item.corpus]
    root = context.roots[item.corpus]
    name = recording_id(corpus, item.path)
    answer: dict[str, Any] = {"rows": [], "sha256": {}}
    reason = ""
    try:
        with local_copy(root / item.path, root, corpus, work=spool.parent) as (path, local_root):
            job = Job(
                path=path,
                root=local_root,
                corpus=corpus,
                recipe=context.recipe,
                spool=spool,
                identity=item.identity,
            )
            answer = sandbox.convert(job)
        num_windows = len(answer["rows"])
        _take(tally, item, answer, spool)
    except RecordingError as error:
        num_windows, reason = 0, error.reason
        logger.warning("%s %s: %s: %s", item.corpus, item.path, reason, error)
        tally.quarantine.append(
            Quarantined(
                corpus=item.corpus,
                recording=name,
                path=item.path,
                reason=reason,
                message=str(error),
                command=_command(context, item),
            )
        )
    tally.inputs.append(
        Input(
            corpus=item.corpus,
            recording=name,
            path=item.path,
            identity=item.identity,
            seconds=item.seconds,
            windows=num_windows,
            labels=answer.get("labels", {}),
            sha256=answer["sha256"],
        )
    )
    return reason


def _command(context: Context, item: PlanItem) -> str:
    """What shows a rejected recording again, by its corpus file: subjects, units and layouts may stand there."""
    root, name = str(context.roots[item.corpus]), context.names[item.corpus]
    return shlex.join(["kymo", "scan", root, "--corpus", name, "--only", item.path])


def limits_of(config: ConvertConfig) -> Limits:
    """Limits that a conversion runs under."""
    return Limits(time_limit_s=config.time_limit_s, memory_limit_gb=config.memory_limit_gb, code=code_digest())


def _commit_of(unit: Unit, tally: _Tally, shards: list[ShardEntry], limits: Limits, seconds: float) -> Commit:
    quarantined = {(item.corpus, item.recording) for item in tally.quarantine}
    return Commit(
        unit=unit.id,
        inputs=tally.inputs,
        shards=shards,
        samples_bytes=0,
        counts=Counts(
            recordings=len(unit.recordings),
            quarantined=len(quarantined),
            windows=len(tally.samples),
            seconds=sum(item.seconds for item in tally.inputs if (item.corpus, item.recording) not in quarantined),
            dropped=dict(sorted(tally.dropped.items())),
        ),
        quarantine=tally.quarantine,
        unresolved=[
            UnresolvedLabel(corpus=corpus, label=label, reason=why, count=count)
            for (corpus, label, why), count in sorted(tally.unresolved.items())
        ],
        unmapped={name: count for name, count in sorted(tally.unmapped.items()) if count},
        unit_suspect=_nested(tally.unit_suspect),
        limits=limits,
        seconds=round(seconds, 3),
    )


def _nested(counts: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Counts of (corpus, kind) as a sorted table by corpus."""
    table: dict[str, dict[str, int]] = {}
    for (corpus, kind), count in sorted(counts.items()):
        table.setdefault(corpus, {})[kind] = count
    return table


def convert_unit(
    unit: Unit, *, context: Context, sandbox: Sandbox, after_recording: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Shards, sample rows and, last, the commit of one unit; returns a small row that tells what was done."""
    began = time.monotonic()
    output = context.config.output
    work = work_folder(output, context.config.scratch) / f"{unit.id}-{os.getpid()}"
    tally = _Tally([], [], [], {}, Counter(), Counter(), Counter(), Counter())
    try:
        work.mkdir(parents=True, exist_ok=True)
        with writable(output), Pulse(output, unit.id, len(unit.recordings)) as pulse:
            for number, item in enumerate(unit.recordings):
                pulse.at(number)
                spool = work / f"{number:06d}.bin"
                reason = _convert_item(item, tally, context=context, sandbox=sandbox, spool=spool)
                pulse.record({"seconds": item.seconds, "reason": reason})
                if after_recording is not None:
                    after_recording()
            pulse.at(None)
            shards, placed = write_shards(
                tally.samples,
                output=output,
                unit=unit.id,
                shard_bytes=context.config.shard_bytes,
                staging=work if is_remote(output) else None,
            )
        commit = _commit_of(unit, tally, shards, limits_of(context.config), time.monotonic() - began)
        write_commit(output, commit, [{**tally.rows[place.key], **asdict(place)} for place in placed])
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {"unit": unit.id, "windows": commit.counts.windows, "quarantined": commit.counts.quarantined}


def _refuse_other_settings(config: ConvertConfig, snapshot: Snapshot) -> None:
    """Raise where another recipe or salt would remove every shard of the snapshot that stands in the output."""
    recipe = load_recipe(config.recipe)
    if digest(recipe.model_dump(mode="json")) != snapshot.recipe_digest:
        what = f"recipe {snapshot.recipe['id']}, and {recipe.id} would give other bytes"
    elif (config.salt_fingerprint() or PUBLIC_SALT) != snapshot.provenance.get("salt", PUBLIC_SALT):
        what = "another salt_file"
    else:
        return
    raise ConfigError(
        f"{config.output}: the snapshot there was made with {what}: all its shards would go; "
        "choose another output, or set replace=true"
    )


def _refuse_losses(output: Path, before_units: Sequence[Unit], units: Sequence[Unit]) -> None:
    """Raise where recordings of the snapshot in the output are no longer among the sources."""
    planned = {(item.corpus, item.path) for unit in units for item in unit.recordings}
    before = [(item.corpus, item.path) for unit in before_units for item in unit.recordings]
    gone = [name for name in before if name not in planned]
    if gone:
        raise ConfigError(
            f"{output}: {len(gone)} of the {len(before)} recordings of the snapshot there are not among these "
            f"sources ({': '.join(gone[0])}, …) and their shards would go. Is an archive not mounted, or is this the "
            "output of another conversion? Choose another output, or set replace=true"
        )


def scan_of(config: ConvertConfig, *, keep: bool = False) -> ScanResult:
    """Scan of a conversion's sources.

    Args:
        config: The conversion.
        keep: Remember in the output what was read on object stores, so that a rerun need not copy it again.

    Raises:
        ConfigError: A corpus without a file, or with more unknown labels than it allows.
    """
    result = scan(
        config.sources,
        work=work_folder(config.output, config.scratch),
        salt=config.salt(),
        output=config.output if keep else None,
        limits=HeaderLimits(time_limit_s=config.time_limit_s, memory_limit_gb=config.memory_limit_gb),
    )
    for name in sorted(set(result.corpora) - {row.corpus for row in result.rows}):
        patterns = ", ".join(result.corpora[name].files)
        raise ConfigError(f"{name}: no file matches {patterns} under its root; check sources.root")
    for name, (share, labels) in result.unknown_shares().items():
        limit = result.corpora[name].max_unresolved
        if share > limit:
            raise ConfigError(
                f"{name}.yaml: {share:.1%} of its channels have labels that nobody knows ({', '.join(labels)}), "
                f"max_unresolved allows {limit:.1%}; add them to channels (null leaves one out)"
            )
    return result


def prepare(config: ConvertConfig) -> tuple[ScanResult, list[Unit]]:
    """Scan and plan of a conversion; the run's header comes first, `plan.jsonl` is brought up to date.

    Raises:
        ConfigError: Wrong configuration, or one that would cost the snapshot in the output shards unasked.
    """
    refuse_repacked(config.output)
    standing = None if config.replace else sound_snapshot(config.output)
    if standing is not None:
        _refuse_other_settings(config, standing)
    start_run(config.output, config)
    result = scan_of(config, keep=True)
    existing = read_plan(config.output)
    units = plan(result, load_recipe(config.recipe), config, existing=existing)
    if standing is not None:
        _refuse_losses(config.output, existing, units)
    write_plan(config.output, units)
    removed = remove_leftovers(config.output, units, work=work_folder(config.output, config.scratch))
    if removed:
        logger.info("%s: removed %d files of an interrupted or superseded run", config.output, len(removed))
    return result, units


def finish(config: ConvertConfig, units: Sequence[Unit]) -> ConvertResult:
    """Result of a conversion whose units are done; what killed processes of this run left behind goes."""
    result = finalise(config, units)
    done = {unit.id for unit in units}  # or finalise had raised: no commit need be read again
    remove_leftovers(config.output, units, work=work_folder(config.output, config.scratch), done=done)
    return result


class Progress:
    """Turns the units' progress files into `ProgressRow`s; what was committed before has no part in the speed."""

    def __init__(self, output: Path, units: Sequence[Unit], todo: Sequence[Unit]) -> None:
        self._output = output
        self._todo = list(todo)
        self._began = time.monotonic()
        self._total_s = sum(unit.seconds for unit in units)
        self._num_total = sum(len(unit.recordings) for unit in units)
        self._before_s = self._total_s - sum(unit.seconds for unit in todo)
        self._num_before = self._num_total - sum(len(unit.recordings) for unit in todo)
        self._seen: dict[str, tuple[int, list[dict[str, Any]]]] = {}

    def _rows(self) -> list[dict[str, Any]]:
        """Rows of all pending units; only files that grew are read again."""
        sizes = sizes_in(self._output / PROGRESS_DIR)
        for unit in self._todo:
            size = sizes.get(progress_path(self._output, unit.id).name, 0)
            if size != self._seen.get(unit.id, (0, []))[0]:
                self._seen[unit.id] = size, read_progress(self._output, unit.id)
        return [row for _, rows in self._seen.values() for row in rows if "seconds" in row]

    def row(self) -> ProgressRow:
        """Where the conversion stands now."""
        rows = self._rows()
        run_s = sum(row["seconds"] for row in rows)
        done_s = self._before_s + run_s
        speed = run_s / max(1e-9, time.monotonic() - self._began)
        return ProgressRow(
            hours_done=done_s / 3600,
            hours_total=self._total_s / 3600,
            recordings_done=self._num_before + len(rows),
            recordings_total=self._num_total,
            quarantined=sum(bool(row["reason"]) for row in rows),
            hours_per_s=speed / 3600,
            eta_s=(self._total_s - done_s) / speed if speed > 0 else None,
        )


def convert_all(config: ConvertConfig, *, progress: Callable[[ProgressRow], None] | None = None) -> ConvertResult:
    """Scan, plan, convert what is pending and finalise, in this process and without Ray.

    Raises:
        ConfigError: Wrong configuration, or another conversion writes to the same folder.
        ContractError: A unit ended without a commit, or an earlier result is damaged.
    """
    with writable(config.output), locked(config.output) as check_lock:
        _, units = prepare(config)
        todo = pending(config.output, units, limits_of(config), recheck=config.recheck)
        meter = Progress(config.output, units, todo)
        context = Context.of(config)
        with context.sandbox() as sandbox:
            for unit in todo:
                convert_unit(
                    unit,
                    context=context,
                    sandbox=sandbox,
                    after_recording=None if progress is None else lambda: progress(meter.row()),
                )
        check_lock()
        return finish(config, units)
