"""The UCS table and `resolve`: frozen ids, coordinates, properties, and the labels of real corpora."""

import csv
import hashlib
import re
from pathlib import Path

import mne
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.channels import (
    KINDS,
    REFERENCES,
    UNITS,
    ChannelTag,
    Unresolved,
    positions,
    resolve,
    site,
    site_ids,
    sites,
    table_digest,
)

FROZEN_ROWS = 532
FROZEN_DIGEST = "e97e0563c1b51ef2064421936e307a1148c04a52535f7cc9686b76c2e0ebdeeb"

TEN_TWENTY = ("Fp1", "Fp2", "F7", "F3", "Fz", "F4", "F8", "T7", "C3", "Cz", "C4", "T8", "P7", "P3", "Pz", "P8", "O1")

# Places that are no label by themselves, or that two meanings share: only a symbol or a corpus file names them.
# `flow` alone is another sensor in every corpus, so only a corpus file can say which site it is.
NOT_A_LABEL = {"flow", "Pg1", "Pg2", "finger", "ear", "body", "single_lead", "skin", "rectal", "horizontal", "vertical"}

LABEL_ROWS = [row for row in sites() if row.site not in REFERENCES]
SPELLINGS = [(row, name) for row in LABEL_ROWS for name in (row.site, *row.aliases) if name not in NOT_A_LABEL]


def _tag(label: str, **overrides: str | None) -> ChannelTag:
    found = resolve(label, overrides or None)
    assert isinstance(found, ChannelTag), found
    return found


def _identity(tag: ChannelTag) -> tuple[str, str, str | None, str]:
    return tag.kind, tag.anode, tag.cathode, tag.role


# The table


def test_ids_never_change() -> None:
    rows = "".join(f"{row.id},{row.site},{row.kind};" for row in sites()[:FROZEN_ROWS])
    assert hashlib.sha256(rows.encode()).hexdigest() == FROZEN_DIGEST, "ids are append-only: put new sites at the end"


def test_ids_count_up_from_one() -> None:
    assert [row.id for row in sites()] == list(range(1, site_ids()))
    assert positions().shape == (site_ids(), 3)
    assert np.isnan(positions()[0]).all()


def test_every_kind_is_used_and_has_one_unit() -> None:
    assert {row.kind for row in sites()} == set(KINDS)
    assert {(row.kind, row.unit) for row in sites()} == {(kind, UNITS.get(kind, "au")) for kind in KINDS}


def test_names_differ_without_case() -> None:
    names = [row.site.lower() for row in sites()]
    assert len(set(names)) == len(names)


def test_site_wants_the_canonical_spelling() -> None:
    assert site("T7").aliases == ("T3",)
    with pytest.raises(KeyError):
        site("T3")


def test_scalp_coordinates_are_those_of_the_standard_montage() -> None:
    builtin = mne.channels.get_builtin_montages()
    name = "colin27_1005" if "colin27_1005" in builtin else "standard_1005"
    montage = mne.channels.make_standard_montage(name)
    to_head = mne.channels.compute_native_head_t(montage)
    in_head = {
        label: mne.transforms.apply_trans(to_head, xyz) for label, xyz in montage.get_positions()["ch_pos"].items()
    }
    centre = np.array([-1.0, 14.8, 39.9]) / 1000  # metres, from the table's header
    for label, xyz in in_head.items():
        expected = (xyz - centre) / np.linalg.norm(xyz - centre)
        anode = _tag(label).anode
        np.testing.assert_allclose(positions()[site(anode).id], expected, atol=2e-3, err_msg=label)
    assert len({_tag(label).anode for label in in_head}) == len(in_head) - 4  # T3 T4 T5 T6 are aliases


def test_head_axes_are_right_front_up() -> None:
    assert site("T8").xyz[0] > 0.9 > -0.9 > site("T7").xyz[0]  # type: ignore[index]
    assert site("Fpz").xyz[1] > 0.8 > -0.8 > site("Oz").xyz[1]  # type: ignore[index]
    assert site("Cz").xyz[2] > 0.9  # type: ignore[index]


