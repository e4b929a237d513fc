import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from engine.annotations import Labels
from engine.read import read_header, read_signals
from engine.recording import Annotation, Channel, Recording, Segment
from engine.rows import Losses, segment_samples
from engine.windows import Sample, recording_id, window_labels, window_recording
from manifests.corpora import Corpus, load_corpus, split_of, subject_hash
from manifests.errors import RecordingError
from manifests.recipes import Recipe, load_recipe

STAGES = {"W", "N1", "N2", "N3", "R", "?"}


def windows(
    corpus: str | Corpus, recipe: str | Recipe, root: Path, path: str, losses: Losses | None = None
) -> list[Sample]:
    corpus = load_corpus(corpus) if isinstance(corpus, str) else corpus
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    return list(window_recording(root / path, corpus=corpus, recipe=recipe, root=root, losses=losses))


def physical(sample: Sample, kind: str) -> np.ndarray:
    scales = np.array([tag["scale"] for tag in sample.meta["ucs"][kind]])
    return sample.arrays[kind] * scales[:, None]


@pytest.fixture(scope="module")
def night(tiny_root: Path) -> list[Sample]:
    return windows("synthetic_psg", "sleep128", tiny_root, "psg/sub-001/sub-001_psg.edf")


def test_windows_tile_the_recording(night: list[Sample]) -> None:
    assert [sample.meta["start"] for sample in night] == [3840 * i for i in range(20)]
    assert len({sample.key for sample in night}) == 20
    for sample in night:
        assert sample.meta["length"] == 3840
        assert sample.meta["rate"] == [128, 1]
        for kind, array in sample.arrays.items():
            assert array.dtype == np.int16
            assert array.shape == (len(sample.meta["ucs"][kind]), 3840)
        assert sample.meta["key"] == sample.key
        assert set(sample.meta["labels"]["stage"]) <= STAGES - {"?"}
        json.dumps(sample.meta, allow_nan=False)


def test_identity_is_hashed_and_the_split_is_the_subjects(night: list[Sample]) -> None:
    corpus = load_corpus("synthetic_psg")
    meta = night[0].meta
    assert meta["subject"] == subject_hash(corpus, "001")
    assert meta["split"] == split_of(corpus, "001")
    assert meta["recording"] == recording_id(corpus, "psg/sub-001/sub-001_psg.edf")
    assert "sub-001" not in json.dumps(meta)


def test_signal_agrees_with_the_file_in_its_pass_band(tiny_root: Path, night: list[Sample]) -> None:
    path = tiny_root / "psg/sub-001/sub-001_psg.edf"
    tag = night[0].meta["ucs"]["eeg"][0]
    recording = read_header(path, "edf")
    raw = read_signals(recording, [tag["source_index"]])[0]
    channel = next(channel for channel in recording.channels if channel.index == tag["source_index"])
    whole = np.concatenate([physical(sample, "eeg")[0] for sample in night])
    num_s = 500
    expected = np.abs(np.fft.rfft(raw[: int(num_s * channel.rate)]))[5 * num_s : 12 * num_s] / float(channel.rate)
    found = np.abs(np.fft.rfft(whole[: num_s * 128]))[5 * num_s : 12 * num_s] / 128
    assert np.corrcoef(expected, found)[0, 1] > 0.999
    assert found.sum() == pytest.approx(expected.sum(), rel=0.01)


def test_statistics_are_those_of_the_filtered_recording(night: list[Sample]) -> None:
    for kind in night[0].arrays:
        whole = np.concatenate([physical(sample, kind) for sample in night], axis=1)
        for row, tag in zip(whole, night[0].meta["ucs"][kind], strict=True):
            assert tag["mean"] == pytest.approx(row.mean(), abs=0.01 * row.std())
            assert tag["sd"] == pytest.approx(row.std(), rel=1e-3)
            assert tag["median"] == pytest.approx(np.median(row), abs=0.01 * row.std())
            assert tag["mad"] == pytest.approx(np.median(np.abs(row - np.median(row))), rel=0.02)


