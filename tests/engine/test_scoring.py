"""Scorings as whole epochs: remainders, gaps, contradictions, time outside the signal."""

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.annotations import Labels
from engine.recording import Annotation, Segment
from engine.scoring import Scoring, score
from manifests.errors import RecordingError

PATH = Path("night.edf")


def interval(onset: float, duration: float, text: str) -> Annotation:
    return Annotation(onset=Fraction(onset), duration=Fraction(duration), text=text)


def scored(*intervals: Annotation, duration: int = 300, epoch_s: int = 30) -> Scoring:
    return score(intervals, [Segment(start=Fraction(0), duration=Fraction(duration))], epoch_s, path=PATH)


def spans(found: Scoring) -> list[tuple[float, float, str]]:
    return [(float(stage.onset), float(stage.duration), stage.text) for stage in found.stages]


def test_the_rest_of_a_run_that_fills_no_epoch_is_unscored() -> None:
    found = scored(interval(0, 75, "W"), interval(75, 60, "N1"))
    assert spans(found) == [(0, 60, "W"), (60, 15, "?"), (75, 60, "N1")]
    assert found.record() == {
        "scored_s": 120,
        "unscored_s": 180,
        "remainder_s": 15,
        "contradicted_s": 0,
        "outside_s": 0,
    }
    assert found.summary() == "scored 120 s, unscored 180 s, remainder 15 s"


def test_a_window_on_the_remainder_is_unscored_and_the_next_ones_go_by_majority() -> None:
    labels = Labels(stages=scored(interval(0, 75, "W"), interval(75, 60, "N1")).stages)
    assert [labels.stage_at(Fraction(start), 30) for start in (0, 30, 60, 90, 120)] == ["W", "W", "?", "N1", "N1"]


def test_runs_of_one_stage_that_touch_are_one() -> None:
    found = scored(*(interval(10 * i, 10, "N2") for i in range(6)))
    assert spans(found) == [(0, 60, "N2")]
    assert found.remainder_s == 0


def test_epochs_of_20_seconds() -> None:
    assert spans(scored(interval(0, 50, "W"), epoch_s=20)) == [(0, 40, "W"), (40, 10, "?")]
    assert spans(scored(interval(0, 60, "W"), epoch_s=20)) == [(0, 60, "W")]


def test_times_rounded_to_a_second_lose_no_epoch() -> None:
    found = scored(interval(0, 30, "W"), interval(29, 30, "N1"), interval(60, 29.5, "N2"), interval(90, 30, "W"))
    assert spans(found) == [(0, 29, "W"), (29, 30, "N1"), (60, 29.5, "N2"), (90, 30, "W")]
    assert found.contradicted_s == found.remainder_s == 0
    # Two seconds are no rounding any more.
    assert spans(scored(interval(0, 28, "W"))) == [(0, 28, "?")]


def test_contradictions_are_unscored_and_two_scorings_are_refused() -> None:
    found = scored(interval(0, 60, "W"), interval(45, 75, "N1"))
    assert spans(found) == [(0, 30, "W"), (30, 15, "?"), (45, 15, "?"), (60, 60, "N1")]
    assert found.contradicted_s == 15
    with pytest.raises(RecordingError, match="more than one scoring") as caught:
        scored(interval(0, 120, "W"), interval(0, 60, "N1"), interval(60, 60, "N2"))
    assert caught.value.reason == "ANNOTATION_INVALID"
    # The same scoring twice, and a file filled with '?', contradict nothing.
    assert spans(scored(interval(0, 60, "W"), interval(0, 60, "W"), interval(0, 300, "?"))) == [
        (0, 60, "W"),
        (60, 240, "?"),
    ]


def test_scored_time_outside_the_signal_is_counted() -> None:
    found = scored(interval(-60, 120, "W"), interval(240, 120, "N2"))
    assert (found.scored_s, found.unscored_s, found.outside_s) == (120, 180, 120)
    gap = [Segment(start=Fraction(0), duration=Fraction(60)), Segment(start=Fraction(90), duration=Fraction(60))]
    found = score([interval(0, 150, "W")], gap, 30, path=PATH)
    assert (found.scored_s, found.unscored_s, found.outside_s) == (120, 0, 30)


def test_the_scoring_of_another_recording_is_refused() -> None:
    with pytest.raises(RecordingError, match="another recording") as caught:
        scored(interval(300, 600, "W"))
    assert caught.value.reason == "ANNOTATION_INVALID"
    assert scored(interval(300, 600, "?")).unscored_s == 300
    assert scored().unscored_s == 300


@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 90), st.sampled_from(["W", "N2", "?"])), max_size=6).filter(
        bool
    )
)
def test_stages_never_overlap_and_times_add_up(items: list[tuple[int, int, str]]) -> None:
    try:
        found = scored(*(interval(*item) for item in items))
    except RecordingError:
        return
    for first, second in zip(found.stages, found.stages[1:], strict=False):
        assert first.onset + first.duration <= second.onset
    assert found.scored_s + found.unscored_s == 300
    inside = sum(s.duration for s in found.stages if s.text != "?") - found.outside_s
    assert found.scored_s == inside
    assert all((stage.duration + 1) % 30 <= 2 for stage in found.stages if stage.text != "?")
