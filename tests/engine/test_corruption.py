"""A corpus of damaged, lying and hostile files, each converted as a conversion would: in the sandbox's child.

Every case states how it must end: converted, or refused with exactly one reason. No case may crash the child, hang,
or take memory that its bytes do not justify.
"""

import gzip
import io
import os
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import soundfile

from engine.read import sniff
from engine.readers.edf_header import FILE_FIELDS, SIGNAL_FIELDS
from engine.sandbox import Job, Sandbox
from manifests.corpora import Corpus
from manifests.errors import RecordingError
from manifests.recipes import Recipe

CONVERTED = "converted"
TIME_LIMIT_S = 10.0
MEMORY_LIMIT_GB = 1.0
PEAK_BYTES = 400 << 20  # of the child over all cases, 200 MB of it imports

# The child notes its peak memory after every recording.
CHILD = """
    from pathlib import Path
    from engine.sandbox import convert_recording, serve

    def convert(job):
        try:
            return convert_recording(job)
        finally:
            status = Path("/proc/self/status").read_text(encoding="ascii")  # getrusage would tell the parent's peak too
            job.spool.with_suffix(".peak").write_text(status.partition("VmHWM:")[2].split()[0], encoding="ascii")

    serve(convert)
"""

RECIPE = Recipe.model_validate(
    {"id": "small", "title": "", "window_s": 4, "hop_s": 4, "kinds": {"eeg": {"rate_hz": 64, "low_hz": 0.5}}}
)
RATE, NUM_RECORDS, SIGNALS = 128, 30, ("C3", "C4", "EDF Annotations")


def corpus_of(reader: str, layout: dict | None = None) -> Corpus:
    return Corpus.model_validate(
        {
            "id": "damaged",
            "title": "",
            "licence": "",
            "access": "",
            "reader": reader,
            "files": ["*"],
            "subject": {"pattern": r"(?s)^(?P<subject>.+)"},
            "layout": layout or {},
        }
    )


def samples(num_signals: int) -> np.ndarray:
    """Noise of about 30 uV at 10 counts per uV, (NUM_RECORDS * RATE, num_signals)."""
    return np.random.default_rng(3).normal(0, 300, (NUM_RECORDS * RATE, num_signals)).astype("<i2")


def edf(*, plus: str = "EDF+C", stamps: list[str] | None = None, bdf: bool = False) -> bytes:
    """A sound file of two EEG channels and annotations, 30 s."""
    texts = [stamp.encode("latin-1").ljust(64, b"\0") for stamp in stamps or [f"+{i}\x14\x14\0" for i in range(30)]]
    values = samples(2).reshape(NUM_RECORDS, RATE, 2)
    columns = {
        "label": SIGNALS,
        "unit": ("uV", "uV", ""),
        "physical_min": ("-3276.8", "-3276.8", "-1"),
        "physical_max": ("3276.7", "3276.7", "1"),
        "digital_min": ("-32768",) * 3,
        "digital_max": ("32767",) * 3,
        "num_samples": (str(RATE), str(RATE), "32"),
    }
    fixed = ["0", "X X X X", "Startdate X X X X", "01.02.03", "22.30.00", "1024", plus, "30", "1", "3"]
    head = "".join(text.ljust(width) for text, (_, width) in zip(fixed, FILE_FIELDS, strict=True))
    head += "".join(text.ljust(w) for name, w in SIGNAL_FIELDS for text in columns.get(name, ("",) * 3))
    records = (values[i].T.tobytes() + texts[i] for i in range(NUM_RECORDS))
    return head.encode("ascii") + b"".join(records)


def place(name: str, signal: int | None = None) -> tuple[int, int]:
    """Where a header field stands: start and width."""
    position = 0 if signal is None else 256
    for field, width in FILE_FIELDS if signal is None else SIGNAL_FIELDS:
        if field == name:
            return position + width * (signal or 0), width
        position += width * (1 if signal is None else len(SIGNALS))
    raise KeyError(name)


def with_field(name: str, text: str, signal: int | None = None) -> bytes:
    start, width = place(name, signal)
    data = edf()
    return data[:start] + text.encode("latin-1").ljust(width)[:width] + data[start + width :]


def flipped(position: int, bit: int = 3, data: bytes | None = None) -> bytes:
    changed = bytearray(data or edf())
    changed[position] ^= 1 << bit
    return bytes(changed)


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