def write_edf(path: Path, signals: dict[str, np.ndarray], rate: int) -> None:
    from edfio import Edf, EdfSignal

    path.parent.mkdir(parents=True, exist_ok=True)
    Edf(
        [
            EdfSignal(data, rate, label=label, physical_dimension="uV", physical_range=(-400, 400))
            for label, data in signals.items()
        ]
    ).write(path)


def own_corpus(**changes: object) -> Corpus:
    values = {
        "id": "mine",
        "title": "mine",
        "licence": "none",
        "access": "none",
        "reader": "edf",
        "files": ["*.edf"],
        "subject": {"pattern": r"^(?P<subject>\w+)\.edf$"},
    }
    return Corpus.model_validate(values | changes)


def noise(seconds: int, rate: int = 128, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=20, size=seconds * rate)


def test_flat_and_clipped_stretches_are_found_and_lower_the_quality(tmp_path: Path) -> None:
    flat, clipped = noise(90), noise(90, seed=1)
    flat[30 * 128 : 45 * 128] = 3.0
    clipped[60 * 128 : 60 * 128 + 640] = 400.0
    write_edf(tmp_path / "a.edf", {"C3-M2": flat, "C4-M1": clipped}, 128)
    recipe = load_recipe("sleep128")
    first, second, third = windows(own_corpus(), recipe, tmp_path, "a.edf")
    assert first.meta["quality"] == 1.0
    assert second.meta["ucs"]["eeg"][0]["flat"] == pytest.approx(0.5, abs=0.04)
    assert second.meta["quality"] == pytest.approx(0.75, abs=0.02)
    assert third.meta["ucs"]["eeg"][1]["clipped"] == pytest.approx(640 / 3840, abs=0.001)
    losses = Losses()
    strict = recipe.model_copy(update={"min_quality": 0.8})
    assert len(windows(own_corpus(), strict, tmp_path, "a.edf", losses)) == 2
    assert losses.dropped["quality"] == 1


def test_labelled_windows_only(tmp_path: Path) -> None:
    write_edf(tmp_path / "a.edf", {"C3-M2": noise(60)}, 128)
    losses = Losses()
    recipe = load_recipe("sleep128").model_copy(update={"keep": "labelled"})
    assert windows(own_corpus(), recipe, tmp_path, "a.edf", losses) == []
    assert losses.dropped["unlabelled"] == 2


def test_roles_overrides_units_and_polarity_of_the_corpus(tmp_path: Path) -> None:
    signals = {"C3-M2": noise(30), "Event marker": noise(30), "left out": noise(30), "Qx": noise(30), "EEG2": noise(30)}
    write_edf(tmp_path / "a.edf", signals, 128)
    losses = Losses()
    corpus = own_corpus(
        channels={"left out": None, "EEG2": "eeg:C4-M1"},
        units={"EEG2": "10 uV"},
        polarity={"EEG2": "flipped"},
    )
    (sample,) = windows(corpus, "sleep128", tmp_path, "a.edf", losses)
    known, other = sample.meta["ucs"]["eeg"]
    assert [known["symbol"], other["symbol"]] == ["eeg:C3-M2", "eeg:C4-M1"]
    assert other["sd"] == pytest.approx(10 * known["sd"], rel=0.2)
    assert (known["polarity"], other["polarity"]) == ("as_recorded", "flipped")
    assert other["rule"] == "corpus"
    assert {label for label, _ in losses.unresolved} == {"Event marker", "left out", "Qx"}


@pytest.mark.parametrize(
    ("signals", "reason"),
    [
        ({"C3-M2": noise(20)}, "TOO_SHORT"),
        ({"Qx": noise(30)}, "CHANNEL_UNRESOLVED"),
        ({"SpO2": noise(30)}, "NO_CHANNELS"),
    ],
)
def test_a_recording_that_gives_nothing_is_refused(tmp_path: Path, signals: dict[str, np.ndarray], reason: str) -> None:
    write_edf(tmp_path / "a.edf", signals, 128)
    with pytest.raises(RecordingError) as error:
        windows(own_corpus(), "sleep128", tmp_path, "a.edf")
    assert error.value.reason == reason