def test_scalp_sites_lie_apart_and_on_the_sphere() -> None:
    xyz = np.array([row.xyz for row in sites() if row.kind == "eeg" and row.id <= site("A2").id])
    np.testing.assert_allclose(np.linalg.norm(xyz, axis=1), 1, atol=1e-3)
    distance = np.linalg.norm(xyz[:, None] - xyz[None], axis=2) + 9 * np.eye(len(xyz))
    assert distance.min() > 0.05


def test_side_follows_the_coordinates() -> None:
    for row in sites():
        if row.kind in ("eeg", "eog") and row.xyz is not None:
            expected = "M" if abs(row.xyz[0]) < 0.03 else "R" if row.xyz[0] > 0 else "L"
            assert row.side == expected, row


def test_ears_and_mastoids_are_four_sites() -> None:
    assert len({site(name).id for name in ("A1", "A2", "M1", "M2")}) == 4
    apart = np.linalg.norm(positions()[site("A1").id] - positions()[site("M1").id])
    assert 0.1 < apart < 0.3


def test_digest_is_a_sha256() -> None:
    assert len(table_digest()) == 64
    assert table_digest() == table_digest()


# Tags


def test_tag_of_a_derivation() -> None:
    tag = _tag("EEG T3-A2")
    assert tag == ChannelTag(
        kind="eeg",
        anode="T7",
        cathode="A2",
        side="L",
        role="signal",
        unit="uV",
        polarity="as_recorded",
        source_label="EEG T3-A2",
        rule="parser:pair+typed",
    )
    assert tag.symbol == "eeg:T7-A2"
    assert (tag.anode_id, tag.cathode_id) == (site("T7").id, site("A2").id)
    assert _tag("T3").cathode_id == 0


@pytest.mark.parametrize(
    ("label", "role"),
    [
        ("M2", "reference"),
        ("EEG A1-REF", "reference"),
        ("M2-C3", "signal"),
        ("M1M2", "signal"),
        ("A1:EOG2", "signal"),
        ("C3-M2", "signal"),
        ("EOG-L_Off", "flag"),
        ("OX STAT", "flag"),
        ("Event marker", "marker"),
        ("PHOTIC-REF", "marker"),
        ("DHR", "derived"),
    ],
)
def test_role(label: str, role: str) -> None:
    assert _tag(label).role == role


def test_units_by_kind() -> None:
    units = {label: _tag(label).unit for label in ("EEG1", "E1-M2", "EMG", "II", "SpO2", "Temp rectal", "Thor", "HR")}
    assert list(units.values()) == ["uV", "uV", "uV", "mV", "%", "degC", "au", "au"]


# Overrides of a corpus


def test_corpus_labels_come_first() -> None:
    overrides = {"EEG(sec)": "eeg:C3-A2", "Flow": "resp:nasal_pressure", "EOG1": None, "C3": "eeg:C3-Fpz"}
    found = [resolve(label, overrides) for label in ("EEG(sec)", "Flow", "C3")]
    assert [(tag.symbol, tag.rule) for tag in found if isinstance(tag, ChannelTag)] == [
        ("eeg:C3-A2", "corpus"),
        ("resp:nasal_pressure", "corpus"),
        ("eeg:C3-Fpz", "corpus"),
    ]
    assert resolve("EOG1", overrides) == Unresolved(label="EOG1", reason="excluded by corpus")
    assert _tag("C4", **overrides).rule == "parser:site"


def test_corpus_labels_match_exactly_before_they_match_without_case() -> None:
    overrides = {"flow": "resp:thermistor", "Flow": "resp:nasal_pressure"}
    assert _tag("Flow", **overrides).anode == "nasal_pressure"
    assert _tag("flow", **overrides).anode == "thermistor"
    assert _tag(" FLOW", **overrides).anode == "thermistor"  # the first in the corpus file


