import csv
import json
from fractions import Fraction

import numpy as np
import pytest

from adapters.bundle import load_bundle
from adapters.data import load_task_data, read_spread
from adapters.predict import Prediction, annotation_rows, check_channels, predict, write_csv
from manifests.errors import ContractError, RecordingError
from trainer.read import Window


@pytest.fixture(scope="module")
def bundle(bundle_dir):
    return load_bundle(bundle_dir)


@pytest.fixture(scope="module")
def test_windows(adapted, bundle):
    """Task -> labelled test windows with their true class."""
    found = {}
    for run, record in zip(adapted.config.tasks, bundle.records.values(), strict=True):
        labelled = load_task_data(record.task, run).splits["test"]
        windows = [window for group in read_spread(labelled, limit=1000, batch=7) for window in group]
        found[record.task.id] = windows, [record.task.labels[labelled.targets[w.key][0]] for w in windows]
    return found


def retagged(window: Window, **changes) -> Window:
    """The window with other tags on its channels."""
    meta = json.loads(json.dumps(window.meta))
    for tags in meta["ucs"].values():
        for tag in tags:
            tag.update(changes)
    return Window(
        key=window.key, position=0, epoch=0, corpus=window.corpus, recording=window.recording, meta=meta,
        arrays=window.arrays,
    )  # fmt: skip


def test_predictions_are_those_that_were_scored(bundle, test_windows):
    for name, (windows, truth) in test_windows.items():
        predictions = predict(bundle, iter(windows))
        right = np.mean([item.label == label for item, label in zip(predictions, truth, strict=True)])
        confusion = np.array(bundle.records[name].scores["test"]["confusion"])
        assert right == pytest.approx(np.trace(confusion) / confusion.sum())
        assert {item.task for item in predictions} == {name}
        first = predictions[0]
        assert sum(first.probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert first.label == max(first.probabilities, key=first.probabilities.__getitem__)
        assert (first.start, first.length) == (windows[0].meta["start"], windows[0].meta["length"])
        assert first.rate == 32


def test_batch_mates_do_not_matter(bundle, test_windows):
    windows, _ = test_windows["sleep_staging"]
    together = predict(bundle, windows, batch=32)
    alone = predict(bundle, windows, batch=1)
    for one, other in zip(together, alone, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_windows_of_both_recipes_go_to_their_tasks(bundle, test_windows):
    mixed = [test_windows["sleep_staging"][0][0], test_windows["rhythm"][0][0]]
    assert [item.task for item in predict(bundle, mixed)] == ["sleep_staging", "rhythm"]
    assert [item.task for item in predict(bundle, mixed[:1], tasks=["sleep_staging"])] == ["sleep_staging"]
    with pytest.raises(ContractError, match="which no task here reads"):
        predict(bundle, mixed, tasks=["rhythm"])


def test_missing_channels_say_what_is_needed_and_what_is_there(bundle):
    record = bundle.records["sleep_staging"]
    assert check_channels(record, {"eeg:C4-M1": Fraction(100)}) == ""
    message = check_channels(record, {"ecg:II": Fraction(256), "resp:thorax": 32.0})
    assert "sleep_staging needs at least 1 eeg" in message
    assert "the recording has ecg:II, resp:thorax" in message
    assert "no channel that is known" in check_channels(record, {})


def test_rate_below_the_band_counts_as_missing(bundle):
    record = bundle.records["sleep_staging"]  # eeg up to 12 Hz
    assert check_channels(record, {"eeg:C3-M2": Fraction(24)}) == ""
    message = check_channels(record, {"eeg:C3-M2": Fraction(20)})
    assert "too slow: eeg:C3-M2 (20 Hz, 24 needed)" in message


def test_window_without_the_channels_or_of_another_rate_is_refused(bundle, test_windows):
    window = test_windows["sleep_staging"][0][0]
    with pytest.raises(RecordingError, match="needs at least 1 eeg") as caught:
        predict(bundle, [retagged(window, role="reference")])
    assert caught.value.reason == "NO_CHANNELS"
    with pytest.raises(ContractError, match="at 64 Hz, recipe tiny_psg of the bundle says 32 Hz"):
        predict(bundle, [retagged(window, rate=[64, 1])])


def test_csv_rows(tmp_path):
    rows = [
        Prediction(
            task="rhythm", recording="r", start=320, length=320, rate=Fraction(32), label="af",
            probabilities={"sinus": 0.25, "af": 0.75},
        )
    ]  # fmt: skip
    write_csv(tmp_path / "p.csv", rows)
    with (tmp_path / "p.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row == {
        "recording": "r", "task": "rhythm", "onset_s": "10", "duration_s": "10", "start": "320", "length": "320",
        "rate": "32", "label": "af", "probabilities": "sinus=0.2500;af=0.7500",
    }  # fmt: skip


def test_annotations_use_the_words_of_the_standard(bundle, test_windows):
    windows = [test_windows["rhythm"][0][0], test_windows["sleep_staging"][0][0]]
    rows = annotation_rows(predict(bundle, windows))
    assert rows == sorted(rows)
    texts = {text.rsplit(" ", 1)[0] for _, _, text in rows}
    assert texts == {"Sleep stage", "rhythm:"}
    assert all(isinstance(onset, Fraction) and duration == 8 for onset, duration, _ in rows)
