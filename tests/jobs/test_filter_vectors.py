"""Other filters than a bundle's maker had are told and refused, whoever changed them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.assembly import draft_of_bundle, record_bytes
from adapters.bundle import Bundle, save_draft
from adapters.layout import task_files
from engine import rows
from jobs.filter_vectors import KEPT, KEY, MAINS_HZ, STEPS, check_filters, filtered_noise
from manifests.errors import ContractError
from manifests.recipes import load_recipe

SYMBOLS = dict.fromkeys(("eeg:C3-M2", "eeg:C4-M1", "eog:E1-M2", "emg:chin", "ecg:II", "resp:thorax"), 1)


def test_a_record_remembers_a_stretch_of_each_kind(bundle: Bundle) -> None:
    for record in bundle.records.values():
        kept = record.data[KEY]
        assert kept.keys() == {
            kind
            for kind in record.recipe.kinds
            if any(symbol.startswith(f"{kind}:") for symbol in record.data["splits"]["train"]["symbols"])
        }
        assert all(len(entry["samples"]) == KEPT for entry in kept.values())
        assert all(np.std(entry["samples"]) > 1000 for entry in kept.values()), "a stretch that shows no filter"
    assert check_filters(bundle.path, bundle.records) == ["sleep_staging", "rhythm"]


@pytest.mark.parametrize("name", ["sleep128", "eeg200_trials", "ecg128"])
def test_every_filter_of_a_recipe_leaves_its_mark(name: str) -> None:
    """The band and the notch; of trials as of nights."""
    recipe = load_recipe(name)
    plain = filtered_noise(recipe, SYMBOLS)
    assert plain == filtered_noise(recipe, SYMBOLS)
    for kind in plain:
        rule = recipe.kinds[kind]
        changes: list[dict[str, Any]] = [{"low_hz": 0.8 * rule.low_hz}] if rule.low_hz else []
        changes += [{"high_hz": 0.95 * rule.high_hz}] if rule.high_hz else []
        changes += (
            [{"notch": False}] if rule.notch and (rule.high_hz or MAINS_HZ) > 0.8 * MAINS_HZ else []
        )  # else it is cut
        for change in changes:
            other = recipe.model_copy(update={"kinds": {**recipe.kinds, kind: rule.model_copy(update=change)}})
            found = filtered_noise(other, SYMBOLS)[kind]
            steps = np.array(found["samples"]) * (found["scale"] / plain[kind]["scale"]) - plain[kind]["samples"]
            assert np.abs(steps).max() > 10 * STEPS, (kind, change)


def test_filters_that_were_changed_are_refused_by_verify_and_predict(
    kymo: Any, bundle_dir: Path, night: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = rows.harmonise

    def without_notch(signal: np.ndarray, **options: Any) -> np.ndarray:
        return real(signal, **{**options, "notch_hz": None})

    monkeypatch.setattr(rows, "harmonise", without_notch)
    for arguments in (("bundle", "verify", bundle_dir), ("predict", bundle_dir, night)):
        code, text = kymo(*arguments)
        assert code == 5, text
        assert "task sleep_staging: eeg of recipe sleep128: noise comes out of the filters of this installation" in text
        assert "install kymo" in text


def test_a_record_whose_recipe_was_changed_is_refused(bundle: Bundle) -> None:
    record = bundle.records["rhythm"]
    rule = record.recipe.kinds["ecg"].model_copy(update={"low_hz": 1.5})
    other = record.model_copy(update={"recipe": record.recipe.model_copy(update={"kinds": {"ecg": rule}})})
    with pytest.raises(ContractError, match="task rhythm: ecg of recipe ecg128"):
        check_filters(bundle.path, {"rhythm": other})


def test_a_bundle_that_keeps_no_signal_is_told_of(kymo: Any, bundle_dir: Path, tmp_path: Path) -> None:
    draft = draft_of_bundle(bundle_dir)
    record = draft.records["rhythm"]
    bare = record.model_copy(update={"data": {key: value for key, value in record.data.items() if key != KEY}})
    files = {**draft.files, task_files("rhythm")["record"]: record_bytes(bare)}
    save_draft(replace(draft, records={**draft.records, "rhythm": bare}, files=files), tmp_path / "bare")
    code, text = kymo("bundle", "verify", tmp_path / "bare")
    assert code == 0, text
    assert "same filtered signal as at its maker's: sleep_staging" in text
    assert "filters: rhythm keep no signal to compare" in text
