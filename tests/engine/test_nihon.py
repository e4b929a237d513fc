"""Nihon Kohden files written by hand: two blocks with a gap, labels and log beside them, cut files."""

import struct
from fractions import Fraction

import numpy as np
import pytest

from engine.read import read_header, read_signals, sniff
from engine.readers.nihon import companions
from manifests.errors import RecordingError

DEVICE = b"EEG-1100C V01.00"
CODES = (0, 1, 42)  # FP1 and FP2 in µV, DC01 in mV


def nihon(path, blocks):
    """A file of (clock as 12 digits, stored numbers (T, 3)) blocks at 200 Hz, T a multiple of 20."""
    data = bytearray(0x1800)
    data[:16] = DEVICE
    data[0x81:0x91] = DEVICE
    data[0x91] = 1
    struct.pack_into("<I", data, 0x92, 0x400)
    data[0x17FE] = 1
    data[0x400 + 17] = len(blocks)
    body = bytearray()
    for number, (clock, stored) in enumerate(blocks):
        address = len(data) + len(body)
        struct.pack_into("<I", data, 0x400 + 18 + 20 * number, address)
        head = bytearray(0x27 + 10 * len(CODES))
        head[0x14:0x1A] = bytes.fromhex(clock)
        struct.pack_into("<HI", head, 0x1A, 200 | 0xC000, len(stored) // 20)
        head[0x26] = len(CODES)
        for channel, code in enumerate(CODES):
            head[0x27 + 10 * channel] = code
        marks = np.zeros((len(stored), 1), int)  # a row of event marks follows the channels
        body += head + (np.hstack([stored, marks]) + 0x8000).astype("<u2").tobytes()
    path.write_bytes(bytes(data + body))
    return path


def log(path, events):
    """A `.LOG` of (text, hours, minutes, seconds from the start)."""
    data = bytearray(0x400)
    data[:16] = DEVICE
    data[0x91] = 1
    struct.pack_into("<I", data, 0x92, 0x400)
    block = bytearray(0x14)
    block[1:17] = DEVICE
    block[0x12] = len(events)
    rows = b"".join(
        text.encode().ljust(20, b"\0") + f"{h:02d}{m:02d}{s:02d}".encode() + b"0" * 19 for text, h, m, s in events
    )
    path.write_bytes(bytes(data + block) + rows)


@pytest.fixture
def stored():
    return np.random.default_rng(9).integers(-20000, 20000, (2000, 3))


@pytest.fixture
def written(tmp_path, stored):
    path = nihon(tmp_path / "night.EEG", [("240102233000", stored[:1200]), ("240102233110", stored[1200:])])
    log(path.with_suffix(".LOG"), [("REC START", 0, 0, 0), ("Lights off", 0, 1, 12)])
    path.with_suffix(".21E").write_text("[ELECTRODE]\n0000=Fp1\n0001=Fp2\n0042=DC01\n")
    path.with_suffix(".PNT").write_bytes(DEVICE + bytes(0x30) + b"20240102233000" + b"Planted Name")
    return path


def refusal(path):
    with pytest.raises(RecordingError) as caught:
        read_signals(read_header(path, "nihon"), [0])
    return caught.value.reason


def test_blocks_are_segments_by_their_clocks(written):
    recording = read_header(written, "nihon")
    assert sniff(written) == "nihon"
    assert [(part.start, part.duration) for part in recording.segments] == [(0, 6), (70, 4)]
    assert [channel.label for channel in recording.channels] == ["Fp1", "Fp2", "DC01"]
    assert {(channel.rate, channel.unit, channel.num_samples) for channel in recording.channels} == {(200, "V", 2000)}
    assert recording.extra["start_time"] == "23:30:00"
    assert [(mark.onset, mark.text) for mark in recording.annotations] == [(0, "REC START"), (72, "Lights off")]
    assert not recording.repairs
    assert "Planted" not in repr(recording)


def test_values_are_the_physical_range_of_the_device(written, stored):
    got = read_signals(read_header(written, "nihon"), [2, 0])
    microvolts = -3200 + (stored[:, 0] + 32768) * (3199.902 + 3200) / 65535
    millivolts = -12002.9 + (stored[:, 2] + 32768) * (12002.56 + 12002.9) / 65535
    np.testing.assert_allclose(got[1], microvolts * 1e-6, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(got[0], millivolts * 1e-3, rtol=1e-5, atol=1e-6)


def test_companions_are_the_files_of_its_name(written):
    assert {name.name for name in companions(written)} == {"night.21E", "night.PNT", "night.LOG"}


def test_without_its_files_the_labels_are_the_devices_and_that_is_said(tmp_path, stored):
    recording = read_header(nihon(tmp_path / "a.eeg", [("240102233000", stored)]), "nihon")
    assert [channel.label for channel in recording.channels] == ["FP1", "FP2", "DC01"]
    assert any(".21E" in repair for repair in recording.repairs)
    assert recording.annotations == ()
    assert recording.segments[0].duration == 10


def test_a_block_without_a_clock_follows_at_once(tmp_path, stored):
    path = nihon(tmp_path / "a.eeg", [("240102233000", stored[:1200]), ("ffffffffffff", stored[1200:])])
    assert [(part.start, part.duration) for part in read_header(path, "nihon").segments] == [(0, 6), (6, 4)]


def test_a_cut_file_keeps_what_is_whole(written, stored):
    data = written.read_bytes()
    written.write_bytes(data[: len(data) - 8 * 500 - 3])
    recording = read_header(written, "nihon")
    assert recording.channels[0].num_samples == 1499
    assert recording.repairs[0] == "truncated: 1499 of 2000 samples per channel are there"
    assert recording.segments[1].duration == Fraction(299, 200)
    got = read_signals(recording, [1])[0]
    np.testing.assert_allclose(
        got, (-3200 + (stored[:1499, 1] + 32768) * 6399.902 / 65535) * 1e-6, rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[:0x1700], "HEADER_INVALID"),
        (lambda data: data[:0x1804], "HEADER_INVALID"),
        (lambda data: b"EEG-9900" + data[8:], "NOT_A_RECORDING"),
        (lambda _: b"", "NOT_A_RECORDING"),
        (lambda data: data[:0x91] + b"\2" + data[0x92:], "FORMAT_UNSUPPORTED"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, stored, change, reason):
    path = nihon(tmp_path / "a.eeg", [("240102233000", stored)])
    path.write_bytes(change(path.read_bytes()))
    assert refusal(path) == reason
