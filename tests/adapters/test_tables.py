import csv
import io
from fractions import Fraction

import numpy as np
import pytest

from adapters.bundle import load_bundle
from adapters.predict import Prediction
from adapters.tables import Track, csv_columns, csv_row, events_columns, events_row, events_sidecar


@pytest.fixture(scope="module")
def records(bundle_dir):
    return load_bundle(bundle_dir).records


def prediction(record, row, start=0, rate=Fraction(32), length=256) -> Prediction:
    labels = record.task.labels
    best = max(range(len(row)), key=row.__getitem__)
    return Prediction(
        task=record.task.id, recording="r", start=start, length=length, rate=rate, label=labels[best],
        probabilities=dict(zip(labels, row, strict=True)),
    )  # fmt: skip


def yes_no(record, labels):
    return record.model_copy(update={"task": record.task.model_copy(update={"loss": "bce", "labels": labels})})


def test_a_csv_row_has_its_times_in_seconds_and_samples_and_every_probability(records):
    record = records["rhythm"]
    file = io.StringIO()
    table = csv.writer(file)
    table.writerow(csv_columns(record))
    table.writerow(csv_row(prediction(record, [0.25, 0.05, 0.1, 0.6], start=320, length=320)))
    (row,) = csv.DictReader(io.StringIO(file.getvalue()))
    assert row == {
        "recording": "r", "task": "rhythm", "onset_s": "10", "duration_s": "10", "start": "320", "length": "320",
        "rate": "32", "label": "af", "p_sinus": "0.2500", "p_bradycardia": "0.0500", "p_tachycardia": "0.1000",
        "p_af": "0.6000",
    }  # fmt: skip


def test_an_event_has_the_columns_that_bids_asks_for_and_the_json_tells_of_each(records):
    record = records["sleep_staging"]
    assert events_columns(record)[:3] == ["onset", "duration", "trial_type"]
    row = events_row(prediction(record, [0.1, 0.1, 0.5, 0.2, 0.1], start=256, rate=Fraction(1000, 3)))
    assert row[:3] == ["0.768", "0.768", "N2"]
    assert row[3:] == ["0.1000", "0.1000", "0.5000", "0.2000", "0.1000"]
    sidecar = events_sidecar(record, bundle="bundle b")
    assert list(sidecar) == events_columns(record)
    assert sidecar["onset"]["Units"] == "s"
    assert sidecar["trial_type"]["Levels"]["R"] == "REM"
    assert "not of a person" in sidecar["trial_type"]["Description"]
    assert "bundle b" in sidecar["trial_type"]["Description"]


def test_labels_make_column_names_that_differ(records):
    record = yes_no(records["rhythm"], ["left fist", "left-fist", "af"])
    assert events_columns(record)[3:] == ["probability_left_fist_0", "probability_left_fist_1", "probability_af"]
    assert events_sidecar(record, bundle="b")["trial_type"]["Levels"]["none"] == "no class"
    single = yes_no(records["rhythm"], ["seizure"])
    assert set(events_sidecar(single, bundle="b")["trial_type"]["Levels"]) == {"seizure", "not seizure"}


def test_annotations_use_the_words_of_the_standard(records):
    found = [
        prediction(records["sleep_staging"], [0.1, 0.1, 0.5, 0.2, 0.1]),
        prediction(records["rhythm"], [0.25, 0.05, 0.1, 0.6], start=256),
    ]
    tracks = {name: Track(record) for name, record in records.items()}
    for item in found:
        tracks[item.task].add(item)
    assert tracks["sleep_staging"].annotations() == [(Fraction(0), Fraction(8), "Sleep stage N2")]
    assert tracks["rhythm"].annotations() == [(Fraction(8), Fraction(8), "rhythm: af")]


def test_a_track_keeps_what_it_was_given(records):
    record = records["sleep_staging"]
    track = Track(record)
    rows = [[0.1, 0.1, 0.5, 0.2, 0.1], [0.7, 0.1, 0.1, 0.05, 0.05]]
    for number, row in enumerate(rows):
        track.add(prediction(record, row, start=256 * number))
    assert len(track) == 2
    assert track.labels == ["N2", "W"]
    np.testing.assert_array_equal(track.onset_s, [0, 8])
    np.testing.assert_array_equal(track.duration_s, [8, 8])
    np.testing.assert_allclose(track.probabilities, rows)
    silent = Track(yes_no(record, ["W", "R"]))
    silent.add(prediction(silent.record, [0.2, 0.3]))
    assert silent.labels == ["none"]
