"""Where signals, rates, labels and trials lie in a file of arrays: the `layout` of a corpus with `reader: arrays`."""

import math
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from engine.readers.containers import Container, Names

Number = int | float | str  # `250`, `128.5` or `"1000/3"`
Axis = Literal["channel", "time", "block", "trial", "member"]
_PLACES = ("member", "trial", "channel")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def exact(number: object) -> Fraction:
    """Number of a layout or a file as an exact fraction.

    Raises:
        ValueError: It is none.
    """
    try:
        return Fraction(str(number))
    except ZeroDivisionError as error:
        raise ValueError(str(error)) from None


class Lookup(_Strict):
    """A value that stands in the file: an array (`{path: fs}`) or an attribute of HDF5 (`{attribute: fs}`).

    An attribute is looked up at the signal's array, then at the groups above it.
    """

    path: str | None = None
    attribute: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "Lookup":
        if (self.path is None) == (self.attribute is None):
            raise ValueError("give either path or attribute")
        return self


class SignalRule(_Strict):
    """One array, or several alike, that hold signals.

    Attributes:
        path: Names from the file's root to the array, with `/` between: `data`, `*_eeg{trial}`,
            `signals/*/{channel}`, `DREAMER/Data/{member}/EEG/stimuli/{trial}`. `*` stands for any text, `{stem}` for
            the file's stem, `{member}`, `{trial}` and `{channel}` for what tells these apart; numbers count from 1.
        axes: What its axes are, in the order that numpy or MATLAB shows them: `[channel, time]`. `trial`: pieces
            apart from each other, `block`: pieces of one stretch, `member`: recordings. An axis of length 1 that
            MATLAB adds to a vector need not be named.
        rate_hz: Sampling rate in Hz: `200`, `"1000/3"`, `{path: fs}` or `{attribute: fs}`.
        labels: Channels in the order of their axis: `[Fp1, Fp2]` or `{path: ch_names}`. Not with `{channel}`.
        unit: Unit of the values, `uV` or `{attribute: unit}`; blank where nobody knows it.
        scale: Factor that turns the values into that unit, `0.0488` for raw counts.
        missing: Values that stand for a lost sample, `[-9999]`; they become NaN.
        trim: Value that fills up both ends, `0.0`: samples that have it in all channels are cut off there.
        samples: Length that the time axis must have, `3840`.
    """

    path: str
    axes: Annotated[tuple[Axis, ...], Field(min_length=1)]
    rate_hz: Number | Lookup
    labels: tuple[str, ...] | Lookup = ()
    unit: str | Lookup = ""
    scale: float = 1.0
    missing: tuple[float, ...] = ()
    trim: float | None = None
    samples: Annotated[int, Field(gt=0)] | None = None

    @field_validator("rate_hz")
    @classmethod
    def _positive(cls, value: Number | Lookup) -> Number | Lookup:
        if not isinstance(value, Lookup) and exact(value) <= 0:
            raise ValueError("a rate in Hz above 0 is expected")
        return value

    @model_validator(mode="after")
    def _is_consistent(self) -> "SignalRule":
        if "time" not in self.axes or len(set(self.axes)) != len(self.axes):
            raise ValueError("axes: time once, and each other one at most once")
        for name in _PLACES:
            if self.path.count(f"{{{name}}}") + (name in self.axes) > 1:
                raise ValueError(f"{name} stands twice; it is told by the path or by an axis")
        if not self.labels and "{channel}" not in self.path:
            raise ValueError("labels are missing; give them, or {channel} in the path")
        return self

    def varies_over(self, name: str) -> bool:
        """Whether path or axes tell members or trials apart."""
        return name in self.axes or f"{{{name}}}" in self.path


class LabelRule(_Strict):
    """What each trial is labelled with: `{values: [1, 0, -1]}`, or `{path: labels, column: 0}` in the file.

    Attributes:
        values: Labels in the order of the trials, the same for every recording.
        path: Array (trials,) or (trials, columns) of labels; `{member}` and `{stem}` are known.
        column: Column of that array, from 0.
        name: Put before the label, `valence` gives `valence=1`.
        edges: Limits of classes: `[5]` gives `0` below 5 and `1` from 5 up.
    """

    values: tuple[Number, ...] = ()
    path: str | None = None
    column: Annotated[int, Field(ge=0)] = 0
    name: str = ""
    edges: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _one_of_both(self) -> "LabelRule":
        if bool(self.values) == bool(self.path):
            raise ValueError("give either values or path")
        return self

    def text(self, value: object) -> str:
        """Text of an annotation."""
        if isinstance(value, int | float) and math.isfinite(value):
            value = sum(edge <= value for edge in self.edges) if self.edges else f"{value:g}"
        return f"{self.name}={value}" if self.name else str(value)


