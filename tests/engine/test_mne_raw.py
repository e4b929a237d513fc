"""MNE in silence: its errors by name, its warnings in our words, its samples in blocks."""

import errno
import warnings
from pathlib import Path

import mne
import numpy as np
import pytest

from engine.readers import mne_raw
from engine.readers.mne_raw import read_blocks, reading
from manifests.errors import RecordingError


def run(error, what):
    with reading(Path("a"), what=what):
        raise error


@pytest.mark.parametrize(
    ("error", "what", "reason"),
    [
        (NotImplementedError("old"), "header", "FORMAT_UNSUPPORTED"),
        (FileNotFoundError(errno.ENOENT, "gone", "a.eeg"), "header", "TRUNCATED"),
        (OSError("corrupt"), "header", "HEADER_INVALID"),
        (Exception("tag"), "header", "HEADER_INVALID"),
        (ValueError("shape"), "signals", "SIGNAL_INVALID"),
        (RecordingError("TRUNCATED", "ours"), "signals", "TRUNCATED"),
    ],
)
def test_what_mne_raises_gets_a_reason(error, what, reason):
    with pytest.raises(RecordingError) as caught:
        run(error, what)
    assert caught.value.reason == reason


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "rights"), MemoryError(), KeyboardInterrupt()])
def test_what_is_not_the_files_fault_stays_what_it_is(error):
    with pytest.raises(type(error)):
        run(error, "header")


def test_warnings_become_repairs_without_their_words(capfd):
    repairs = []
    with reading(Path("a"), what="header", repairs=repairs):
        warnings.warn("Could not parse meas date of Planted Name", RuntimeWarning, stacklevel=1)
        warnings.warn("something else about Planted Name", RuntimeWarning, stacklevel=1)
        mne.utils.warn("No LOG file exists. Annotations will not be read")
    assert repairs == ["start time unreadable: left out", "no .LOG file: no annotations"]
    assert capfd.readouterr() == ("", "")


def test_samples_come_in_blocks_in_the_order_asked(monkeypatch):
    monkeypatch.setattr(mne_raw, "_BLOCK_BYTES", 8 * 3 * 7)  # seven samples of three channels
    signals = np.random.default_rng(0).normal(size=(3, 100))
    raw = mne.io.RawArray(signals, mne.create_info(3, 100.0, "eeg"), verbose="ERROR")
    third, first = read_blocks(raw, [2, 0], [(0, 20), (50, 91)], Path("a"))
    expected = np.concatenate([signals[:, :20], signals[:, 50:91]], axis=1).astype(np.float32)
    np.testing.assert_array_equal(third, expected[2])
    np.testing.assert_array_equal(first, expected[0])
    assert read_blocks(raw, [], [(0, 20)], Path("a")) == []
