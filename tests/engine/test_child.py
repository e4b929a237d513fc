import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.child import Child
from manifests.errors import ConfigError, RecordingError

# A child whose starts end as the file `start` says, one word a start.
MODULE = """
    import os
    from pathlib import Path
    from engine.child import serve

    start = Path(__file__).with_name("start")
    if fates := start.read_text().split() if start.exists() else []:
        start.write_text(" ".join(fates[1:]))
        os._exit(3) if fates[0] == "broken" else os.kill(os.getpid(), 9)
    serve(lambda line: {"heard": line.decode().strip()})
"""
PATH = Path("a.edf")


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Child]:
    (tmp_path / "moody_child.py").write_text(textwrap.dedent(MODULE), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("engine.child._GRACE_S", 0.1)
    with Child(time_limit_s=5, memory_limit_gb=0.5, module="moody_child") as child:
        yield child


def test_a_kill_while_the_child_starts_costs_no_recording(child: Child, tmp_path: Path) -> None:
    (tmp_path / "start").write_text("killed killed", encoding="utf-8")
    assert child.ask(b"hello\n", PATH) == {"heard": "hello"}
    child.close()
    (tmp_path / "start").write_text("killed killed killed", encoding="utf-8")
    with pytest.raises(RecordingError, match="killed from outside at each start") as error:
        child.ask(b"hello\n", PATH)
    assert error.value.reason == "KILLED"
    assert child.ask(b"again\n", PATH) == {"heard": "again"}


def test_a_child_that_cannot_start_stops_the_run(child: Child, tmp_path: Path) -> None:
    (tmp_path / "start").write_text("broken", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"moody_child: ended while it started \(exit code 3\)"):
        child.ask(b"hello\n", PATH)


def test_a_child_that_hangs_in_its_imports_stops_the_run(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.child._START_LIMIT_S", 0.0)
    with pytest.raises(ConfigError, match="not ready after 0 s of imports"):
        child.ask(b"hello\n", PATH)
