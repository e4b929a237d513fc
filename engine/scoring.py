"""Sleep scorings as whole epochs: what is scored, what is not, and what contradicts itself.

A scorer judges whole epochs, and a file states intervals of any length. The rule, in this order:

1. Files round their times: where an interval reaches up to one second into the next one, it ends there.
2. Where intervals overlap by more and differ, nobody can say who is right: that time is unscored, and more than one
   epoch of it in a recording means two scorings in one file, which is refused. `?` under a stage counts as the stage.
3. Intervals of one stage that touch are one run.
4. A run has as many epochs as fit, counted from its beginning; the rest of it, shorter than an epoch, is unscored:
   75 s of W on epochs of 30 s are two epochs W and an interval `?` of 15 s. One second is forgiven again.
5. Time in a gap between runs, before the first or after the last, is unscored.

A window's epoch then takes the stage that fills most of it, if that is at least half (`Labels.stage_at`), because the
windows' grid begins with the recording and the scorer's grid where the scoring begins.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

from engine.recording import Annotation, Segment
from manifests.errors import RecordingError

UNSCORED = "?"
_ROUNDING_S = Fraction(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """Stages of a recording and what is missing in them; times in seconds.

    Attributes:
        stages: Runs of whole epochs in time order without overlap, explicit `?` among them. They may reach beyond the
            signal, as the file says.
        scored_s: Recorded time that has a stage.
        unscored_s: Recorded time that has none.
        remainder_s: Ends of runs that fill no epoch, within the signal or outside.
        contradicted_s: Time for which the file states several stages.
        outside_s: Scored time without signal: before its start, after its end, in a gap.
    """

    stages: tuple[Annotation, ...] = ()
    scored_s: Fraction = Fraction(0)
    unscored_s: Fraction = Fraction(0)
    remainder_s: Fraction = Fraction(0)
    contradicted_s: Fraction = Fraction(0)
    outside_s: Fraction = Fraction(0)

    def record(self) -> dict[str, float]:
        """Seconds by name, for a table or JSON."""
        return {
            "scored_s": float(self.scored_s),
            "unscored_s": float(self.unscored_s),
            "remainder_s": float(self.remainder_s),
            "contradicted_s": float(self.contradicted_s),
            "outside_s": float(self.outside_s),
        }

    def summary(self) -> str:
        """What is scored and what is not, in one line."""
        parts = [
            f"{name.removesuffix('_s')} {seconds:,.0f} s"
            for name, seconds in self.record().items()
            if seconds or name == "scored_s"
        ]
        return ", ".join(parts)


def score(intervals: Sequence[Annotation], segments: Sequence[Segment], epoch_s: int, *, path: Path) -> Scoring:
    """Stages in whole epochs of `epoch_s` seconds, with the time that has none.

    Args:
        intervals: Canonical stages as the file states them, in any order.
        segments: Where the recording has signal.
        epoch_s: Length of the scorer's epoch.
        path: The recording, for messages.

    Raises:
        RecordingError: `ANNOTATION_INVALID` for more than an epoch of contradictions, or a scoring of which no part
            lies in the signal.
    """
    runs, contradicted_s = _runs(_rounded(intervals))
    if contradicted_s > epoch_s:
        raise RecordingError(
            "ANNOTATION_INVALID",
            f"{path}: {float(contradicted_s):g} s have several stages at once; the file holds more than one scoring, "
            "choose one by pattern, table.keep or map",
        )
    stages = [piece for run in runs for piece in _whole_epochs(run, epoch_s)]
    scored = [stage for stage in stages if stage.text != UNSCORED]
    claimed_s = _total(scored)
    inside_s = _shared(scored, segments)
    duration = sum((segment.duration for segment in segments), Fraction(0))
    if claimed_s and not inside_s:
        first, last = scored[0].onset, scored[-1].onset + scored[-1].duration
        raise RecordingError(
            "ANNOTATION_INVALID",
            f"{path}: scored from {float(first):g} to {float(last):g} s, and the signal is elsewhere; "
            "is it the scoring of another recording?",
        )
    return Scoring(
        stages=tuple(stages),
        scored_s=inside_s,
        unscored_s=duration - inside_s,
        remainder_s=_total([run for run in runs if run.text != UNSCORED]) - claimed_s,
        contradicted_s=contradicted_s,
        outside_s=claimed_s - inside_s,
    )


def _rounded(intervals: Sequence[Annotation]) -> list[Annotation]:
    """Intervals in time order, shortened where they reach a second or less into the next one."""
    ordered = sorted(intervals, key=lambda found: found.onset)
    cut: list[Annotation] = []
    for first, second in pairwise(ordered):
        end = first.onset + first.duration
        is_rounding = 0 < end - second.onset <= _ROUNDING_S and end <= second.onset + second.duration
        cut.append(replace(first, duration=second.onset - first.onset) if is_rounding else first)
    return cut + ordered[-1:]


def _runs(intervals: Sequence[Annotation]) -> tuple[list[Annotation], Fraction]:
    """Disjoint runs in time order, and the seconds that had several stages."""
    edges = sorted(
        (time, step, found.text)
        for found in intervals
        if found.duration > 0
        for time, step in ((found.onset, 1), (found.onset + found.duration, -1))
    )
    runs: list[Annotation] = []
    active: Counter[str] = Counter()
    contradicted_s, since = Fraction(0), Fraction(0)
    for time, step, text in edges:
        if active and time > since:
            names = set(active) - {UNSCORED}
            contradicted_s += time - since if len(names) > 1 else 0
            _append(runs, since, time, names.pop() if len(names) == 1 else UNSCORED)
        since = time
        active[text] += step
        if not active[text]:
            del active[text]
    return runs, contradicted_s


def _append(runs: list[Annotation], start: Fraction, stop: Fraction, text: str) -> None:
    if runs and runs[-1].text == text and runs[-1].onset + runs[-1].duration == start:
        start = runs.pop().onset
    runs.append(Annotation(onset=start, duration=stop - start, text=text))


def _whole_epochs(run: Annotation, epoch_s: int) -> list[Annotation]:
    """The run's epochs, and its rest as `?`."""
    if run.text == UNSCORED:
        return [run]
    whole = min(run.duration, Fraction((run.duration + _ROUNDING_S) // epoch_s * epoch_s))
    if whole and run.duration - whole <= _ROUNDING_S:
        return [run]
    rest = Annotation(onset=run.onset + whole, duration=run.duration - whole, text=UNSCORED)
    return [Annotation(onset=run.onset, duration=whole, text=run.text), rest] if whole else [rest]


def _shared(stages: Sequence[Annotation], segments: Sequence[Segment]) -> Fraction:
    """Time that lies in a stage and in a segment; both are in time order and disjoint, so one pass does."""
    shared_s, i, j = Fraction(0), 0, 0
    while i < len(stages) and j < len(segments):
        stage_end = stages[i].onset + stages[i].duration
        segment_end = segments[j].start + segments[j].duration
        shared_s += max(Fraction(0), min(stage_end, segment_end) - max(stages[i].onset, segments[j].start))
        i, j = (i + 1, j) if stage_end <= segment_end else (i, j + 1)
    return shared_s


def _total(intervals: Sequence[Annotation]) -> Fraction:
    return sum((found.duration for found in intervals), Fraction(0))
