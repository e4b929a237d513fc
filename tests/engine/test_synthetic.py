import hashlib
from pathlib import Path

import edfio
import mne
import numpy as np
import pytest
import wfdb
from scipy import signal

from engine.synthetic import MONTAGES, belts, ecg_mv, eeg_uv, emg_uv, sleeper, synthesise
from engine.synthetic_signals import EPOCH_S, RHYTHMS, STAGES, band_noise, draw_hypnogram, pink_noise
from manifests.channels import Unresolved, resolve
from manifests.corpora import load_corpus, split_of

SIZES = {"num_subjects": 2, "num_ecg": 8, "night_minutes": 20, "seed": 3}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    synthesise(root, **SIZES)
    return root


@pytest.fixture(scope="module")
def night():
    return sleeper(0, night_minutes=40, seed=3)


def band_power(values, rate, low_hz, high_hz):
    """Power per epoch between two frequencies."""
    epochs = values.reshape(-1, EPOCH_S * rate)
    frequencies, power = signal.welch(epochs, rate, nperseg=4 * rate)
    return power[:, (frequencies >= low_hz) & (frequencies <= high_hz)].mean(axis=1)


def median_by_stage(night, values):
    return {stage: np.median(values[np.array(night.stages) == stage]) for stage in STAGES}


def digests(root: Path):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_seed_gives_the_same_bytes_and_another_seed_others(corpus, tmp_path):
    synthesise(tmp_path / "again", **SIZES)
    synthesise(tmp_path / "other", **{**SIZES, "seed": 4})
    assert digests(tmp_path / "again") == digests(corpus)
    other = digests(tmp_path / "other")
    equal = [name for name, value in digests(corpus).items() if other[name] == value]
    # The broken file ends within its header, which is the same for every seed.
    assert equal == ["psg/sub-003/sub-003_psg.edf"]


def test_a_subject_does_not_depend_on_how_many_there_are(corpus, tmp_path):
    synthesise(tmp_path, **{**SIZES, "num_subjects": 1, "num_ecg": 1})
    name = "psg/sub-001/sub-001_psg.edf"
    assert (tmp_path / name).read_bytes() == (corpus / name).read_bytes()


def test_edf_files_open_in_edfio_and_mne(corpus):
    path = corpus / "psg/sub-002/sub-002_psg.edf"
    edf = edfio.read_edf(path)
    assert edf.patient.name == "X"
    assert {one.physical_dimension for one in edf.signals} == {"uV", ""}
    raw = mne.io.read_raw_edf(path, verbose="error")
    assert raw.duration == 20 * 60
    assert raw.ch_names[0] == "F3-M2"
    # Volts in MNE; a sleeping scalp lies between 5 and 100 uV.
    assert 5e-6 < raw.get_data(picks=[0]).std() < 100e-6
    assert sum(raw.annotations.duration) == 20 * 60


def test_the_broken_file_opens_nowhere(corpus):
    path = corpus / "psg/sub-003/sub-003_psg.edf"
    with pytest.raises((ValueError, IndexError), match=r"\w"):
        edfio.read_edf(path)
    with pytest.raises((ValueError, OSError, IndexError), match=r"\w"):
        mne.io.read_raw_edf(path, verbose="error")


def test_wfdb_records_carry_the_rhythm_and_its_rate(corpus):
    for number, rhythm in enumerate(RHYTHMS):
        record = wfdb.rdrecord(str(corpus / "ecg" / f"E{number + 1:05d}"))
        assert record.p_signal.shape == (5000, 12)
        assert record.units == ["mV"] * 12
        assert f"Dx: {rhythm}" in record.comments
        lead = record.p_signal[:, record.sig_name.index("II")]
        peaks, _ = signal.find_peaks(lead, height=0.5 * lead.max(), distance=125)
        intervals = np.diff(peaks) / record.fs
        low, high = RHYTHMS[rhythm]
        assert 0.85 * low < 60 / intervals.mean() < 1.15 * high
        assert peaks[0] / record.fs < 1.5 * intervals.max()
        is_irregular = intervals.std() / intervals.mean() > 0.09
        assert is_irregular == (rhythm == "164889003")


def test_einthoven_holds_over_the_twelve_leads(corpus):
    record = wfdb.rdrecord(str(corpus / "ecg" / "E00001"))
    lead = dict(zip(record.sig_name, signal.sosfilt(BAND, record.p_signal, axis=0).T, strict=True))
    error = lead["I"] + lead["III"] - lead["II"]
    assert error.std() < 0.25 * lead["II"].std()
    # The precordial R wave grows from V1 to V5.
    assert lead["V1"].max() < 0.5 * lead["V5"].max()


BAND = signal.butter(2, (1, 40), "bandpass", fs=500, output="sos")


def test_every_stage_of_a_night(night):
    _, latent, edf = night
    assert set(latent.stages) == set(STAGES)
    texts = [one.text for one in edf.annotations]
    assert texts == [f"Sleep stage {stage}" for stage in latent.stages]
    with pytest.raises(ValueError, match="at least 20"):
        draw_hypnogram(19, np.random.default_rng(0))


def test_run_length_annotations_cover_the_night():
    _, latent, edf = sleeper(2, night_minutes=20, seed=3)
    stages = [
        text for one in edf.annotations for text in [one.text[-2:].strip()] * round((one.duration or 0) / EPOCH_S)
    ]
    assert stages == list(latent.stages)
    assert len(edf.annotations) < len(latent.stages)


