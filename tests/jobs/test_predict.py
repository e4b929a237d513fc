"""A stranger's file through a bundle, and what it says when the file does not suit."""

import gzip
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import edfio
import numpy as np
import pytest

import jobs.predict
from adapters.bundle import Bundle
from adapters.predict import Prediction
from jobs.predict import open_file, recording_name, stranger
from manifests.config import dump_yaml
from manifests.corpora import Corpus
from manifests.errors import ConfigError, RecordingError


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """Predictions of a file, tasks that it does not suit with the reason, windows and channels left out by reason.

    `left_out` counts, by task, windows whose channels are flat, clipped or missing for too long.
    """

    predictions: list[Prediction]
    refused: dict[str, str]
    left_out: Counter[str]
    dropped: Counter[str]
    unresolved: dict[str, str]


def predict_file(bundle: Bundle, path: Path, corpus: Corpus, *, tasks: Sequence[str] | None = None) -> Predicted:
    """All predictions of the tasks of a bundle that the recording suits, at once.

    Raises:
        RecordingError: It suits none of them, or cannot be read.
    """
    run = open_file(bundle, path, corpus, tasks=tasks)
    return Predicted(
        predictions=list(run.predictions()),
        refused=run.refused,
        left_out=+run.left_out,
        dropped=+run.losses.dropped,
        unresolved=dict(run.losses.unresolved.keys()),
    )


def test_a_night_is_predicted_by_the_tasks_that_it_suits(bundle, night):
    found = predict_file(bundle, night, stranger(night, mains_hz=50))
    staging = [item for item in found.predictions if item.task == "sleep_staging"]
    assert len(staging) == 20  # ten minutes in epochs of 30 s
    assert [item.onset for item in staging] == [30 * n for n in range(20)]
    assert all(abs(sum(item.probabilities.values()) - 1) < 1e-5 for item in staging)
    rhythm = [item for item in found.predictions if item.task == "rhythm"]
    assert [item.onset for item in rhythm] == [10 * n for n in range(60)]


def test_predictions_come_from_the_signal(bundle, nights):
    found = {}
    for subject in ("sub-001", "sub-002"):
        path = nights / "psg" / subject / f"{subject}_psg.edf"
        found[subject] = predict_file(bundle, path, stranger(path)).predictions[0].probabilities
    assert found["sub-001"] != found["sub-002"]


def test_every_window_is_told_of_once_and_only_kinds_that_a_task_sees_are_decoded(bundle, night):
    run = open_file(bundle, night, stranger(night), tasks=["sleep_staging"])
    told: list[int] = []
    assert run.num_windows == 20
    assert len(list(run.predictions(told.append))) == 20
    assert sum(told) == 20
    ((recipe, tasks),) = run._recipes()
    assert (set(recipe.kinds), tasks) == ({"eeg", "eog", "emg"}, ["sleep_staging"])
    assert "ecg" in bundle.records["sleep_staging"].recipe.kinds


def test_a_file_without_the_channels_names_what_is_missing(bundle, tmp_path):
    path = tmp_path / "belt.edf"
    signal = edfio.EdfSignal(np.sin(np.arange(64 * 60) / 20), 64, label="THOR RES", physical_dimension="mV")
    edfio.Edf([signal]).write(path)
    with pytest.raises(RecordingError, match=r"sleep_staging: task sleep_staging needs at least 1 eeg .*resp:thorax"):
        predict_file(bundle, path, stranger(path))


def test_channels_that_training_had_and_the_file_lacks_are_told(bundle, tmp_path, write_eeg):
    path = write_eeg(tmp_path / "one.edf", label="EEG Fpz-Cz")
    run = open_file(bundle, path, stranger(path))
    (suits,) = run.suits.values()
    assert suits.used == suits.unseen == ("eeg:Fpz-Cz",)
    assert "eeg:C3-A2" in suits.missing
    list(run.predictions())
    assert run.fit() == run.suits


def test_a_channel_that_turns_out_useless_is_not_called_seen(bundle, tmp_path):
    rng = np.random.default_rng(0)
    signals = [
        edfio.EdfSignal(30 * rng.standard_normal(rate * 90), rate, label=label, physical_dimension="uV")
        for rate, label in ((128, "EEG C3-A2"), (1, "EMG chin"))
    ]
    edfio.Edf(signals).write(tmp_path / "slow.edf")
    run = open_file(bundle, tmp_path / "slow.edf", stranger(tmp_path / "slow.edf"))
    assert len(list(run.predictions())) == 3
    assert run.suits["sleep_staging"].used == ("eeg:C3-A2", "emg:chin")
    assert run.fit()["sleep_staging"].used == ("eeg:C3-A2",)
    assert "emg:chin" in run.fit()["sleep_staging"].missing


