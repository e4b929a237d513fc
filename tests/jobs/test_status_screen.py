import io

import pytest
from rich.console import Console

from engine.commit import Quarantined
from engine.status import Status, UnitRow
from jobs import status_screen
from jobs.status_screen import headline, screen, time_text, watch


def state(*states: str, is_running: bool = True, digest: str = "", speed: float | None = 0.5) -> Status:
    rows = [
        UnitRow(unit=f"{i:016d}", state=name, reason=f"why {i} [/x]" * (name != "done"), recordings=2, hours=1.0)
        for i, name in enumerate(states)
    ]
    bad = Quarantined(corpus="c", recording="r", path="p", reason="TIMEOUT", message="m", command="k")
    return Status(
        units=tuple(rows),
        quarantine=(bad, bad),
        num_waived=1,
        is_running=is_running,
        digest=digest,
        hours_per_s=speed,
        eta_s=None if speed is None else 4000.0,
        resume="kymo convert out/config.yaml",
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "?"), (45.4, "45 s"), (119, "119 s"), (600, "10 min"), (11_100, "3 h 05 min")]
)
def test_times_as_a_person_says_them(seconds: float | None, text: str) -> None:
    assert time_text(seconds) == text


def test_headline_tells_states_speed_and_what_to_do() -> None:
    running = str(headline(state("done", "running", "stalled")))
    assert "3 units: 1 done, 1 running, 1 stalled" in running
    assert "at 0.5 h/s, ETA 67 min" in running
    assert "1 unit at work" in running
    assert "scanning" in str(headline(state(speed=None)))
    assert "complete, snapshot abc" in str(headline(state("done", is_running=False, digest="abc")))
    stopped = str(headline(state("done", "pending", is_running=False)))
    assert stopped.endswith("stopped, no snapshot. Go on with: kymo convert out/config.yaml")
    assert "an earlier snapshot abc stands" in str(headline(state("pending", is_running=False, digest="abc")))


def drawn(value: object, *, width: int = 100, terminal: bool = False) -> str:
    text = io.StringIO()
    Console(file=text, width=width, force_terminal=terminal).print(value)
    return text.getvalue()


def test_the_screen_shows_who_needs_an_eye_first_and_fits() -> None:
    text = drawn(screen(state("done", "running", *["stalled"] * 30, "failed"), height=24))
    lines = text.splitlines()
    assert len(lines) <= 24
    assert "failed" in lines[4]
    assert "stalled" in lines[5]
    assert "[/x]" in lines[5]
    assert "… and 20 more" in text
    assert "quarantine (2, 1 of them waived): 2 TIMEOUT" in text


def test_without_a_terminal_a_block_is_printed_per_change(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(status_screen, "console", Console(file=text, width=200))
    same = state("running")
    watch([same, same, state("done"), state("done", is_running=False, digest="abc")])
    assert text.getvalue().count("1 units: ") == 3
