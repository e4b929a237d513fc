"""Recordings in MAT, HDF5, NPZ and NPY files whose layout a corpus file declares, such as SEED, DEAP or CODE-15."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np

from engine.readers.arrays_layout import ArraysLayout, LabelRule, Lookup, SignalRule, exact, matches, natural
from engine.readers.containers import Container, Names, opened
from engine.readers.text import parse_layout
from engine.recording import Annotation, Channel, Recording, Segment, split_member
from manifests.errors import RecordingError

_MAX_DIFFERENCE_S = 1  # by which the signals of one trial may differ in length; more is another layout


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Where a stretch of samples lies: the array, positions on its axes `member` and `trial`, samples to take."""

    names: Names
    at: Mapping[str, int]
    start: int
    num_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Channels that lie together: one array per trial, or one for all."""

    rule: SignalRule
    rate: Fraction
    labels: tuple[str, ...]
    unit: str
    pieces: tuple[_Piece, ...]


def members(path: Path, layout: Mapping[str, object]) -> list[str]:
    """Names of the recordings in a file, in its order; none where the file is one recording.

    Raises:
        ConfigError: The layout breaks its schema.
        RecordingError: The file cannot be read, or the names do not tell its recordings apart.
    """
    rules = parse_layout(ArraysLayout, layout, "arrays")
    if not rules.has_members:
        return []
    stat = path.stat()
    return list(_positions(path, stat.st_size, stat.st_mtime_ns, rules.model_dump_json()))


@lru_cache(maxsize=2)
def _positions(path: Path, _size: int, _mtime_ns: int, layout: str) -> dict[str, int]:
    """Position of each recording of a file on the axis `member`."""
    rules = ArraysLayout.model_validate_json(layout)
    rule = rules.signals[0]
    with opened(path) as container:
        known = {"stem": path.stem}
        if rules.members:
            names = container.texts(tuple(rules.members.strip("/").split("/")))
        elif "member" in rule.axes:
            node, _ = next(matches(container, rule.path, known))
            names = [str(1 + i) for i in range(container.shape(node)[rule.axes.index("member")])]
        else:
            names = sorted({found["member"] for _, found in matches(container, rule.path, known)}, key=natural)
    positions = [(name, position) for position, name in enumerate(names) if name not in rules.not_members]
    names = [name for name, _ in positions]
    strange = [name for name in names if not name or set(name) & set("#/\0\n")]
    if strange or len(set(names)) != len(names) or not names:
        raise RecordingError(
            "HEADER_INVALID",
            f"{path}: {len(names)} recordings under {len(set(names))} names, {len(strange)} of them empty or with "
            "'#' or '/'; each recording needs a name of its own",
        )
    return dict(positions)


def read_header(path: Path, layout: Mapping[str, object]) -> Recording:
    """Channels, trials as segments, and labels; values are read only where the layout trims them.

    Args:
        path: The file, or `file#member` for one of several recordings in it.
        layout: See `ArraysLayout`.

    Raises:
        ConfigError: The layout breaks its schema.
        RecordingError: The file is damaged, or not what the layout says.
    """
    rules = parse_layout(ArraysLayout, layout, "arrays")
    file, member = split_member(path)
    with opened(file) as container:
        sources, repairs = _sources(container, rules, path)
        segments = _segments(sources, rules)
        annotations = _annotations(container, rules, segments, {"stem": file.stem, "member": member})
    channels = [
        (label, source, sum(piece.num_samples for piece in source.pieces))
        for source in sources
        for label in source.labels
    ]
    return Recording(
        path=path,
        channels=tuple(
            Channel(index=index, label=label, rate=source.rate, unit=source.unit, prefilter="", num_samples=num_samples)
            for index, (label, source, num_samples) in enumerate(channels)
        ),
        segments=segments,
        annotations=annotations,
        repairs=repairs,
        layout=dict(layout),
    )


def read_signals(recording: Recording, indices: Sequence[int]) -> list[np.ndarray]:
    """Channels as float32 (num_samples,), scaled to the declared unit, trials one after another.

    Raises:
        RecordingError: `SIGNAL_INVALID` for values that cannot be read.
    """
    rules = parse_layout(ArraysLayout, recording.layout, "arrays")
    found: dict[int, np.ndarray] = {}
    with opened(split_member(recording.path)[0]) as container:
        first = 0
        for source in _sources(container, rules, recording.path)[0]:
            wanted = sorted({i - first for i in indices if first <= i < first + len(source.labels)})
            if wanted:
                signals = [_values(container, source, piece, wanted) for piece in source.pieces]
                joined = signals[0] if len(signals) == 1 else np.concatenate(signals, axis=1)
                found.update((first + row, joined[i]) for i, row in enumerate(wanted))
            first += len(source.labels)
    return [found[i] for i in indices]


def _sources(container: Container, rules: ArraysLayout, path: Path) -> tuple[list[_Source], tuple[str, ...]]:
    """Where every channel lies, cut to trials that are equally long in all of them, and what was cut."""
    file, member = split_member(path)
    known = {"stem": file.stem}
    position = None
    if rules.has_members:
        stat = file.stat()
        position = _positions(file, stat.st_size, stat.st_mtime_ns, rules.model_dump_json()).get(member)
        if position is None:
            raise RecordingError("HEADER_INVALID", f"{path}: no recording {member!r}; write file#name of one of them")
        known["member"] = member
    elif member:
        raise RecordingError("HEADER_INVALID", f"{path}: the layout declares one recording a file, not {member!r}")
    sources = [
        source for rule in rules.signals for source in _sources_of(container, rule, known, position, rules=rules)
    ]
    return _equally_long(sources, path)


def _sources_of(
    container: Container, rule: SignalRule, known: dict[str, str], position: int | None, *, rules: ArraysLayout
) -> list[_Source]:
    nodes = list(matches(container, rule.path, known))
    if not nodes:
        raise RecordingError("HEADER_INVALID", f"{container.path}: nothing at {rule.path!r}")
    nodes.sort(key=lambda node: (natural(node[1].get("channel", "")), natural(node[1].get("trial", ""))))
    sources: list[_Source] = []
    for label, group in groupby(nodes, key=lambda node: node[1].get("channel")):
        arrays = [names for names, _ in group]
        rate = _rate(container, rule, arrays[0])
        pieces = tuple(piece for names in arrays for piece in _pieces(container, rule, names, position=position))
        skip = exact(rules.trials.skip_s) * rate
        if skip:
            pieces = tuple(_without_start(piece, math.ceil(skip), container.path) for piece in pieces)
        labels = (label,) if label is not None else _labels(container, rule, arrays[0])
        sources.append(
            _Source(rule=rule, rate=rate, labels=labels, unit=_unit(container, rule, arrays[0]), pieces=pieces)
        )
    return sources


def _without_start(piece: _Piece, count: int, path: Path) -> _Piece:
    if piece.num_samples <= count:
        raise RecordingError("TRUNCATED", f"{path}: a trial of {piece.num_samples} samples, skip_s takes {count}")
    return replace(piece, start=piece.start + count, num_samples=piece.num_samples - count)


def _axes(container: Container, rule: SignalRule, names: Names) -> tuple[dict[str, int], dict[str, int]]:
    """Position and length of each declared axis; axes of length 1 beyond these are MATLAB's."""
    shape = container.shape(names)
    if len(shape) == len(rule.axes):
        places = list(range(len(shape)))
    else:
        places = [i for i, size in enumerate(shape) if size != 1]
    if len(places) != len(rule.axes):
        raise RecordingError(
            "HEADER_INVALID", f"{container.path}: {'/'.join(names)} is {shape}, expected axes {', '.join(rule.axes)}"
        )
    positions: dict[str, int] = dict(zip(rule.axes, places, strict=True))
    sizes = {axis: shape[place] for axis, place in positions.items()}
    if rule.samples not in {None, sizes["time"]} or not all(sizes.values()):
        raise RecordingError(
            "HEADER_INVALID",
            f"{container.path}: {'/'.join(names)} is {shape}, expected {rule.samples or 'some'} samples "
            f"on the time axis of {', '.join(rule.axes)}",
        )
    return positions, sizes