def test_known_bad_recordings_are_refused_with_their_reason(tmp_path: Path) -> None:
    write_edf(tmp_path / "a.edf", {"C3-M2": noise(30)}, 128)
    with pytest.raises(RecordingError, match="electrode fell off") as error:
        windows(own_corpus(known_bad={"a.edf": "electrode fell off"}), "sleep128", tmp_path, "a.edf")
    assert error.value.reason == "KNOWN_BAD"


def test_two_recordings_never_share_a_key(tmp_path: Path) -> None:
    corpus = own_corpus(files=["**/*.edf"], subject={"pattern": r"(?P<subject>a)\.edf$"})
    for name in ("one/a.edf", "two/a.edf"):
        write_edf(tmp_path / name, {"C3-M2": noise(30)}, 128)
    keys = {windows(corpus, "sleep128", tmp_path, name)[0].key for name in ("one/a.edf", "two/a.edf")}
    assert len(keys) == 2


def test_windows_stay_inside_segments_and_on_the_grid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ramp = np.arange(110 * 128, dtype=np.float32)
    recording = Recording(
        path=tmp_path / "a.edf",
        channels=(Channel(index=0, label="C3-M2", rate=Fraction(128), unit="uV", prefilter="", num_samples=ramp.size),),
        segments=(
            Segment(start=Fraction(0), duration=Fraction(40)),
            Segment(start=Fraction(100), duration=Fraction(70)),
        ),
    )
    monkeypatch.setattr("engine.windows.read_header", lambda *_: recording)
    monkeypatch.setattr("engine.rows.read_signals", lambda *_: [ramp.copy()])
    monkeypatch.setattr("engine.rows.harmonise", lambda signal, **_: signal)
    losses = Losses()
    first, second = windows(own_corpus(), "sleep128", tmp_path, "a.edf", losses)
    assert [first.meta["start"], second.meta["start"]] == [0, 120 * 128]
    # 120 s lie 20 s into the second segment, which begins 40 s into the joined signal
    assert physical(second, "eeg")[0, 0] == pytest.approx(60 * 128, abs=1)
    assert losses.dropped["partial"] == 2
    assert segment_samples(recording, Fraction(128), ramp.size) == [40 * 128, 70 * 128]


def label(onset: int, duration: int, text: str) -> Annotation:
    return Annotation(onset=Fraction(onset), duration=Fraction(duration), text=text)


def test_stages_events_and_classes_of_a_window() -> None:
    stages = Labels(stages=(label(0, 60, "W"), label(60, 20, "N1")))
    assert window_labels(stages, Fraction(30), window_s=60, rate_hz=10) == {"stage": ["W", "N1"]}
    assert window_labels(stages, Fraction(70), window_s=30, rate_hz=10) == {"stage": ["?"]}
    events = Labels(events=(label(0, 5, "rest"), label(5, 4, "left")))
    assert window_labels(events, Fraction(4), window_s=4, rate_hz=10) == {
        "events": [[0, 10, "rest"], [10, 30, "left"]],
        "classes": ["rest"],
    }
    assert window_labels(Labels(classes=("426783006",)), Fraction(0), window_s=4, rate_hz=10) == {
        "classes": ["426783006"]
    }


def test_the_class_of_a_window_is_that_of_its_anchor() -> None:
    labels = Labels(events=(label(0, 7, "rest"), label(7, 3, "left")))
    at = [
        window_labels(labels, Fraction(4), window_s=4, rate_hz=10, anchor_s=Fraction(s))["classes"] for s in (0, 2, 3)
    ]
    assert at == [["rest"], ["rest"], ["left"]]


