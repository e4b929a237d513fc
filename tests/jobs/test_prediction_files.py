"""Files of predictions: whole or not at all."""

import csv
import json

import edfio
import pytest

from jobs.predict import open_file, stranger
from jobs.prediction_files import PredictionFiles
from manifests.errors import ConfigError

FORMATS = ("csv", "edf", "bids", "png")


def write(run, folder, formats=FORMATS):
    with PredictionFiles(run, folder, formats) as files:
        for prediction in run.predictions():
            files.add(prediction)
        return files.commit()


@pytest.fixture
def run(bundle, night):
    return open_file(bundle, night, stranger(night), tasks=["sleep_staging"])


def test_every_format_says_the_same(run, tmp_path):
    written = write(run, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert [path.name for path in written] == names
    assert names == [
        "sub-001_desc-sleepstaging_events.json",
        "sub-001_desc-sleepstaging_events.tsv",
        "sub-001_psg.sleep_staging.csv",
        "sub-001_psg.sleep_staging.edf",
        "sub-001_psg.sleep_staging.png",
    ]
    rows = list(csv.DictReader((tmp_path / "out" / names[2]).open()))
    events = list(csv.DictReader((tmp_path / "out" / names[1]).open(), delimiter="\t"))
    edf = edfio.read_edf(tmp_path / "out" / names[3])
    assert len(rows) == len(events) == len(edf.annotations) == 20
    for row, event, annotation in zip(rows, events, edf.annotations, strict=True):
        assert row["label"] == event["trial_type"] == annotation.text.removeprefix("Sleep stage ")
        assert float(row["onset_s"]) == float(event["onset"]) == annotation.onset
        assert row["p_W"] == event["probability_W"]
    assert list(events[0]) == list(json.loads((tmp_path / "out" / names[0]).read_text()))
    assert edf.starttime.isoformat() == run.recording.extra["start_time"]
    assert (tmp_path / "out" / names[4]).read_bytes().startswith(b"\x89PNG")


def test_rows_go_to_the_disk_as_they_come_and_have_no_name_before_the_end(run, tmp_path):
    with PredictionFiles(run, tmp_path, FORMATS) as files:
        for prediction in run.predictions():
            files.add(prediction)
        assert {path.suffix for path in tmp_path.iterdir()} == {".tmp"}
        assert not [path for path in files.names("sleep_staging") if path.exists()]
        files.commit()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_leaves_nothing_and_an_earlier_result_as_it_was(run, tmp_path, error):
    for path in write(run, tmp_path):
        path.write_text("from before")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error), PredictionFiles(run, tmp_path, FORMATS) as files:  # noqa: PT012
        files.add(next(run.predictions()))
        raise error
    assert sorted(tmp_path.iterdir()) == before
    assert {path.read_text() for path in before} == {"from before"}


def test_the_same_command_gives_the_same_bytes(bundle, night, tmp_path):
    contents = []
    for _ in range(2):
        again = open_file(bundle, night, stranger(night))
        contents.append({path.name: path.read_bytes() for path in write(again, tmp_path)})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 10  # two tasks


def test_the_recording_is_never_overwritten(run, night, tmp_path):
    (tmp_path / "sub-001_psg.sleep_staging.edf").symlink_to(night)
    before = night.read_bytes()
    with pytest.raises(ConfigError, match="is the recording itself"):
        PredictionFiles(run, tmp_path, FORMATS)
    assert night.read_bytes() == before
    PredictionFiles(run, tmp_path, ["csv"])


def test_without_formats_no_folder_is_made(run, tmp_path):
    assert write(run, tmp_path / "out", []) == []
    assert not (tmp_path / "out").exists()
