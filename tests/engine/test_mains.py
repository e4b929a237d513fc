"""The line frequency, from the signal."""

from pathlib import Path

import edfio
import numpy as np
import pytest

from engine.mains import LEAST_DB, LEAST_LONG_DB, find_mains, prominences
from engine.read import read_header, sniff


def eeg(hum_hz: float | None, *, rate: int = 256, seconds: int = 60, amplitude: float = 2.0, seed: int = 0):
    """Pink-like noise of 30 uV with a hum of `amplitude` uV."""
    rng = np.random.default_rng(seed)
    noise = np.cumsum(rng.standard_normal(rate * seconds)) * 0.8 + rng.standard_normal(rate * seconds)
    noise -= np.convolve(noise, np.ones(rate) / rate, mode="same")
    time = np.arange(rate * seconds) / rate
    return noise + (0 if hum_hz is None else amplitude * np.sin(2 * np.pi * hum_hz * time))


def write(path: Path, signals, *, rate: int = 256, labels=("EEG C3-A2", "EEG C4-A1", "EEG O1-A2", "EEG O2-A1")):
    edfio.Edf(
        [
            edfio.EdfSignal(signal, rate, label=label, physical_dimension="uV")
            for signal, label in zip(signals, labels, strict=False)
        ]
    ).write(path)
    return read_header(path, "edf")


@pytest.mark.parametrize("hum_hz", [50, 60])
@pytest.mark.parametrize("seconds", [10, 600])
def test_a_hum_is_found(tmp_path, hum_hz, seconds):
    recording = write(tmp_path / "a.edf", [eeg(hum_hz, seconds=seconds)])
    found = find_mains(recording, recording.channels)
    assert (found.hz, found.why_not) == (hum_hz, "")
    assert found.prominence_db[hum_hz] > LEAST_DB
    assert found.prominence_db[110 - hum_hz] < LEAST_LONG_DB


def test_no_hum_is_no_line_frequency(tmp_path):
    # Forty recordings of ten seconds, whose spectra are rough: none may hum by chance.
    for seed in range(40):
        assert max(prominences(eeg(None, seconds=10, seed=seed), 256.0).values()) < LEAST_DB
        assert max(prominences(eeg(None, seconds=60, seed=seed), 256.0).values()) < LEAST_LONG_DB
    recording = write(tmp_path / "a.edf", [eeg(None)])
    found = find_mains(recording, recording.channels)
    assert found.hz is None
    assert "no hum stands out" in found.why_not


def test_two_hums_alike_are_not_decided(tmp_path):
    recording = write(tmp_path / "a.edf", [eeg(50) + eeg(60, seed=1)])
    found = find_mains(recording, recording.channels)
    assert found.hz is None
    assert "stand out alike" in found.why_not


def test_a_rate_that_holds_no_line_says_so(tmp_path):
    recording = write(tmp_path / "a.edf", [eeg(None, rate=100)], rate=100)
    found = find_mains(recording, recording.channels)
    assert (found.hz, found.prominence_db) == (None, {})
    assert "100 Hz" in found.why_not
    # 110 Hz holds 50 but not 60.
    assert list(prominences(eeg(50, rate=110), 110.0)) == [50]


def test_the_channel_that_hums_is_heard_among_others_and_artefacts_are_not(tmp_path):
    quiet, humming = eeg(None), eeg(50, seed=2)
    recording = write(tmp_path / "a.edf", [quiet, quiet, quiet, humming])
    assert find_mains(recording, recording.channels).hz == 50
    burst = eeg(None, seconds=600)
    burst[: 256 * 60] += eeg(60, seconds=60, amplitude=200, seed=3)  # a tenth of the time
    assert prominences(burst, 256.0)[60] < LEAST_LONG_DB
    flat = np.zeros(256 * 60)
    assert prominences(flat, 256.0) == {}
    holes = eeg(50)
    holes[::4096] = np.nan
    assert prominences(np.full(2560, np.nan), 256.0) == {}
    assert prominences(holes[:3000], 256.0).get(50, np.inf) > LEAST_DB


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("mitdb/100.hea", {60}),
        ("eegmmidb/S001/S001R01.edf", {60}),
        ("eegmmidb/S001/S001R04.edf", {60}),
        ("eeg_microstates/test.edf", {50}),
        ("ucddb_epochs/ucd018_C3A2_reassembled.edf", {None}),  # filtered before it was published
    ],
)
def test_real_recordings_hum_as_their_countries_do(shared_data, file, expected):
    path = shared_data / file
    if not path.is_file():
        pytest.skip(f"no {file}")
    reader = sniff(path)
    assert reader is not None
    recording = read_header(path, reader)
    able = [channel for channel in recording.channels if channel.rate > 110]
    assert find_mains(recording, able).hz in expected