class TrialRule(_Strict):
    """Trials: each is a segment, in the order of its number; when they were recorded is not in the file.

    Attributes:
        labels: One annotation per trial and entry, over the whole trial.
        align_s: Each trial begins at a multiple of it in seconds, `60`, so that a window can begin with it;
            0: one follows the other.
        skip_s: Seconds at the beginning of each trial that are left out, `3` for a baseline.
    """

    labels: tuple[LabelRule, ...] = ()
    align_s: Annotated[int, Field(ge=0)] = 0
    skip_s: Number = 0


class CodeRule(_Strict):
    """One code per epoch from the recording's start, such as a hypnogram: `{path: hypnogram, epoch_s: 30}`."""

    path: str
    epoch_s: Annotated[int, Field(gt=0)] = 30


class ArraysLayout(_Strict):
    """`layout` of a corpus with `reader: arrays`.

    >>> layout:
    ...   signals: [{path: tracings, axes: [member, time, channel], rate_hz: 400, unit: mV, labels: [I, II, III]}]
    ...   members: exam_id

    Attributes:
        signals: Arrays that hold signals; several where kinds lie apart or have rates of their own.
        members: Array that names the recordings along the `member` axis, `exam_id`; without it they are numbered.
        not_members: Names there that are no recordings, `["0"]` for the filler row of CODE-15.
        trials: How trials are placed and labelled.
        codes: Codes per epoch that become annotations.
    """

    signals: Annotated[tuple[SignalRule, ...], Field(min_length=1)]
    members: str | None = None
    not_members: tuple[str, ...] = ()
    trials: TrialRule = TrialRule()
    codes: CodeRule | None = None

    @model_validator(mode="after")
    def _agree(self) -> "ArraysLayout":
        for name in ("member", "trial"):
            if len({rule.varies_over(name) for rule in self.signals}) > 1:
                raise ValueError(f"signals: either all or none vary over {name}")
        if self.members and not all("member" in rule.axes for rule in self.signals):
            raise ValueError("members names the recordings along an axis member; no signal has one")
        if self.codes and (self.has_trials or any(rule.trim is not None for rule in self.signals)):
            raise ValueError("codes count from the recording's start: not with trials or trim")
        return self

    @property
    def has_members(self) -> bool:
        """Whether a file holds several recordings."""
        return self.signals[0].varies_over("member")

    @property
    def has_trials(self) -> bool:
        """Whether a recording consists of trials."""
        return self.signals[0].varies_over("trial")


def natural(text: str) -> tuple[tuple[int, str], ...]:
    """Sorting key that puts `eeg2` before `eeg10`."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text))


def matches(container: Container, path: str, known: dict[str, str]) -> Iterator[tuple[Names, dict[str, str]]]:
    """Nodes that a path of a layout means, with what its placeholders stand for, in natural order."""
    yield from _below(container, (), path.strip("/").split("/"), known)


def _below(
    container: Container, names: Names, rest: list[str], known: dict[str, str]
) -> Iterator[tuple[Names, dict[str, str]]]:
    if not rest:
        yield names, known
        return
    pattern = _component(rest[0], known)
    if isinstance(pattern, str):
        yield from _below(container, (*names, pattern), rest[1:], known)
        return
    for name in sorted(container.children(names), key=natural):
        found = pattern.fullmatch(name)
        if found:
            yield from _below(container, (*names, name), rest[1:], {**known, **found.groupdict()})


def _component(text: str, known: dict[str, str]) -> str | re.Pattern[str]:
    """A name, or the pattern of one where it has a wildcard or a placeholder that is still open."""
    is_open = False
    parts: list[str] = []
    for part in re.split(r"(\*|\{\w+\})", text):
        if part == "*":
            parts.append(".*")
            is_open = True
        elif part.startswith("{") and part[1:-1] in known:
            parts.append(re.escape(known[part[1:-1]]))
        elif part.startswith("{") and part[1:-1] in _PLACES:
            parts.append(rf"(?P<{part[1:-1]}>\d+|.+?)")
            is_open = True
        else:
            parts.append(re.escape(part))
    return re.compile("".join(parts)) if is_open else re.sub(r"\\(.)", r"\1", "".join(parts))
