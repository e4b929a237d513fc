"""The command line: every verb has help with an example, errors become exit codes and one message."""

import re
from collections.abc import Callable
from pathlib import Path

import edfio
import numpy as np
import pytest

from engine.config import ConvertConfig
from engine.convert import convert_all
from engine.finalise import ConvertResult, ExitCode
from engine.synthetic import synthesise
from jobs import data_verbs
from jobs.data_verbs import run_conversion
from manifests.config import dump_yaml, load_config
from manifests.shards import load_snapshot
from trainer.lock import hold
from trainer.paths import LAUNCH_LOCK_FILE

Kymo = Callable[..., tuple[int, str]]

VERBS = [
    *("corpora", "fetch", "scan", "plan", "convert", "status", "verify", "report", "preview"),
    *("diff", "repack", "quarantine"),
    *(
        "mix",
        "simulate",
        "pretrain",
        "evaluate",
        "export",
        "adapt",
        "finetune",
        "ablate",
        "predict",
        "publish",
        "bundle",
        "submit",
        "doctor",
        "demo",
    ),
]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two nights of ten minutes, a broken file, four ECG records."""
    root = tmp_path_factory.mktemp("recordings")
    synthesise(root, num_subjects=2, num_ecg=4, night_minutes=10)
    return root


@pytest.fixture(scope="module")
def snapshot(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Snapshot of the ECG records."""
    output = tmp_path_factory.mktemp("snapshots") / "ecg"
    source = {"corpus": "synthetic_ecg", "root": str(recordings)}
    convert_all(ConvertConfig.model_validate({"output": str(output), "recipe": "ecg128", "sources": [source]}))
    return output


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example(kymo: Kymo, verb: str) -> None:
    code, text = kymo(verb, "--help")
    assert code == 0
    assert f"Example: kymo {verb}" in re.sub(r"\s+", " ", text)


def test_the_verbs_are_those_of_the_readme_and_no_more(kymo: Kymo) -> None:
    _, text = kymo("--help")
    assert set(re.findall(r"^│ ([a-z]+)  ", text, re.MULTILINE)) == set(VERBS)


def test_scan_shows_channels_unresolved_labels_and_broken_files(kymo: Kymo, recordings: Path) -> None:
    code, text = kymo("scan", recordings, "--corpus", "synthetic_psg")
    assert code == 0
    assert "resp:thorax" in text
    assert "X7" in text
    assert "TRUNCATED" in text


def test_scan_works_without_a_corpus_file(kymo: Kymo, recordings: Path) -> None:
    code, text = kymo("scan", recordings / "ecg")
    assert code == 0
    assert "ecg:V6" in text


def test_plan_writes_nothing(kymo: Kymo, recordings: Path, tmp_path: Path) -> None:
    config = tmp_path / "convert.yaml"
    sources = [{"corpus": "synthetic_psg", "root": str(recordings)}]
    config.write_text(dump_yaml({"output": str(tmp_path / "out"), "recipe": "sleep128", "sources": sources}))
    code, text = kymo("plan", config, "unit_bytes=1000000")
    assert code == 0
    assert "units, 0.33 h" in text
    assert not (tmp_path / "out").exists()


def test_a_wrong_key_ends_with_code_2_and_the_nearest_key(kymo: Kymo, tmp_path: Path) -> None:
    config = tmp_path / "convert.yaml"
    config.write_text(dump_yaml({"output": "o", "recipe": "sleep128", "sources": [], "num_cpu": 2}))
    code, text = kymo("convert", config)
    assert code == 2
    assert "num_cpu: no such key; nearest: num_cpus" in text


def test_verify_finds_a_flipped_byte(kymo: Kymo, snapshot: Path) -> None:
    assert kymo("verify", snapshot, "--deep")[0] == 0
    shard = next((snapshot / "shards").glob("*.tar"))
    original = shard.read_bytes()
    try:
        shard.write_bytes(original[:700] + bytes([original[700] ^ 1]) + original[701:])
        code, text = kymo("verify", snapshot)
        assert code == 5
        assert shard.name in text
    finally:
        shard.write_bytes(original)


