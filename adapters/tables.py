"""Predictions as rows: CSV, BIDS `events.tsv` with the JSON that describes its columns, and EDF+ annotations."""

import re
from array import array
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from adapters.layout import TaskRecord
from adapters.predict import Prediction, label_of
from manifests.annotations import STAGES

CSV_COLUMNS = ("recording", "task", "onset_s", "duration_s", "start", "length", "rate", "label")
NONE = "none"  # what a yes/no task says where it says no to everything
STAGE_NAMES = {"W": "Wake", "N1": "NREM 1", "N2": "NREM 2", "N3": "NREM 3", "R": "REM"}


class Track:
    """Predictions of one task on one file, kept small: some 40 bytes a window, so that a day takes less than 1 MB."""

    def __init__(self, record: TaskRecord) -> None:
        self.record = record
        self.rate = Fraction(1)
        self._starts = array("q")
        self._lengths = array("q")
        self._probabilities = array("f")

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, prediction: Prediction) -> None:
        """Take one more window."""
        self.rate = prediction.rate
        self._starts.append(prediction.start)
        self._lengths.append(prediction.length)
        self._probabilities.extend(prediction.probabilities.values())

    @property
    def onset_s(self) -> np.ndarray:
        """Seconds from the recording's start to each window, (N,)."""
        return np.array(self._starts) / float(self.rate)

    @property
    def duration_s(self) -> np.ndarray:
        """Seconds that each window lasts, (N,)."""
        return np.array(self._lengths) / float(self.rate)

    @property
    def probabilities(self) -> np.ndarray:
        """Probability of each class in each window, float32 (N, K)."""
        return np.array(self._probabilities, dtype=np.float32).reshape(len(self), len(self.record.task.labels))

    @property
    def labels(self) -> list[str]:
        """Label of each window; several joined by `+`, `none` for none."""
        return [label_of(self.record, row) or NONE for row in self.probabilities.tolist()]

    def annotations(self) -> list[tuple[Fraction, Fraction, str]]:
        """(onset, duration, text) in seconds for `engine.annotate`, by onset."""
        return [
            (start / self.rate, length / self.rate, annotation_text(self.record, label))
            for start, length, label in zip(self._starts, self._lengths, self.labels, strict=True)
        ]


def is_staging(record: TaskRecord) -> bool:
    """Whether the classes of a task are sleep stages, so that its predictions make a hypnogram."""
    return set(record.task.labels) <= set(STAGES)


def annotation_text(record: TaskRecord, label: str) -> str:
    """`Sleep stage N2` for a stage, the words of the EDF+ standard that hypnogram readers know, else `task: label`."""
    return f"Sleep stage {label}" if is_staging(record) else f"{record.task.id}: {label}"


def csv_columns(record: TaskRecord) -> list[str]:
    """Names of the columns of `csv_row`."""
    return [*CSV_COLUMNS, *(f"p_{label}" for label in record.task.labels)]


def csv_row(prediction: Prediction) -> list[Any]:
    """One window: its times in seconds and, exact, in samples; its label; the probability of each class."""
    item = prediction
    return [
        *(item.recording, item.task, _seconds(item.onset), _seconds(item.duration)),
        *(item.start, item.length, item.rate, item.label or NONE),
        *(f"{probability:.4f}" for probability in item.probabilities.values()),
    ]


def events_columns(record: TaskRecord) -> list[str]:
    """Names of the columns of `events_row`, as BIDS asks for them."""
    return ["onset", "duration", "trial_type", *_probability_columns(record.task.labels)]


def events_row(prediction: Prediction) -> list[Any]:
    """One window as a row of a BIDS `events.tsv`."""
    return [
        *(_seconds(prediction.onset), _seconds(prediction.duration), prediction.label or NONE),
        *(f"{probability:.4f}" for probability in prediction.probabilities.values()),
    ]


def events_sidecar(record: TaskRecord, *, bundle: str) -> dict[str, Any]:
    """What the columns of `events_row` mean: the JSON that lies beside the table. `bundle` says whose word it is."""
    task = record.task
    is_exclusive = task.loss == "cross_entropy"
    levels: Mapping[str, str] = (
        STAGE_NAMES if is_staging(record) else {label: f"class {label}" for label in task.labels}
    )
    what = "the most probable class" if is_exclusive else "the classes of probability above 0.5, joined by +"
    no = {} if is_exclusive else {label_of(record, [0.0] * len(task.labels)) or NONE: "no class"}
    how = "softmax over the classes" if is_exclusive else "sigmoid, each class by itself"
    return {
        "onset": {"Description": "Begin of the window, from the start of the recording", "Units": "s"},
        "duration": {"Description": "Length of the window", "Units": "s"},
        "trial_type": {
            "LongName": task.title,
            "Description": f"Prediction of a model, not of a person: {what} by task {task.id} of {bundle}",
            "Levels": {label: levels[label] for label in task.labels} | no,
        },
        **{
            column: {"LongName": f"Probability of {label}", "Description": f"Output of the model ({how}), 0 to 1"}
            for column, label in zip(_probability_columns(task.labels), task.labels, strict=True)
        },
    }


def _probability_columns(labels: Sequence[str]) -> list[str]:
    """Column names of letters, digits and underscores, told apart by their number where two would be one."""
    plain = [re.sub(r"\W+", "_", label, flags=re.ASCII) for label in labels]
    return [
        f"probability_{name}" if plain.count(name) == 1 else f"probability_{name}_{number}"
        for number, name in enumerate(plain)
    ]


def _seconds(value: Fraction) -> str:
    return f"{float(value):.10g}"