@pytest.mark.parametrize("symbol", ["eeg:Q9", "C3-M2", "brain:C3", "eeg:C3-C3", "resp:C3", "eeg:common", "eeg:c3", ""])
def test_a_wrong_symbol_in_a_corpus_file_is_not_resolved(symbol: str) -> None:
    found = resolve("EEG", {"EEG": symbol})
    assert isinstance(found, Unresolved)
    assert "not a UCS symbol" in found.reason


# Properties

FRAGMENTS = (
    "EEG EOG EMG ECG EKG1 Resp C3 C4 Fp1 T3 CZ M1 M2 A2 A22 E1 LOC ROC EOG1 Chin1 L Leg Thor Abd SpO2 REF LE AVG "
    "x unknown PG1 II V1 Flow Pulse 1 0 20 01 - : / _ . + ( ) # .1s -0 eeg: ecg: h z"
)
_fragments = st.sampled_from(re.split(" ", FRAGMENTS))
_labels = st.one_of(
    st.text(max_size=40),
    st.lists(st.one_of(_fragments, st.just(" ")), max_size=7).map("".join),
    st.text(st.characters(), min_size=60, max_size=200),
)


@settings(max_examples=400, deadline=None)
@given(_labels)
def test_resolve_never_raises_and_reads_its_own_symbol(label: str) -> None:
    found = resolve(label)
    if isinstance(found, Unresolved):
        assert found.label == label
        assert found.reason
        return
    assert found.source_label == label
    assert _identity(_tag(found.symbol)) == _identity(found)
    assert 0 < found.anode_id < site_ids()


@pytest.mark.parametrize("shape", ["{}", " {} ", "{}\0", "\t{}"])
@pytest.mark.parametrize("case", [str, str.upper, str.lower])
def test_every_spelling_of_a_site_is_that_site(case: type, shape: str) -> None:
    for row, name in SPELLINGS:
        found = _tag(shape.format(case(name)))
        assert (found.anode, found.kind, found.cathode) == (row.site, row.kind, None), name


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_alias_gives_the_same_derivation(data: st.DataObject) -> None:
    electrodes = [row for row in LABEL_ROWS if row.kind == "eeg" and row.site not in NOT_A_LABEL]
    anode, cathode = data.draw(st.lists(st.sampled_from(electrodes), min_size=2, max_size=2, unique=True))
    separator = data.draw(st.sampled_from(["-", ":", "/", "_", " - ", " "]))
    names = [data.draw(st.sampled_from((row.site, *row.aliases))) for row in (anode, cathode)]
    tag = _tag(data.draw(st.sampled_from(["", "EEG "])) + separator.join(names))
    assert (tag.kind, tag.anode, tag.cathode) == ("eeg", anode.site, cathode.site)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_alias_of_a_reference_gives_the_same_cathode(data: st.DataObject) -> None:
    token = data.draw(st.sampled_from([site(name) for name in REFERENCES]))
    name = data.draw(st.sampled_from((token.site, *token.aliases)))
    assert _tag(f"{data.draw(st.sampled_from(TEN_TWENTY))}-{name}").cathode == token.site


# Labels of real corpora

