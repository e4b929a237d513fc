"""Signs of life of a unit."""

import os
import time
from pathlib import Path

import pytest

from engine.config import ConvertConfig
from engine.convert import Context, convert_unit, prepare
from engine.heartbeat import Heartbeat, Pulse, append_progress, heartbeat_path, read_heartbeat, read_progress


def test_the_heartbeat_tells_who_converts_what_since_when(tmp_path: Path) -> None:
    began = time.time()
    with Pulse(tmp_path, "u", 3, interval_s=0.02) as pulse:
        pulse.at(1)
        deadline = time.time() + 5
        while (beat := read_heartbeat(tmp_path, "u")) is None or beat.recording != 1:
            assert time.time() < deadline
            time.sleep(0.005)
        assert (beat.unit, beat.recordings, beat.pid) == ("u", 3, os.getpid())
        assert began <= beat.since <= beat.time <= time.time()
        while (later := read_heartbeat(tmp_path, "u")) is None or later.time == beat.time:  # a child decodes for long
            assert time.time() < deadline
            time.sleep(0.005)
        assert later.since == beat.since
    assert list((tmp_path / "progress").iterdir()) == [tmp_path / "progress/u.jsonl"]
    assert read_heartbeat(tmp_path, "u") is None


def test_the_heartbeat_goes_when_the_unit_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with Pulse(tmp_path, "u", 3):
            assert heartbeat_path(tmp_path, "u").exists()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not heartbeat_path(tmp_path, "u").exists()


def test_a_foreign_heartbeat_tells_nothing(tmp_path: Path) -> None:
    assert read_heartbeat(tmp_path, "u") is None
    heartbeat_path(tmp_path, "u").parent.mkdir()
    heartbeat_path(tmp_path, "u").write_text('{"unit": "u", "reco')
    assert read_heartbeat(tmp_path, "u") is None


def test_a_unit_beats_for_every_recording_without_its_name(
    tiny_config: ConvertConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats: list[Heartbeat | None] = []
    begin = Pulse.at

    def at(pulse: Pulse, recording: int | None) -> None:
        begin(pulse, recording)
        pulse.beat()
        text = heartbeat_path(tiny_config.output, unit.id).read_text()
        assert not any(item.path in text for item in unit.recordings)
        beats.append(read_heartbeat(tiny_config.output, unit.id))

    monkeypatch.setattr(Pulse, "at", at)
    tiny_config.output.mkdir()
    _, (unit, *_) = prepare(tiny_config)
    context = Context.of(tiny_config)
    with context.sandbox() as sandbox:
        convert_unit(unit, context=context, sandbox=sandbox)
    assert [beat.recording for beat in beats if beat] == [*range(len(unit.recordings)), None]
    assert not list(tiny_config.output.rglob("*.beat"))


def test_progress_lines_are_read_whole(tmp_path: Path) -> None:
    append_progress(tmp_path, "u", {"seconds": 3, "reason": ""})
    with (tmp_path / "progress/u.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"seconds": 4, "re')
    assert read_progress(tmp_path, "u") == [{"seconds": 3, "reason": ""}]
    assert read_progress(tmp_path, "other") == []
