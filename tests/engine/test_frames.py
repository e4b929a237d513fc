"""Raw samples in blocks of rows: orders, more than one block, files that shrink."""

import numpy as np
import pytest

from engine.readers import frames
from engine.readers.frames import Frames, read_rows, whole_frames
from manifests.errors import RecordingError


@pytest.mark.parametrize("run", [1, 5])
def test_rows_come_whole_and_scaled_whatever_the_block(tmp_path, monkeypatch, run):
    monkeypatch.setattr(frames, "_BLOCK_BYTES", 64)  # many blocks
    stored = np.random.default_rng(0).integers(-99, 99, (3, 100))
    laid = stored.reshape(3, -1, run).transpose(1, 0, 2)
    path = tmp_path / "a.dat"
    path.write_bytes(b"head" + np.ascontiguousarray(laid).astype(">i2").tobytes())
    place = Frames(path=path, offset=4, dtype=np.dtype(">i2"), num_rows=3, num_samples=100, run=run)
    second, first = read_rows(place, [1, 0], [0.5, 2.0], [1.0, 0.0])
    np.testing.assert_array_equal(second, stored[1] * 0.5 + 1)
    np.testing.assert_array_equal(first, stored[0] * 2)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(RecordingError) as caught:
        read_rows(place, [0], [1.0], [0.0])
    assert caught.value.reason == "TRUNCATED"


@pytest.mark.parametrize(
    ("size", "promised", "held", "said"),
    [(40, 10, 10, 0), (40, None, 10, 0), (39, 10, 9, 1), (39, None, 9, 1), (48, 10, 10, 0)],
)
def test_what_is_there_counts_and_what_is_missing_is_said(tmp_path, size, promised, held, said):
    (tmp_path / "a").write_bytes(bytes(size + 8))
    repairs = []
    assert whole_frames(tmp_path / "a", offset=8, frame_bytes=4, promised=promised, repairs=repairs) == held
    assert len(repairs) == said


def test_not_one_sample_is_no_recording(tmp_path):
    (tmp_path / "a").write_bytes(bytes(3))
    with pytest.raises(RecordingError) as caught:
        whole_frames(tmp_path / "a", offset=0, frame_bytes=4, promised=5, repairs=[])
    assert caught.value.reason == "TRUNCATED"
