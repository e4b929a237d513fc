"""WFDB annotation files against the `wfdb` package, and damaged ones."""

import math
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import wfdb
from hypothesis import given
from hypothesis import strategies as st

from engine.readers.physionet_annotations import Mark, read_marks
from manifests.errors import RecordingError

PATH = Path("a.atr")


def annotation_files(root: Path) -> list[Path]:
    found = sorted(path.with_suffix(".atr") for path in root.rglob("*.hea"))
    return [path for path in found if path.is_file()]


def test_every_real_file_reads_as_with_wfdb(shared_data: Path) -> None:
    files = annotation_files(shared_data)
    assert len(files) > 15
    for path in files:
        marks, rate = read_marks(path.read_bytes(), path)
        expected = wfdb.rdann(str(path.with_suffix("")), "atr")
        assert [mark.sample for mark in marks] == expected.sample.tolist(), path
        assert [mark.symbol for mark in marks] == expected.symbol, path
        assert [mark.note for mark in marks] == [(note or "").strip(" \0") for note in expected.aux_note], path
        assert rate is None or rate == expected.fs, path


def test_own_codes_rates_and_long_pauses_as_wfdb_writes_them(tmp_path: Path) -> None:
    samples = np.array([0, 5, 2000, 5_000_000, 5_000_001])
    wfdb.wrann(
        "a",
        "atr",
        samples,
        symbol=["N", "y", "+", "V", '"'],
        aux_note=["", "", "(AFIB", "", "a note"],
        fs=250,
        custom_labels=[("y", "an own code")],
        write_dir=str(tmp_path),
    )
    marks, rate = read_marks((tmp_path / "a.atr").read_bytes(), PATH)
    assert rate == 250
    assert marks == [
        Mark(sample=0, symbol="N"),
        Mark(sample=5, symbol="y"),
        Mark(sample=2000, symbol="+", note="(AFIB"),
        Mark(sample=5_000_000, symbol="V"),
        Mark(sample=5_000_001, symbol='"', note="a note"),
    ]


def word(code: int, value: int) -> bytes:
    return (code << 10 | value).to_bytes(2, "little")


def test_words_of_the_specification() -> None:
    data = b"".join(
        [
            word(1, 10), word(60, 3), word(61, 1), word(62, 1), word(63, 3) + b"abc\0",
            word(59, 0) + b"\xff\xff\xf6\xff", word(45, 5), word(0, 0), b"beyond the end",
        ]
    )  # fmt: skip
    assert read_marks(data, PATH) == (
        [Mark(sample=10, symbol="N", note="abc"), Mark(sample=5, symbol="undefined")],
        None,
    )


def test_a_fraction_of_a_hertz_is_exact() -> None:
    note = b"## time resolution: 999.56"
    assert read_marks(word(22, 0) + word(63, len(note)) + note + word(0, 0), PATH) == ([], Fraction("999.56"))


@pytest.mark.parametrize("data", [b"", b"\x01", word(1, 5), word(63, 9) + b"abc\0", word(59, 0) + b"\0\0"])
def test_a_file_without_its_end_mark_is_refused(data: bytes) -> None:
    with pytest.raises(RecordingError, match="without its end mark") as caught:
        read_marks(data, PATH)
    assert caught.value.reason == "ANNOTATION_INVALID"


def test_a_rate_of_zero_is_refused() -> None:
    note = b"## time resolution: 0 "
    with pytest.raises(RecordingError, match="0 Hz"):
        read_marks(word(22, 0) + word(63, len(note)) + note + word(0, 0), PATH)


@given(st.binary(max_size=400))
def test_any_bytes_end_with_marks_or_a_reason(data: bytes) -> None:
    before = time.perf_counter()
    try:
        marks, _ = read_marks(data, PATH)
    except RecordingError as error:
        assert error.reason == "ANNOTATION_INVALID"  # noqa: PT017 - random bytes may be a file
    else:
        assert len(marks) <= math.ceil(len(data) / 2)
    assert time.perf_counter() - before < 1
