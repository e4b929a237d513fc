"""GDF 1 and 2 written by hand as the standard says: rates, types, units and events, and MNE beside it."""

import struct
from fractions import Fraction

import mne
import numpy as np
import pytest

from engine.read import read_header, read_signals, sniff
from manifests.errors import RecordingError

CODES = {"uV": 4275, "mV": 4274, "V": 4256, "%": 544, "?": 9999}


def gdf(path, *, version, signals, units, per_record, record=(1, 1), events=(), types=None, records=None):
    """A file whose stored numbers are `signals` (a list of arrays); physical = stored / 10 + 5."""
    count = len(signals)
    types = types or [3] * count
    is_old = version < 1.9
    kinds = {3: "<i2", 5: "<i4", 16: "<f4"}
    number = len(signals[0]) // per_record[0]
    head = f"GDF {version:.2f}".encode()
    if is_old:
        head += b"X Planted Name".ljust(80) + b"recording".ljust(80) + b"2024010223000000"
        head += struct.pack("<q", 256 * (count + 1)) + bytes(24 + 20)
    else:
        head += b"X Planted Name".ljust(66) + bytes(10 + 4) + b"recording".ljust(64) + bytes(16 + 16)
        head += struct.pack("<H", count + 1) + bytes(6 + 8 + 6 + 6 + 24)
    assert len(head) == 236
    head += struct.pack("<q2I", number if records is None else records, *record)
    head += struct.pack("<I" if is_old else "<HH", *([count] if is_old else [count, 0]))
    table = b"".join(f"EEG:{k}".encode().ljust(16, b"\0") for k in range(count)) + bytes(80 * count)
    if is_old:
        table += b"".join(unit.encode().ljust(8) for unit in units)
    else:
        table += bytes(6 * count) + struct.pack(f"<{count}H", *(CODES[unit] for unit in units))
    low, high = [-32768.0] * count, [32767.0] * count
    table += struct.pack(f"<{count}d", *(value / 10 + 5 for value in low))
    table += struct.pack(f"<{count}d", *(value / 10 + 5 for value in high))
    table += struct.pack(f"<{count}{'q' if is_old else 'd'}", *(int(v) if is_old else v for v in low))
    table += struct.pack(f"<{count}{'q' if is_old else 'd'}", *(int(v) if is_old else v for v in high))
    if is_old:
        table += bytes(80 * count)
    else:
        table += bytes(68 * count) + struct.pack(f"<{count}f", *[70.0] * count)
        table += struct.pack(f"<{count}f", *[0.5] * count) + bytes(4 * count)
    table += struct.pack(f"<{count}i", *per_record) + struct.pack(f"<{count}i", *types) + bytes(32 * count)
    assert len(table) == 256 * count
    data = b"".join(
        signal[k * size : (k + 1) * size].astype(kinds[kind]).tobytes()
        for k in range(number)
        for signal, size, kind in zip(signals, per_record, types, strict=True)
    )
    rate = per_record[0] * record[1] // record[0]
    size = len(events)
    tail = (
        struct.pack("<B", 3) + rate.to_bytes(3, "little") + struct.pack("<I", size)
        if version < 1.94
        else struct.pack("<B", 3) + size.to_bytes(3, "little") + struct.pack("<f", rate)
    )
    for column, kind in ((0, "I"), (1, "H"), (None, "H"), (2, "I")):
        tail += struct.pack(f"<{size}{kind}", *(event[column] if column is not None else 0 for event in events))
    path.write_bytes(head + table + data + (tail if events else b""))
    return path


@pytest.fixture(params=[1.25, 2.20])
def written(request, tmp_path):
    """Ten records of half a second: 200 Hz, 50 Hz and 200 Hz as int16, int32 and float32."""
    rng = np.random.default_rng(2)
    signals = [rng.integers(-3000, 3000, size) for size in (1000, 250, 1000)]
    path = gdf(
        tmp_path / "a.gdf",
        version=request.param,
        signals=signals,
        units=["uV", "%", "mV"],
        per_record=[100, 25, 100],
        types=[3, 5, 16],
        record=(1, 2),
        events=[(1, 768, 0), (401, 0x7FFE, 0), (501, 769, 100)],
    )
    return path, signals