CORPUS_LABELS = """
SHHS     | H.R. hr:heart_rate ; PR hr:pulse_rate ; EOG(L) eog:E1 ; EOG(R) eog:E2 ; THOR RES resp:thorax
SHHS     | ABDO RES resp:abdomen ; NEW AIR resp:flow ; OX stat other:sensor_status flag ; EEG(sec) eeg:unknown ; AUX ?
SHHS     | SOUND snore:microphone ; LIGHT other:light ; POSITION position:body ; EPMS ? ; SaO2 spo2:finger
MESA     | EKG ecg:single_lead ; EOG-L eog:E1 ; EEG1 eeg:unknown ; Pres resp:unknown ; Flow resp:unknown
MESA     | Aux_AC resp:thermistor ; Pleth ppg:pleth ; DHR hr:heart_rate_derived derived ; Leg emg:leg
MESA     | EOG-L_Off other:lead_off flag ; EEG3_Off other:lead_off flag ; OxStatus other:sensor_status flag
MrOS     | Leg L emg:leg_l ; A1 eeg:A1 reference ; ROC eog:E2 ; ECG L ecg:torso_l ; L Chin emg:chin_l
MrOS     | SUM resp:effort_sum
MrOS     | STAT other:sensor_status flag ; Cannula Flow resp:nasal_pressure ; M1 eeg:M1 reference ; Chest resp:thorax
CHB-MIT  | FP1-F7 eeg:Fp1-F7 ; T8-P8 eeg:T8-P8 ; T8-P8-0 eeg:T8-P8 ; P7-T7 eeg:P7-T7 ; FT9-FT10 eeg:FT9-FT10
CHB-MIT  | - ? ; VNS ? ; LOC-ROC eog:E1-E2 ; C3-CS2 ? ; ECG ecg:single_lead
TUH      | EEG FP1-REF eeg:Fp1-common ; EEG T3-LE eeg:T7-linked_ears ; EEG A1-REF eeg:A1-common reference
TUH      | EEG T1-REF eeg:T1-common ; EEG C3P-REF eeg:C3P-common ; EEG ROC-REF eog:E2-common
TUH      | EMG-REF emg:unknown-common
TUH      | EEG 20-REF ? ; EEG 128-REF ? ; IBI other:marker marker ; BURSTS other:marker marker
TUH      | EEG SP1-REF eeg:Sp1-common
Sleep-EDF| EEG Fpz-Cz eeg:Fpz-Cz ; EOG horizontal eog:horizontal ; Resp oro-nasal resp:flow_oronasal
Sleep-EDF| EMG submental emg:chin ; Temp rectal temp:rectal ; Event marker other:marker marker
HMC      | EEG F4-M1 eeg:F4-M1 ; EOG E1-M2 eog:E1-M2 ; EMG chin emg:chin
CAP      | ROC-LOC eog:E2-E1 ; EOG dx eog:E2 ; EMG1-EMG2 emg:unknown ; ECG1-ECG2 ecg:ecg_1-ecg_2 ; SX1-SX2 ?
CAP      | TIB Dx emg:leg_r ; deltoide emg:deltoid ; TERMISTORE resp:thermistor ; ADDDOME resp:abdomen
CAP      | Flusso resp:unknown
CAP      | TAG other:sensor_status flag ; MIC snore:microphone ; Posizione position:body ; F8-T4 eeg:F8-T8
DREAMS   | FP1-A2 eeg:Fp1-A2 ; CZ2-A1 eeg:Cz-A1 ; EOG1-A2 eog:unknown-A2 ; VTH resp:thorax ; VTOT resp:effort_sum
DREAMS   | NAF2P-A1 resp:nasal_pressure ; NAF1 resp:thermistor ; PCPAP resp:mask_pressure ; PULSE hr:pulse_rate
CFS      | PlethWV ppg:pleth ; NASAL PRES resp:nasal_pressure ; OX STATUS other:sensor_status flag ; ECG1 ecg:ecg_1
CHAT     | Lleg1 emg:leg_l_1 ; Cchin emg:chin_c ; SAO2Nellcor spo2:finger ; EtCO2 other:co2_end_tidal ; RR ?
WSC      | C3_M2 eeg:C3-M2 ; Fz_AVG eeg:Fz-average ; Pz_Cz eeg:Pz-Cz ; cchin_l emg:chin ; nas_pres resp:nasal_pressure
eegmmidb | Fc5. eeg:FC5 ; C5.. eeg:C5 ; Cz.. eeg:Cz ; Af7. eeg:AF7 ; T10. eeg:T10 ; Iz.. eeg:Iz
SEED     | CB1 eeg:CB1 ; VEO eog:vertical ; FPZ eeg:Fpz
DEAP     | zEMG emg:zygomaticus ; GSR other:skin_conductance ; Plethysmograph ppg:pleth ; Temperature temp:temperature
PTB-XL   | I ecg:I ; AVR ecg:aVR ; AVF ecg:aVF ; V6 ecg:V6
MIT-BIH  | MLII ecg:MLII ; V5 ecg:V5
PC18     | Chin1-Chin2 emg:chin_1-chin_2 ; F3-M2 eeg:F3-M2
"""


