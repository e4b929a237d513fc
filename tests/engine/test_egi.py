"""EGI: the real simple binary file against its text export, the real .mff folder, files written by hand, damage."""

import shutil
import struct
from fractions import Fraction

import numpy as np
import pytest

from engine.files import companions as files_of
from engine.files import corpus_files, identity_of
from engine.read import read_header, read_signals, sniff
from engine.scan import scan_folder
from manifests.corpora import Corpus
from manifests.errors import RecordingError


def simple_binary(path, stored, *, version=2, bits=0, span=0, codes=("DIN1",), events=None, segments=()):
    """A file at 250 Hz of `stored` (samples, channels) with event rows; `segments` are (category, time in ms)."""
    head = struct.pack(">i6hi5h", version, 2024, 1, 2, 23, 15, 0, 0, 250, stored.shape[1], 1, bits, span)
    count = max(1, len(segments))
    if segments:
        head += struct.pack(">h", 2) + b"\4Left\5Right" + struct.pack(">h", len(segments))
    head += struct.pack(">ih", len(stored) // count, len(codes)) + b"".join(code.encode() for code in codes)
    rows = np.hstack([stored, events if events is not None else np.zeros((len(stored), len(codes)), int)])
    kind = {2: ">i2", 4: ">f4", 6: ">f8"}[version & 6]
    body = b""
    for number, part in enumerate(np.split(rows, count)):
        body += struct.pack(">hi", *segments[number]) if segments else b""
        body += part.astype(kind).tobytes()
    path.write_bytes(head + body)
    return path


@pytest.fixture
def stored():
    return np.random.default_rng(1).integers(-3000, 3000, (1000, 4))


@pytest.fixture
def folder(shared_data, tmp_path):
    """A copy of EEGLAB's .mff folder, writable."""
    target = tmp_path / "testmff.mff"
    shutil.copytree(shared_data / "eeglab/testmff.mff", target, copy_function=shutil.copyfile)
    for path in [target, *target.rglob("*")]:
        path.chmod(0o755)
    return target


def times(recording):
    return [(part.start, part.duration) for part in recording.segments]


def refusal(path):
    with pytest.raises(RecordingError) as caught:
        read_signals(read_header(path, "egi"), [0])
    return caught.value.reason


def test_the_real_file_gives_the_numbers_of_its_text_export(shared_data):
    path = shared_data / "mne_python_testdata/egi/test_egi.raw"
    recording = read_header(path, "egi")
    assert sniff(path) == "egi"
    text = np.loadtxt(path.with_suffix(".txt"))[1:]  # the first row is time
    assert {(channel.rate, channel.unit, channel.num_samples) for channel in recording.channels} == {(250, "uV", 77)}
    np.testing.assert_allclose(read_signals(recording, list(range(256))), text[:256], rtol=2e-5, atol=2e-3)
    assert [(mark.onset, mark.text) for mark in recording.annotations] == [
        (Fraction(19, 250), "TRSP"),
        (Fraction(57, 250), "XXX1"),
    ]


@pytest.mark.parametrize("version", [2, 4, 6])
def test_every_precision_and_the_range_of_the_amplifier(tmp_path, stored, version):
    events = np.zeros((1000, 1), int)
    events[[0, 500, 501, 502]] = 1
    path = simple_binary(tmp_path / "a.raw", stored, version=version, bits=12, span=5000, events=events)
    recording = read_header(path, "egi")
    assert [channel.label for channel in recording.channels] == ["E1", "E2", "E3", "E4"]
    np.testing.assert_allclose(read_signals(recording, [3, 0]), stored[:, [3, 0]].T * 5000 / 4096, rtol=1e-6)
    assert [(mark.onset, mark.text) for mark in recording.annotations] == [(0, "DIN1"), (2, "DIN1")]
    assert recording.extra["start_time"] == "23:15:00"


def test_a_segmented_file_is_segments_with_their_categories(tmp_path, stored):
    path = simple_binary(tmp_path / "a.raw", stored, version=5, segments=[(1, 4000), (2, 9000), (1, 10000), (2, 12000)])
    recording = read_header(path, "egi")
    assert times(recording) == [(0, 1), (5, 1), (6, 1), (8, 1)]
    assert [(mark.onset, mark.text) for mark in recording.annotations] == [
        (0, "Left"),
        (5, "Right"),
        (6, "Left"),
        (8, "Right"),
    ]
    np.testing.assert_array_equal(read_signals(recording, [2])[0], stored[:, 2])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[:39], "TRUNCATED"),
        (lambda data: data[:45], "TRUNCATED"),
        (lambda data: b"\0\0\0\x09" + data[4:], "NOT_A_RECORDING"),
        (lambda data: data[:30] + b"\xff\xff\xff\xff" + data[34:], "HEADER_INVALID"),
        (lambda _: b"", "NOT_A_RECORDING"),
    ],
)
def test_a_damaged_simple_binary_file_is_refused_by_name(tmp_path, stored, change, reason):
    path = simple_binary(tmp_path / "a.raw", stored)
    path.write_bytes(change(path.read_bytes()))
    assert refusal(path) == reason