def test_an_unknown_label_can_be_named(bundle, tmp_path, write_eeg):
    path = write_eeg(tmp_path / "x7.edf", label="X7")
    with pytest.raises(RecordingError, match="no channel that is known"):
        predict_file(bundle, path, stranger(path))
    found = predict_file(bundle, path, stranger(path, channels=["X7=eeg:C3-M2"]))
    assert len(found.predictions) == 3


def test_a_corpus_file_tells_labels_and_units(bundle, tmp_path, write_eeg):
    corpus = {
        "id": "lab", "title": "Lab", "licence": "x", "access": "x", "reader": "edf", "files": ["*.edf"],
        "subject": {"pattern": "(?P<subject>.+)"}, "channels": {"X7": "eeg:C3-M2", "X9": "eeg:C4-M1"},
        "units": {"X7": "uV", "X9": "uV"},
    }  # fmt: skip
    (tmp_path / "lab.yaml").write_text(dump_yaml(corpus))
    path = write_eeg(tmp_path / "x7.edf", label="X7", unit="")
    found = predict_file(bundle, path, stranger(path, corpus=str(tmp_path / "lab.yaml")))
    assert len(found.predictions) == 3
    with pytest.raises(ConfigError, match="no such file"):
        stranger(tmp_path / "absent.edf", corpus=str(tmp_path / "lab.yaml"))
    # What the user says goes before what the corpus says.
    named = stranger(path, corpus=str(tmp_path / "lab.yaml"), channels=["X7=eeg:O1-M2"])
    assert named.channels == {"X7": "eeg:O1-M2"}


def test_a_rate_that_cannot_carry_the_band_is_refused_with_both_numbers(bundle, tmp_path, write_eeg):
    path = write_eeg(tmp_path / "slow.edf", rate=32)
    with pytest.raises(RecordingError, match=r"too slow: eeg:C3-A2 \(32 Hz"):
        predict_file(bundle, path, stranger(path))


def test_a_missing_unit_is_refused_and_can_be_declared(bundle, tmp_path, write_eeg):
    path = write_eeg(tmp_path / "unit.edf", unit="")
    with pytest.raises(RecordingError, match="unit") as caught:
        predict_file(bundle, path, stranger(path))
    assert caught.value.reason == "UNIT_UNKNOWN"
    assert predict_file(bundle, path, stranger(path, units=["EEG C3-A2=uV"])).predictions


def test_a_recording_shorter_than_a_window_is_refused_with_both_lengths(bundle, tmp_path, write_eeg):
    path = write_eeg(tmp_path / "short.edf", seconds=20)
    with pytest.raises(RecordingError, match=r"longest stretch 20 s.* takes 30 s") as caught:
        predict_file(bundle, path, stranger(path))
    assert caught.value.reason == "TOO_SHORT"


def test_windows_without_signal_are_left_out_and_told(bundle, tmp_path, write_eeg):
    signal = 30 * np.random.default_rng(0).standard_normal(128 * 120)
    signal[: 128 * 50] = 0.0  # the first window and two thirds of the second
    path = write_eeg(tmp_path / "half.edf", signal=signal)
    run = open_file(bundle, path, stranger(path))
    assert [item.onset for item in run.predictions()] == [60, 90]
    assert run.left_out == {"sleep_staging": 2}
    assert not +run.losses.dropped
    flat = np.zeros(128 * 120)
    flat[-1] = 1.0
    path = write_eeg(tmp_path / "flat.edf", signal=flat)
    with pytest.raises(RecordingError, match=r"each of its 4 windows was left out: .*flat") as caught:
        predict_file(bundle, path, stranger(path))
    assert caught.value.reason == "SIGNAL_INVALID"


def hum(tmp_path: Path, write_eeg, *, hz: float, rate: int = 256) -> Path:
    rng = np.random.default_rng(1)
    time = np.arange(rate * 90) / rate
    return write_eeg(
        tmp_path / f"hum{hz}.edf",
        rate=rate,
        signal=20 * rng.standard_normal(len(time)) + 9 * np.sin(2 * np.pi * hz * time),
    )


