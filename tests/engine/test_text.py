"""Declared text tables: DREAMS excerpts, OpenBCI exports, gaps by a counter, wrong layouts."""

import gzip
from fractions import Fraction

import numpy as np
import pytest

from engine.read import read_header, read_signals
from engine.readers import text
from engine.recording import Segment
from manifests.errors import ConfigError, RecordingError

DREAMS = {
    "columns": [{"column": 0, "unit": "uV"}],
    "header_lines": 1,
    "label_pattern": r"^\[(.+)\]",
    "rate_hz": 200,
    "rate_by_file": {"excerpt1.txt": 100, "excerpt3.txt": 50},
}
OPENBCI = {
    "columns": [{"column": 1 + i, "label": f"EXG {i}", "unit": "uV"} for i in range(8)],
    "separator": "comma",
    "comment": "%",
    "header_lines": 1,
    "rate_pattern": r"^%Sample Rate = ([\d.]+) Hz",
    "counter": {"column": 0, "modulus": 256},
}
TINY = {"columns": [{"column": 1, "label": "x"}], "rate_hz": 10, "counter": {"column": 0, "modulus": 8}}


@pytest.mark.parametrize(("number", "rate", "label"), [(1, 100, "C3-A1"), (3, 50, "C3-A1"), (5, 200, "CZ-A1")])
def test_dreams_excerpts_last_30_minutes(shared_data, number, rate, label):
    path = shared_data / f"dreams_spindles/excerpt{number}.txt"
    recording = read_header(path, "text", DREAMS)
    (channel,) = recording.channels
    assert (channel.label, channel.rate, channel.unit, recording.duration) == (label, rate, "uV", 1800)
    (signal,) = read_signals(recording, [0])
    assert signal.shape == (channel.num_samples,)
    lines = path.read_text().splitlines()[1:]
    for place in (0, 1234, len(lines) - 1):
        assert signal[place] == np.float32(lines[place])


def test_dreams_text_is_the_edf_channel(shared_data):
    text = read_signals(read_header(shared_data / "dreams_spindles/excerpt3.txt", "text", DREAMS), [0])[0]
    edf = read_header(shared_data / "dreams_spindles/excerpt3.edf", "edf")
    index = next(channel.index for channel in edf.channels if channel.label == "C3-A1")
    assert np.corrcoef(text, read_signals(edf, [index])[0])[0, 1] > 0.999


def test_openbci_export_has_its_rate_in_the_head_and_no_gap(shared_data):
    path = shared_data / "openbci/OpenBCI_GUI-v6-blinks-jawClench-alpha.txt"
    recording = read_header(path, "text", OPENBCI)
    assert {channel.rate for channel in recording.channels} == {250}
    assert len(recording.segments) == 1
    first, last = read_signals(recording, [0, 7])
    assert (first[0], last[0]) == (np.float32(61379.36), np.float32(1740.11))
    with pytest.raises(RecordingError, match="200"):
        read_header(path, "text", {**OPENBCI, "rate_hz": 200})


def test_a_jump_of_the_counter_is_a_gap(tmp_path):
    (tmp_path / "a.txt").write_text("5 1\n6 2\n7 3\n0 4\n3 5\n4 6\n")
    recording = read_header(tmp_path / "a.txt", "text", TINY)
    spans = [(segment.start, segment.duration) for segment in recording.segments]
    assert spans == [(0, Fraction(4, 10)), (Fraction(6, 10), Fraction(2, 10))]
    assert read_signals(recording, [0])[0].tolist() == [1, 2, 3, 4, 5, 6]


def test_a_word_among_the_numbers_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("0 1\n1 lost\n")
    with pytest.raises(RecordingError, match="lost") as caught:
        read_signals(read_header(tmp_path / "a.txt", "text", {**TINY, "counter": None}), [0])
    assert caught.value.reason == "SIGNAL_INVALID"


