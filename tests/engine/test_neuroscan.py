"""Neuroscan CNT: the real file of EEGLAB and files written by hand as the structures say, MNE beside them."""

import struct
from fractions import Fraction

import mne
import numpy as np
import pytest

from engine.read import read_header, read_signals, sniff
from manifests.errors import ConfigError, RecordingError

LABELS = ("FP1", "C3", "FP1")
BASELINES = (0, 7, -3)


def cnt(path, stored, *, width=2, events=(), kind=2, promised=None, run=0):
    """A file at 250 Hz whose values are (stored - baseline) · 2 · 1.5 / 204.8 µV; events are (sample, code, accept)."""
    head = bytearray(900)
    head[:12] = b"Version 3.0\0"
    head[121:141] = b"Planted Name".ljust(20, b"\0")
    head[235:243] = b"23:15:00"
    struct.pack_into("<H", head, 370, len(stored))
    struct.pack_into("<H", head, 376, 250)
    struct.pack_into("<i", head, 864, stored.shape[1] if promised is None else promised)
    begin = 900 + 75 * len(stored)
    data = stored.T if run <= 1 else stored.reshape(len(stored), -1, run).transpose(1, 0, 2)
    samples = np.ascontiguousarray(data).astype("<i2" if width == 2 else "<i4").tobytes()
    struct.pack_into("<i", head, 886, begin + len(samples))
    struct.pack_into("<i", head, 894, run * width)
    channels = b""
    for label, baseline in zip(LABELS[: len(stored)], BASELINES, strict=False):
        one = bytearray(75)
        one[: len(label)] = label.encode()
        struct.pack_into("<h", one, 47, baseline)
        struct.pack_into("<f", one, 59, 2.0)
        struct.pack_into("<f", one, 71, 1.5)
        channels += bytes(one)
    table = b""
    for sample, code, accept in events:
        place = sample if kind == 3 else begin + sample * width * len(stored)
        table += struct.pack("<HBBi", code, 0, accept << 4, place) + bytes(0 if kind == 1 else 11)
    path.write_bytes(bytes(head) + channels + samples + struct.pack("<Bii", kind, len(table), 0) + table)
    return path


def physical(stored):
    return (stored - np.array(BASELINES)[: len(stored), None]) * 3 / 204.8


def smooth(count=2000, seed=0):
    steps = np.random.default_rng(seed).normal(size=(3, count)) * 20
    return np.cumsum(steps, axis=1).astype(int) + np.array([[5000], [0], [-5000]])


def refusal(path, layout=None):
    with pytest.raises(RecordingError) as caught:
        read_signals(read_header(path, "cnt", layout), [0])
    return caught.value.reason


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("kind", [1, 2, 3])
def test_values_labels_and_events_of_either_width_and_every_table(tmp_path, width, kind):
    stored = smooth()
    path = cnt(tmp_path / "a.cnt", stored, width=width, kind=kind, events=[(250, 5, 0), (1000, 9, 0)])
    recording = read_header(path, "cnt")
    assert sniff(path) == "cnt"
    assert [channel.label for channel in recording.channels] == list(LABELS)
    assert {(channel.rate, channel.unit, channel.num_samples) for channel in recording.channels} == {(250, "uV", 2000)}
    np.testing.assert_allclose(read_signals(recording, [2, 1]), physical(stored)[[2, 1]], rtol=1e-6, atol=1e-5)
    assert [(mark.onset, mark.text) for mark in recording.annotations] == [(1, "5"), (4, "9")]
    assert recording.extra["start_time"] == "23:15:00"
    assert "Planted" not in repr(recording)


def test_mne_gives_the_same_volts(tmp_path):
    stored = smooth()
    path = cnt(tmp_path / "a.cnt", stored, width=4, events=[(250, 5, 0)])
    raw = mne.io.read_raw_cnt(path, preload=True, verbose="ERROR")
    got = np.stack(read_signals(read_header(path, "cnt"), [0, 1, 2])) * 1e-6
    np.testing.assert_allclose(got, raw.get_data(), rtol=1e-5, atol=1e-12)


def test_a_stop_ends_a_segment_and_a_rejected_stretch_is_an_annotation(tmp_path):
    events = [(250, 5, 0), (500, 0, 0xE), (600, 0, 0xC), (800, 0, 0xD), (1900, 0, 0xC)]
    recording = read_header(cnt(tmp_path / "a.cnt", smooth(), events=events), "cnt")
    assert [(part.start, part.duration) for part in recording.segments] == [(0, 2), (2, 6)]
    found = [(mark.onset, mark.duration, mark.text) for mark in recording.annotations]
    assert found == [
        (1, 0, "5"),
        (Fraction(12, 5), Fraction(4, 5), "BAD_reject"),
        (Fraction(38, 5), Fraction(2, 5), "BAD_reject"),
    ]


