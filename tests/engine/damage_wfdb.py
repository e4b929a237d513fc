"""Damaged WFDB records."""

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import soundfile

from tests.engine.damage import CONVERTED, LFS, NUM_RECORDS, RATE, SIGNALS, Case, flipped, samples, swapped


def wfdb_files(lines: list[str] | None = None, data: bytes | None = None) -> dict[str, bytes]:
    """`a.hea` and `a.dat` of two signals in format 16; lines and data replace those of the sound record."""
    values = samples(2)
    sums = [int(values[:, i].sum(dtype=np.int64)) % 65536 for i in range(2)]
    sound = [f"a 2 {RATE} {len(values)}"]
    sound += [f"a.dat 16 10/uV 16 0 {values[0, i]} {sums[i]} 0 {SIGNALS[i]}" for i in range(2)]
    return {"a.hea": "\n".join([*(lines or sound), ""]).encode(), "a.dat": values.tobytes() if data is None else data}


def wfdb_line(head: str | None = None, signal: str | None = None) -> dict[str, bytes]:
    """A record whose record line or second signal line is another one."""
    lines = wfdb_files()["a.hea"].decode().splitlines()
    return wfdb_files([head or lines[0], lines[1], signal or lines[2]])


def linked(name: str, target: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for file, data in wfdb_files().items():
            (folder / file).write_bytes(data)
        (folder / name).unlink()
        (folder / name).symlink_to(folder / target)
        return folder / "a.hea"

    return make


def fifo(folder: Path) -> Path:
    """A signal file that is a pipe nobody writes to: opening it would wait for ever."""
    (folder / "a.hea").write_bytes(wfdb_files()["a.hea"])
    os.mkfifo(folder / "a.dat")
    return folder / "a.hea"


def wfdb_cases() -> Iterator[Case]:
    sound = wfdb_files()
    signal = sound["a.hea"].decode().splitlines()[2]
    multi = [f"a/2 2 {RATE} 100", "b 50", "c 50"]
    table: list[tuple[str, Callable[[Path], Path] | dict[str, bytes], str, str]] = [
        ("sound", sound, CONVERTED, ""),
        ("header empty", {**sound, "a.hea": b""}, "NOT_A_RECORDING", ""),
        ("header with NUL", {**sound, "a.hea": b"a 2\0 128"}, "NOT_A_RECORDING", ""),
        ("header an LFS pointer", {**sound, "a.hea": LFS}, "HEADER_INVALID", "git-lfs"),
        ("header of 20 MB", {**sound, "a.hea": b"#" * (20 << 20)}, "NOT_A_RECORDING", ""),
        ("header cut after the record line", {**sound, "a.hea": sound["a.hea"][:12]}, "HEADER_INVALID", ""),
        ("header cut in a signal line", {**sound, "a.hea": sound["a.hea"][:28]}, "HEADER_INVALID", ""),
        ("header of comments", {**sound, "a.hea": b"#a\n#b\n"}, "HEADER_INVALID", ""),
        ("signal file missing", {"a.hea": sound["a.hea"]}, "TRUNCATED", "a.dat is missing"),
        ("signal file empty", wfdb_files(data=b""), "TRUNCATED", "no complete frame"),
        ("signal file cut", wfdb_files(data=sound["a.dat"][:-5001]), CONVERTED, ""),
        ("signal file an LFS pointer", wfdb_files(data=LFS), "TOO_SHORT", ""),
        (
            "signal file with a flipped bit",
            wfdb_files(data=flipped(100, data=sound["a.dat"])),
            "SIGNAL_INVALID",
            "checksum",
        ),
        ("signal file swapped", wfdb_files(data=swapped(sound["a.dat"], 0)), "SIGNAL_INVALID", "checksum"),
        ("every sample missing", wfdb_files(data=b"\0\x80" * (2 * NUM_RECORDS * RATE)), "SIGNAL_INVALID", ""),
        ("signals 10^8", wfdb_line("a 100000000 128 3840"), "HEADER_INVALID", "100000000 signals"),
        ("signals 0", wfdb_line("a 0 128 3840"), "HEADER_INVALID", "0 signals"),
        ("length 10^18", wfdb_line("a 2 128 1000000000000000000"), CONVERTED, ""),
        ("rate 0", wfdb_line("a 2 0 3840"), "HEADER_INVALID", "frames per second"),
        ("rate 10^12", wfdb_line("a 2 1000000000000 3840"), "HEADER_INVALID", "frames per second"),
        ("rate of 5000 digits", wfdb_line("a 2 " + "9" * 5000 + " 3840"), "HEADER_INVALID", ""),
        ("unknown format", wfdb_line(signal="a.dat 999 10/uV"), "FORMAT_UNSUPPORTED", ""),
        ("gain 0", wfdb_line(signal="a.dat 16 0/uV 16 0 0"), CONVERTED, ""),
        ("gain 1e400", wfdb_line(signal="a.dat 16 1e400/uV 16 0 0"), CONVERTED, ""),
        ("gain of nonsense", wfdb_line(signal="a.dat 16 nan/uV 16 0 0"), "HEADER_INVALID", "gain"),
        ("10^9 samples per frame", wfdb_line(signal="a.dat 16x1000000000 10/uV"), "TRUNCATED", "no complete frame"),
        ("skew 10^9", wfdb_line(signal="a.dat 16:1000000000 10/uV"), "HEADER_INVALID", "skew"),
        ("offset 10^9", wfdb_files(["a 2 128 3840"] + [signal.replace("16", "16+1000000000", 1)] * 2), "TRUNCATED", ""),
        ("path up", wfdb_line(signal="../../etc/passwd 16 10/uV"), "HEADER_INVALID", "other folders"),
        ("absolute path", wfdb_line(signal="/etc/passwd 16 10/uV"), "HEADER_INVALID", "other folders"),
        ("path of Windows", wfdb_line(signal="..\\..\\passwd 16 10/uV"), "HEADER_INVALID", "other folders"),
        ("address of a server", wfdb_line(signal="http://127.0.0.1:9/x 16 10/uV"), "HEADER_INVALID", "other folders"),
        ("itself as signal file", wfdb_line(signal="a.hea 16 10/uV"), "TOO_SHORT", ""),
        ("symlink loop as signal file", linked("a.dat", "a.dat"), "TRUNCATED", "missing"),
        ("symlink loop as header", linked("a.hea", "a.hea"), "NOT_A_RECORDING", ""),
        ("pipe as signal file", fifo, "TRUNCATED", "missing"),
        ("segment in another folder", wfdb_files([multi[0], "../b 50", "c 50"]), "HEADER_INVALID", "other folders"),
        ("segment missing", wfdb_files(multi), "TRUNCATED", "b.hea is missing"),
        ("segment of itself", wfdb_files([f"a/1 2 {RATE} 100", "a 100"]), "HEADER_INVALID", ""),
        ("segments of nothing", wfdb_files([f"a/2 2 {RATE} 100", "~ 50", "~ 50"]), "HEADER_INVALID", ""),
        ("FLAC of noise", wfdb_files([f"a 1 {RATE} 3840", "a.dat 516 10/uV 16 0 0 0 0 C3"]), "SIGNAL_INVALID", "FLAC"),
        (
            "FLAC cut",
            wfdb_files([f"a 1 {RATE} 3840", "a.dat 516 10/uV 16 0 0 0 0 C3"], flac()[:4000]),
            "SIGNAL_INVALID",
            "",
        ),
        (
            "FLAC that promises 2^36",
            wfdb_files([f"a 1 {RATE} 60000000000", "a.dat 516 10/uV 16 0 0 0 0 C3"], flac_of(1 << 35)),
            "SIGNAL_INVALID",
            "bytes can hold",
        ),
    ]
    for name, make, reason, word in table:
        yield Case(f"WFDB: {name}", make, reason, word, "wfdb")


def flac() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples(1), RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def flac_of(num_samples: int) -> bytes:
    """A FLAC file whose first block claims another length."""
    data = bytearray(flac())
    word = int.from_bytes(data[18:26], "big") >> 36 << 36 | num_samples
    data[18:26] = word.to_bytes(8, "big")
    return bytes(data)