@dataclass
class Case:
    """A file to convert; `make` writes it into a folder and gives its path, or gives the bytes of its files."""

    name: str
    make: Callable[[Path], Path] | bytes | dict[str, bytes]
    reason: str
    word: str = ""
    reader: str = "edf"
    layout: dict | None = None

    def path(self, folder: Path) -> Path:
        if callable(self.make):
            return self.make(folder)
        files = {"a.edf": self.make} if isinstance(self.make, bytes) else self.make
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return folder / next(iter(files))


def edf_header_cases() -> Iterator[Case]:
    for number, (field, width) in enumerate(FILE_FIELDS):
        start, _ = place(field)
        yield Case(
            f"cut in file field {field}",
            edf()[: start + width // 2],
            "TRUNCATED",
            "header has at least" if number else "",
        )
    for field, width in SIGNAL_FIELDS:
        start, _ = place(field, 1)
        yield Case(f"cut in signal field {field}", edf()[: start + width // 2], "TRUNCATED", "each signal needs 256")
    yield Case("num_signals 0", with_field("num_signals", "0"), "HEADER_INVALID", "0 signals")
    yield Case("num_signals negative", with_field("num_signals", "-3"), "HEADER_INVALID", "-3 signals")
    yield Case("num_signals too few", with_field("num_signals", "2"), "HEADER_INVALID", "samples per record")
    yield Case("num_signals too many", with_field("num_signals", "4"), "HEADER_INVALID")
    yield Case("num_signals 9999", with_field("num_signals", "9999"), "TRUNCATED", "9999 signals")
    yield Case("num_signals words", with_field("num_signals", "many"), "HEADER_INVALID", "not a whole number")
    yield Case("num_signals 10^8 spills over", with_field("num_signals", "1000"), "TRUNCATED", "1000 signals")
    yield Case("num_records -1", with_field("num_records", "-1"), CONVERTED)
    yield Case("num_records too few", with_field("num_records", "9"), CONVERTED)
    yield Case("num_records giant", with_field("num_records", "99999999"), CONVERTED)
    yield Case("num_records words", with_field("num_records", "all"), CONVERTED)
    yield Case("header bytes wrong", with_field("header_bytes", "99999999"), CONVERTED)
    yield Case("start date and time impossible", with_field("start_date", "99.99.99"), CONVERTED)
    for text in ("-1", "1e308", "nan", "inf", "1e-99", "", "1/1"):
        yield Case(f"record duration {text}", with_field("record_duration", text), "HEADER_INVALID", "record duration")
    yield Case("record duration 0", with_field("record_duration", "0"), "TOO_SHORT", "longest stretch 0 s")
    yield Case("record duration a week", with_field("record_duration", "604800"), "HEADER_INVALID", "go back")
    yield Case("record duration a year", with_field("record_duration", "31536000"), "HEADER_INVALID")
    yield Case("samples per record giant", with_field("num_samples", "99999999", 0), "TRUNCATED", "no complete record")
    yield Case("samples per record negative", with_field("num_samples", "-128", 0), "HEADER_INVALID", "-128 samples")
    yield Case("samples per record words", with_field("num_samples", "1e2", 0), "HEADER_INVALID", "whole number")
    yield Case("samples per record one off", with_field("num_samples", "129", 0), "HEADER_INVALID")
    yield Case("samples per record 0", with_field("num_samples", "0", 0), "HEADER_INVALID")
    for text in ("nan", "inf", "1e999", "", "9e99", "-"):
        yield Case(f"physical minimum {text}", with_field("physical_min", text, 0), CONVERTED)
    yield Case("equal digital limits", with_field("digital_max", "-32768", 1), CONVERTED)
    yield Case("unit of nonsense", with_field("unit", "parsec", 0), CONVERTED)
    yield Case("bit flip in the version", flipped(0), "NOT_A_RECORDING")
    yield Case("bit flip in the signal count", flipped(place("num_signals")[0], 6), "HEADER_INVALID")
    yield Case("bit flip in a physical limit", flipped(place("physical_min", 0)[0] + 1, 6), CONVERTED)
    yield Case("bit flip in a sample count", flipped(place("num_samples", 1)[0], 1), "HEADER_INVALID")


def swapped(data: bytes, start: int) -> bytes:
    return data[:start] + np.frombuffer(data[start:], dtype="<u2").byteswap().tobytes()


def edf_data_cases() -> Iterator[Case]:
    data, record = edf(), 2 * (2 * RATE + 32)
    yield Case("sound", data, CONVERTED)
    yield Case("no data", data[:1024], "TRUNCATED", "no complete record")
    yield Case("half a record", data[: 1024 + record // 2], "TRUNCATED", "no complete record")
    yield Case("a record and a half", data[: 1024 + record * 3 // 2], "TOO_SHORT")
    yield Case("last record cut", data[:-1], CONVERTED)
    yield Case("last records missing", data[: 1024 + 20 * record + 7], CONVERTED)
    yield Case("bit flip in a sample", flipped(1024 + 5 * record + 100), CONVERTED)
    yield Case("bit flip in a record time", flipped(1024 + 5 * record + 4 * RATE + 1, 2), "HEADER_INVALID", "go back")
    yield Case("byte lost in the middle", data[:9000] + data[9001:], "HEADER_INVALID", "record times")
    yield Case("byte added in the middle", data[:9000] + b"\r" + data[9000:], "HEADER_INVALID", "record times")
    yield Case("byte lost in the header", data[:300] + data[301:], "HEADER_INVALID")
    yield Case("bytes swapped", swapped(data, 1024), "HEADER_INVALID", "no list at all")
    yield Case("header and data swapped", swapped(data, 0), "HEADER_INVALID", "whole number")
    yield Case("as text with CR LF", data.replace(b"\n", b"\r\n"), "HEADER_INVALID", "bytes were lost, added")
    yield Case("data all zero", data[:1024] + bytes(len(data) - 1024), CONVERTED)
    yield Case("data all 0xFF", data[:1024] + b"\xff" * (len(data) - 1024), "HEADER_INVALID", "no list at all")
    yield Case("times go back", edf(stamps=[f"+{30 - i}\x14\x14\0" for i in range(30)]), "HEADER_INVALID", "go back")
    yield Case("time of 60 digits", edf(stamps=[f"+{i}{'9' * 58}\x14\x14\0" for i in range(30)]), "HEADER_INVALID")
    yield Case("EDF+D without times", edf(plus="EDF+D", stamps=["x"] * 30), "HEADER_INVALID", "no list at all")
    yield Case("EDF+D with empty lists", edf(plus="EDF+D", stamps=["\0"] * 30), "ANNOTATION_INVALID", "no onset")
    yield Case(
        "a gap after every record", edf(plus="EDF+D", stamps=[f"+{i * 9}\x14\x14\0" for i in range(30)]), "TOO_SHORT"
    )
    far = edf(plus="EDF+D", stamps=[f"+{i if i < 15 else 999999999 + i}\x14\x14\0" for i in range(30)])
    yield Case("a gap of 31 years", far, CONVERTED)
    odd = "+{0}\x14\x14\0+{0}\x15-1e999\x14\xff\xfe\x14\0\0+\x14x\x14\0"
    yield Case("lists of nonsense", edf(stamps=[odd.format(i) for i in range(30)]), CONVERTED)


def gzip_bomb() -> dict[str, bytes]:
    return {"a.edf.gz": gzip.compress(with_field("num_records", "-1") + bytes(80 << 20), 6)}


def loop(folder: Path) -> Path:
    (folder / "a.edf").symlink_to(folder / "b.edf")
    (folder / "b.edf").symlink_to(folder / "a.edf")
    return folder / "a.edf"


def named(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(edf())
        return path

    return make


def folder_as_file(folder: Path) -> Path:
    (folder / "a.edf").mkdir()
    return folder / "a.edf"


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.edf", edf())
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1000000\n"


def edf_file_cases() -> Iterator[Case]:
    packed = gzip.compress(edf(), 6)
    yield Case("zero length", b"", "NOT_A_RECORDING")
    yield Case("LFS pointer", LFS, "NOT_A_RECORDING", "git-lfs")
    yield Case("all zero", bytes(1 << 16), "NOT_A_RECORDING")
    yield Case("noise", np.random.default_rng(0).bytes(1 << 16), "NOT_A_RECORDING")
    yield Case("an error page", b"<!DOCTYPE html><title>404 Not Found</title>" * 50, "NOT_A_RECORDING")
    yield Case("zip archive", zipped(), "NOT_A_RECORDING")
    yield Case("gzip", packed, CONVERTED)
    yield Case("gzip cut", packed[:-200], "TRUNCATED", "ends early")
    yield Case("gzip damaged", packed[:5000] + b"\0" * 9 + packed[5009:], "SIGNAL_INVALID", "gzip")
    yield Case("gzip of nothing", gzip.compress(b""), "NOT_A_RECORDING")
    yield Case("gzip of gzip", gzip.compress(packed), "NOT_A_RECORDING")
    yield Case("gzip bomb", gzip_bomb(), "SIGNAL_INVALID", "no sensor")
    yield Case("symlink loop", loop, "NOT_A_RECORDING")
    yield Case("a folder", folder_as_file, "NOT_A_RECORDING")
    yield Case("newline in the name", named("a\nb.edf"), CONVERTED)
    yield Case("name that looks like a flag and a path", named("-rf ..;$(x) %00 C:\\.edf"), CONVERTED)
    yield Case("name of 250 letters", named("a" * 246 + ".edf"), CONVERTED)


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


CASES = [*edf_header_cases(), *edf_data_cases(), *edf_file_cases(), *wfdb_cases(), *array_cases()]

# Every recording among the malformed files at hand; what no reader recognises is no recording to a scan.
MALFORMED = {
    "bdf_test.bdf": "CHANNEL_UNRESOLVED",  # sound; its labels are those of a test
    "bdf_test.edf": "CHANNEL_UNRESOLVED",
    "crlf_mangled_S001R04.edf": "HEADER_INVALID",
    "duplicate_channel_labels.edf": CONVERTED,
    "edfAnnonC.edf": "TOO_SHORT",
    "edfPlusD.edf": "NO_CHANNELS",
    "eeglab_test_nrec_minus1.bdf": "CHANNEL_UNRESOLVED",  # numbered inputs of an amplifier
    "empty_streams.xdf": "CHANNEL_UNRESOLVED",
    "gitlfs_pointer_short_psg.edf": "NOT_A_RECORDING",
    "minimal.xdf": "TOO_SHORT",
    "pyedflib_test_generator.bdf": "CHANNEL_UNRESOLVED",
    "sub-xp101_task-motorloc_eeg.vhdr": "TOO_SHORT",  # 0.05 s are left of it
    "test_reduced_11rates.edf": CONVERTED,
    "test_uneven_samp.edf": "CHANNEL_UNRESOLVED",
    "truncated_ds001787_sub-001_eeg.bdf": "TRUNCATED",
}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    folder = tmp_path_factory.mktemp("child")
    (folder / "noting_child.py").write_text(textwrap.dedent(CHILD), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        with Sandbox(time_limit_s=TIME_LIMIT_S, memory_limit_gb=MEMORY_LIMIT_GB, module="noting_child") as child:
            yield child


def outcome(sandbox: Sandbox, case: Case, folder: Path, root: Path | None = None) -> tuple[str, str]:
    """How a case ends, and with what words; its memory is checked on the way."""
    if root is None:
        root = folder / "root"
        root.mkdir()
    path = case.path(root)
    spool = folder / "spool.bin"
    job = Job(path=path, root=root, corpus=corpus_of(case.reader, case.layout), recipe=RECIPE, spool=spool)
    try:
        answer = sandbox.convert(job)
    except RecordingError as error:
        return error.reason, str(error)
    finally:
        assert int(spool.with_suffix(".peak").read_text(encoding="ascii")) * 1024 < PEAK_BYTES
    assert answer["rows"]
    return CONVERTED, ""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_damage_ends_as_stated(sandbox: Sandbox, tmp_path: Path, case: Case) -> None:
    reason, message = outcome(sandbox, case, tmp_path)
    assert (reason, message if case.word in message else "") == (case.reason, message), message


def test_every_malformed_file_at_hand_ends_as_stated(sandbox: Sandbox, tmp_path: Path, shared_data: Path) -> None:
    found: dict[str, str] = {}
    root = shared_data / "malformed_edge_cases"
    for number, path in enumerate(sorted(path for path in root.rglob("*") if path.is_file())):
        reader = sniff(path)
        if reader is None:
            continue
        (tmp_path / str(number)).mkdir()
        case = Case(path.name, lambda _, path=path: path, "", reader=reader)
        found[path.name], _ = outcome(sandbox, case, tmp_path / str(number), root)
    assert found == MALFORMED