def _corpus_cases() -> list[tuple[str, str, str]]:
    cases = []
    for line in CORPUS_LABELS.strip().splitlines():
        for item in line.split("|")[1].split(";"):
            words = item.split()
            role = words.pop() if words[-1] in ("flag", "marker", "reference", "derived") else "signal"
            cases.append((" ".join(words[:-1]), words[-1], role))
    return cases


@pytest.mark.parametrize(("label", "symbol", "role"), _corpus_cases())
def test_labels_of_the_major_corpora(label: str, symbol: str, role: str) -> None:
    found = resolve(label)
    if symbol == "?":
        assert isinstance(found, Unresolved)
    else:
        assert isinstance(found, ChannelTag)
        assert (found.symbol, found.role) == (symbol, role)


# The published list of 443 labels

GROUP_KINDS = {"BAS": {"eeg", "eog"}, "RESP": {"resp", "spo2", "snore"}, "EKG": {"ecg"}, "EMG": {"emg"}}

MOVED = {  # label: (our kind, why the published group is wrong)
    **dict.fromkeys(
        ("Finger PPG", "PPG", "PPG Masimo", "PPG-Masimo", "PPG_Masimo", "SentecPPG"),
        ("ppg", "a pulse wave is the heart's, in RESP it gives the ECG away"),
    ),
    **dict.fromkeys(
        ("H.R.", "Heart Rate_CU", "Pulse", "Pulse Rate", "Pulse-1", "PulseR", "PulseRa", "Tosca_Pulse"),
        ("hr", "a rate of the heart is not respiration"),
    ),
    "RIP Tho": ("resp", "an effort belt is not a muscle"),
    "Oral-CO2": ("other", "a gas concentration is neither flow nor effort"),
}

NAMES_NO_SITE = {"Ext1", "Ext2", "Ext3", "Ext4"}  # extensor muscle, or the amplifier's external inputs

UNREAD = {
    **dict.fromkeys(NAMES_NO_SITE, "extensor muscle or external input"),
    "F3:M2:E1:M1": "names sites of several kinds, or the same site twice",
    "O1:E1:M1": "names sites of several kinds, or the same site twice",
}


@pytest.fixture(scope="module")
def published(shared_data: Path) -> dict[str, str]:
    with (shared_data / "labels" / "psg_labels.csv").open(encoding="utf-8", newline="") as lines:
        return {row["label"]: row["sleepfm_group"] for row in csv.DictReader(lines)}


def test_published_labels_are_resolved(published: dict[str, str]) -> None:
    assert len(published) == 443
    found = {label: resolve(label) for label in published}
    unread = {label: tag.reason for label, tag in found.items() if isinstance(tag, Unresolved)}
    assert unread == UNREAD
    naming = published.keys() - NAMES_NO_SITE
    assert len(naming - unread.keys()) / len(naming) >= 0.98


def test_published_groups_agree_but_for_the_known_mistakes(published: dict[str, str]) -> None:
    moved = {}
    for label, group in published.items():
        tag = resolve(label)
        if isinstance(tag, ChannelTag) and tag.kind not in GROUP_KINDS[group]:
            moved[label] = tag.kind
    assert moved == {label: kind for label, (kind, _) in MOVED.items()}