def refusal(path):
    with pytest.raises(RecordingError) as caught:
        read_signals(read_header(path, "gdf"), [0])
    return caught.value.reason


def test_every_channel_keeps_its_rate_type_and_unit(written):
    path, signals = written
    recording = read_header(path, "gdf")
    assert sniff(path) == "gdf"
    found = [(channel.label, channel.rate, channel.unit, channel.num_samples) for channel in recording.channels]
    assert found == [("EEG:0", 200, "uV", 1000), ("EEG:1", 50, "%", 250), ("EEG:2", 200, "mV", 1000)]
    for got, index in zip(read_signals(recording, [2, 0, 1]), (2, 0, 1), strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, signals[index] / 10 + 5, rtol=1e-6)
    assert "Planted" not in repr(recording)


def test_events_are_annotations_and_a_new_segment_is_none(written):
    recording = read_header(written[0], "gdf")
    assert [(part.start, part.duration) for part in recording.segments] == [(0, 2), (2, 3)]
    found = [(mark.onset, mark.duration, mark.text) for mark in recording.annotations]
    assert found == [(0, 0, "768"), (Fraction(5, 2), Fraction(1, 2), "769")]


@pytest.mark.parametrize("version", [1.25, 2.20])
def test_mne_reads_the_same_where_all_rates_are_one(tmp_path, version):
    signals = [np.random.default_rng(k).integers(-3000, 3000, 1000) for k in range(2)]
    path = gdf(
        tmp_path / "a.gdf",
        version=version,
        signals=signals,
        units=["uV", "uV"],
        per_record=[200, 200],
        events=[(1, 768, 0)],
    )
    raw = mne.io.read_raw_gdf(path, preload=True, verbose="ERROR")
    recording = read_header(path, "gdf")
    assert raw.ch_names == [channel.label for channel in recording.channels]
    assert raw.info["sfreq"] == recording.channels[0].rate
    np.testing.assert_allclose(np.stack(read_signals(recording, [0, 1])) * 1e-6, raw.get_data(), rtol=1e-5, atol=1e-12)


def test_an_unknown_unit_and_filters_are_honest(tmp_path):
    signals = [np.arange(100)] * 2
    path = gdf(tmp_path / "a.gdf", version=2.2, signals=signals, units=["?", "V"], per_record=[100, 100])
    first, second = read_header(path, "gdf").channels
    assert (first.unit, second.unit) == ("", "V")
    assert first.prefilter == "HP:0.5Hz LP:70Hz"


def test_a_cut_file_and_an_unknown_count_are_repairs(written):
    path, signals = written
    whole = path.read_bytes()
    record = 100 * 2 + 25 * 4 + 100 * 4
    path.write_bytes(whole[: 256 * 4 + 3 * record + 10])
    recording = read_header(path, "gdf")
    assert recording.channels[0].num_samples == 300
    assert recording.repairs == ("truncated: 3 of 10 records are there",)
    np.testing.assert_allclose(read_signals(recording, [0])[0], signals[0][:300] / 10 + 5, rtol=1e-6)
    path.write_bytes(whole[:236] + struct.pack("<q", -1) + whole[244 : 256 * 4 + 4 * record])
    recording = read_header(path, "gdf")
    assert recording.channels[1].num_samples == 100
    assert "counted" in recording.repairs[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[:100], "TRUNCATED"),
        (lambda data: data[:600], "TRUNCATED"),
        (lambda data: data[: 256 * 4], "TRUNCATED"),
        (lambda data: b"GDX " + data[4:], "NOT_A_RECORDING"),
        (lambda _: b"", "NOT_A_RECORDING"),
        (lambda data: data[:252] + b"\xff\xff\0\0" + data[256:], "HEADER_INVALID"),
        (lambda data: data[:248] + bytes(4) + data[252:], "HEADER_INVALID"),
        (lambda data: data[: 256 + 220 * 3] + b"\x63\0\0\0" + data[256 + 220 * 3 + 4 :], "HEADER_INVALID"),
        (lambda data: data[: 256 + 216 * 3] + b"\0\0\0\xff" + data[256 + 216 * 3 + 4 :], "HEADER_INVALID"),
    ],
)
def test_a_damaged_header_is_refused_by_name(written, change, reason):
    path, _ = written
    path.write_bytes(change(path.read_bytes()))
    assert refusal(path) == reason