def test_spectra_follow_the_stage(night):
    traits, latent, _ = night
    montage = MONTAGES[0]
    channels = eeg_uv(latent, traits, montage, np.random.default_rng(5))
    central, occipital = channels["EEG C3-A2"], channels["EEG O2-A1"]
    delta = median_by_stage(latent, band_power(central, 256, 0.5, 2))
    assert delta["N3"] > 3 * delta["N2"] > 3 * delta["W"]
    sigma = median_by_stage(latent, band_power(central, 256, 12, 14.5))
    assert sigma["N2"] > 1.5 * max(sigma["N3"], sigma["R"], sigma["W"])
    alpha = band_power(occipital, 256, traits.alpha_hz - 1, traits.alpha_hz + 1)
    alpha_by_stage = median_by_stage(latent, alpha)
    assert alpha_by_stage["W"] > 3 * alpha_by_stage["N2"]
    muscle = median_by_stage(latent, band_power(emg_uv(latent, traits, 256, np.random.default_rng(6)), 256, 20, 100))
    assert muscle["W"] > 3 * muscle["N2"] > 9 * muscle["R"]


def test_the_heart_beats_at_the_latent_rate_and_with_the_breath(night):
    traits, latent, _ = night
    lead = signal.sosfiltfilt(
        signal.butter(2, (5, 30), "bandpass", fs=256, output="sos"),
        ecg_mv(latent, traits, 256, np.random.default_rng(7)),
    )
    peaks, _ = signal.find_peaks(lead, height=0.4 * np.percentile(lead, 99.8), distance=int(0.4 * 256))
    beats = peaks / 256
    assert abs(len(beats) - len(latent.beats_s)) < 0.02 * len(latent.beats_s)
    assert 60 / np.median(np.diff(beats)) == pytest.approx(np.median(latent.heart_bpm), rel=0.04)

    # Respiratory sinus arrhythmia: heart rate and belt, both at 4 Hz, cohere at the breathing rate and only there.
    grid = np.arange(0, len(latent.stages) * EPOCH_S, 0.25)
    rate = np.interp(grid, beats[1:], 60 / np.diff(beats))
    belt = belts(latent, MONTAGES[0], np.random.default_rng(8))["THOR RES"][::8]
    frequencies, coherence = signal.coherence(rate, belt, fs=4, nperseg=128)
    breathing = np.argmin(abs(frequencies - traits.breaths_per_min / 60))
    assert coherence[breathing] > 0.5
    assert coherence[breathing] > 2 * coherence[np.argmin(abs(frequencies - 0.75))]


def test_slow_waves_fall_while_the_heart_speeds_up(night):
    traits, latent, _ = night
    central = eeg_uv(latent, traits, MONTAGES[0], np.random.default_rng(5))["EEG C3-A2"]
    asleep = np.isin(latent.stages, ["N2", "N3"])
    delta = np.log(band_power(central, 256, 0.5, 2))[asleep]
    heart = latent.heart_bpm.reshape(len(latent.stages), -1).mean(axis=1)[asleep]
    assert np.corrcoef(delta, heart)[0, 1] < -0.4


@pytest.mark.parametrize(
    "noise", [lambda rng: band_noise(50_000, 100, 8, 12, rng), lambda rng: pink_noise(50_001, 100, 1.5, rng)]
)
def test_noise_has_unit_variance(noise):
    assert noise(np.random.default_rng(0)).std() == pytest.approx(1, rel=0.05)


def test_gaps_of_the_first_round_are_filled_in_the_second():
    labels = [
        {one.label for one in sleeper(subject, night_minutes=10, seed=1)[2].signals} for subject in (1, 3, 5, 7, 9, 11)
    ]
    assert "X7" in labels[0]
    assert "X7" not in labels[3]
    assert not any("EMG" in label or "Chin" in label for label in labels[1])
    assert "EMG" in labels[4]
    assert not any("ECG" in label or "EKG" in label for label in labels[2])
    assert "ECG" in labels[5]


def test_corpus_files_resolve_every_label_but_x7():
    overrides = load_corpus("synthetic_psg").channels
    for montage in MONTAGES:
        kinds = {
            "eeg": list(montage.eeg),
            "eog": list(montage.eog),
            "emg": [montage.emg or "EMG"],
            "ecg": [montage.ecg or "ECG"],
            "resp": list(montage.resp),
        }
        for kind, labels in kinds.items():
            tags = [resolve(label, overrides) for label in labels]
            assert [getattr(tag, "kind", label) for tag, label in zip(tags, labels, strict=True)] == [kind] * len(
                labels
            )
    assert isinstance(resolve("X7", overrides), Unresolved)


@pytest.mark.parametrize("num_subjects", [3, 8, 14])
def test_each_split_has_a_sleeper(num_subjects):
    psg = load_corpus("synthetic_psg")
    splits = [split_of(psg, f"{number + 1:03d}") for number in range(num_subjects)]
    assert set(splits) == {"train", "val", "test"}
    assert splits.count("train") >= num_subjects / 3


def test_each_split_has_each_rhythm():
    ecg = load_corpus("synthetic_ecg")
    found = {(number % 4, split_of(ecg, f"E{number + 1:05d}")) for number in range(120)}
    assert len(found) == 12
