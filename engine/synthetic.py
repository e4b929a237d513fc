"""A small corpus of synthetic sleepers and 12-lead ECGs as real files: EDF+ and WFDB, same seed, same bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, time
from itertools import groupby
from pathlib import Path

import numpy as np
import wfdb
from edfio import Edf, EdfAnnotation, EdfSignal, Patient, Recording
from scipy import signal

from engine.synthetic_signals import (
    AROUSAL,
    CHIN_TONE_UV,
    ECG_RATE_HZ,
    EPOCH_S,
    LATENT_HZ,
    LEADS,
    RHYTHMS,
    STAGES,
    Array,
    Night,
    Traits,
    arrivals,
    band_noise,
    draw_night,
    draw_traits,
    heart_dipole,
    pink_noise,
    train,
    twelve_lead_mv,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Montage:
    """How one sleep laboratory names its channels and how fast it samples them (Hz).

    Attributes:
        eeg: Label to scalp region (F, C or O).
        eog: Left and right outer canthus.
        resp: Thorax, abdomen, flow.
        stage_texts: Annotation text of W, N1, N2, N3, R.
        is_run_length: One annotation per bout instead of one per epoch, as in Sleep-EDF.
    """

    eeg: dict[str, str]
    eeg_hz: int
    eeg_unit: str = "uV"
    eog: tuple[str, str]
    eog_hz: int
    emg: str | None
    emg_hz: int = 128
    ecg: str | None
    ecg_hz: int
    ecg_unit: str = "mV"
    resp: tuple[str, str, str]
    resp_hz: int
    stage_texts: tuple[str, ...] = ("W", "N1", "N2", "N3", "R")
    is_run_length: bool = False
    unknown: str | None = None


MONTAGES = (
    Montage(
        eeg={"EEG C3-A2": "C", "EEG C4-A1": "C", "EEG O2-A1": "O"},
        eeg_hz=256,
        eog=("EOG(L)", "EOG(R)"),
        eog_hz=128,
        emg="EMG submental",
        ecg="ECG II",
        ecg_hz=256,
        resp=("THOR RES", "ABDO RES", "Airflow"),
        resp_hz=32,
    ),
    Montage(
        eeg={"F3-M2": "F", "C3-M2": "C", "C4-M1": "C", "O1-M2": "O"},
        eeg_hz=200,
        eog=("E1-M2", "E2-M1"),
        eog_hz=200,
        emg="Chin1-Chin2",
        emg_hz=200,
        ecg="EKG",
        ecg_hz=200,
        ecg_unit="uV",
        resp=("Thorax", "Abdomen", "AIRFLOW"),
        resp_hz=25,
        stage_texts=("W", "1", "2", "3", "R"),
        unknown="X7",
    ),
    Montage(
        eeg={"C3:M2": "C", "C4:M1": "C"},
        eeg_hz=128,
        eog=("LOC-A2", "ROC-A1"),
        eog_hz=128,
        emg="EMG chin",
        ecg="ECG",
        ecg_hz=256,
        resp=("Chest", "ABD", "Airflow"),
        resp_hz=32,
        is_run_length=True,
    ),
    Montage(
        eeg={"EEG F4-M1": "F", "EEG C4-M1": "C", "EEG O2-M1": "O"},
        eeg_hz=256,
        eeg_unit="mV",
        eog=("EOG E1-M2", "EOG E2-M2"),
        eog_hz=256,
        emg=None,
        ecg="ECG II",
        ecg_hz=256,
        resp=("THOR EFFORT", "ABDO EFFORT", "AIRFLOW"),
        resp_hz=32,
    ),
    Montage(
        eeg={"EEG C3-A2": "C", "EEG O1-A2": "O"},
        eeg_hz=128,
        eog=("LOC", "ROC"),
        eog_hz=64,
        emg="Chin1-Chin2",
        emg_hz=256,
        ecg="EKG",
        ecg_hz=128,
        resp=("Thoracic", "Abdominal", "Airflow"),
        resp_hz=16,
        stage_texts=("W", "1", "2", "3", "R"),
        is_run_length=True,
    ),
    Montage(
        eeg={"C4-M1": "C", "F4-M1": "F", "O2-M1": "O"},
        eeg_hz=200,
        eog=("E1-M2", "E2-M2"),
        eog_hz=200,
        emg="EMG chin",
        emg_hz=200,
        ecg=None,
        ecg_hz=200,
        resp=("Thorax", "Abdomen", "Airflow"),
        resp_hz=25,
    ),
)
# Gain of alpha, theta, delta, sigma, K-complex by scalp region.
REGIONS = {
    "F": (0.35, 0.9, 1.0, 0.7, 1.0),
    "C": (0.6, 1.0, 0.9, 1.0, 0.9),
    "O": (1.0, 0.8, 0.6, 0.3, 0.5),
}


def _montage_of(subject: int) -> Montage:
    """Each laboratory in turn; its gaps (no EMG, no ECG, an odd label) appear in the first round only."""
    montage = MONTAGES[subject % len(MONTAGES)]
    if subject < len(MONTAGES):
        return montage
    fields = {name: getattr(montage, name) for name in Montage.__dataclass_fields__}
    return Montage(**{**fields, "emg": montage.emg or "EMG", "ecg": montage.ecg or "ECG", "unknown": None})


def _rhythms_uv(night: Night, traits: Traits, rate: int, rng: np.random.Generator) -> list[Array]:
    """Alpha, theta, delta, sigma and K-complexes in µV at unit gain, the sources of every scalp channel."""
    size = len(night.stages) * EPOCH_S * rate

    def envelope(values: Sequence[float], gain: Array) -> Array:
        return night.at(night.by_stage(values) * np.exp(gain), rate)

    alpha = envelope((16, 5, 2, 1, 4), 0.35 * night.arousal)
    theta = envelope((4, 11, 8, 6, 10), 0 * night.arousal)
    delta = envelope((7, 8, 20, 48, 7), -0.35 * (night.arousal - night.by_stage(AROUSAL)))
    spindles = arrivals(night.by_stage((0, 0, 6, 1, 0)) * np.exp(0.8 * night.infraslow), rng)
    tick = np.arange(round(1.2 * rate)) / rate
    spindle = np.sin(2 * np.pi * traits.spindle_hz * tick) * np.hanning(len(tick))
    complexes = arrivals(night.by_stage((0, 0, 2.5, 0, 0)), rng)
    tick = np.arange(round(1.0 * rate)) / rate
    complex_shape = -np.exp(-0.5 * ((tick - 0.2) / 0.07) ** 2) + 0.6 * np.exp(-0.5 * ((tick - 0.5) / 0.14) ** 2)
    saws = arrivals(night.by_stage((0, 0, 0, 0, 4)), rng)
    tick = np.arange(round(3.0 * rate)) / rate
    saw = (2 * np.mod(2.8 * tick, 1) - 1) * np.hanning(len(tick))

    def events(times_s: Array, low: float, high: float, kernel: Array) -> Array:
        return train(times_s, rng.uniform(low, high, len(times_s)), kernel, rate=rate, num_samples=size)

    return [
        alpha * band_noise(size, rate, traits.alpha_hz - 0.6, traits.alpha_hz + 0.6, rng),
        theta * band_noise(size, rate, 4, 7, rng) + events(saws, 15, 30, saw),
        delta * band_noise(size, rate, 0.5, 2.2, rng),
        envelope((0.5, 0.5, 2.5, 1, 0.5), 0.5 * night.infraslow) * band_noise(size, rate, 12, 14.5, rng)
        + events(spindles, 25, 45, spindle),
        events(complexes, 70, 120, complex_shape),
    ]


def _artefact_uv(night: Night, rate: int, rng: np.random.Generator) -> Array:
    """What a movement adds to a scalp or eye channel, in µV: a slow swing and muscle."""
    size = len(night.stages) * EPOCH_S * rate
    swing = 70 * band_noise(size, rate, 0.4, 3, rng) + 14 * rng.standard_normal(size)
    return night.at(night.movement, rate) * swing


def eeg_uv(night: Night, traits: Traits, montage: Montage, rng: np.random.Generator) -> dict[str, Array]:
    """Scalp channels in µV by label: shared rhythms at the gain of the region, over shared and own background."""
    rate = montage.eeg_hz
    rhythms = _rhythms_uv(night, traits, rate, rng)
    size = len(rhythms[0])
    shared = pink_noise(size, rate, traits.slope, rng)
    beta = night.at(3 * np.exp(0.3 * night.arousal), rate)
    channels = {}
    for label, region in montage.eeg.items():
        own = pink_noise(size, rate, traits.slope, rng)
        mixture = sum(gain * source for gain, source in zip(REGIONS[region], rhythms, strict=True))
        mixture += 5 * shared + 5 * own + beta * band_noise(size, rate, 16, 30, rng)
        channels[label] = traits.amplitude * mixture + _artefact_uv(night, rate, rng)
    return channels


def eog_uv(night: Night, traits: Traits, montage: Montage, rng: np.random.Generator) -> dict[str, Array]:
    """Both eyes in µV: blinks awake, slow rolling in N1, bursts of rapid movements in REM, frontal slow waves."""
    rate = montage.eog_hz
    size = len(night.stages) * EPOCH_S * rate
    bursts = np.clip(band_noise(len(night.arousal), LATENT_HZ, 0.02, 0.1, rng), 0, None)
    blinks = arrivals(night.by_stage((14, 1, 0, 0, 0)), rng)
    saccades = arrivals(night.by_stage((8, 0, 0, 0, 55)) * bursts, rng)
    tick = np.arange(round(1.5 * rate)) / rate
    blink = np.exp(-0.5 * ((tick - 0.2) / 0.06) ** 2)
    saccade = (1 - np.exp(-tick / 0.03)) * np.exp(-tick / 0.35)
    vertical = train(blinks, rng.uniform(70, 130, len(blinks)), blink, rate=rate, num_samples=size)
    direction = rng.choice([-1.0, 1.0], len(saccades)) * rng.uniform(50, 120, len(saccades))
    horizontal = train(saccades, direction, saccade, rate=rate, num_samples=size)
    horizontal += night.at(night.by_stage((4, 55, 4, 0, 4)), rate) * band_noise(size, rate, 0.2, 0.45, rng)
    delta = night.at(night.by_stage((5, 6, 12, 28, 5)), rate) * band_noise(size, rate, 0.5, 2.2, rng)
    alpha = night.at(night.by_stage((6, 2, 1, 0.5, 2)) * np.exp(0.35 * night.arousal), rate)
    common = delta + alpha * band_noise(size, rate, traits.alpha_hz - 0.6, traits.alpha_hz + 0.6, rng)
    artefact = _artefact_uv(night, rate, rng)
    left, right = (
        traits.amplitude * (common + sign * horizontal + height * vertical + 5 * pink_noise(size, rate, 1.3, rng))
        + artefact
        for sign, height in ((1.0, 0.7), (-1.0, -0.4))
    )
    return dict(zip(montage.eog, (left, right), strict=True))


def emg_uv(night: Night, traits: Traits, rate: int, rng: np.random.Generator) -> Array:
    """Chin muscle in µV: tone by stage and arousal, none but twitches in REM, bursts while moving."""
    size = len(night.stages) * EPOCH_S * rate
    twitches = arrivals(night.by_stage((0, 0, 0, 0, 3)), rng)
    burst = np.hanning(round(0.3 * rate))
    tone = night.at(night.by_stage(CHIN_TONE_UV) * np.exp(0.3 * night.arousal), rate)
    tone += 8 * train(twitches, np.ones(len(twitches)), burst, rate=rate, num_samples=size)
    tone += 45 * night.at(night.movement, rate)
    highpass = signal.butter(2, 15, "highpass", fs=rate, output="sos")
    fibres = np.asarray(signal.sosfilt(highpass, rng.standard_normal(size)))
    return traits.amplitude * tone * fibres + 0.6 * rng.standard_normal(size)


def ecg_mv(night: Night, traits: Traits, rate: int, rng: np.random.Generator) -> Array:
    """Lead II in mV; breathing turns the heart's axis (amplitude) and moves the baseline."""
    size = len(night.stages) * EPOCH_S * rate
    lead = LEADS["II"] @ heart_dipole(night.beats_s, size, rate=rate, wave_scale=traits.wave_scale)
    breath = night.at(night.breath_depth * np.sin(night.breath_phase), rate)
    swing = 0.35 * night.at(night.movement, rate) * band_noise(size, rate, 0.3, 3, rng)
    return lead * (1 - 0.1 * breath) + 0.08 * breath + swing + 0.015 * rng.standard_normal(size)


