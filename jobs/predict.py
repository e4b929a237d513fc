"""`kymo predict`: a stranger's recording through a bundle, from the bundle alone."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapters.bundle import Bundle
from adapters.predict import Prediction, check_channels, predict
from engine.read import read_header, sniff
from engine.recording import Recording
from engine.rows import Losses, in_canonical_unit
from engine.scan import resolve_channels
from engine.windows import window_recording
from manifests.channels import Unresolved, resolve
from manifests.config import validate
from manifests.corpora import Corpus
from manifests.errors import ConfigError, RecordingError
from manifests.recipes import Recipe
from trainer.read import Window


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """Predictions of a file, tasks that it does not suit with the reason, windows and channels left out by reason."""

    predictions: list[Prediction]
    refused: dict[str, str]
    dropped: Counter[str]
    unresolved: dict[str, str]


def stranger(
    path: Path, *, channels: Sequence[str] = (), units: Sequence[str] = (), mains_hz: int | None = None
) -> Corpus:
    """A corpus for one file of unknown origin: its reader by content, labels by the generic parser.

    Args:
        path: The recording.
        channels: `label=symbol` for labels that the parser does not know, e.g. `X7=eeg:C3-M2`.
        units: `label=unit` where the header's unit is missing or wrong.
        mains_hz: Line frequency, 50 or 60; None filters none.

    Raises:
        ConfigError: No such file, or an option that is not label=value.
        RecordingError: No reader knows the file's content.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such file; give a recording, e.g. an EDF file or the .hea of a WFDB record")
    reader = sniff(path)
    if reader is None:
        raise RecordingError("NOT_A_RECORDING", f"{path}: no reader knows its content; convert it to EDF first")
    data = {
        "id": "stranger",
        "title": "One recording",
        "licence": "unknown",
        "access": "",
        "reader": reader,
        "files": [path.name],
        "subject": {"pattern": "(?P<subject>.+)"},
        "channels": dict(_pair(text) for text in channels),
        "units": dict(_pair(text) for text in units),
        "mains_hz": mains_hz,
        "split": {"fractions": (0, 0, 1)},
    }
    return validate(Corpus, data, where="options")


def _pair(text: str) -> tuple[str, str]:
    label, equals, value = text.rpartition("=")
    if not equals or not label:
        raise ConfigError(f"{text!r}: expected LABEL=VALUE, e.g. 'EEG 2=eeg:C3-M2'")
    return label, value


def predict_file(bundle: Bundle, path: Path, corpus: Corpus, *, tasks: Sequence[str] | None = None) -> Predicted:
    """Predictions of the tasks of a bundle that the recording suits.

    Raises:
        RecordingError: It suits none of them, or cannot be read.
    """
    recording = read_header(path, corpus.reader_of(path), corpus.layout)
    check_options(recording, corpus)
    available = {tag.symbol: channel.rate for channel, tag in resolve_channels(recording, corpus)[0]}
    wanted = [name for name in bundle.records if tasks is None or name in tasks]
    refused = {name: reason for name in wanted if (reason := check_channels(bundle.records[name], available))}
    losses = Losses()
    predictions: list[Prediction] = []
    for recipe, readers in bundle.by_recipe():
        suited = [name for name in readers if name in wanted and name not in refused]
        if not suited:
            continue
        try:
            windows = windows_of(path, corpus, recipe, losses)
            predictions += predict(bundle, windows, tasks=suited)
        except RecordingError as error:
            refused |= dict.fromkeys(suited, str(error))
    if not predictions:
        lines = [f"  {name}: {reason}" for name, reason in refused.items()]
        lines += [f"  channel {label!r}: {reason}" for label, reason in losses.unresolved]
        lines += [f"  {count} windows left out: {reason}" for reason, count in (+losses.dropped).items()]
        hint = "  name a label with --channel LABEL=SYMBOL, a unit with --unit LABEL=UNIT"
        raise RecordingError("NO_CHANNELS", "\n".join([f"{path}: no task of {bundle.path} can read it", *lines, hint]))
    return Predicted(
        predictions=predictions,
        refused=refused,
        dropped=+losses.dropped,
        unresolved=dict(losses.unresolved.keys()),
    )


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
            recording=path.stem,
            meta=sample.meta,
            arrays=sample.arrays,
        )