def test_windows_around_events_lie_on_whole_samples_of_one_segment(tmp_path: Path) -> None:
    from edfio import Edf, EdfAnnotation, EdfSignal

    ramp = np.arange(60 * 128) / 100.0
    signal = EdfSignal(ramp, 128, label="C3-M2", physical_dimension="uV", physical_range=(-400, 400))
    marks = [(0.5, 1, "x"), (10.003, 2, "x"), (10.003, 2, "y"), (20, 0, "x"), (30, 1, "z"), (58.9, 1, "x")]
    Edf([signal], annotations=[EdfAnnotation(*mark) for mark in marks]).write(tmp_path / "a.edf")
    annotations = {"source": "in_file", "target": "events", "map": {"x": "one", "y": "two", "z": None}}
    values = {"id": "around", "title": "t", "window_s": 4, "hop_s": 4, "kinds": {"eeg": {"rate_hz": 128}}}
    recipe = Recipe.model_validate({**values, "place": "events", "anchor": "centre"})
    losses = Losses()
    (sample,) = windows(own_corpus(annotations=annotations), recipe, tmp_path, "a.edf", losses)
    start = int((10.003 + 1 - 2) * 128)
    assert sample.meta["start"] == start
    assert sample.meta["labels"]["classes"] == ["one", "two"]  # an instant (20 s) has no length and no window
    assert losses.dropped["partial"] == 2
    assert physical(sample, "eeg")[0, 0] == pytest.approx(ramp[start], abs=0.02)
    assert len(windows(own_corpus(), recipe, tmp_path, "a.edf")) == 15  # a stranger's file: the grid


def test_native_rates_give_one_sample_per_rate(tmp_path: Path) -> None:
    from edfio import Edf, EdfSignal

    rates = {"C3-M2": 256, "C4-M1": 128, "ECG II": 256, "Thorax": 32}
    signals = [
        EdfSignal(noise(35, rate), rate, label=label, physical_dimension="uV", physical_range=(-400, 400))
        for label, rate in rates.items()
    ]
    Edf(signals).write(tmp_path / "a.edf")
    losses = Losses()
    found = windows(own_corpus(units={"Thorax": "au"}), "native", tmp_path, "a.edf", losses)
    assert [sample.meta["rate"] for sample in found] == [[256, 1], [128, 1], [32, 1]] * 3
    assert [sample.meta["start"] for sample in found] == [10 * i * rate for i in range(3) for rate in (256, 128, 32)]
    assert len({sample.key for sample in found}) == 9
    fast, slow, breath = found[:3]
    assert {kind: array.shape for kind, array in fast.arrays.items()} == {"eeg": (1, 2560), "ecg": (1, 2560)}
    assert [tag["symbol"] for tag in slow.meta["ucs"]["eeg"]] == ["eeg:C4-M1"]
    assert breath.arrays["resp"].shape == (1, 320)
    assert losses.dropped["partial"] == 1