def _pieces(container: Container, rule: SignalRule, names: Names, *, position: int | None) -> list[_Piece]:
    """The trials of an array, or the one stretch that it is."""
    _, sizes = _axes(container, rule, names)
    here = {"member": position} if position is not None and "member" in rule.axes else {}
    num_samples = sizes["time"] * sizes.get("block", 1)
    trials = [{**here, "trial": i} for i in range(sizes["trial"])] if "trial" in sizes else [here]
    pieces = [_Piece(names=names, at=at, start=0, num_samples=num_samples) for at in trials]
    return pieces if rule.trim is None else [_trimmed(container, rule, piece) for piece in pieces]


def _trimmed(container: Container, rule: SignalRule, piece: _Piece) -> _Piece:
    """The piece without the padding at its ends."""
    used = np.flatnonzero((_table(container, rule, piece) != rule.trim).any(axis=0))
    if not used.size:
        raise RecordingError(
            "SIGNAL_INVALID", f"{container.path}: {'/'.join(piece.names)}: nothing but the padding {rule.trim:g}"
        )
    return replace(piece, start=int(used[0]), num_samples=int(used[-1] - used[0] + 1))


def _table(container: Container, rule: SignalRule, piece: _Piece, channels: slice = slice(None)) -> np.ndarray:
    """Values of a piece as (channels, samples), padding and all; HDF5 reads no more than that."""
    positions, sizes = _axes(container, rule, piece.names)
    index: list[int | slice] = [0] * (1 + max(positions.values()))
    order: list[str] = []
    whole = "block" not in sizes and piece.start + piece.num_samples <= sizes["time"]
    for axis, place in sorted(positions.items(), key=lambda item: item[1]):
        if axis in piece.at:
            index[place] = piece.at[axis]
            continue
        order.append(axis)
        index[place] = channels if axis == "channel" else slice(None)
        if axis == "time" and whole:
            index[place] = slice(piece.start, piece.start + piece.num_samples)
    shape = container.shape(piece.names)
    full = (*index, *[0] * (len(shape) - len(index)))
    values = container.read(piece.names, full)
    if values.dtype.kind not in "fiub":
        raise RecordingError("SIGNAL_INVALID", f"{container.path}: {'/'.join(piece.names)} holds {values.dtype}")
    wanted = [axis for axis in ("channel", "block", "time") if axis in order]
    values = values.transpose([order.index(axis) for axis in wanted])
    rows = values.shape[0] if "channel" in order else 1
    values = values.reshape(rows, -1)
    return values if whole else values[:, piece.start : piece.start + piece.num_samples]


