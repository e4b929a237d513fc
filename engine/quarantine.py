"""The recordings that a conversion rejected, and what an operator decides about them: convert again, or accept.

Decisions stand outside every digest. A retried unit's commit is renamed, so that the unit is pending; a waiver is a
line of `waivers.jsonl`, and its recording no longer counts against the quarantine budget.
"""

import difflib
import hashlib
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from engine.commit import COMMITS_DIR, Commit, Quarantined, commit_path, read_commit, sizes_of
from engine.config import ConvertConfig
from engine.files import companions, identity_of
from engine.lock import locked
from engine.plan import PLAN_FILE, PlanItem, Unit, read_plan
from engine.scan import load_sources
from manifests.config import parse_yaml, validate, write_atomically
from manifests.errors import ConfigError, ContractError

WAIVERS_FILE = "waivers.jsonl"
CONFIG_FILE = "config.yaml"
KNOWN_BAD = "KNOWN_BAD"

# A waived recording is known by corpus, path and reason: another fault of the same file is another decision.
WaiverKey = tuple[str, str, str]


class Waiver(BaseModel):
    """One decision of the operator to do without a recording: `note` says why, `time` when (UTC)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    corpus: str
    path: str
    recording: str
    reason: str
    note: str
    time: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """One recording in quarantine.

    Attributes:
        corpus: Id of its corpus.
        path: POSIX path relative to the corpus root.
        recording: Its id in sample keys.
        reason: Code, see `manifests.errors.REASONS`.
        message: What is wrong.
        command: What shows it again.
        unit: The unit that it belongs to.
        state: `counted` against the budget, `known bad`, `waived`, or `retry` (its unit is converted next).
        note: Note of the waiver, or nothing.
    """

    corpus: str
    path: str
    recording: str
    reason: str
    message: str
    command: str
    unit: str
    state: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One rejected recording in full.

    Attributes:
        item: The recording.
        files: Its files: name, size in bytes, SHA-256; none when they are not there any more.
        where: Where they lie.
        is_changed: Whether they differ from those that were converted.
        alike: Other recordings with the same reason.
    """

    item: Rejected
    files: tuple[tuple[str, int, str], ...]
    where: Path
    is_changed: bool
    alike: tuple[Rejected, ...]


