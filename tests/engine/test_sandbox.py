import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.sandbox import Job, Sandbox, guarded
from manifests.corpora import load_corpus
from manifests.errors import ConfigError, RecordingError
from manifests.recipes import load_recipe

NIGHT = "psg/sub-001/sub-001_psg.edf"

# What a decoder may do to its process, by the name of the file that it is given.
EVIL = """
    import ctypes, os, time
    from engine.sandbox import Job, convert_recording, serve
    from manifests.errors import ConfigError

    def convert(job: Job):
        match job.path.name:
            case "segfault": ctypes.string_at(0)
            case "exit": os._exit(7)
            case "killed": os.kill(os.getpid(), 9)
            case "killed_once" if not (job.root / "mark").exists():
                (job.root / "mark").touch()
                os.kill(os.getpid(), 9)
            case "hang": time.sleep(600)
            case "memory": return {"rows": [bytearray(64 << 20) for _ in range(100)]}
            case "bug": raise KeyError("no such thing")
            case "config": raise ConfigError("fix your file")
            case "disk": raise OSError(28, "No space left on device")
            case "chatter":
                print("a library that prints")
                os.write(1, b"and one that writes\\n")
        return {"rows": [job.path.name], "pid": os.getpid()}

    serve(convert)
"""


def job(tmp_path: Path, name: str, root: Path | None = None) -> Job:
    root = root or tmp_path
    return Job(
        path=root / name,
        root=root,
        corpus=load_corpus("synthetic_psg"),
        recipe=load_recipe("sleep128"),
        spool=tmp_path / "spool.bin",
    )


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    (tmp_path / "evil_decoder.py").write_text(textwrap.dedent(EVIL), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Sandbox(time_limit_s=4, memory_limit_gb=0.5, module="evil_decoder") as sandbox:
        yield sandbox


def test_a_crash_a_hang_or_a_glutton_costs_one_recording(evil: Sandbox, tmp_path: Path) -> None:
    expected = {
        "segfault": ("CRASHED", "SIGSEGV"),
        "hang": ("TIMEOUT", "time_limit_s = 4"),
        "memory": ("MEMORY", "memory_limit_gb"),
        "bug": ("CRASHED", r"KeyError at evil_decoder\.py:\d+; the log"),
    }
    for name, (reason, words) in expected.items():
        with pytest.raises(RecordingError, match=words) as error:
            evil.convert(job(tmp_path, name))
        assert error.value.reason == reason
        assert "no such thing" not in str(error.value)
        assert evil.convert(job(tmp_path, "good"))["rows"] == ["good"]


def test_a_child_lives_on_while_it_behaves(evil: Sandbox, tmp_path: Path) -> None:
    first = evil.convert(job(tmp_path, "good"))["pid"]
    with pytest.raises(RecordingError):
        evil.convert(job(tmp_path, "bug"))
    assert evil.convert(job(tmp_path, "chatter"))["pid"] == first
    with pytest.raises(RecordingError, match="exit code 7"):
        evil.convert(job(tmp_path, "exit"))
    assert evil.convert(job(tmp_path, "good"))["pid"] != first


def test_what_is_not_the_recordings_fault_stops_the_run(evil: Sandbox, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fix your file"):
        evil.convert(job(tmp_path, "config"))
    with pytest.raises(ConfigError, match="No space left on device; free space and run the same command again"):
        evil.convert(job(tmp_path, "disk"))


def test_a_recording_comes_out_as_spooled_tar_blocks(tiny_root: Path, tmp_path: Path) -> None:
    with Sandbox(time_limit_s=60, memory_limit_gb=2) as sandbox:
        answer = sandbox.convert(job(tmp_path, NIGHT, tiny_root))
    assert len(answer["rows"]) == 20
    assert sum(row["num_bytes"] for row in answer["rows"]) == (tmp_path / "spool.bin").stat().st_size
    assert list(answer["sha256"]) == ["sub-001_psg.edf"]


def test_a_short_recording_does_not_pay_for_a_process(tiny_root: Path, tmp_path: Path) -> None:
    task = Job(
        path=tiny_root / "ecg/E00001.hea",
        root=tiny_root,
        corpus=load_corpus("synthetic_ecg"),
        recipe=load_recipe("ecg128"),
        spool=tmp_path / "spool.bin",
    )
    with Sandbox(time_limit_s=60, memory_limit_gb=2) as sandbox:
        sandbox.convert(task)
        began = time.monotonic()
        for _ in range(20):
            sandbox.convert(task)
    assert (time.monotonic() - began) / 20 < 0.2


def test_errors_are_answers_inside_the_child(tmp_path: Path) -> None:
    assert guarded(job(tmp_path, "psg/sub-001/none.edf"))["error"][0] == "NOT_A_RECORDING"
    assert guarded(job(tmp_path, "other/place.edf"))["stop"][0] == "ConfigError"


def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "evil_decoder.py").write_text(textwrap.dedent(EVIL), encoding="utf-8")
    parent = textwrap.dedent("""
        import sys
        from pathlib import Path
        from engine.sandbox import Job, Sandbox
        from manifests.corpora import load_corpus
        from manifests.recipes import load_recipe
        sandbox = Sandbox(time_limit_s=60, memory_limit_gb=1, module="evil_decoder")
        here = Path(sys.argv[1])
        job = lambda name: Job(path=here / name, root=here, corpus=load_corpus("synthetic_psg"),
                               recipe=load_recipe("sleep128"), spool=here / "spool")
        print(sandbox.convert(job("good"))["pid"], flush=True)
        sandbox.convert(job("hang"))
    """)
    repository = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", parent, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{repository}{os.pathsep}{tmp_path}"},
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    os.kill(child, 0)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(50):
        status = Path(f"/proc/{child}/stat")
        if not status.exists() or status.read_text(encoding="ascii").split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child outlived its parent")


def test_a_kill_from_outside_is_not_blamed_on_the_recording(
    evil: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.child._GRACE_S", 0.1)
    assert evil.convert(job(tmp_path, "killed_once"))["rows"] == ["killed_once"]
    with pytest.raises(RecordingError, match=r"killed twice from outside \(SIGKILL\)") as error:
        evil.convert(job(tmp_path, "killed"))
    assert error.value.reason == "KILLED"


def test_the_decoder_is_out_of_reach_of_the_terminals_signals(evil: Sandbox) -> None:
    assert os.getpgid(evil.start().pid) != os.getpgid(0)
