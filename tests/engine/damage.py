"""Damaged, lying and hostile recordings: what a case is, the sound bytes that cases change, and those of EDF."""

import gzip
import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.readers.edf_header import FILE_FIELDS, SIGNAL_FIELDS

CONVERTED = "converted"
RATE, NUM_RECORDS, SIGNALS = 128, 30, ("C3", "C4", "EDF Annotations")
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1000000\n"


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


def swapped(data: bytes, start: int) -> bytes:
    return data[:start] + np.frombuffer(data[start:], dtype="<u2").byteswap().tobytes()


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