def _values(container: Container, source: _Source, piece: _Piece, rows: Sequence[int]) -> np.ndarray:
    """Channels of a piece, float32 (rows, samples), scaled, NaN where a sample is missing."""
    rule = source.rule
    table = _table(container, rule, piece, slice(rows[0], rows[-1] + 1))[[row - rows[0] for row in rows]]
    lost = np.isin(table, rule.missing) if rule.missing else None
    if rule.scale != 1.0:
        table = table * rule.scale
    values = np.ascontiguousarray(table, dtype=np.float32)
    if lost is not None:
        values[lost] = np.nan
    return values


def _rate(container: Container, rule: SignalRule, names: Names) -> Fraction:
    value = _looked_up(container, rule.rate_hz, names) if isinstance(rule.rate_hz, Lookup) else rule.rate_hz
    try:
        rate = exact(value)
    except ValueError:
        rate = Fraction(0)
    if rate <= 0:
        raise RecordingError(
            "HEADER_INVALID", f"{container.path}: rate {value!r} of {'/'.join(names)} is no rate in Hz"
        )
    return rate


def _unit(container: Container, rule: SignalRule, names: Names) -> str:
    return str(_looked_up(container, rule.unit, names)) if isinstance(rule.unit, Lookup) else rule.unit


def _looked_up(container: Container, lookup: Lookup, names: Names) -> object:
    if lookup.attribute is not None:
        value = container.attribute(names, lookup.attribute)
        if value is None:
            raise RecordingError(
                "HEADER_INVALID", f"{container.path}: no attribute {lookup.attribute!r} at {'/'.join(names)} or above"
            )
        return value
    values = container.texts(tuple((lookup.path or "").strip("/").split("/")))
    if len(values) != 1:
        raise RecordingError(
            "HEADER_INVALID", f"{container.path}: {lookup.path} has {len(values)} values, expected one"
        )
    return values[0]


