"""Arrays by a declared layout: SEED, DEAP, DREAMER, DOD, CODE-15 and UCDDB as they are laid out; what is refused."""

from fractions import Fraction
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy import io

from engine.read import READERS, read_header, read_signals
from engine.recording import Annotation, Segment
from manifests.errors import ConfigError, RecordingError

SEED = {
    "signals": [
        {
            "path": "*_eeg{trial}",
            "axes": ["channel", "time"],
            "rate_hz": 200,
            "unit": "uV",
            "labels": [f"E{i}" for i in range(62)],
        }
    ],
    "trials": {"align_s": 60, "labels": [{"values": [1, 0, -1] * 5}]},
}
DEAP = {
    "signals": [
        {
            "path": "data",
            "axes": ["trial", "channel", "time"],
            "rate_hz": 128,
            "labels": [f"c{i}" for i in range(5)],
        }
    ],
    "trials": {
        "skip_s": 3,
        "labels": [
            {"name": "valence", "path": "labels", "column": 0, "edges": [5]},
            {"name": "liking", "path": "labels", "column": 3, "edges": [5]},
        ],
    },
}
DREAMER = {
    "signals": [
        {
            "path": "DREAMER/Data/{member}/EEG/stimuli/{trial}",
            "axes": ["time", "channel"],
            "rate_hz": 128,
            "labels": [f"E{i}" for i in range(14)],
        },
        {
            "path": "DREAMER/Data/{member}/ECG/stimuli/{trial}",
            "axes": ["time", "channel"],
            "rate_hz": 256,
            "labels": ["ECG 1", "ECG 2"],
        },
    ],
    "trials": {"labels": [{"name": "valence", "path": "DREAMER/Data/{member}/ScoreValence", "edges": [3]}]},
}
DOD = {
    "signals": [
        {"path": "signals/*/{channel}", "axes": ["time"], "rate_hz": {"attribute": "fs"}, "unit": {"attribute": "unit"}}
    ],
    "codes": {"path": "hypnogram", "epoch_s": 30},
}
CODE15 = {
    "signals": [
        {
            "path": "tracings",
            "axes": ["member", "time", "channel"],
            "rate_hz": 400,
            "unit": "mV",
            "trim": 0.0,
            "labels": ["DI", "DII", "DIII"],
        }
    ],
    "members": "exam_id",
}
UCDDB = {
    "signals": [{"path": "{stem}", "axes": ["trial", "time"], "samples": 3840, "rate_hz": 128, "labels": ["C3A2"]}]
}
NPZ = {
    "signals": [
        {
            "path": "eeg",
            "axes": ["channel", "time"],
            "rate_hz": {"path": "fs"},
            "labels": {"path": "names"},
            "scale": 0.5,
            "missing": [-9999],
        }
    ]
}


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).normal(size=shape)


def cell(arrays: list[np.ndarray]) -> np.ndarray:
    """MATLAB cell (n, 1)."""
    result = np.empty((len(arrays), 1), dtype=object)
    for row, array in enumerate(arrays):
        result[row, 0] = array
    return result


def reason_of(path: Path, layout: dict) -> str:
    with pytest.raises(RecordingError) as caught:
        read_header(path, "arrays", layout)
    return caught.value.reason


@pytest.mark.parametrize("compressed", [True, False])
def test_seed_trials_come_in_the_order_of_their_numbers(tmp_path, compressed):
    trials = {f"djc_eeg{i}": noise(62, 400 + i) for i in range(15, 0, -1)}
    io.savemat(tmp_path / "1_20131027.mat", trials, do_compression=compressed)
    recording = read_header(tmp_path / "1_20131027.mat", "arrays", SEED)
    assert [segment.start for segment in recording.segments] == [60 * i for i in range(15)]
    assert recording.segments[9] == Segment(start=Fraction(540), duration=Fraction(410, 200))
    assert [found.text for found in recording.annotations[:4]] == ["1", "0", "-1", "1"]
    assert recording.annotations[1] == Annotation(onset=Fraction(60), duration=Fraction(402, 200), text="0")
    last, first = read_signals(recording, [61, 0])
    whole = np.concatenate([trials[f"djc_eeg{i}"] for i in range(1, 16)], axis=1).astype(np.float32)
    assert np.array_equal(first, whole[0])
    assert np.array_equal(last, whole[61])