def test_the_line_frequency_is_found_or_said_to_be_unknown(bundle, tmp_path, write_eeg):
    record = bundle.records["sleep_staging"]
    assert record.recipe.kinds["eeg"].notch
    for hz in (50, 60):
        path = hum(tmp_path, write_eeg, hz=hz)
        run = open_file(bundle, path, stranger(path), mains="auto")
        assert run.corpus.mains_hz == hz
        assert f"{hz} Hz found in the signal" in run.mains
    given = open_file(bundle, path, stranger(path), mains="50")
    assert (given.corpus.mains_hz, "50 Hz as given" in given.mains) == (50, True)
    none = open_file(bundle, path, stranger(path), mains="none")
    assert (none.corpus.mains_hz, "nothing notched" in none.mains) == (None, True)
    quiet = write_eeg(tmp_path / "quiet.edf", rate=256)
    run = open_file(bundle, quiet, stranger(quiet), mains="auto")
    assert run.corpus.mains_hz is None
    assert "no hum stands out" in run.mains
    assert "in training: synthetic_psg 50 Hz" in run.mains
    slow = write_eeg(tmp_path / "slow.edf", rate=100)
    assert "no channel's rate holds it" in open_file(bundle, slow, stranger(slow), mains="50").mains
    with pytest.raises(ConfigError, match="expected auto, 50, 60 or none"):
        open_file(bundle, path, stranger(path), mains="55")


def test_the_notch_that_was_found_is_the_one_that_is_applied(bundle, tmp_path, write_eeg):
    path = hum(tmp_path, write_eeg, hz=50)
    found = {
        mains: [item.probabilities["W"] for item in open_file(bundle, path, stranger(path), mains=mains).predictions()]
        for mains in ("auto", "50", "60", "none")
    }
    assert found["auto"] == found["50"]
    assert found["auto"] != found["none"]


def test_a_recipe_without_a_notch_needs_no_line_frequency(bundle, tmp_path, write_eeg):
    record = bundle.records["sleep_staging"]
    kinds = {kind: rule.model_copy(update={"notch": False}) for kind, rule in record.recipe.kinds.items()}
    plain = record.model_copy(update={"recipe": record.recipe.model_copy(update={"kinds": kinds})})
    path = hum(tmp_path, write_eeg, hz=50)
    run = open_file(replace(bundle, records={"sleep_staging": plain}), path, stranger(path), mains="auto")
    assert "notch none of these channels" in run.mains


def test_wrong_files_and_options_are_said_clearly(tmp_path, write_eeg, monkeypatch):
    with pytest.raises(ConfigError, match="no such file"):
        stranger(tmp_path / "absent.edf")
    with pytest.raises(ConfigError, match="is a folder; give one recording"):
        stranger(tmp_path)
    (tmp_path / "notes.txt").write_text("not a recording")
    with pytest.raises(RecordingError, match="no reader knows its content"):
        stranger(tmp_path / "notes.txt")
    path = write_eeg(tmp_path / "e.edf")
    with pytest.raises(ConfigError, match="expected LABEL=VALUE"):
        stranger(path, channels=["X7"])
    with pytest.raises(ConfigError, match="no UCS symbol"):
        stranger(path, channels=["X7=eeg:Nowhere"])

    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(jobs.predict, "sniff", refuse)
    with pytest.raises(RecordingError, match="Permission denied") as caught:
        stranger(path)
    assert caught.value.reason == "UNREADABLE"


def test_options_that_name_what_is_not_there_are_refused(bundle, tmp_path, write_eeg):
    path = write_eeg(tmp_path / "e.edf")
    with pytest.raises(ConfigError, match=r"'X8': e.edf has no such label; it has 'EEG C3-A2'"):
        predict_file(bundle, path, stranger(path, channels=["X8=eeg:C3-M2"]))
    with pytest.raises(ConfigError, match="parsec"):
        predict_file(bundle, path, stranger(path, units=["EEG C3-A2=parsec"]))


def test_odd_names_and_labels_are_read(bundle, tmp_path, write_eeg):
    path = write_eeg(tmp_path / "night [1] #2 * é.edf", label="[x]*{7}")
    found = predict_file(bundle, path, stranger(path, channels=["[x]*{7}=eeg:C3-M2"]))
    assert len(found.predictions) == 3


def test_names_of_files_tell_recordings_apart(bundle, tmp_path, write_eeg):
    assert recording_name(Path("a/night.v2.edf")) == "night.v2"
    assert recording_name(Path("a/exams.hdf5#subj/117")) == "117"  # a path, not a member
    assert recording_name(Path("a/exams.hdf5#1 17")) == "exams_1-17"
    plain = write_eeg(tmp_path / "night.edf")
    packed = tmp_path / "night.edf.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    found = predict_file(bundle, packed, stranger(packed)).predictions
    assert [item.recording for item in found] == ["night"] * 3
    assert [item.probabilities for item in found] == [
        item.probabilities for item in predict_file(bundle, plain, stranger(plain)).predictions
    ]
