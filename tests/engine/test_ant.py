"""ANT recordings written by libeep, the format's own library."""

import numpy as np
import pytest
from antio.libeep import pyeep

from engine.read import read_header, read_signals, sniff
from manifests.errors import RecordingError


@pytest.fixture
def stored():
    return np.random.default_rng(2).integers(-3000, 3000, (4000, 3))


@pytest.fixture
def written(tmp_path, stored):
    """Eight seconds at 500 Hz; two channels share a label, the third is in mV."""
    path = tmp_path / "night.cnt"
    info = pyeep.create_channel_info()
    for label, unit in (("C3", "uV"), ("C3", "uV"), ("BIP1", "mV")):
        pyeep.add_channel(info, label, "CPz", unit)
    handle = pyeep.write_cnt(str(path), 500, info, 0)
    pyeep.add_samples(handle, stored.astype(float).ravel().tolist(), 3)
    pyeep.close(handle)
    pyeep.close_channel_info(info)
    return path


def refusal(path):
    with pytest.raises(RecordingError) as caught:
        read_signals(read_header(path, "ant"), [0])
    return caught.value.reason


def test_what_libeep_wrote_is_read_in_the_units_it_states(written, stored):
    recording = read_header(written, "ant")
    assert sniff(written) == "ant"
    assert [(channel.label, channel.unit) for channel in recording.channels] == [
        ("C3", "uV"),
        ("C3", "uV"),
        ("BIP1", "mV"),
    ]
    assert {(channel.rate, channel.num_samples) for channel in recording.channels} == {(500, 4000)}
    assert [(part.start, part.duration) for part in recording.segments] == [(0, 8)]
    third, first = read_signals(recording, [2, 0])
    assert first.dtype == np.float32
    np.testing.assert_allclose(first, stored[:, 0], rtol=1e-6)
    np.testing.assert_allclose(third, stored[:, 2], rtol=1e-6)


def test_other_containers_and_damage_are_refused_by_name(written):
    data = written.read_bytes()
    for content, reasons in (
        (b"", {"NOT_A_RECORDING"}),
        (b"RIFF\0\0\0\0WAVEfmt ", {"NOT_A_RECORDING"}),
        (b"version https://git-lfs.github.com/spec/v1\n", {"NOT_A_RECORDING"}),
        (data[:60], {"TRUNCATED"}),
        (data[: len(data) // 2], {"TRUNCATED"}),
        (data[:4] + b"\x10\0\0\0" + data[8:100], {"HEADER_INVALID"}),
    ):
        written.write_bytes(content)
        assert refusal(written) in reasons