def test_deap_baselines_are_left_out_and_ratings_become_classes(tmp_path):
    data, labels = noise(4, 5, 63 * 128), np.array([[4.9, 1, 1, 9], [5, 1, 1, 1], [5.1, 1, 1, 1], [1, 1, 1, 5]])
    io.savemat(tmp_path / "s01.mat", {"data": data, "labels": labels})
    recording = read_header(tmp_path / "s01.mat", "arrays", DEAP)
    assert {segment.duration for segment in recording.segments} == {60}
    texts = [found.text for found in recording.annotations]
    assert texts == [
        *("valence=0", "liking=1", "valence=1", "liking=0"),
        *("valence=1", "liking=0", "valence=0", "liking=1"),
    ]
    (signal,) = read_signals(recording, [3])
    assert np.array_equal(signal, data[:, 3, 384:].reshape(-1).astype(np.float32))


def test_a_matlab_73_file_reads_as_the_version_5_one(tmp_path):
    data, labels = noise(4, 5, 63 * 128), np.arange(16.0).reshape(4, 4)
    io.savemat(tmp_path / "s01.mat", {"data": data, "labels": labels})
    with h5py.File(tmp_path / "s02.mat", "w", userblock_size=512) as file:
        file["data"], file["labels"] = data.T, labels.T  # MATLAB writes its axes turned round
    with (tmp_path / "s02.mat").open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(128))
    one, other = (read_header(tmp_path / name, "arrays", DEAP) for name in ("s01.mat", "s02.mat"))
    assert (one.channels, one.segments, one.annotations) == (other.channels, other.segments, other.annotations)
    assert np.array_equal(read_signals(one, [1, 4]), read_signals(other, [1, 4]))


def dreamer_file(path: Path) -> tuple[list, list]:
    """Three subjects with two films each."""
    eeg = [[noise(128 * (5 + film), 14) + subject for film in range(2)] for subject in range(3)]
    ecg = [[noise(256 * (5 + film), 2) - subject for film in range(2)] for subject in range(3)]
    data = np.empty((1, 3), dtype=object)
    for subject in range(3):
        data[0, subject] = {
            "EEG": {"baseline": cell(eeg[subject]), "stimuli": cell(eeg[subject])},
            "ECG": {"stimuli": cell(ecg[subject])},
            "ScoreValence": np.array([[2.0], [3.0]]),
        }
    io.savemat(path, {"DREAMER": {"Data": data, "EEG_SamplingRate": 128}}, do_compression=True)
    return eeg, ecg


def test_dreamer_subjects_are_recordings_with_two_rates(tmp_path):
    path = tmp_path / "DREAMER.mat"
    eeg, ecg = dreamer_file(path)
    assert READERS["arrays"].members(path, DREAMER) == ["1", "2", "3"]
    recording = read_header(Path(f"{path}#2"), "arrays", DREAMER)
    assert [segment.duration for segment in recording.segments] == [5, 6]
    assert [found.text for found in recording.annotations] == ["valence=0", "valence=1"]
    assert {channel.rate for channel in recording.channels} == {128, 256}
    second_lead, third = read_signals(recording, [15, 2])
    assert np.array_equal(second_lead, np.concatenate([film[:, 1] for film in ecg[1]]).astype(np.float32))
    assert np.array_equal(third, np.concatenate([film[:, 2] for film in eeg[1]]).astype(np.float32))
    assert reason_of(Path(f"{path}#4"), DREAMER) == "HEADER_INVALID"


def test_dod_signals_stand_in_groups_with_attributes(tmp_path):
    c3, eog = noise(250 * 90), noise(250 * 90)
    with h5py.File(tmp_path / "a1b2.h5", "w") as file:
        file["signals/eeg/C3_M2"], file["signals/eog/EOG1"] = c3, eog
        for name in ("eeg", "eog"):
            file[f"signals/{name}"].attrs["fs"] = 250
            file[f"signals/{name}"].attrs["unit"] = b"\xc2\xb5V"
        file["hypnogram"] = np.array([-1, 0, 0])
    recording = read_header(tmp_path / "a1b2.h5", "arrays", DOD)
    assert [(channel.label, channel.rate, channel.unit) for channel in recording.channels] == [
        ("C3_M2", 250, "µV"),
        ("EOG1", 250, "µV"),
    ]
    assert [(found.onset, found.duration, found.text) for found in recording.annotations] == [
        (0, 30, "-1"),
        (30, 60, "0"),
    ]
    assert np.array_equal(read_signals(recording, [1, 0]), np.stack([eog, c3]).astype(np.float32))


