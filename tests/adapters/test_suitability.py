from fractions import Fraction

import pytest

from adapters.bundle import load_bundle
from adapters.suitability import check_channels, suitability, training_mains, training_shares


@pytest.fixture(scope="module")
def record(bundle_dir):
    return load_bundle(bundle_dir).records["sleep_staging"]


def changed(record, **changes):
    return record.model_copy(update={"task": record.task.model_copy(update=changes)})


def trained_with(record, symbols, windows=10):
    splits = {**record.data["splits"], "train": {**record.data["splits"]["train"], "symbols": symbols}}
    splits["train"]["windows"] = windows
    return record.model_copy(update={"data": {**record.data, "splits": splits}})


def test_missing_channels_say_what_is_needed_and_what_is_there(record):
    assert check_channels(record, {"eeg:C4-M1": Fraction(100)}) == ""
    message = check_channels(record, {"ecg:II": Fraction(256), "resp:thorax": 32.0})
    assert "sleep_staging needs at least 1 eeg" in message
    assert "the recording has ecg:II, resp:thorax" in message
    assert "no channel that is known" in check_channels(record, {})


def test_rate_below_the_band_counts_as_missing(record):
    assert check_channels(record, {"eeg:C3-M2": Fraction(24)}) == ""  # eeg up to 12 Hz
    message = check_channels(record, {"eeg:C3-M2": Fraction(20)})
    assert "too slow: eeg:C3-M2 (20 Hz, 24 needed)" in message


def test_with_channel_dropout_missing_and_unseen_channels_are_told(record):
    assert record.task.channel_dropout > 0
    assert training_shares(record) == {"ecg:II": 1.0, "eeg:C3-M2": 1.0, "eeg:C4-M1": 1.0}
    found = suitability(record, {"eeg:C4-M1": 100, "eeg:Fpz-Cz": 100, "resp:thorax": 10})
    assert found.refusal == ""
    assert found.used == ("eeg:C4-M1", "eeg:Fpz-Cz")
    assert set(found.missing) == {"eeg:C3-M2", "ecg:II"}
    assert found.unseen == ("eeg:Fpz-Cz",)


def test_without_channel_dropout_a_channel_of_every_training_window_must_be_there(record):
    strict = changed(record, channel_dropout=0.0)
    everything = {"eeg:C3-M2": 100, "eeg:C4-M1": 100, "ecg:II": 100}
    assert suitability(strict, everything).refusal == ""
    refusal = suitability(strict, {"eeg:C4-M1": 100}).refusal
    assert "trained without channel dropout" in refusal
    assert "ecg:II, eeg:C3-M2" in refusal
    assert "the recording has eeg:C4-M1" in refusal
    # What only some training windows had is no condition.
    mixed = trained_with(strict, {"eeg:C4-M1": 10, "eeg:C3-M2": 9, "ecg:II": 2})
    found = suitability(mixed, {"eeg:C4-M1": 100})
    assert (found.refusal, found.missing) == ("", ("eeg:C3-M2",))


def test_a_bundle_that_does_not_tell_its_channels_refuses_by_number_alone(record):
    silent = changed(record, channel_dropout=0.0).model_copy(update={"data": {}})
    found = suitability(silent, {"eeg:C4-M1": 100})
    assert (found.refusal, found.missing, found.unseen) == ("", (), ())
    assert training_mains(silent) == {}
