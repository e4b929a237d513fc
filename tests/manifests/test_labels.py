"""The grammar of channel labels: one test per rule, and what it must not guess."""

import pytest

from manifests.channels import ChannelTag, Unresolved, resolve


def _symbol(label: str) -> str:
    tag = resolve(label)
    return tag.symbol if isinstance(tag, ChannelTag) else "?"


def _rule(label: str) -> str:
    tag = resolve(label)
    return tag.rule if isinstance(tag, ChannelTag) else "?"


@pytest.mark.parametrize(
    ("label", "symbol", "rule"),
    [
        ("Fc5.", "eeg:FC5", "parser:site"),
        ("  fP1 ", "eeg:Fp1", "parser:site"),
        ("poo10H", "eeg:POO10h", "parser:site"),
        ("RIP  Tho", "resp:thorax", "parser:site"),
        ("EEG(sec)", "eeg:unknown", "parser:label"),
        ("EEG_Cz", "eeg:Cz", "parser:site+typed"),
        ("C3-M2", "eeg:C3-M2", "parser:pair"),
        ("c3:m2", "eeg:C3-M2", "parser:pair"),
        ("C3/M2", "eeg:C3-M2", "parser:pair"),
        ("C3_M2", "eeg:C3-M2", "parser:pair"),
        ("C3 M2", "eeg:C3-M2", "parser:pair"),
        ("FP1 - F7", "eeg:Fp1-F7", "parser:pair"),
        ("C3M2", "eeg:C3-M2", "parser:joined"),
        ("LOCA2", "eog:E1-A2", "parser:joined"),
        ("01-A2", "eeg:O1-A2", "parser:pair"),
        ("O2-x", "eeg:O2-unknown", "parser:pair"),
        ("EEG C3-A22", "eeg:C3-A2", "parser:pair+copy+typed"),
        ("CZ2-A1", "eeg:Cz-A1", "parser:pair+copy"),
        ("AIRFLOW-0", "resp:flow", "parser:site+copy"),
        ("T8-P8-1", "eeg:T8-P8", "parser:pair+copy"),
        ("SpO2.1s", "spo2:finger", "parser:site+rate"),
        ("RESP ABDOMEN-REF", "resp:abdomen", "parser:pair+typed"),
        ("EEG EKG1-REF", "ecg:ecg_1-common", "parser:pair+typed"),
        ("ECG EKG-REF", "ecg:single_lead-common", "parser:pair+typed"),
        ("EOG M1", "eog:unknown-M1", "parser:pair+typed"),
        ("EOG Fp1", "eog:Fp1", "parser:site+typed"),
        ("Chin_L-Chin-Ctr", "emg:chin_l-chin_c", "parser:pair"),
        ("L-Leg 1-L-Leg 2", "emg:leg_l_1-leg_l_2", "parser:pair"),
        ("EKG_R-Cz", "ecg:torso_r-Cz", "parser:pair"),
        ("EMG1-EMG2", "emg:unknown", "parser:pair"),
        ("Lead I (Einthoven)", "ecg:I", "parser:site"),  # DICOM's name of the code MDC 2:1
    ],
)
def test_rule(label: str, symbol: str, rule: str) -> None:
    assert (_symbol(label), _rule(label)) == (symbol, rule)


@pytest.mark.parametrize(
    ("label", "symbol"),
    [
        ("C3:M1+M2", "eeg:C3-linked_mastoid"),
        ("C3:M2:M1", "eeg:C3-linked_mastoid"),
        ("C3-M1M2", "eeg:C3-linked_mastoid"),
        ("C3-(M1+M2)/2", "eeg:C3-linked_mastoid"),
        ("C3:A1:A2", "eeg:C3-linked_ears"),
        ("C3:M1-M2", "eeg:C3-unknown"),  # linked, or M1 minus M2: not said
        ("C3:M1:A2", "eeg:C3-unknown"),
        ("A2:A1:C3", "eeg:unknown"),
        ("C3-M2:C4-M1", "eeg:unknown"),
        ("F3:M2:E1:M1", "?"),  # an EEG and an EOG derivation in one channel
        ("O1:E1:M1", "?"),
    ],
)
def test_several_references(label: str, symbol: str) -> None:
    assert _symbol(label) == symbol


def test_references_of_one_meaning_are_one_token() -> None:
    assert {_symbol(f"C3-{token}") for token in ("REF", "Ref", "org")} == {"eeg:C3-common"}
    assert {_symbol(f"C3-{token}") for token in ("AVG", "av", "CAR")} == {"eeg:C3-average"}
    assert _symbol("C3-LE") == "eeg:C3-linked_ears" != _symbol("C3-CLE")


def test_polarity_makes_two_channels() -> None:
    assert _symbol("C3-M2") == "eeg:C3-M2"
    assert _symbol("M2-C3") == "eeg:M2-C3"


def test_an_eye_on_either_side_makes_it_eog() -> None:
    assert _symbol("E2:Fp1") == "eog:E2-Fp1"
    assert _symbol("Fp1:E2") == "eog:Fp1-E2"
    assert _symbol("M2:E1") == "eog:M2-E1"


@pytest.mark.parametrize("label", ["T1-0", "F1-0", "O1-0", "P1-0"])
def test_a_copy_number_is_not_part_of_a_site(label: str) -> None:
    assert _symbol(label) == f"eeg:{label.removesuffix('-0')}"  # T1-0 is not T10


@pytest.mark.parametrize(
    ("label", "word"),
    [
        ("", "empty"),
        (" \0 ", "empty"),
        ("-", "unused"),
        ("EPMS", "unused"),
        ("PG1", "ground"),
        ("E1-PG1", "ground"),
        ("EEG PG1-REF", "ground"),
        ("Ext1", "external"),
        ("RR", "respiratory"),
        ("REF", "reference"),
        ("M1+M2", "reference"),
        ("EEG 20-REF", "number"),
        ("C12", "no known"),  # BioSemi input or C1, second copy
        ("E128", "no known"),
        ("C3-CS2", "no known"),
        ("C3-C3", "same site"),
        ("SpO2-Pulse", "several kinds"),
        ("EOG1:Oral-CO2", "several kinds"),
        ("A10", "no known"),
        ("finger", "without a quantity"),
        ("C3" * 41, "longer than 80"),
    ],
)
def test_unread_labels_say_why(label: str, word: str) -> None:
    found = resolve(label)
    assert isinstance(found, Unresolved)
    assert word in found.reason


@pytest.mark.parametrize(
    ("labels", "symbol"),
    [
        (("EEG", "EEG1", "EEG2", "EEG 2", "EEG sec", "EEG (SEC)"), "eeg:unknown"),
        (("EOG1", "EOG2", "EOG"), "eog:unknown"),
        (("EMG", "EMG #1", "EMG Aux12"), "emg:unknown"),
        (("Flow", "flow", "Flusso", "Flow.40ms"), "resp:unknown"),
    ],
)
def test_ambiguous_labels_name_a_kind_and_never_a_site(labels: tuple[str, ...], symbol: str) -> None:
    assert {_symbol(label) for label in labels} == {symbol}
