"""Cut-out epochs: every row a segment of its own."""

from fractions import Fraction

import numpy as np
import pytest
from scipy import io

from engine.read import read_header, read_signals
from manifests.errors import ConfigError, RecordingError

UCDDB = {"label": "C3-A2", "rate_hz": 128, "epoch_samples": 3840}


def test_rows_of_ucddb_are_segments(shared_data):
    path = shared_data / "ucddb_epochs/ucd002_stagewake.mat"
    recording = read_header(path, "epochs_mat", UCDDB)
    assert len(recording.segments) == 121
    assert {segment.duration for segment in recording.segments} == {30}
    assert recording.channels[0].rate == 128
    (signal,) = read_signals(recording, [0])
    expected = io.loadmat(path)["ucd002_stagewake"]
    assert signal.dtype == np.float32
    assert np.array_equal(signal.reshape(121, 3840), expected.astype(np.float32))


def test_a_matrix_of_another_shape_or_name_is_refused(tmp_path):
    io.savemat(tmp_path / "a.mat", {"a": np.zeros((3, 100)), "b": np.zeros((2, 3840))})
    for layout, word in ((UCDDB, "3, 100"), ({**UCDDB, "variable": "c"}, "no variable 'c'")):
        with pytest.raises(RecordingError, match=word) as caught:
            read_header(tmp_path / "a.mat", "epochs_mat", layout)
        assert caught.value.reason == "HEADER_INVALID"
    assert read_header(tmp_path / "a.mat", "epochs_mat", {**UCDDB, "variable": "b"}).duration == Fraction(60)


def test_other_files_and_layouts_are_refused(tmp_path):
    (tmp_path / "a.mat").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 5)
    with pytest.raises(RecordingError) as caught:
        read_header(tmp_path / "a.mat", "epochs_mat", UCDDB)
    assert caught.value.reason == "NOT_A_RECORDING"
    with pytest.raises(ConfigError, match=r"layout\.rate"):
        read_header(tmp_path / "a.mat", "epochs_mat", {**UCDDB, "rate": 3})
    with pytest.raises(ConfigError, match=r"layout\.label"):
        read_header(tmp_path / "a.mat", "epochs_mat", {"rate_hz": 128, "epoch_samples": 3840})
