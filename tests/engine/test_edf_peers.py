"""Every EDF and BDF file at hand against edfio, pyedflib and MNE, sample by sample; each difference is stated.

`DIFFERENCES` is exactly what is found. A file that is not listed for a peer agrees with it in labels, exact rates,
annotations, number of samples, and every value up to the rounding of float32. Files that both refuse are left out.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import edfio
import mne
import numpy as np
import pyedflib
import pytest

from engine.read import read_header, read_signals
from manifests.errors import RecordingError

VOLTS = {"uV": 1e6, "µV": 1e6, "mV": 1e3}  # MNE gives volts for these units, for all others what the file says


@dataclass
class Read:
    """What a reader gives: signals as (label, rate in Hz, values), annotations as (onset, duration, text) or None."""

    signals: list
    annotations: list | None
    num_segments: int = 1


def by_kymo(path: Path) -> tuple[Read, list[str]]:
    recording = read_header(path, "edf")
    values = read_signals(recording, [channel.index for channel in recording.channels])
    signals = [(c.label, float(c.rate), signal) for c, signal in zip(recording.channels, values, strict=True)]
    notes = [(float(a.onset), float(a.duration), a.text) for a in recording.annotations]
    return Read(signals, notes, max(1, len(recording.segments))), [channel.unit for channel in recording.channels]


def is_bdf(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(1) == b"\xff"


def by_edfio(path: Path) -> Read:
    found = (edfio.read_bdf if is_bdf(path) else edfio.read_edf)(path.read_bytes())
    notes = [(a.onset, a.duration or 0.0, a.text) for a in found.annotations]
    return Read([(s.label, s.sampling_frequency, s.data) for s in found.signals], notes)


def by_pyedflib(path: Path) -> Read:
    with pyedflib.EdfReader(str(path)) as reader:
        numbers = range(reader.signals_in_file)
        signals = [(reader.getLabel(i), reader.getSampleFrequency(i), reader.readSignal(i)) for i in numbers]
    return Read(signals, None)  # it cuts annotations to 40 characters


def by_mne(path: Path) -> Read:
    read = mne.io.read_raw_bdf if is_bdf(path) else mne.io.read_raw_edf
    raw = read(path, verbose="error", stim_channel=False)
    values = raw.get_data() if raw.ch_names else []
    notes = [(a["onset"], a["duration"], a["description"]) for a in raw.annotations]
    return Read([(name, raw.info["sfreq"], row) for name, row in zip(raw.ch_names, values, strict=True)], notes)


PEERS: dict[str, Callable[[Path], Read]] = {"edfio": by_edfio, "pyedflib": by_pyedflib, "mne": by_mne}

REFUSES = "refuses"
FLAT = "a signal has equal digital limits; kymo gives it as uncalibrated and the others in full"
COUNT = "the record count is -1; kymo infers it from the file's size"
ZERO = "EDF+D of annotations and one CRC signal, records of 0 s; kymo gives the annotations, the signal has no rate"
EMPTY = "the file holds no complete record: the peer gives signals without a sample"
UPSAMPLED = "the peer makes slower channels as fast as the fastest; kymo keeps native rates"
LABELS = "the peer numbers equal labels, kymo leaves them as written"
GAPS = "EDF+D with five gaps: the peer joins the pieces, kymo gives six segments with their times"
RESMED = "resmed_cpap/DATALOG/20230822/20230822_"
NIGHTS = ["20230822_225132", "20230823_001346", "20230823_020701", "20230823_042437", "20230823_042832"]
PARTS = [f"{night}_{part}" for night in NIGHTS for part in ("BRP", "PLD", "SAD")]
PARTS += ["20230823_024117_BRP", "20230823_024118_PLD", "20230823_024118_SAD"]

DIFFERENCES: dict[str, dict[str, tuple[str, str]]] = {
    "edfio": {
        "malformed_edge_cases/edfPlusD.edf": ("6 segments joined", GAPS),
        "malformed_edge_cases/truncated_ds001787_sub-001_eeg.bdf": ("reads what kymo refuses as TRUNCATED", EMPTY),
        RESMED + "224916_CSL.edf": ("1 signals, not 0", ZERO),
        RESMED + "224916_EVE.edf": ("1 signals, not 0", ZERO),
        **{
            f"{RESMED}224924_{part}.edf": ("reads what kymo refuses as TRUNCATED", EMPTY)
            for part in ("BRP", "PLD", "SAD")
        },
    },
    "pyedflib": {
        "dreams_spindles/excerpt3.edf": (REFUSES, FLAT),
        "malformed_edge_cases/bdf_test.edf": (REFUSES, "EDF+ without an annotation channel; kymo reads it as EDF"),
        "malformed_edge_cases/edfPlusD.edf": (REFUSES, GAPS),
        "malformed_edge_cases/eeglab_test_nrec_minus1.bdf": (REFUSES, COUNT),
        "mne_python_testdata/edf/test.bdf": (REFUSES, COUNT),
        RESMED + "224916_CSL.edf": (REFUSES, ZERO),
        RESMED + "224916_EVE.edf": (REFUSES, ZERO),
        "resmed_cpap/STR.edf": (REFUSES, "units that are not ASCII; kymo reads them as UTF-8 or Latin-1"),
    },
    "mne": {
        "dreams_spindles/excerpt3.edf": ("5 rates differ", UPSAMPLED),
        "malformed_edge_cases/duplicate_channel_labels.edf": ("2 labels differ", LABELS),
        "malformed_edge_cases/edfAnnonC.edf": ("1 rates differ", UPSAMPLED),
        "malformed_edge_cases/edfPlusD.edf": ("6 segments joined", GAPS),
        "malformed_edge_cases/pyedflib_test_generator.bdf": ("4 rates differ", UPSAMPLED),
        "malformed_edge_cases/test_reduced_11rates.edf": ("13 rates differ", UPSAMPLED),
        "malformed_edge_cases/test_uneven_samp.edf": ("1 rates differ", UPSAMPLED),
        RESMED + "224916_CSL.edf": ("1 signals, not 0", ZERO),
        RESMED + "224916_EVE.edf": ("1 signals, not 0", ZERO),
        **{f"resmed_cpap/DATALOG/20230822/{part}.edf": ("1 rates differ", UPSAMPLED) for part in PARTS},
        "resmed_cpap/STR.edf": ("79 rates differ", UPSAMPLED),
        "sleep_edf/SC4001EC-Hypnogram.edf": (
            "annotations differ",
            "a file of annotations only: read_raw_edf cuts them to the 0 s of signal it has; kymo gives all 154",
        ),
        "sleep_edf/short_psg_SC4001_first5min.bdf": ("4 rates differ", UPSAMPLED),
        "sleep_edf/short_psg_SC4001_first5min.edf": ("4 rates differ", UPSAMPLED),
    },
}


def annotations_agree(ours: list, theirs: list) -> bool:
    return len(ours) == len(theirs) and all(
        abs(a[0] - b[0]) < 1e-6 and abs(a[1] - b[1]) < 1e-6 and a[2].strip() == b[2].strip()
        for a, b in zip(sorted(ours), sorted(theirs), strict=True)
    )


def compared(ours: Read, theirs: Read, units: list[str], *, in_volts: bool) -> str:
    """What differs, empty for nothing."""
    if len(ours.signals) != len(theirs.signals):
        return f"{len(theirs.signals)} signals, not {len(ours.signals)}"
    counts = dict.fromkeys(("labels", "rates", "lengths", "values"), 0)
    for (label, rate, mine), (other, other_rate, other_values), unit in zip(
        ours.signals, theirs.signals, units, strict=True
    ):
        counts["labels"] += label != other.strip()
        if abs(rate - other_rate) > 1e-9 * rate:
            counts["rates"] += 1
        elif len(mine) != len(other_values):
            counts["lengths"] += 1
        elif len(mine):
            values = other_values * VOLTS.get(unit, 1.0) if in_volts else other_values
            counts["values"] += bool(np.abs(mine - values).max() > 5e-7 * (np.abs(values).max() + 1e-30))
    words = [f"{ours.num_segments} segments joined"] if ours.num_segments != theirs.num_segments else []
    words += [f"{count} {name} differ" for name, count in counts.items() if count]
    if theirs.annotations is not None and ours.annotations is not None:
        words += [] if annotations_agree(ours.annotations, theirs.annotations) else ["annotations differ"]
    return ", ".join(words)


def difference(path: Path, peer: str) -> str:
    try:
        ours, units = by_kymo(path)
    except RecordingError as error:
        ours, units = None, [error.reason]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = PEERS[peer](path)
    except Exception:  # noqa: BLE001 - whatever a peer raises on a file is its refusal
        return "refuses" if ours else ""
    if ours is None:
        return f"reads what kymo refuses as {units[0]}"
    return compared(ours, theirs, units, in_volts=peer == "mne")


@pytest.mark.parametrize("peer", PEERS)
def test_each_difference_from_a_peer_is_known_and_stated(shared_data, peer):
    paths = sorted(path for path in shared_data.rglob("*") if path.suffix.lower() in {".edf", ".bdf", ".rec"})
    assert len(paths) >= 60
    found = {path.relative_to(shared_data).as_posix(): difference(path, peer) for path in paths}
    found = {name: what for name, what in found.items() if what}
    assert found == {name: what for name, (what, _) in DIFFERENCES[peer].items()}
