"""A stranger's recording through a bundle, from the bundle alone: what suits it, its windows, its predictions."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from adapters.bundle import Bundle
from adapters.predict import Prediction, predict
from adapters.suitability import Suitability, suitability, training_mains
from engine.mains import find_mains
from engine.read import read_header, sniff
from engine.recording import Recording, split_member
from engine.rows import Losses, in_canonical_unit
from engine.scan import resolve_channels
from engine.windows import count_windows, window_recording
from manifests.channels import Unresolved, resolve
from manifests.config import validate
from manifests.corpora import Corpus, load_corpus
from manifests.errors import ConfigError, RecordingError
from manifests.recipes import Recipe
from trainer.read import Window

NOTCH_EDGE_HZ = 1.1  # beyond a line that a channel must hold for the notch to fit, as in `engine.dsp`


@dataclass(slots=True, kw_only=True)
class FileRun:
    """A recording on its way through a bundle; `predictions` reads it window by window.

    Attributes:
        source: What the user calls the bundle.
        suits: How the channels of the recording meet each task that they suit.
        refused: Task to the reason why it says nothing; complete when `predictions` is through.
        left_out: Windows per task in which its channels are flat, clipped or missing for too long.
        mains: What was done about the line frequency, a sentence.
    """

    bundle: Bundle
    source: str
    path: Path
    corpus: Corpus
    recording: Recording
    suits: dict[str, Suitability]
    refused: dict[str, str]
    mains: str = ""
    losses: Losses = field(default_factory=Losses)
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def num_windows(self) -> int:
        """Windows that are going to be looked at, over all recipes."""
        return sum(count_windows(self.recording, recipe) for recipe, _ in self._recipes())

    def predictions(self, advance: Callable[[int], None] = lambda _: None) -> Iterator[Prediction]:
        """Predictions as they are computed, of each task in order of time; `advance` is told of every window.

        Raises:
            RecordingError: No task could say anything; the message has the reasons.
        """
        reasons: set[str] = set()
        spoken: set[str] = set()
        for recipe, tasks in self._recipes():
            try:
                windows = _told(windows_of(self.path, self.corpus, recipe, self.losses), advance)
                for prediction in predict(self.bundle, windows, tasks=tasks, left_out=self.left_out):
                    spoken.add(prediction.task)
                    yield prediction
            except RecordingError as error:
                reasons.add(error.reason)
                self.refused |= dict.fromkeys(tasks, str(error))
            faulty = self.losses.dropped.pop("quality", 0)  # of all channels; the recipe leaves such windows out itself
            self.left_out.update(dict.fromkeys(tasks, faulty))
            for name in tasks:
                if name not in spoken and name not in self.refused:
                    reasons.add("SIGNAL_INVALID")
                    self.refused[name] = (
                        f"each of its {self.left_out[name]} windows was left out: the signal of its channels is flat, "
                        "clipped or missing for too much of the time; look at the electrodes and at the file"
                    )
        if not spoken:
            raise self.refusal(reasons)

    def fit(self) -> dict[str, Suitability]:
        """`suits`, without the channels that turned out to be of no use when they were read."""
        lost = {label for label, _ in self.losses.unresolved}
        found, _ = resolve_channels(self.recording, self.corpus)
        useless = {tag.symbol for channel, tag in found if channel.label in lost}
        return {
            name: replace(
                suits,
                used=tuple(symbol for symbol in suits.used if symbol not in useless),
                missing=(*suits.missing, *(symbol for symbol in suits.used if symbol in useless)),
                unseen=tuple(symbol for symbol in suits.unseen if symbol not in useless),
            )
            for name, suits in self.suits.items()
            if name not in self.refused
        }

    def _recipes(self) -> list[tuple[Recipe, list[str]]]:
        """Recipes with the tasks that suit, cut down to the kinds that these see."""
        found: list[tuple[Recipe, list[str]]] = []
        for recipe, readers in self.bundle.by_recipe():
            tasks = [name for name in readers if name in self.suits]
            seen = {kind for name in tasks for kind in self.bundle.records[name].task.kinds}
            if tasks:
                kinds = {kind: rule for kind, rule in recipe.kinds.items() if kind in seen}
                found.append((recipe.model_copy(update={"kinds": kinds}), tasks))
        return found

    def refusal(self, reasons: set[str]) -> RecordingError:
        """Why no task says anything: `reasons` are the codes, the message has task by task and channel by channel."""
        lines = [f"  {name}: {reason}" for name, reason in self.refused.items()]
        lines += [f"  channel {label!r}: {reason}" for label, reason in self.losses.unresolved]
        lines += [f"  {count} windows left out: {reason}" for reason, count in (+self.losses.dropped).items()]
        hint = "  name a label with --channel LABEL=SYMBOL, a unit with --unit LABEL=UNIT"
        reason = reasons.pop() if len(reasons) == 1 else "NO_CHANNELS"
        text = "\n".join([f"{self.path}: no task of {self.bundle.path} can read it", *lines, hint])
        return RecordingError(reason, text)


def stranger(
    path: Path,
    *,
    channels: Sequence[str] = (),
    units: Sequence[str] = (),
    mains_hz: int | None = None,
    corpus: str | None = None,
) -> Corpus:
    """A corpus for one file of unknown origin: its reader by content, labels by the generic parser.

    Args:
        path: The recording; `file#member` for one of several in a file.
        channels: `label=symbol` for labels that the parser does not know, e.g. `X7=eeg:C3-M2`.
        units: `label=unit` where the header's unit is missing or wrong.
        mains_hz: Line frequency, 50 or 60; None filters none.
        corpus: Corpus, by name or path, that the file is like: its reader, layout, labels, units and polarities hold.

    Raises:
        ConfigError: No such file, a folder, or an option that is not label=value.
        RecordingError: No reader knows the file's content.
    """
    data = {
        "id": "stranger",
        "title": "One recording",
        "licence": "unknown",
        "access": "",
        "files": ["*"],
        "subject": {"pattern": "(?P<subject>.+)"},
        "mains_hz": mains_hz,
        "split": {"fractions": (0, 0, 1)},
        **({"reader": _reader(path)} if corpus is None else _as_in(load_corpus(corpus), path)),
    }
    for name, texts in (("channels", channels), ("units", units)):
        data[name] = {**data.get(name, {}), **dict(_pair(text) for text in texts)}
    return validate(Corpus, data, where="options")


def _as_in(corpus: Corpus, path: Path) -> dict[str, Any]:
    """What a corpus file says about reading the file and about the labels that it has."""
    if not split_member(path)[0].exists():
        raise ConfigError(f"{path}: no such file; give a recording of {corpus.id}")
    reader = corpus.reader_of(path)
    labels = {channel.label for channel in read_header(path, reader, corpus.layout).channels}
    tables = {"channels": corpus.channels, "units": corpus.units, "polarity": corpus.polarity}
    known = {name: {label: table[label] for label in labels & table.keys()} for name, table in tables.items()}
    return {"reader": reader, "layout": corpus.layout, **known}


def _reader(path: Path) -> str:
    """Reader of a file by its content."""
    file, _ = split_member(path)
    if not file.exists():
        raise ConfigError(f"{path}: no such file; give a recording, e.g. an EDF file or the .hea of a WFDB record")
    try:
        reader = sniff(file)
    except OSError as error:
        raise RecordingError("UNREADABLE", f"{path}: {error.strerror or error}; give yourself the right to") from None
    if reader is None and file.is_dir():
        raise ConfigError(f"{path}: is a folder; give one recording, e.g. {path}/night.edf (kymo scan lists them)")
    if reader is None:
        raise RecordingError(
            "NOT_A_RECORDING",
            f"{path}: no reader knows its content; convert it to EDF first, or name a corpus that describes the file "
            "with --corpus",
        )
    return reader


def _pair(text: str) -> tuple[str, str]:
    label, equals, value = text.rpartition("=")
    if not equals or not label:
        raise ConfigError(f"{text!r}: expected LABEL=VALUE, e.g. 'EEG 2=eeg:C3-M2'")
    return label, value


def open_file(
    bundle: Bundle,
    path: Path,
    corpus: Corpus,
    *,
    tasks: Sequence[str] | None = None,
    mains: str | None = None,
    source: str = "",
) -> FileRun:
    """A recording held against the tasks of a bundle by its header; its signal is read for the line frequency alone.

    Args:
        bundle: From `load_bundle`.
        path: The recording.
        corpus: From `stranger`, whose `mains_hz` holds when `mains` is None.
        tasks: Only these; None = all.
        mains: `auto` (found in the signal), `50`, `60` or `none`.
        source: What the user calls the bundle; empty = the last two folders of its path.

    Raises:
        RecordingError: It suits no task, or its header cannot be read.
        ConfigError: An option that names a label which the recording lacks.
    """
    recording = read_header(path, corpus.reader_of(path), corpus.layout)
    check_options(recording, corpus)
    found, missed = resolve_channels(recording, corpus)
    available = {tag.symbol: channel.rate for channel, tag in found}
    wanted = {name: record for name, record in bundle.records.items() if tasks is None or name in tasks}
    verdicts = {name: suitability(record, available) for name, record in wanted.items()}
    run = FileRun(
        bundle=bundle,
        source=source or "/".join(bundle.path.absolute().parts[-2:]),
        path=path,
        corpus=corpus,
        recording=recording,
        suits={name: verdict for name, verdict in verdicts.items() if not verdict.refusal},
        refused={name: verdict.refusal for name, verdict in verdicts.items() if verdict.refusal},
    )
    if not run.suits:
        run.losses.unresolved.update((item.label, item.reason) for item in missed)
        raise run.refusal({"NO_CHANNELS"})
    if mains is not None:
        run.corpus, run.mains = _with_mains(run, mains)
    return run


def _with_mains(run: FileRun, choice: str) -> tuple[Corpus, str]:
    """The corpus with its line frequency, and what was done about it."""
    if choice not in {"auto", "50", "60", "none"}:
        raise ConfigError(f"--mains {choice}: expected auto, 50, 60 or none")
    notched = {
        kind
        for name in run.suits
        for kind, rule in run.bundle.records[name].recipe.kinds.items()
        if rule.notch and kind in run.bundle.records[name].task.kinds
    }
    channels = [channel for channel, tag in resolve_channels(run.recording, run.corpus)[0] if tag.kind in notched]
    if not channels:
        return run.corpus, "line frequency: the bundle's tasks notch none of these channels"
    where = f"notched out of {', '.join(sorted(notched))}"
    if choice in {"50", "60"}:
        if not any(channel.rate > 2 * (int(choice) + NOTCH_EDGE_HZ) for channel in channels):
            return run.corpus, f"line frequency: {choice} Hz as given; no channel's rate holds it, nothing notched"
        return _at(run.corpus, int(choice)), f"line frequency: {choice} Hz as given, {where}"
    if choice == "none":
        return _at(run.corpus, None), "line frequency: none as given, nothing notched"
    found = find_mains(run.recording, channels)
    if found.hz is not None:
        heard = f"{found.prominence_db[found.hz]:g} dB above its surroundings"
        text = f"line frequency: {found.hz} Hz found in the signal ({heard}), {where}; --mains says otherwise"
        return _at(run.corpus, found.hz), text
    trained: Mapping[str, int | None] = {
        name: hz for task in run.suits for name, hz in training_mains(run.bundle.records[task]).items()
    }
    told = ", ".join(f"{name} {hz} Hz" if hz else f"{name} none" for name, hz in trained.items()) or "not told"
    anyway = "; --mains 50 or 60 notches anyway" if found.prominence_db else ""
    return _at(run.corpus, None), f"line frequency: {found.why_not}; nothing notched (in training: {told}){anyway}"


def _at(corpus: Corpus, mains_hz: int | None) -> Corpus:
    return corpus.model_copy(update={"mains_hz": mains_hz})


def check_options(recording: Recording, corpus: Corpus) -> None:
    """Hold the user's labels and units to the recording; ConfigError names what it has."""
    labels = [channel.label for channel in recording.channels]
    for label in [*corpus.channels, *corpus.units]:
        if label not in labels:
            raise ConfigError(
                f"{label!r}: {recording.path.name} has no such label; it has {', '.join(map(repr, labels))}"
            )
    for label, unit in corpus.units.items():
        tag = resolve(label, corpus.channels)
        if isinstance(tag, Unresolved):
            raise ConfigError(f"{label!r}: a unit helps only a channel that is known; add --channel {label!r}=SYMBOL")
        try:
            in_canonical_unit(np.zeros(1, dtype=np.float32), unit, tag.unit)
        except RecordingError as error:
            raise ConfigError(f"{label!r}: unit {unit!r}: {error}") from None


def recording_name(path: Path) -> str:
    """Name of a recording without the suffixes of its file; one of several in a file has both names."""
    file, member = split_member(path)
    stem = Path(file.stem).stem if file.suffix == ".gz" else file.stem
    return f"{stem}_{re.sub(r'[^A-Za-z0-9.-]+', '-', member)}" if member else stem


def windows_of(path: Path, corpus: Corpus, recipe: Recipe, losses: Losses) -> Iterator[Window]:
    """Windows of a recording as the model takes them."""
    for number, sample in enumerate(
        window_recording(path, corpus=corpus, recipe=recipe, root=path.parent, losses=losses)
    ):
        yield Window(
            key=sample.key,
            position=number,
            epoch=0,
            corpus=corpus.id,
            recording=recording_name(path),
            meta=sample.meta,
            arrays=sample.arrays,
        )


def _told(windows: Iterator[Window], advance: Callable[[int], None]) -> Iterator[Window]:
    for window in windows:
        advance(1)
        yield window
