"""Files of predictions: written beside their names as the predictions come, and renamed all together at the end."""

import csv
import datetime
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from adapters.picture import draw_track
from adapters.predict import Prediction
from adapters.tables import Track, csv_columns, csv_row, events_columns, events_row, events_sidecar
from engine.annotate import write_annotations
from engine.files import companions
from jobs.predict import FileRun, recording_name
from manifests.errors import ConfigError

Format = Literal["csv", "edf", "bids", "png"]
# What BIDS and kymo's own corpora put at the end of a recording's name; `events` takes its place.
_SUFFIXES = ("_eeg", "_ieeg", "_emg", "_ecg", "_physio", "_psg")


class PredictionFiles:
    """Files of every task that speaks, by format; a context that leaves nothing behind unless `commit` was called.

    Rows of CSV and BIDS tables go to the disk as they come. Annotations and pictures are made at the end, from the
    small `Track` of each task.

    Args:
        run: The recording and the bundle.
        folder: Where the files go; made if need be.
        formats: Which of them.

    Raises:
        ConfigError: A file would take the place of the recording.
    """

    def __init__(self, run: FileRun, folder: Path, formats: Sequence[Format]) -> None:
        self.tracks: dict[str, Track] = {}
        self._run = run
        self._formats = tuple(dict.fromkeys(formats))
        self._folder = folder
        self._temporary: dict[Path, Path] = {}  # final path -> the one that is written to
        self._tables: dict[str, list[tuple[Any, Any]]] = {}
        self._open = ExitStack()
        inputs = {name.resolve() for name in companions(run.path, run.corpus.reader_of(run.path))}
        inputs.add(run.path.resolve())
        for task in run.suits:
            if taken := [path for path in self.names(task) if path.resolve() in inputs]:
                raise ConfigError(f"{taken[0]}: is the recording itself; choose another folder with --out")
        if self._formats:
            folder.mkdir(parents=True, exist_ok=True)

    def names(self, task: str) -> list[Path]:
        """Files of a task, in the order of the formats."""
        return [path for format_ in self._formats for path in self._paths(task, format_)]

    def _paths(self, task: str, format_: Format) -> list[Path]:
        stem = recording_name(self._run.path)
        if format_ != "bids":
            return [self._folder / f"{stem}.{task}.{format_}"]
        source = next((stem.removesuffix(suffix) for suffix in _SUFFIXES if stem.endswith(suffix)), stem)
        name = f"{source}_desc-{task.replace('_', '')}_events"  # a BIDS value has no underscore
        return [self._folder / f"{name}.tsv", self._folder / f"{name}.json"]

    def __enter__(self) -> "PredictionFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        for temporary in self._temporary.values():
            temporary.unlink(missing_ok=True)

    def add(self, prediction: Prediction) -> None:
        """Take a prediction; its rows are written now."""
        task = prediction.task
        if task not in self.tracks:
            self._begin(task)
        self.tracks[task].add(prediction)
        for table, row_of in self._tables[task]:
            table.writerow(row_of(prediction))

    def commit(self) -> list[Path]:
        """Finish all files and give them their names; an earlier file of that name is replaced."""
        for task, track in self.tracks.items():
            self._finish(task, track)
        self._open.close()
        for path, temporary in self._temporary.items():
            temporary.replace(path)
        written, self._temporary = list(self._temporary), {}
        return sorted(written)

    def _begin(self, task: str) -> None:
        record = self._run.bundle.records[task]
        self.tracks[task] = Track(record)
        self._tables[task] = []
        kinds = (("csv", ",", csv_columns, csv_row), ("bids", "\t", events_columns, events_row))
        for format_, delimiter, columns_of, row_of in kinds:
            if format_ in self._formats:
                path = self._beside(self._paths(task, format_)[0])
                file = self._open.enter_context(path.open("w", encoding="utf-8", newline=""))
                table = csv.writer(file, delimiter=delimiter, lineterminator="\n")
                table.writerow(columns_of(record))
                self._tables[task].append((table, row_of))

    def _finish(self, task: str, track: Track) -> None:
        """Write what needs the whole track."""
        about = about_bundle(self._run)
        start_time = self._run.recording.extra.get("start_time", "")
        start_time = "" if start_time == "00:00:00" else start_time  # what writers put who do not know it
        if "bids" in self._formats:
            sidecar = events_sidecar(track.record, bundle=about)
            text = json.dumps(sidecar, indent=2, ensure_ascii=False) + "\n"
            self._beside(self._paths(task, "bids")[1]).write_text(text, encoding="utf-8")
        if "edf" in self._formats:
            start = datetime.time.fromisoformat(start_time) if start_time else None
            write_annotations(self._beside(self._paths(task, "edf")[0]), track.annotations(), start)
        if "png" in self._formats:
            figure = draw_track(track, file=self._run.path.name, bundle=about, start_time=start_time)
            figure.savefig(self._beside(self._paths(task, "png")[0]), format="png")

    def _beside(self, path: Path) -> Path:
        """Path to write to, beside the final one."""
        self._temporary[path] = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        return self._temporary[path]


def about_bundle(run: FileRun) -> str:
    """The bundle in a few words: what the user calls it, and the first digits of its encoder's hash."""
    return f"bundle {run.source} (encoder {run.bundle.manifest.base.sha256[:8]})"