@pytest.mark.parametrize("data", [b"", b"\0\1\2", b"version https://git-lfs.github.com/spec/v1\n"])
def test_what_is_no_table_is_refused(tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(RecordingError) as caught:
        read_header(tmp_path / "a.txt", "text", TINY)
    assert caught.value.reason == "NOT_A_RECORDING"


@pytest.mark.parametrize(
    ("layout", "word"),
    [
        ({**TINY, "colums": 3}, "layout.colums"),
        ({"rate_hz": 10}, "layout.columns"),
        ({**TINY, "rate_hz": None}, "no rate"),
        ({**TINY, "rate_hz": "fast"}, "'fast'"),
        ({**TINY, "columns": [{"column": 0}]}, "no label"),
    ],
)
def test_a_layout_that_breaks_its_schema_is_the_operators(tmp_path, layout, word):
    (tmp_path / "a.txt").write_text("0 1\n1 2\n")
    with pytest.raises(ConfigError, match=word):
        read_header(tmp_path / "a.txt", "text", layout)


BIDMC = {
    "columns": [{"name": "RESP"}, {"name": "II", "label": "ECG II", "unit": "mV"}],
    "separator": "comma",
    "header_lines": 1,
    "rate_hz": 125,
}
MUSE = {
    "columns": [{"name": name, "unit": "uV"} for name in ("TP9", "AF7", "AF8", "TP10")],
    "separator": "comma",
    "header_lines": 1,
    "rate_hz": 256,
    "times": {"name": "timestamps"},
}
OPENSIGNALS = {
    "columns": [{"column": 6, "label": "ECG"}],
    "comment": "#",
    "rate_pattern": r'"sampling rate": (\d+)',
    "counter": {"column": 0, "modulus": 16},
}
BIOSPPY = {
    "columns": [{"column": 0}],
    "comment": "#",
    "rate_pattern": r"Sampling Rate \(Hz\):= ([\d.]+)",
    "label_pattern": r"Labels:= (\w+)",
}


@pytest.mark.parametrize("gzipped", [False, True])
def test_columns_by_name(shared_data, tmp_path, gzipped):
    path = shared_data / "bidmc/bidmc_01_Signals.csv"
    if gzipped:
        (tmp_path / "a.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
        path = tmp_path / "a.csv.gz"
    recording = read_header(path, "text", BIDMC)
    assert [(found.label, found.unit) for found in recording.channels] == [("RESP", ""), ("ECG II", "mV")]
    assert recording.channels[0].num_samples == 60_001
    lead, respiration = read_signals(recording, [1, 0])
    assert (lead[1], respiration[1]) == (np.float32(0.67059), np.float32(0.35679))
    with pytest.raises(RecordingError, match="0 columns 'ABP'"):
        read_header(path, "text", {**BIDMC, "columns": [{"name": "ABP"}]})


def test_opensignals_and_biosppy_exports(shared_data):
    recording = read_header(shared_data / "opensignals/OSmontage1A.txt", "text", OPENSIGNALS)
    assert recording.channels[0].rate == 100
    assert read_signals(recording, [0])[0][:3].tolist() == [512, 508, 505]
    recording = read_header(shared_data / "biosppy/eeg_ec.txt", "text", BIOSPPY)
    assert (recording.channels[0].label, recording.channels[0].rate) == ("EEG", 125)
    assert read_signals(recording, [0])[0][:2].tolist() == [537, 442]


def test_muse_time_stamps_agree_with_its_rate(shared_data):
    path = shared_data / "muse_lsl/P300_subject1_data_2017-02-04-15_45_13.csv"
    recording = read_header(path, "text", MUSE)
    assert recording.segments == (Segment(start=Fraction(0), duration=Fraction(30_732, 256)),)
    assert read_signals(recording, [3])[0][0] == np.float32(58.105)
    with pytest.raises(RecordingError, match="off 250 Hz") as caught:
        read_header(path, "text", {**MUSE, "rate_hz": 250})
    assert caught.value.reason == "SIGNAL_INVALID"


def test_a_pause_in_the_time_stamps_is_a_gap(tmp_path):
    times = np.concatenate([np.arange(100), 350 + np.arange(50)]) * 10  # ms at 100 Hz
    rows = [f"{time + 5};{value}" for value, time in enumerate(times)]
    (tmp_path / "a.csv").write_text("\n".join(["t;x", *rows]))
    layout = {
        "columns": [{"name": "x"}],
        "separator": "semicolon",
        "header_lines": 1,
        "rate_hz": 100,
        "times": {"name": "t", "unit_s": 0.001},
    }
    recording = read_header(tmp_path / "a.csv", "text", layout)
    assert recording.segments == (
        Segment(start=Fraction(0), duration=Fraction(1)),
        Segment(start=Fraction(7, 2), duration=Fraction(1, 2)),
    )
    assert read_signals(recording, [0])[0].tolist() == list(range(150))
    rows[40] = "100;40"
    (tmp_path / "a.csv").write_text("\n".join(["t;x", *rows]))
    with pytest.raises(RecordingError, match="sample 40"):
        read_header(tmp_path / "a.csv", "text", layout)


def test_a_gzipped_bomb_or_half_a_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_BOMB_BYTES", 1 << 20)
    for content, reason in (
        (gzip.compress(bytes(1 << 24)), "HEADER_INVALID"),
        (gzip.compress(b"1\n" * 9)[:-9], "TRUNCATED"),
    ):
        (tmp_path / "a.csv").write_bytes(content)
        with pytest.raises(RecordingError) as caught:
            read_header(tmp_path / "a.csv", "text", {"columns": [{"column": 0, "label": "x"}], "rate_hz": 1})
        assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"columns": [{"name": "x", "column": 1}]}, "either column or name"),
        ({"columns": [{"name": "x"}], "header_lines": 0}, "header_lines"),
        ({"counter": {"column": 0, "modulus": 8}, "times": {"column": 0}}, "either counter or times"),
    ],
)
def test_a_layout_that_contradicts_itself_is_named(tmp_path, changes, word):
    with pytest.raises(ConfigError, match=word):
        read_header(tmp_path / "a.csv", "text", {**BIDMC, **changes})