def belts(night: Night, montage: Montage, rng: np.random.Generator) -> dict[str, Array]:
    """Thorax, abdomen and flow without a unit; the abdomen lags, flow is the rate of change of volume."""
    rate = montage.resp_hz
    size = len(night.stages) * EPOCH_S * rate
    # Interpolate the phase, not the wave: at 8 Hz the wave itself would lose its peaks.
    phase, depth = night.at(night.breath_phase, rate), night.at(night.breath_depth, rate)
    shapes = (
        np.sin(phase) + 0.2 * np.sin(2 * phase),
        0.8 * np.sin(phase - 0.35) + 0.1 * np.sin(2 * phase),
        np.cos(phase) + 0.25 * np.cos(3 * phase),
    )
    moves = night.at(night.movement, rate)
    return {
        label: depth * shape + moves * band_noise(size, rate, 0.1, 1.5, rng) + 0.03 * rng.standard_normal(size)
        for label, shape in zip(montage.resp, shapes, strict=True)
    }


def _edf_signal(label: str, values: Array, rate: int, *, unit: str, limit: float, prefilter: str = "") -> EdfSignal:
    """EDF signal clipped to ±limit, as an amplifier does."""
    return EdfSignal(
        np.clip(values, -limit, limit),
        rate,
        label=label,
        physical_dimension=unit,
        physical_range=(-limit, limit),
        prefiltering=prefilter,
    )