def code15_file(path: Path, count: int = 3) -> np.ndarray:
    """Exams of 10, 7 and 10 s in 4096 samples, zeros around."""
    tracings = np.zeros((count, 4096, 3), dtype=np.float32)
    for exam in range(count):
        length = (4000, 2800)[exam % 2]
        start = (4096 - length) // 2
        tracings[exam, start : start + length] = noise(length, 3) + exam
    with h5py.File(path, "w") as file:
        file.create_dataset("tracings", data=tracings, compression="gzip", chunks=(1, 4096, 3))
        file["exam_id"] = np.arange(1169160, 1169160 + count)
    return tracings


def test_code15_exams_are_recordings_without_their_padding(tmp_path):
    path = tmp_path / "exams_part0.hdf5"
    tracings = code15_file(path)
    assert READERS["arrays"].members(path, CODE15) == ["1169160", "1169161", "1169162"]
    recording = read_header(Path(f"{path}#1169161"), "arrays", CODE15)
    assert recording.segments == (Segment(start=Fraction(0), duration=Fraction(7)),)
    (lead,) = read_signals(recording, [2])
    assert np.array_equal(lead, tracings[1, 648:3448, 2])
    assert reason_of(path, CODE15) == "HEADER_INVALID"


def test_an_exam_of_nothing_but_padding_is_refused(tmp_path):
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file["tracings"], file["exam_id"] = np.zeros((1, 4096, 3)), [0]
    assert reason_of(Path(f"{tmp_path}/x.hdf5#0"), CODE15) == "SIGNAL_INVALID"


@pytest.mark.parametrize("names", [[1, 1], ["a#b", "c"], ["a/b", "c"], ["", "c"]])
def test_members_need_names_of_their_own(tmp_path, names):
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file["tracings"], file["exam_id"] = np.ones((2, 40, 3)), names
    with pytest.raises(RecordingError, match="name of its own"):
        READERS["arrays"].members(tmp_path / "x.hdf5", CODE15)


def test_rows_of_ucddb_are_segments(shared_data):
    path = shared_data / "ucddb_epochs/ucd002_stagewake.mat"
    recording = read_header(path, "arrays", UCDDB)
    assert len(recording.segments) == 121
    assert {segment.duration for segment in recording.segments} == {30}
    (signal,) = read_signals(recording, [0])
    assert signal.dtype == np.float32
    assert np.array_equal(signal.reshape(121, 3840), io.loadmat(path)["ucd002_stagewake"].astype(np.float32))


def test_a_matlab_vector_needs_one_axis(shared_data):
    layout = {"signals": [{"path": "hr", "axes": ["time"], "rate_hz": "1000/9", "labels": ["PPG"]}]}
    path = shared_data / "heartpy/data3.mat"
    recording = read_header(path, "arrays", layout)
    assert recording.channels[0].rate == Fraction(1000, 9)
    assert np.array_equal(read_signals(recording, [0])[0], io.loadmat(path)["hr"].ravel().astype(np.float32))


def test_npz_tells_rate_labels_and_missing_samples(tmp_path):
    eeg = noise(2, 300).round(3)
    eeg[1, 7] = -9999
    np.savez_compressed(tmp_path / "a.npz", eeg=eeg, fs=np.array(128.5), names=np.array(["Cz", "Pz"]))
    recording = read_header(tmp_path / "a.npz", "arrays", NPZ)
    assert [(channel.label, channel.rate) for channel in recording.channels] == [
        ("Cz", Fraction(257, 2)),
        ("Pz", Fraction(257, 2)),
    ]
    cz, pz = read_signals(recording, [0, 1])
    assert np.array_equal(cz, (eeg[0] * 0.5).astype(np.float32))
    assert np.flatnonzero(np.isnan(pz)).tolist() == [7]