def read_waivers(output: Path) -> dict[WaiverKey, Waiver]:
    """The operator's waivers of an output folder; the last one about a recording holds.

    Raises:
        ContractError: The file has a line that is no waiver.
    """
    path = output / WAIVERS_FILE
    if not path.exists():
        return {}
    try:
        waivers = [Waiver.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise ContractError(f"{path}: a line is no waiver ({error}); mend it or remove the file") from None
    return {(item.corpus, item.path, item.reason): item for item in waivers}


def state_of(item: Quarantined, waived: Container[WaiverKey]) -> str:
    """What a recording in quarantine means for the budget: `counted`, `known bad` or `waived`."""
    if item.reason == KNOWN_BAD:
        return "known bad"
    return "waived" if (item.corpus, item.path, item.reason) in waived else "counted"


def retried_path(output: Path, unit: str) -> Path:
    """Commit of a unit that waits to be converted again; the conversion removes it."""
    return output / COMMITS_DIR / f"retry-{unit}.json"


def _commits(output: Path, units: Sequence[Unit]) -> Iterator[tuple[Unit, Commit, bool]]:
    """Units with their commits, and whether a retry is waiting; a unit without a commit has nothing to tell."""
    sizes = sizes_of(output)
    for unit in units:
        commit = read_commit(output, unit.id, sizes)
        retried = retried_path(output, unit.id)
        if commit is not None:
            yield unit, commit, False
        elif retried.exists():
            yield unit, Commit.model_validate_json(retried.read_bytes()), True


def rejected(output: Path) -> list[Rejected]:
    """Every recording in quarantine, sorted by reason, corpus and path.

    Raises:
        ConfigError: There is no plan in the folder.
    """
    if not (output / PLAN_FILE).exists():
        raise ConfigError(f"{output}: no {PLAN_FILE}; give the output folder of a kymo convert")
    waivers = read_waivers(output)
    found: list[Rejected] = []
    for unit, commit, is_retried in _commits(output, read_plan(output)):
        for item in commit.quarantine:
            waiver = waivers.get((item.corpus, item.path, item.reason))
            found.append(
                Rejected(
                    **item.model_dump(),
                    unit=unit.id,
                    state="retry" if is_retried else state_of(item, waivers),
                    note=waiver.note if waiver else "",
                )
            )
    return sorted(found, key=lambda item: (item.reason, item.corpus, item.path))


def settings_of(output: Path) -> ConvertConfig:
    """Configuration that a conversion wrote into its folder.

    Raises:
        ConfigError: There is none, or it is of another version.
    """
    path = output / CONFIG_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: not there; give the output folder of a kymo convert") from None
    return validate(ConvertConfig, parse_yaml(text, where=str(path)), where=str(path))


def chosen(items: Sequence[Rejected], names: Sequence[str], *, reason: str = "") -> list[Rejected]:
    """Recordings by path, by `corpus/path` or by recording id, and all of a reason.

    Raises:
        ConfigError: Nothing is chosen, or a name fits no recording in quarantine, or several.
    """
    picked = [item for item in items if item.reason == reason]
    if reason and not picked:
        reasons = ", ".join(sorted({item.reason for item in items})) or "none"
        raise ConfigError(f"--reason {reason}: no recording in quarantine has it; reasons here: {reasons}")
    for name in names:
        fit = [item for item in items if name in (item.path, f"{item.corpus}/{item.path}", item.recording)]
        if len(fit) != 1:
            raise ConfigError(_no_choice(name, fit, items))
        picked += fit
    if not picked:
        raise ConfigError("no recording named; give paths as kymo quarantine ls shows them, or --reason CODE")
    return list(dict.fromkeys(picked))


def _no_choice(name: str, fit: Sequence[Rejected], items: Sequence[Rejected]) -> str:
    if fit:
        return f"{name}: {len(fit)} recordings fit; give one of {', '.join(f'{x.corpus}/{x.path}' for x in fit)}"
    near = difflib.get_close_matches(name, [item.path for item in items], n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(near)}" if near else "kymo quarantine ls lists what is"
    return f"{name}: not in quarantine; {hint}"


def evidence(output: Path, name: str) -> Evidence:
    """One rejected recording with its files as they are now, and what else was rejected for the same reason."""
    items = rejected(output)
    (item,) = chosen(items, [name])
    (planned,) = (
        planned
        for unit in read_plan(output)
        if unit.id == item.unit
        for planned in unit.recordings
        if (planned.corpus, planned.path) == (item.corpus, item.path)
    )
    where, files, identity = _files(output, planned)
    return Evidence(
        item=item,
        files=files,
        where=where,
        is_changed=identity != planned.identity,
        alike=tuple(other for other in items if other.reason == item.reason and other != item),
    )


def _files(output: Path, planned: PlanItem) -> tuple[Path, tuple[tuple[str, int, str], ...], str]:
    """Where a recording lies, its files with size and SHA-256, and its identity as they are now."""
    corpus, root = next(pair for pair in load_sources(settings_of(output).sources) if pair[0].id == planned.corpus)
    path = root / planned.path
    files: list[tuple[str, int, str]] = []
    for part in companions(path, corpus.reader_of(path), corpus):
        with part.open("rb") as file:
            files.append((part.name, part.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()))
    return path, tuple(files), identity_of(path, corpus.reader_of(path), corpus)[0] if files else ""


def retry(output: Path, names: Sequence[str], *, reason: str = "") -> list[str]:
    """Mark the units of rejected recordings; the next `kymo convert` converts these units again and no other.

    A recording whose files were mended needs no retry: its identity differs, so a conversion plans it anew.

    Returns:
        Ids of the units that are marked now.

    Raises:
        ConfigError: A name that fits nothing in quarantine, or a conversion runs in the folder.
    """
    with locked(output):
        units = sorted({item.unit for item in chosen(rejected(output), names, reason=reason)})
        for unit in units:
            # The snapshot and its shards stay true until a conversion begins; that one tidies up by itself.
            path = commit_path(output, unit)
            if path.exists():
                write_atomically(retried_path(output, unit), path.read_bytes())
                path.unlink()
        return units


def waive(output: Path, names: Sequence[str], *, note: str, reason: str = "") -> list[Rejected]:
    """Accept that recordings are missing: they no longer count against the budget. No shard changes.

    Returns:
        The recordings that are waived by this call.

    Raises:
        ConfigError: No note, a name that fits nothing in quarantine, or a conversion runs in the folder.
    """
    if not note.strip():
        raise ConfigError("--note: empty; say in a sentence why the recordings can be missing, it is kept")
    with locked(output):
        items = [item for item in chosen(rejected(output), names, reason=reason) if item.reason != KNOWN_BAD]
        now = datetime.now(UTC).isoformat(timespec="seconds")
        waivers = read_waivers(output) | {
            (item.corpus, item.path, item.reason): Waiver(
                corpus=item.corpus,
                path=item.path,
                recording=item.recording,
                reason=item.reason,
                note=note.strip(),
                time=now,
            )
            for item in items
        }
        write_atomically(output / WAIVERS_FILE, "".join(waiver.model_dump_json() + "\n" for waiver in waivers.values()))
        return items


def budget_line(output: Path, items: Sequence[Rejected]) -> str:
    """How much of the quarantine budget is used, in words."""
    settings = settings_of(output)
    total = sum(len(unit.recordings) for unit in read_plan(output))
    counted = sum(item.state in {"counted", "retry"} for item in items)
    allowed = settings.quarantine_budget * total
    verdict = "over budget: no snapshot is written" if counted > allowed else "within budget"
    return (
        f"{counted} of {total} recordings count against quarantine_budget = {settings.quarantine_budget:g} "
        f"({allowed:g} allowed): {verdict}"
    )
