"""Files of arrays: damaged ones, decompression bombs, pickles and links elsewhere end with a reason."""

import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy import io

from engine.read import read_header, read_signals
from engine.readers.containers import opened
from manifests.errors import RecordingError

LAYOUT = {"signals": [{"path": "x", "axes": ["channel", "time"], "rate_hz": 100, "labels": ["a", "b"]}]}
SIGNAL = np.random.default_rng(3).normal(size=(2, 5000))


def reason_of(path: Path) -> str:
    with pytest.raises(RecordingError) as caught:
        read_signals(read_header(path, "arrays", LAYOUT), [0, 1])
    return caught.value.reason


def written(folder: Path, kind: str) -> Path:
    path = folder / f"a.{kind}"
    if kind == "mat":
        io.savemat(path, {"x": SIGNAL}, do_compression=True)
    elif kind == "npz":
        np.savez_compressed(path, x=SIGNAL)
    else:
        with h5py.File(path, "w") as file:
            file.create_dataset("x", data=SIGNAL, compression="gzip", fletcher32=True)
    return path


@pytest.mark.parametrize("kind", ["mat", "npz", "h5"])
def test_a_truncated_or_flipped_file_ends_with_a_reason(tmp_path, kind):
    path = written(tmp_path, kind)
    data = path.read_bytes()
    assert np.array_equal(read_signals(read_header(path, "arrays", LAYOUT), [1])[0], SIGNAL[1].astype(np.float32))
    for length in (0, 3, 100, len(data) // 2, len(data) - 9):
        path.write_bytes(data[:length])
        assert reason_of(path) in {"NOT_A_RECORDING", "SIGNAL_INVALID", "TRUNCATED", "HEADER_INVALID"}, length
    for place in range(0, len(data), len(data) // 25):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        try:
            signals = read_signals(read_header(path, "arrays", LAYOUT), [0, 1])
        except RecordingError:
            continue
        assert np.array_equal(signals, SIGNAL.astype(np.float32)), place  # a byte that nobody needs


def test_a_pickle_is_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "run",))

    for protocol in (0, 2, 4):
        (tmp_path / "s01.dat").write_bytes(pickle.dumps({"x": Bomb()}, protocol=protocol))
        with pytest.raises(RecordingError, match="never unpickles") as caught:
            read_header(tmp_path / "s01.dat", "arrays", LAYOUT)
        assert caught.value.reason == "FORMAT_UNSUPPORTED"
    np.savez(tmp_path / "a.npz", x=np.array([Bomb(), 1], dtype=object))
    assert reason_of(tmp_path / "a.npz") == "FORMAT_UNSUPPORTED"
    assert not (tmp_path / "run").exists()


def test_bombs_are_refused_before_anything_is_allocated(tmp_path):
    header = np.lib.format.header_data_from_array_1_0(np.zeros((2, 1)))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (2, 1 << 33)})
        file.write(bytes(1 << 20))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", shape=(2, 1 << 40), chunks=(1, 1 << 16), dtype="f8")  # not a byte of it written
    element = zlib.compress(struct.pack("<II", 14, (1 << 31)) + bytes(1 << 16))
    (tmp_path / "a.mat").write_bytes(
        b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM" + struct.pack("<II", 15, len(element)) + element
    )
    for name in ("a.npz", "a.h5", "a.mat"):
        with pytest.raises(RecordingError, match="bomb") as caught:
            read_header(tmp_path / name, "arrays", LAYOUT)
        assert caught.value.reason == "HEADER_INVALID"


def test_hdf5_links_to_other_files_are_not_followed(tmp_path):
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["x"] = SIGNAL
    (tmp_path / "raw.bin").write_bytes(SIGNAL.tobytes())
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = h5py.ExternalLink("secret.h5", "/x")
    assert reason_of(tmp_path / "a.h5") == "FORMAT_UNSUPPORTED"
    with h5py.File(tmp_path / "b.h5", "w") as file:
        place = [(str(tmp_path / "raw.bin"), 0, h5py.h5f.UNLIMITED)]
        file.create_dataset("x", shape=SIGNAL.shape, dtype="f8", external=place)
    assert reason_of(tmp_path / "b.h5") == "FORMAT_UNSUPPORTED"
    layout = h5py.VirtualLayout(shape=SIGNAL.shape, dtype="f8")
    layout[:] = h5py.VirtualSource(tmp_path / "secret.h5", "x", shape=SIGNAL.shape)
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file.create_virtual_dataset("x", layout)
    assert reason_of(tmp_path / "c.h5") == "FORMAT_UNSUPPORTED"


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\n" * 4, b"\x00" * 4096, b"%PDF-1.7"]
)
@pytest.mark.parametrize("suffix", ["mat", "h5", "npz"])
def test_other_files_are_no_recordings(tmp_path, content, suffix):
    (tmp_path / f"a.{suffix}").write_bytes(content)
    assert reason_of(tmp_path / f"a.{suffix}") in {"NOT_A_RECORDING", "HEADER_INVALID"}


def test_values_that_are_no_real_numbers_are_refused(tmp_path):
    for values in (SIGNAL + 1j, np.array([["a", "b"], ["c", "d"]])):
        np.savez(tmp_path / "a.npz", x=values)
        assert reason_of(tmp_path / "a.npz") in {"HEADER_INVALID", "SIGNAL_INVALID"}


def test_matlab_73_cells_are_followed(tmp_path):
    with h5py.File(tmp_path / "a.mat", "w", userblock_size=512) as file:
        for number, values in enumerate((SIGNAL[:, :10], SIGNAL[:, 10:30])):
            file[f"#refs#/{number}"] = values.T
        file["#refs#/name"] = np.array([[ord(letter)] for letter in "Cz"], dtype=np.uint16)
        references = file.create_dataset("d/cells", (1, 2), dtype=h5py.ref_dtype)
        references[0] = [file["#refs#/0"].ref, file["#refs#/1"].ref]
        file["one"] = np.array([[ord(letter)] for letter in "Oz"], dtype=np.uint16)
        file["one"].attrs["MATLAB_class"] = np.bytes_("char")
        names = file.create_dataset("names", (1, 1), dtype=h5py.ref_dtype)
        names[0, 0] = file["#refs#/name"].ref
    with (tmp_path / "a.mat").open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file")
    with opened(tmp_path / "a.mat") as container:
        assert container.children(()) == ["d", "names", "one"]
        assert container.children(("d", "cells")) == ["1", "2"]
        assert container.texts(("names",)) == ["Cz"]
        assert container.texts(("one",)) == ["Oz"]
    layout = {"signals": [{**LAYOUT["signals"][0], "path": "d/cells/{trial}"}]}
    recording = read_header(tmp_path / "a.mat", "arrays", layout)
    assert [float(segment.duration) for segment in recording.segments] == [0.1, 0.2]
    assert np.array_equal(read_signals(recording, [1])[0], SIGNAL[1, :30].astype(np.float32))