def test_a_rate_that_is_no_whole_number_stays_exact(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rate = Fraction(1000, 3)
    signal = np.arange(13_334, dtype=np.float32)  # 40.002 s
    recording = Recording(
        path=tmp_path / "a.edf",
        channels=(Channel(index=0, label="C3-M2", rate=rate, unit="uV", prefilter="", num_samples=signal.size),),
        segments=(Segment(start=Fraction(0), duration=signal.size / rate),),
    )
    monkeypatch.setattr("engine.windows.read_header", lambda *_: recording)
    monkeypatch.setattr("engine.rows.read_signals", lambda *_: [signal.copy()])
    kinds = {"eeg": {"rate_hz": "native"}}
    recipe = Recipe.model_validate({"id": "own", "title": "own", "window_s": 10, "hop_s": 10, "kinds": kinds})
    found = windows(own_corpus(), recipe, tmp_path, "a.edf")
    assert [sample.meta["start"] for sample in found] == [0, 3333, 6666, 10000]
    for sample in found:
        assert sample.meta["rate"] == sample.meta["ucs"]["eeg"][0]["rate"] == [1000, 3]
        assert sample.meta["length"] == sample.arrays["eeg"].shape[1] == 3333
        assert sample.key.endswith("-1000_3")
        assert physical(sample, "eeg")[0, 0] == pytest.approx(sample.meta["start"], abs=1)


def test_mains_and_repairs_stand_in_every_sample(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_edf(tmp_path / "a.edf", {"C3-M2": noise(60)}, 128)
    for sample in windows(own_corpus(mains_hz=60), "sleep128", tmp_path, "a.edf"):
        assert sample.meta["mains_hz"] == 60
        assert "repairs" not in sample.meta
    repaired = replace(read_header(tmp_path / "a.edf", "edf"), repairs=("RECORDS_COUNTED",))
    monkeypatch.setattr("engine.windows.read_header", lambda *_: repaired)
    found = windows(own_corpus(), "sleep128", tmp_path, "a.edf")
    assert [sample.meta["repairs"] for sample in found] == [["RECORDS_COUNTED"]] * 2
    assert found[0].meta["mains_hz"] is None


@pytest.mark.parametrize(
    ("names", "path", "count", "shapes"),
    [
        (("eegmmidb", "eeg200", "eegmmidb"), "S001/S001R01.edf", 15, {"eeg": (64, 800)}),
        (("mitdb", "ecg128", "mitdb"), "100.hea", 180, {"ecg": (2, 1280)}),
        (("mitdb", "native", "mitdb"), "100.hea", 180, {"ecg": (2, 3600)}),
        (("challenge2021", "ecg128", "challenge2021_12lead"), "A/A0689.hea", 1, {"ecg": (12, 1280)}),
        (("ucddb_epochs", "sleep128", "ucddb_epochs"), "ucd018_C3A2_reassembled.edf", 822, {"eeg": (1, 3840)}),
        (("ucddb_epochs_mat", "sleep128", "ucddb_epochs"), "ucd002_stagedeep.mat", 87, {"eeg": (1, 3840)}),
        (("dreams_spindles", "sleep128", "dreams_spindles"), "excerpt1.txt", 60, {"eeg": (1, 3840)}),
        (
            ("dreams_psg", "sleep128", "dreams_spindles"),
            "excerpt3.edf",
            60,
            {"eeg": (3, 3840), "eog": (2, 3840), "emg": (1, 3840), "ecg": (1, 3840), "resp": (3, 3840)},
        ),
    ],
)
def test_real_recordings(
    shared_data: Path, names: tuple[str, str, str], path: str, count: int, shapes: dict[str, tuple[int, int]]
) -> None:
    corpus, recipe, folder = names
    found = windows(corpus, recipe, shared_data / folder, path)
    assert len(found) == count
    assert {kind: array.shape for kind, array in found[0].arrays.items()} == shapes
    for tags in found[0].meta["ucs"].values():
        for tag in tags:
            assert 0 < tag["sd"] < {"uV": 500, "mV": 20}.get(tag["unit"], np.inf)


def test_real_labels(shared_data: Path) -> None:
    ecg = windows("challenge2021", "ecg128", shared_data / "challenge2021_12lead", "A/A0689.hea")
    assert ecg[0].meta["labels"]["classes"] == ["164889003"]
    night = windows("ucddb_epochs", "sleep128", shared_data / "ucddb_epochs", "ucd018_C3A2_reassembled.edf")
    codes = (shared_data / "ucddb_epochs/ucddb018_stage.txt").read_text(encoding="ascii").split()
    names = {"0": "W", "1": "R", "2": "N1", "3": "N2", "4": "N3", "5": "N3"}
    assert [sample.meta["labels"]["stage"][0] for sample in night] == [names[code] for code in codes]
    deep = windows("ucddb_epochs_mat", "sleep128", shared_data / "ucddb_epochs", "ucd002_stagedeep.mat")
    assert {tuple(sample.meta["labels"]["stage"]) for sample in deep} == {("N3",)}


def test_the_json_that_is_written_is_the_meta(night: list[Sample], tmp_path: Path) -> None:
    gap = noise(60)
    gap[1000:3000] = 5.0
    write_edf(tmp_path / "a.edf", {"C3-M2": gap}, 128)
    faulty = windows(own_corpus(), "sleep128", tmp_path, "a.edf")
    assert faulty[0].meta["ucs"]["eeg"][0]["flat"] > 0
    for sample in (*night[:2], *faulty):
        assert json.loads(sample.to_json()) == sample.meta
