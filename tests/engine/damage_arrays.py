"""Damaged arrays: NPZ, NPY, MAT and HDF5 files."""

import io
import zipfile
from collections.abc import Callable, Iterator

import h5py
import numpy as np
import scipy.io

from tests.engine.damage import CONVERTED, LFS, RATE, Case, flipped, samples

ARRAYS = {
    "signals": [{"path": "x", "axes": ["channel", "time"], "rate_hz": RATE, "unit": "uV", "labels": ["C3", "C4"]}]
}


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def npz(content: bytes | np.ndarray, name: str = "x.npy") -> dict[str, bytes]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content if isinstance(content, bytes) else npy(content))
    return {"a.npz": buffer.getvalue()}


def mat(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"x": values}, do_compression=True)
    return buffer.getvalue()


def hdf(make: Callable[[h5py.File], object]) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        make(file)
    return buffer.getvalue()


def array_cases() -> Iterator[Case]:
    values = samples(2).T / np.float32(10)
    holes, infinite = values.copy(), values.copy()
    holes[:, 1000:1200] = np.nan
    infinite[0, 500] = np.inf
    giant = npy(values).replace(b"(2, 3840)", b"(2,99999)")
    huge = npy(values).replace(b"(2, 3840), }         ", b"(2, 999999999999), } ")
    terabytes = hdf(lambda file: file.create_dataset("x", (2, 10**12), "f4", chunks=(2, 1 << 16)))
    outside = hdf(lambda file: file.__setitem__("x", h5py.ExternalLink("/etc/passwd", "x")))
    itself = hdf(lambda file: file.__setitem__("x", h5py.SoftLink("/x")))
    mat5, hdf5 = mat(values), hdf(lambda file: file.create_dataset("x", data=values))
    table: list[tuple[str, bytes | dict[str, bytes], str, str]] = [
        ("npz", npz(values), CONVERTED, ""),
        ("npz with NaN", npz(holes), CONVERTED, ""),
        ("npz with infinity", npz(infinite), CONVERTED, ""),
        ("npz of NaN", npz(values * np.nan), "SIGNAL_INVALID", ""),
        ("npz empty", {"a.npz": b""}, "NOT_A_RECORDING", ""),
        ("npz an LFS pointer", {"a.npz": LFS}, "NOT_A_RECORDING", ""),
        ("npz cut", {"a.npz": npz(values)["a.npz"][:-300]}, "NOT_A_RECORDING", "not a zip file"),
        ("npz with a flipped bit", {"a.npz": flipped(9000, data=npz(values)["a.npz"])}, "SIGNAL_INVALID", "CRC"),
        ("npz bomb", npz(np.zeros((2, 10_000_000), dtype=np.float32)), "HEADER_INVALID", "bomb"),
        ("npz that claims more than it holds", npz(giant), "SIGNAL_INVALID", "EOF"),
        ("npz that claims terabytes", npz(huge), "HEADER_INVALID", "bomb"),
        ("npz of pickles", npz(np.array([{"a": 1}], dtype=object)), "FORMAT_UNSUPPORTED", "pickled"),
        ("npz with a path", npz(values, "../../x.npy"), "HEADER_INVALID", "no array"),
        ("npy of text", {"a.npy": npy(np.array([["C3", "C4"]]))}, "HEADER_INVALID", "no array"),
        ("MAT", {"a.mat": mat5}, CONVERTED, ""),
        ("MAT cut", {"a.mat": mat5[:-500]}, "TRUNCATED", "cut off"),
        ("MAT with a flipped bit", {"a.mat": flipped(len(mat5) // 2, data=mat5)}, "NOT_A_RECORDING", "data check"),
        ("MAT bomb", {"a.mat": mat(np.zeros((2, 5_000_000)))}, "HEADER_INVALID", "bomb"),
        ("HDF5", {"a.h5": hdf5}, CONVERTED, ""),
        ("HDF5 cut", {"a.h5": hdf5[: len(hdf5) // 2]}, "NOT_A_RECORDING", "truncated file"),
        (
            "HDF5 that claims terabytes",
            {"a.h5": terabytes},
            "HEADER_INVALID",
            "bomb",
        ),
        (
            "HDF5 with a link outside",
            {"a.h5": outside},
            "FORMAT_UNSUPPORTED",
            "link",
        ),
        ("HDF5 with a link to itself", {"a.h5": itself}, "SIGNAL_INVALID", "links"),
    ]
    for name, make, reason, word in table:
        yield Case(f"arrays: {name}", make, reason, word, "arrays", ARRAYS)