def test_a_cut_simple_binary_file_keeps_what_is_whole(tmp_path, stored):
    path = simple_binary(tmp_path / "a.raw", stored)
    data = path.read_bytes()
    path.write_bytes(data[: -10 * 300 + 3])
    recording = read_header(path, "egi")
    assert recording.channels[0].num_samples == 700
    assert recording.repairs == ("truncated: 700 of 1000 samples per channel are there",)
    np.testing.assert_array_equal(read_signals(recording, [1])[0], stored[:700, 1])


def test_the_real_folder_gives_the_floats_of_its_blocks(shared_data):
    path = shared_data / "eeglab/testmff.mff"
    recording = read_header(path, "egi")
    assert sniff(path) == "egi"
    assert (len(recording.channels), recording.channels[256].label) == (257, "VREF")
    assert {(channel.rate, channel.unit, channel.num_samples) for channel in recording.channels} == {(250, "uV", 600)}
    assert times(recording) == [(0, Fraction(6, 5)), (Fraction(6, 5), Fraction(6, 5))]
    data = (path / "signal1.bin").read_bytes()
    header, block = struct.unpack_from("<2i", data, 4)
    second = header + block
    (is_header,) = struct.unpack_from("<i", data, second)
    skip = struct.unpack_from("<i", data, second + 4)[0] if is_header else 4
    parts = [np.frombuffer(data, "<f4", 257 * 300, offset=place).reshape(257, 300) for place in (header, second + skip)]
    np.testing.assert_array_equal(read_signals(recording, [256, 0]), np.hstack(parts)[[256, 0]])
    assert recording.annotations[0].text == "stm+"
    assert recording.annotations[0].onset == Fraction(203_960, 10**6)  # 33.845920 - 33.641960
    assert recording.extra["start_time"] == "16:24:33"


def test_a_break_between_epochs_is_a_gap(folder):
    epochs = (folder / "epochs.xml").read_text()
    (folder / "epochs.xml").write_text(epochs.replace("1200000</beginTime>", "61200000</beginTime>"))
    assert times(read_header(folder, "egi")) == [(0, Fraction(6, 5)), (Fraction(306, 5), Fraction(6, 5))]


def test_a_folder_is_one_recording_for_scans_and_corpora(folder):
    scanned = scan_folder(folder.parent).rows
    assert [(row.path, row.reason) for row in scanned] == [("testmff.mff", "")]
    assert [row.path for row in scan_folder(folder).rows] == ["testmff.mff"]
    corpus = Corpus.model_validate(
        {
            "id": "mff",
            "title": "mff",
            "licence": "CC0",
            "access": "",
            "reader": "egi",
            "files": ["*.mff"],
            "subject": {"pattern": r"(?P<subject>\w+)\.mff"},
        }
    )
    assert corpus_files(corpus, folder.parent) == [folder]
    names = {name.name for name in files_of(folder, "egi", corpus)}
    assert {"signal1.bin", "epochs.xml", "Events_exported_from_EEGLAB_1.xml"} <= names
    before = identity_of(folder, "egi", corpus)
    (folder / "epochs.xml").write_text((folder / "epochs.xml").read_text() + "\n")
    assert identity_of(folder, "egi", corpus) != before


def test_a_damaged_folder_is_refused_by_name(folder):
    signal = (folder / "signal1.bin").read_bytes()
    (folder / "signal1.bin").write_bytes(signal[: len(signal) * 3 // 4])
    recording = read_header(folder, "egi")
    assert recording.channels[0].num_samples == 300
    assert "last block" in recording.repairs[0]
    for content, reason in (
        (b"", "TRUNCATED"),
        (bytes(64), "HEADER_INVALID"),
        (signal[:12] + b"\xff\xff\xff\x7f" + signal[16:], "HEADER_INVALID"),
        (signal[:8] + b"\1\0\0\0" + signal[12:], "HEADER_INVALID"),
        (signal[:5000], "TRUNCATED"),
    ):
        (folder / "signal1.bin").write_bytes(content)
        assert refusal(folder) == reason
    (folder / "signal1.bin").write_bytes(signal)
    entities = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x "y">]><epochs>&x;</epochs>'
    for text, reason in (("<epochs>", "HEADER_INVALID"), (entities, "HEADER_INVALID")):
        (folder / "epochs.xml").write_text(text)
        assert refusal(folder) == reason
    (folder / "epochs.xml").unlink()
    assert refusal(folder) == "TRUNCATED"