def test_damage_is_told_with_what_to_do(kymo: Kymo, snapshot: Path) -> None:
    shard = next((snapshot / "shards").glob("*.tar"))
    original = shard.read_bytes()
    try:
        shard.write_bytes(original[:-512])
        code, text = kymo("verify", snapshot)
        assert code == 5
        assert f"kymo convert {snapshot}/config.yaml recheck=true" in text
    finally:
        shard.write_bytes(original)
    code, text = kymo("verify", snapshot, "--deep", "--source")
    assert (code, "4 recordings: all as committed" in text) == (0, True)


def test_watching_what_has_ended_prints_one_block(kymo: Kymo, snapshot: Path) -> None:
    code, text = kymo("status", snapshot, "--watch")
    assert code == 0
    assert text.count("units: ") == 1
    assert "complete, snapshot" in text


def test_a_repacked_snapshot_is_the_same_and_diff_says_so(kymo: Kymo, snapshot: Path, tmp_path: Path) -> None:
    code, text = kymo("repack", snapshot, "--out", tmp_path / "new", "--shard-bytes", "60000", "--seed", "3")
    assert code == 0
    assert f"Next: kymo verify {tmp_path / 'new'}" in text
    code, text = kymo("diff", snapshot, tmp_path / "new", "--exit-code")
    assert code == 0
    assert "same samples in other shards" in text
    other = tmp_path / "other"
    source = {"corpus": "synthetic_ecg", "root": str(tmp_path / "fewer")}
    synthesise(tmp_path / "fewer", num_subjects=0, num_ecg=2, night_minutes=10)
    convert_all(ConvertConfig.model_validate({"output": str(other), "recipe": "ecg128", "sources": [source]}))
    assert kymo("diff", snapshot, other)[0] == 0
    code, text = kymo("diff", snapshot, other, "--exit-code")
    assert code == 1
    assert "only in A" in text
    assert "differs" in text
    assert kymo("repack", snapshot, "--out", other)[0] == 2


def test_quarantine_from_list_to_waiver(kymo: Kymo, recordings: Path, tmp_path: Path) -> None:
    source = {"corpus": "synthetic_psg", "root": str(recordings)}
    settings = {"output": str(tmp_path / "out"), "recipe": "sleep128", "sources": [source], "quarantine_budget": 0.1}
    config = ConvertConfig.model_validate(settings)
    assert int(convert_all(config).exit_code) == 4
    out = config.output
    code, text = kymo("convert", out / "config.yaml")
    assert (code, "quarantine (1)" in text, " counted " in text) == (4, True, True)
    code, text = kymo("quarantine", "ls", out)
    assert code == 0
    assert "over budget: no snapshot is written" in text
    assert "TRUNCATED" in text
    name = "psg/sub-003/sub-003_psg.edf"
    code, text = kymo("quarantine", "show", out, name)
    assert code == 0
    assert re.search(r"[0-9a-f]{64}", text)
    assert kymo("quarantine", "show", out, "psg/sub-9.edf")[0] == 2
    assert kymo("quarantine", "waive", out, name)[0] == 2  # a note is asked for
    code, text = kymo("quarantine", "waive", out, name, "--note", "cable was loose")
    assert code == 0
    assert "0 of 3 recordings count" in text
    assert "cable was loose" in kymo("quarantine", "ls", out)[1]
    code, text = kymo("convert", out / "config.yaml")
    assert (code, "quarantine (1, 1 of them waived)" in text) == (3, True)
    assert re.search(r"TRUNCATED +│ waived ", text)
    assert "1 of 1 are waived" in kymo("status", out)[1]
    code, text = kymo("quarantine", "retry", out, "--reason", "TRUNCATED")
    assert (code, "units marked: 1" in text) == (0, True)
    assert "marked by kymo quarantine retry" in re.sub(r"[│\s]+", " ", kymo("status", out)[1])


@pytest.mark.parametrize("verb", ["ls", "show", "retry", "waive"])
def test_each_verb_of_quarantine_shows_an_example(kymo: Kymo, verb: str) -> None:
    code, text = kymo("quarantine", verb, "--help")
    assert code == 0
    assert f"Example: kymo quarantine {verb}" in re.sub(r"\s+", " ", text)


