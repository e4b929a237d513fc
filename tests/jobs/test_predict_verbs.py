"""`kymo predict` as a person types it."""

import numpy as np
import pytest

import jobs.predict


def test_a_night_is_told_as_a_table_and_written(kymo, bundle_dir, night, tmp_path):
    code, text = kymo("predict", bundle_dir, night, "--out", tmp_path, "--task", "sleep_staging")
    assert code == 0
    assert "mean probability" in text
    assert "sleep_staging sees eeg:" in text
    assert "line frequency: " in text
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"sub-001_psg.sleep_staging.{suffix}" for suffix in ("csv", "edf", "png")]
    assert all(name in text for name in names)


def test_formats_are_chosen(kymo, bundle_dir, night, tmp_path):
    arguments = ("predict", bundle_dir, night, "--out", tmp_path, "--task", "sleep_staging", "--no-picture")
    code, text = kymo(*arguments, "--format", "bids", "--format", "csv")
    assert code == 0
    assert "mean probability" not in text
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".json", ".tsv"]
    code, text = kymo(*arguments, "--format", "table")
    assert (code, "mean probability" in text, "written" in text) == (0, True, False)


def test_a_montage_unlike_that_of_training_is_told(kymo, bundle_dir, tmp_path, write_eeg):
    path = write_eeg(tmp_path / "one.edf", label="EEG Fpz-Cz")
    code, text = kymo("predict", bundle_dir, path, "--format", "table", "--no-picture")
    assert code == 0
    assert "lacks eeg:C3-A2" in text
    assert "never saw eeg:Fpz-Cz in training" in text
    assert "rhythm left out: task rhythm needs at least 1 ecg" in text


def test_ctrl_c_leaves_no_half_file(kymo, bundle_dir, night, tmp_path, monkeypatch):
    whole = jobs.predict.FileRun.predictions

    def interrupted(run, advance):
        yield next(whole(run, advance))
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs.predict.FileRun, "predictions", interrupted)
    code, text = kymo("predict", bundle_dir, night, "--out", tmp_path)
    assert code == 130
    assert "interrupted" in text
    assert not list(tmp_path.iterdir())


def flat(rate: int = 128) -> np.ndarray:
    signal = np.zeros(rate * 120)
    signal[-1] = 1.0
    return signal


def wrong_inputs(tmp_path, write_eeg) -> dict[str, tuple[list, str]]:
    """Arguments after the bundle, and what must be said."""
    (tmp_path / "notes.txt").write_text("not a recording")
    (tmp_path / "empty.edf").touch()
    good = write_eeg(tmp_path / "good.edf")
    return {
        "absent": ([tmp_path / "absent.edf"], "no such file"),
        "folder": ([tmp_path], "is a folder"),
        "no recording": ([tmp_path / "notes.txt"], "no reader knows its content"),
        "empty": ([tmp_path / "empty.edf"], "neither EDF nor BDF"),
        "no channels": ([write_eeg(tmp_path / "belt.edf", label="THOR RES", unit="mV")], "needs at least 1 eeg"),
        "odd labels": ([write_eeg(tmp_path / "odd.edf", label="[/x] 7")], "[/x] 7"),
        "too short": ([write_eeg(tmp_path / "short.edf", seconds=5)], "longest stretch 5 s"),
        "flat": ([write_eeg(tmp_path / "flat.edf", signal=flat())], "flat, clipped or missing"),
        "unit": ([write_eeg(tmp_path / "unit.edf", unit="")], "--unit LABEL=UNIT"),
        "option": ([good, "--channel", "EEG C3-A2"], "expected LABEL=VALUE"),
        "label": ([good, "--channel", "X8=eeg:C3-M2"], "has no such label"),
        "symbol": ([good, "--channel", "EEG C3-A2=eeg:Nowhere"], "no UCS symbol"),
        "parsec": ([good, "--unit", "EEG C3-A2=parsec"], "parsec"),
        "mains": ([good, "--mains", "55"], "expected auto, 50, 60 or none"),
        "corpus": ([good, "--corpus", "nowhere"], "not shipped"),
        "task": ([good, "--task", "nothing"], "no task 'nothing'"),
    }


@pytest.mark.parametrize(
    "name",
    [
        *("absent", "folder", "no recording", "empty", "no channels", "odd labels", "too short", "flat", "unit"),
        *("option", "label", "symbol", "parsec", "mains", "corpus", "task"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(name, kymo, bundle_dir, tmp_path, write_eeg):
    (tmp_path / "in").mkdir()
    arguments, expected = wrong_inputs(tmp_path / "in", write_eeg)[name]
    code, text = kymo("predict", bundle_dir, *arguments, "--out", tmp_path / "out")
    assert code == 2, text
    assert expected in text
    assert "Traceback" not in text
    assert not list((tmp_path / "out").glob("*"))


def test_a_folder_that_cannot_be_written_is_one_message(kymo, bundle_dir, night, tmp_path):
    (tmp_path / "file").write_text("x")
    code, text = kymo("predict", bundle_dir, night, "--out", tmp_path / "file")
    assert (code, "file" in text) == (2, True)