def _annotations(night: Night, montage: Montage) -> list[EdfAnnotation]:
    texts: dict[str, str] = dict(zip(STAGES, montage.stage_texts, strict=True))
    annotations, epoch = [], 0
    for stage, run in groupby(night.stages):
        length = len(list(run))
        steps = [length] if montage.is_run_length else [1] * length
        for step in steps:
            text = f"Sleep stage {texts[stage]}"
            annotations.append(EdfAnnotation(epoch * EPOCH_S, step * EPOCH_S, text))
            epoch += step
    return annotations


def sleeper(subject: int, *, night_minutes: int, seed: int) -> tuple[Traits, Night, Edf]:
    """One subject's traits, latent night and EDF+ recording; a pure function of its arguments."""
    rng = np.random.default_rng([seed, 1, subject])
    traits = draw_traits(rng)
    night = draw_night(traits, night_minutes * 60 // EPOCH_S, rng)
    montage = _montage_of(subject)
    scale, limit = (1e-3, 0.5) if montage.eeg_unit == "mV" else (1.0, 500.0)
    signals = [
        _edf_signal(label, scale * values, montage.eeg_hz, unit=montage.eeg_unit, limit=limit, prefilter="HP:0.3Hz")
        for label, values in eeg_uv(night, traits, montage, rng).items()
    ]
    for label, values in eog_uv(night, traits, montage, rng).items():
        signals.append(_edf_signal(label, values, montage.eog_hz, unit="uV", limit=500.0))
    if montage.emg:
        chin = emg_uv(night, traits, montage.emg_hz, rng)
        signals.append(_edf_signal(montage.emg, chin, montage.emg_hz, unit="uV", limit=300.0))
    if montage.ecg:
        scale, limit = (1e3, 4000.0) if montage.ecg_unit == "uV" else (1.0, 4.0)
        heart = scale * ecg_mv(night, traits, montage.ecg_hz, rng)
        signals.append(_edf_signal(montage.ecg, heart, montage.ecg_hz, unit=montage.ecg_unit, limit=limit))
    for label, values in belts(night, montage, rng).items():
        signals.append(_edf_signal(label, values, montage.resp_hz, unit="", limit=8.0))
    if montage.unknown:
        values = rng.standard_normal(len(night.stages) * EPOCH_S * montage.resp_hz)
        signals.append(_edf_signal(montage.unknown, values, montage.resp_hz, unit="", limit=8.0))
    edf = Edf(
        signals,
        patient=Patient(code=f"sub-{subject + 1:03d}"),
        recording=Recording(startdate=date(2001, 1, 1), equipment_code="kymo_synthetic"),
        starttime=time(22, 30),
        data_record_duration=1,
        annotations=_annotations(night, montage),
    )
    return traits, night, edf


def _write_ecg(folder: Path, record: int, seed: int) -> None:
    rng = np.random.default_rng([seed, 2, record])
    rhythm = list(RHYTHMS)[record % len(RHYTHMS)]
    values = np.clip(np.round(twelve_lead_mv(rhythm, rng) * 1000), -32767, 32767).astype(np.int64)
    num_leads = len(LEADS)
    wfdb.wrsamp(
        f"E{record + 1:05d}",
        fs=ECG_RATE_HZ,
        units=["mV"] * num_leads,
        sig_name=list(LEADS),
        d_signal=values,
        fmt=["16"] * num_leads,
        adc_gain=[1000.0] * num_leads,
        baseline=[0] * num_leads,
        comments=[f"Age: {int(rng.integers(20, 89))}", f"Sex: {rng.choice(['Female', 'Male'])}", f"Dx: {rhythm}"],
        write_dir=str(folder),
    )


def synthesise(
    root: Path | str, *, num_subjects: int = 14, num_ecg: int = 120, night_minutes: int = 50, seed: int = 1
) -> None:
    """Write `root/psg/sub-NNN/sub-NNN_psg.edf` and `root/ecg/ENNNNN.{hea,dat}`, and one broken EDF.

    The default makes 11.7 hours of sleep (1,400 30-s windows) and 20 minutes of ECG, about 125 MB, deterministic
    for a seed. Subject 4 has no EMG, subject 6 no ECG, subject 2 a channel of an unknown name (`X7`); the subject
    after the last one has a file that ends within its header.

    Args:
        root: Folder to write into; made when missing.
        num_subjects: Sleepers with a readable recording.
        num_ecg: 12-lead records of 10 s; the four rhythms take turns.
        night_minutes: Length of a compressed night, at least 10.
        seed: Seed of everything.

    Raises:
        ValueError: A night too short to hold all five stages.
    """
    root = Path(root)
    content = b""
    for subject in range(num_subjects + 1):
        name = f"sub-{subject + 1:03d}"
        path = root / "psg" / name / f"{name}_psg.edf"
        path.parent.mkdir(parents=True, exist_ok=True)
        if subject == num_subjects:
            # A copy that stopped within the signal headers: no reader can know the channels.
            path.write_bytes(content[:600])
            break
        sleeper(subject, night_minutes=night_minutes, seed=seed)[2].write(path)
        content = content or path.read_bytes()[:600]
    folder = root / "ecg"
    folder.mkdir(parents=True, exist_ok=True)
    for record in range(num_ecg):
        _write_ecg(folder, record, seed)