def test_a_run_that_ray_is_starting_is_told_as_such(kymo: Kymo, tmp_path: Path) -> None:
    with hold(tmp_path / LAUNCH_LOCK_FILE, patience_s=0.0):
        code, text = kymo("status", tmp_path)
    assert (code, "a run is starting under Ray" in text) == (0, True)
    assert "starting" not in kymo("status", tmp_path)[1]  # its driver is gone


def test_watching_waits_for_a_run_that_ray_is_starting(
    kymo: Kymo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hold(tmp_path / LAUNCH_LOCK_FILE, patience_s=0.0) as lock:
        monkeypatch.setattr(data_verbs.time, "sleep", lambda _: lock.close())  # the driver ends while it is waited for
        code, text = kymo("status", tmp_path, "--watch")
    assert "a run is starting under Ray" in text
    assert code == 2


@pytest.mark.parametrize("suspect", [0, 3])
def test_amplitudes_that_no_such_signal_has_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, snapshot: Path, suspect: int
) -> None:
    counts = {**load_snapshot(snapshot).counts, "unit_suspect": suspect}
    result = ConvertResult(exit_code=ExitCode.COMPLETE, snapshot=load_snapshot(snapshot), counts=counts, quarantine=())
    monkeypatch.setattr("engine.pipeline.run", lambda *_, **__: result)
    run_conversion(load_config(ConvertConfig, snapshot / "config.yaml"))
    assert ("3 channels have amplitudes outside" in capsys.readouterr().out) == bool(suspect)


def test_status_preview_and_report_of_a_snapshot(kymo: Kymo, snapshot: Path, tmp_path: Path) -> None:
    code, text = kymo("status", snapshot)
    assert (code, "complete, snapshot" in text) == (0, True)
    assert kymo("preview", snapshot, "--out", tmp_path / "p.png")[0] == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert kymo("report", snapshot, "--out", tmp_path / "r.html")[0] == 0
    assert "</html>" in (tmp_path / "r.html").read_text()


def test_a_folder_without_a_snapshot_is_the_operators_mistake(kymo: Kymo, tmp_path: Path) -> None:
    code, text = kymo("report", tmp_path)
    assert code == 2
    assert "give a folder that kymo convert has finished" in text


def test_doctor_passes_here_and_says_what_to_do_where_it_fails(
    kymo: Kymo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, text = kymo("doctor", tmp_path)
    assert code == 0, text
    monkeypatch.setattr("jobs.doctor.MIN_DISK_GIB", 10**6)
    lock = tmp_path / "cache" / "py311" / "op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    code, text = kymo("doctor", tmp_path)
    assert code == 1
    assert "free 1000000 GiB" in text
    assert f"rm {lock}" in text.replace("\n", "")


def test_predict_says_that_a_folder_holds_no_bundle(kymo: Kymo, recordings: Path, tmp_path: Path) -> None:
    code, text = kymo("predict", tmp_path, recordings / "ecg" / "E00001.hea")
    assert code in {2, 5}
    assert "bundle.json" in text


def test_paths_that_cannot_be_used_are_one_message(kymo: Kymo, snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert kymo("report", snapshot, "--out", tmp_path)[0] == 2
    assert kymo("scan", tmp_path)[0] == 2
    code, text = kymo("convert", snapshot / "samples.parquet")
    assert (code, "is no text" in text) == (2, True)
    assert kymo("doctor", tmp_path / "nowhere")[0] == 1


def test_a_label_that_looks_like_markup_is_shown_as_it_is(kymo: Kymo, tmp_path: Path) -> None:
    signal = edfio.EdfSignal(np.sin(np.arange(640)), 64, label="foo[/x]", physical_dimension="uV")
    edfio.Edf([signal]).write(tmp_path / "x.edf")
    code, text = kymo("scan", tmp_path)
    assert code == 0
    assert "foo[/x]" in text


def test_an_interrupt_says_how_to_go_on(kymo: Kymo, monkeypatch: pytest.MonkeyPatch, snapshot: Path) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.status.status", interrupted)
    code, text = kymo("status", snapshot)
    assert code == 130
    assert "run the same command again" in text