def _labels(container: Container, rule: SignalRule, names: Names) -> tuple[str, ...]:
    labels = rule.labels
    if isinstance(labels, Lookup):
        labels = tuple(container.texts(tuple((labels.path or labels.attribute or "").strip("/").split("/"))))
    _, sizes = _axes(container, rule, names)
    if len(labels) != sizes.get("channel", 1):
        raise RecordingError(
            "HEADER_INVALID",
            f"{container.path}: {'/'.join(names)} has {sizes.get('channel', 1)} channels, {len(labels)} are labelled",
        )
    return tuple(labels)


def _equally_long(sources: Sequence[_Source], path: Path) -> tuple[list[_Source], tuple[str, ...]]:
    """Sources whose trials last equally long, to the sample; a difference of up to a second is cut and told."""
    counts = {len(source.pieces) for source in sources}
    if len(counts) > 1:
        raise RecordingError(
            "HEADER_INVALID", f"{path}: its signals have {sorted(counts)} trials; equal numbers belong"
        )
    rates = {source.rate for source in sources}
    grid = Fraction(
        math.gcd(*(rate.numerator for rate in rates)), math.lcm(*(rate.denominator for rate in rates))
    )  # the greatest rate whose period is whole samples at every rate
    pieces: list[list[_Piece]] = [[] for _ in sources]
    repairs: list[str] = []
    for number, trial in enumerate(zip(*(source.pieces for source in sources), strict=True), start=1):
        lengths = [piece.num_samples / source.rate for piece, source in zip(trial, sources, strict=True)]
        if max(lengths) - min(lengths) > _MAX_DIFFERENCE_S:
            raise RecordingError(
                "HEADER_INVALID",
                f"{path}: trial {number} lasts {float(min(lengths)):g} to {float(max(lengths)):g} s; "
                f"signals may differ by {_MAX_DIFFERENCE_S} s",
            )
        length = math.floor(min(lengths) * grid) / grid
        if length != max(lengths):
            repairs.append(f"trial {number}: signals of unequal length, cut to {float(length):g} s")
        for kept, piece, source in zip(pieces, trial, sources, strict=True):
            kept.append(replace(piece, num_samples=int(length * source.rate)))
    return [replace(source, pieces=tuple(kept)) for source, kept in zip(sources, pieces, strict=True)], tuple(repairs)


def _segments(sources: Sequence[_Source], rules: ArraysLayout) -> tuple[Segment, ...]:
    step = rules.trials.align_s
    segments: list[Segment] = []
    end = Fraction(0)
    for piece in sources[0].pieces:
        start = Fraction(math.ceil(end / step) * step) if step else end
        segments.append(Segment(start=start, duration=piece.num_samples / sources[0].rate))
        end = start + segments[-1].duration
    return tuple(segments)


def _annotations(
    container: Container, rules: ArraysLayout, segments: Sequence[Segment], known: dict[str, str]
) -> tuple[Annotation, ...]:
    """Labels of the trials, or runs of the codes per epoch."""
    if rules.codes:
        codes = [_plain(value) for value in container.read(tuple(rules.codes.path.strip("/").split("/"))).ravel()]
        found: list[Annotation] = []
        position = 0
        for code, run in groupby(codes):
            count = len(list(run))
            onset, duration = position * rules.codes.epoch_s, count * rules.codes.epoch_s
            found.append(Annotation(onset=Fraction(onset), duration=Fraction(duration), text=code))
            position += count
        return tuple(found)
    columns = [_trial_labels(container, rule, len(segments), known) for rule in rules.trials.labels]
    return tuple(
        Annotation(onset=segment.start, duration=segment.duration, text=column[i])
        for i, segment in enumerate(segments)
        for column in columns
    )


def _trial_labels(container: Container, rule: LabelRule, count: int, known: dict[str, str]) -> list[str]:
    values: list[object] = list(rule.values)
    if rule.path is not None:
        names, _ = next(matches(container, rule.path, known))
        table = container.read(names)
        table = table.reshape(len(table), -1) if 1 not in table.shape[:1] else table.reshape(-1, 1)
        if rule.column >= table.shape[1]:
            raise RecordingError(
                "ANNOTATION_INVALID", f"{container.path}: {rule.path} is {table.shape}, no column {rule.column}"
            )
        values = list(table[:, rule.column].tolist())
    if len(values) != count:
        raise RecordingError("ANNOTATION_INVALID", f"{container.path}: {len(values)} labels for {count} trials")
    return [rule.text(value) for value in values]


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float | np.number) else str(value)