def test_blocks_are_one_stretch(tmp_path):
    table = noise(3, 600)
    np.save(tmp_path / "a.npy", table)
    layout = {"signals": [{"path": "a", "axes": ["block", "time"], "rate_hz": 200, "labels": ["F3"]}]}
    recording = read_header(tmp_path / "a.npy", "arrays", layout)
    assert recording.segments == (Segment(start=Fraction(0), duration=Fraction(9)),)
    assert np.array_equal(read_signals(recording, [0])[0], table.reshape(-1).astype(np.float32))


def test_signals_of_unequal_length_are_cut_and_told(tmp_path):
    layout = {
        "signals": [
            {"path": "a", "axes": ["time"], "rate_hz": 100, "labels": ["a"]},
            {"path": "b", "axes": ["time"], "rate_hz": 40, "labels": ["b"]},
        ]
    }
    np.savez(tmp_path / "x.npz", a=np.arange(1000.0), b=np.arange(399.0))
    recording = read_header(tmp_path / "x.npz", "arrays", layout)
    assert recording.duration == Fraction(199, 20)  # a multiple of 1/20 s, whole samples at both rates
    assert [len(signal) for signal in read_signals(recording, [0, 1])] == [995, 398]
    assert "cut to 9.95 s" in recording.repairs[0]
    np.savez(tmp_path / "x.npz", a=np.arange(1000.0), b=np.arange(300.0))
    assert reason_of(tmp_path / "x.npz", layout) == "HEADER_INVALID"


def test_only_the_recording_asked_for_is_decompressed(tmp_path, monkeypatch):
    path = tmp_path / "exams.hdf5"
    code15_file(path, 40)
    read: list[int] = []
    original = h5py.Dataset.__getitem__

    def counting(self, index, **options):
        values = original(self, index, **options)
        read.append(np.asarray(values).nbytes)
        return values

    monkeypatch.setattr(h5py.Dataset, "__getitem__", counting)
    recording = read_header(Path(f"{path}#1169165"), "arrays", CODE15)
    read_signals(recording, [0])
    assert sum(read) < 6 * 4096 * 3 * 4


def test_a_layout_that_contradicts_the_file_is_refused(tmp_path):
    io.savemat(tmp_path / "a.mat", {"a": np.zeros((3, 100)), "b": np.zeros((2, 3840)), "s": {"x": 1}})
    assert reason_of(tmp_path / "a.mat", UCDDB) == "HEADER_INVALID"

    def signal(**changes):
        return {"signals": [{**UCDDB["signals"][0], **changes}]}

    for changes in (
        {"path": "c"},
        {"path": "b", "axes": ["time"]},
        {"path": "b", "axes": ["channel", "time"]},
        {"path": "b", "rate_hz": {"path": "a"}},
        {"path": "b", "rate_hz": {"attribute": "fs"}},
        {"path": "s/y"},
    ):
        assert reason_of(tmp_path / "a.mat", signal(**changes)) == "HEADER_INVALID", changes
    labels = {**signal(path="b"), "trials": {"labels": [{"values": [1]}]}}
    assert reason_of(tmp_path / "a.mat", labels) == "ANNOTATION_INVALID"
    assert read_header(tmp_path / "a.mat", "arrays", signal(path="b")).duration == 60


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"rate": 3}, "rate"),
        ({"labels": []}, "labels are missing"),
        ({"axes": ["channel"]}, "time once"),
        ({"axes": ["trial", "trial", "time"]}, "at most once"),
        ({"path": "x{trial}"}, "stands twice"),
        ({"rate_hz": 0}, "above 0"),
        ({"rate_hz": {"path": "a", "attribute": "b"}}, r"layout\.signals\.0\.rate_hz"),
    ],
)
def test_a_wrong_layout_names_what_is_wrong(tmp_path, changes, word):
    with pytest.raises(ConfigError, match=word):
        read_header(tmp_path / "a.mat", "arrays", {"signals": [{**UCDDB["signals"][0], **changes}]})


def test_some_signals_by_trial_and_some_not_is_no_layout(tmp_path):
    one = {"path": "a", "axes": ["time"], "rate_hz": 1, "labels": ["a"]}
    with pytest.raises(ConfigError, match="all or none"):
        read_header(tmp_path / "a", "arrays", {"signals": [one, {**one, "axes": ["trial", "time"]}]})