@pytest.mark.parametrize("run", [1, 40])
def test_the_order_of_samples_is_read_off_the_samples(tmp_path, run):
    stored = smooth()
    path = cnt(tmp_path / "a.cnt", stored, run=40)
    if run == 1:  # the header speaks of blocks, the samples are multiplexed
        data = path.read_bytes()
        path.write_bytes(data[:894] + struct.pack("<i", 80) + cnt(path, stored).read_bytes()[898:])
    np.testing.assert_allclose(
        read_signals(read_header(path, "cnt"), [1])[0], physical(stored)[1], rtol=1e-6, atol=1e-5
    )
    noise = np.random.default_rng(1).integers(-99, 99, (3, 2000))
    assert refusal(cnt(tmp_path / "b.cnt", noise, run=40)) == "HEADER_INVALID"
    recording = read_header(tmp_path / "b.cnt", "cnt", {"block_samples": 40})
    np.testing.assert_allclose(read_signals(recording, [0])[0], physical(noise)[0], rtol=1e-6, atol=1e-5)


def test_a_count_that_fits_neither_width_must_be_declared(tmp_path):
    stored = smooth()
    path = cnt(tmp_path / "a.cnt", stored, promised=0)
    assert refusal(path) == "HEADER_INVALID"
    recording = read_header(path, "cnt", {"data_format": "int16"})
    np.testing.assert_allclose(read_signals(recording, [0])[0], physical(stored)[0], rtol=1e-6, atol=1e-5)
    with pytest.raises(ConfigError, match="data_format"):
        read_header(path, "cnt", {"data_format": "int24"})


def test_a_cut_file_is_kept_where_its_width_is_sure(tmp_path):
    stored = smooth()
    path = cnt(tmp_path / "a.cnt", stored, events=[(250, 5, 0)])
    data = path.read_bytes()
    path.write_bytes(data[: 900 + 225 + 6 * 1500 + 1])
    assert refusal(path) == "HEADER_INVALID"  # 1500 samples of two bytes, or 750 of four
    recording = read_header(path, "cnt", {"data_format": "int16"})
    assert recording.channels[0].num_samples == 1500
    assert any(repair.startswith("truncated") for repair in recording.repairs)
    np.testing.assert_allclose(read_signals(recording, [1])[0], physical(stored)[1, :1500], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[:500], "TRUNCATED"),
        (lambda data: data[:1000], "TRUNCATED"),
        (lambda data: b"Version 2.0" + data[11:], "NOT_A_RECORDING"),
        (lambda _: b"", "NOT_A_RECORDING"),
        (lambda data: data[:370] + b"\0\0" + data[372:], "HEADER_INVALID"),
        (lambda data: data[:376] + b"\0\0" + data[378:], "HEADER_INVALID"),
    ],
)
def test_a_damaged_header_is_refused_by_name(tmp_path, change, reason):
    path = cnt(tmp_path / "a.cnt", smooth())
    path.write_bytes(change(path.read_bytes()))
    assert refusal(path) == reason


def test_the_real_file_that_mne_cannot_read(shared_data):
    path = shared_data / "eeglab/test.cnt"
    recording = read_header(path, "cnt")
    assert sniff(path) == "cnt"
    assert [channel.label for channel in recording.channels] == ["VEOG", "HEOG"]
    assert len(recording.segments) == 13  # started again twelve times
    assert "26080 samples per channel in the header, 25605" in recording.repairs[0]
    data = path.read_bytes()
    stored = np.frombuffer(data[1050:103470], "<i2").reshape(-1, 2)
    gain = [np.prod([struct.unpack_from("<f", data, 900 + 75 * k + place)[0] for place in (59, 71)]) for k in range(2)]
    base = [struct.unpack_from("<h", data, 900 + 75 * k + 47)[0] for k in range(2)]
    got = read_signals(recording, [1, 0])
    np.testing.assert_allclose(got[0], (stored[:, 1] - base[1]) * gain[1] / 204.8, rtol=1e-5)
    np.testing.assert_allclose(got[1], (stored[:, 0] - base[0]) * gain[0] / 204.8, rtol=1e-5)
