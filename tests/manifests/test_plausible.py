import pytest
from pydantic import ValidationError

from manifests.channels import KINDS
from manifests.plausible import SD_PER_MAD, Plausible, is_suspect, plausible


def test_the_table_names_kinds_and_ordered_ranges() -> None:
    assert set(plausible()) <= set(KINDS)
    assert {"eeg", "eog", "emg", "ecg", "spo2"} <= set(plausible())
    with pytest.raises(ValidationError, match="least value"):
        Plausible(amplitude=(2.0, 1.0))


@pytest.mark.parametrize("kind", ["eeg", "eog", "emg", "ecg"])
def test_a_factor_of_a_thousand_is_noticed_from_any_usual_amplitude(kind: str) -> None:
    usual = {"eeg": (2, 100), "eog": (3, 200), "emg": (0.5, 30), "ecg": (0.01, 1)}[kind]
    for amplitude in usual:
        mad = amplitude / SD_PER_MAD
        assert not is_suspect(kind, median=0.0, mad=mad)
        if kind != "emg" or amplitude < 30:
            assert is_suspect(kind, median=0.0, mad=mad / 1000) or (kind == "ecg" and amplitude > 3)
        assert is_suspect(kind, median=0.0, mad=mad * 10_000)


def test_levels_and_kinds_without_a_range() -> None:
    assert not is_suspect("spo2", median=96.0, mad=0.0)
    assert is_suspect("spo2", median=0.96, mad=0.0)
    assert not is_suspect("resp", median=1e9, mad=1e9)
