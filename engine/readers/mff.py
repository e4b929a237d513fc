"""EGI `.mff` folders: blocks of float32 samples, their times in XML, signals of the amplifier and of the PNS box.

MNE needs the package mffpy for these, which is no dependency; the format takes little more than numpy and an XML
parser that refuses entities. Epochs that do not follow one another are segments. Source: EGI MFF description.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

import numpy as np
from defusedxml import DefusedXmlException
from defusedxml.ElementTree import parse

from engine.readers.magic import is_mff
from engine.readers.mne_raw import annotation
from engine.readers.timeline import Timeline, timeline
from engine.recording import Annotation, Channel, Recording
from manifests.errors import RecordingError

_MAX_XML_BYTES = 256 << 20
_MAX_CHANNELS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """A stretch of samples of all channels of a signal file: place of its bytes, and samples per channel."""

    offset: int
    num_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Signal:
    """A `signalN.bin`."""

    path: Path
    kind: str
    rate: Fraction
    num_channels: int
    blocks: tuple[_Block, ...]


def files(path: Path) -> list[Path]:
    """Every file of the folder that belongs to the recording."""
    return sorted(
        name for name in path.rglob("*") if name.is_file() and not name.is_symlink() and not name.name.startswith(".")
    )


def read_header(path: Path, layout: Mapping[str, object]) -> Recording:
    """Channels in µV (of the PNS box in their own units), segments and events; no sample is read.

    Raises:
        RecordingError: `NOT_A_RECORDING`, `HEADER_INVALID`, `TRUNCATED` or `FORMAT_UNSUPPORTED`.
    """
    if not is_mff(path):
        raise RecordingError("NOT_A_RECORDING", f"{path}: no info.xml and signal1.bin in it")
    repairs: list[str] = []
    signals = _signals(path, repairs)
    times = _timeline(path, signals[0], repairs)
    started, begun = _record_time(path)
    channels: list[Channel] = []
    count = sum(block.num_samples for block in signals[0].blocks)
    for signal in signals:
        for label, unit in _described(path, signal):
            channels.append(
                Channel(index=len(channels), label=label, rate=signal.rate, unit=unit, prefilter="", num_samples=count)
            )
    return Recording(
        path=path,
        channels=tuple(channels),
        segments=times.segments,
        annotations=_events(path, begun, repairs),
        repairs=tuple(dict.fromkeys(repairs)),
        extra={"format": "EGI MFF", "start_time": started},
        layout=dict(layout),
    )


def read_signals(recording: Recording, indices: Sequence[int]) -> list[np.ndarray]:
    """Channels as float32 (num_samples,), blocks one after another.

    Raises:
        RecordingError: `TRUNCATED`.
    """
    signals = _signals(recording.path, [])
    places = [(signal, row) for signal in signals for row in range(signal.num_channels)]
    outputs = [np.empty(recording.channels[index].num_samples, dtype=np.float32) for index in indices]
    for signal in signals:
        wanted = [
            (places[index][1], output)
            for index, output in zip(indices, outputs, strict=True)
            if places[index][0] is signal
        ]
        filled = 0
        with signal.path.open("rb") as stream:
            for block in signal.blocks if wanted else ():
                for row, output in wanted:
                    stream.seek(block.offset + 4 * row * block.num_samples)
                    data = np.fromfile(stream, dtype="<f4", count=block.num_samples)
                    if data.size < block.num_samples:
                        raise RecordingError("TRUNCATED", f"{signal.path}: has lost samples since its header was read")
                    output[filled : filled + data.size] = data
                filled += block.num_samples
        for _, output in wanted:
            output[filled:] = np.nan  # the one sample that the PNS box may lack
    return outputs


def _xml(path: Path) -> Element:
    """Root of an XML file without entities, its names without their namespaces."""
    try:
        if path.stat().st_size > _MAX_XML_BYTES:
            raise RecordingError("HEADER_INVALID", f"{path}: {path.stat().st_size} bytes of XML")
        root: Element | None = parse(path, forbid_dtd=True).getroot()
    except FileNotFoundError:
        raise RecordingError("TRUNCATED", f"{path.parent}: {path.name} is missing; copy the whole folder") from None
    except (ParseError, DefusedXmlException, ValueError) as error:
        raise RecordingError("HEADER_INVALID", f"{path}: {type(error).__name__}: {error}") from None
    if root is None:
        raise RecordingError("HEADER_INVALID", f"{path}: no element in it")
    for element in root.iter():
        if isinstance(element.tag, str):
            element.tag = element.tag.rpartition("}")[2]
    return root


def _signals(path: Path, repairs: list[str]) -> list[_Signal]:
    """EEG first, then other signals, by number."""
    found: list[_Signal] = []
    for name in sorted(path.glob("signal*.bin"), key=lambda item: (len(item.name), item.name)):
        number = name.stem.removeprefix("signal")
        if not number.isdigit():
            continue
        info = _xml(path / f"info{number}.xml")
        kinds = [child.tag for part in info.iter("fileDataType") for child in part]
        found.append(_signal(name, kinds[0] if kinds else "", repairs))
    eeg = [signal for signal in found if signal.kind == "EEG"]
    if len(eeg) != 1:
        raise RecordingError("FORMAT_UNSUPPORTED", f"{path}: {len(eeg)} EEG signals; kymo reads folders with one")
    others = [signal for signal in found if signal.kind == "PNSData"]
    return [*eeg, *(signal for signal in others if _fits(signal, eeg[0], repairs))]


def _fits(signal: _Signal, eeg: _Signal, repairs: list[str]) -> bool:
    """Whether another signal covers the same time; the box is known to lack the last sample."""
    total, expected = (sum(block.num_samples for block in item.blocks) for item in (signal, eeg))
    if signal.rate == eeg.rate and total in {expected, expected - 1}:
        return True
    repairs.append("signals of the PNS box have another length than the EEG: left out")
    return False


def _signal(path: Path, kind: str, repairs: list[str]) -> _Signal:
    blocks: list[_Block] = []
    shape: tuple[int, int] = (0, 0)
    size = path.stat().st_size
    with path.open("rb") as stream:
        position = 0
        while position + 4 <= size:
            stream.seek(position)
            (is_header,) = struct.unpack("<i", stream.read(4))
            if is_header:
                head = stream.read(12)
                if len(head) < 12:
                    break
                header_bytes, block_bytes, count = struct.unpack("<3i", head)
                shape = _shape(path, stream.read(8 * count if 0 < count <= _MAX_CHANNELS else 0), count, shape)
                if header_bytes < 16 + 8 * count or block_bytes <= 0 or block_bytes % (4 * count):
                    raise RecordingError(
                        "HEADER_INVALID", f"{path}: a block of {block_bytes} bytes for {count} channels"
                    )
                begin, samples = position + header_bytes, block_bytes // (4 * count)
            elif blocks:
                begin, samples = position + 4, blocks[-1].num_samples
            else:
                raise RecordingError("HEADER_INVALID", f"{path}: its first block has no header")
            if begin + 4 * shape[0] * samples > size:
                repairs.append("truncated: the last block is incomplete: left out")
                break
            blocks.append(_Block(offset=begin, num_samples=samples))
            position = begin + 4 * shape[0] * samples
    if not blocks:
        raise RecordingError("TRUNCATED", f"{path}: not one whole block; copy the folder again")
    return _Signal(path=path, kind=kind, rate=Fraction(shape[1]), num_channels=shape[0], blocks=tuple(blocks))


def _shape(path: Path, table: bytes, count: int, before: tuple[int, int]) -> tuple[int, int]:
    """Channels and rate that a block's header tells; they may not change within a file."""
    if not 0 < count <= _MAX_CHANNELS or len(table) < 8 * count:
        raise RecordingError("HEADER_INVALID", f"{path}: a block of {count} channels")
    depths = np.frombuffer(table, dtype="<i4")[count:]
    rates = {int(value) >> 8 for value in depths}
    bits = {int(value) & 0xFF for value in depths}
    if bits != {32} or len(rates) != 1 or min(rates) <= 0 or before not in {(0, 0), (count, min(rates))}:
        raise RecordingError("HEADER_INVALID", f"{path}: {count} channels of {bits} bits at {rates} Hz, after {before}")
    return count, min(rates)


def _timeline(path: Path, signal: _Signal, repairs: list[str]) -> Timeline:
    """Timeline by `epochs.xml`: times in microseconds and the blocks that belong to each epoch."""
    lengths = [block.num_samples for block in signal.blocks]
    firsts = [0, *np.cumsum(lengths).tolist()]
    scale = _microseconds_per_tick(path)
    breaks: list[tuple[int, Fraction | None]] = []
    origin: Fraction | None = None
    for epoch in _xml(path / "epochs.xml").iter("epoch"):
        try:
            begin = Fraction(int(epoch.findtext("beginTime", "")) * scale, 1_000_000)
            first = int(epoch.findtext("firstBlock", "")) - 1
        except ValueError as error:
            raise RecordingError("HEADER_INVALID", f"{path}/epochs.xml: {error}") from None
        origin = begin if origin is None else origin
        if 0 <= first < len(lengths):
            breaks.append((firsts[first], begin - origin))
    return timeline(signal.rate, firsts[-1], breaks, repairs)


def _microseconds_per_tick(path: Path) -> Fraction:
    """1, or a thousandth in folders whose times have nine digits behind the point."""
    text = _xml(path / "info.xml").findtext("recordTime", "")
    digits = text.partition(".")[2]
    return Fraction(1, 1000) if len(digits) - len(digits.lstrip("0123456789")) == 9 else Fraction(1)


def _record_time(path: Path) -> tuple[str, datetime | None]:
    text = _xml(path / "info.xml").findtext("recordTime", "").strip()
    date = _date(text)
    return (f"{date:%H:%M:%S}" if date else "", date)


def _date(text: str) -> datetime | None:
    """ISO time; digits behind the microsecond are cut off."""
    whole, dot, rest = text.partition(".")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    try:
        return datetime.fromisoformat(f"{whole}{dot}{digits[:6]}{rest[len(digits) :]}")
    except ValueError:
        return None


def _described(path: Path, signal: _Signal) -> Iterator[tuple[str, str]]:
    """Label and unit of each channel of a signal."""
    if signal.kind == "EEG":
        layout = _xml(path / "sensorLayout.xml")
        sensors = [item for item in layout.iter("sensor") if item.findtext("type", "0").strip() in {"0", "1"}]
        if len(sensors) != signal.num_channels:
            raise RecordingError("HEADER_INVALID", f"{path}: {len(sensors)} sensors for {signal.num_channels} channels")
        for number, sensor in enumerate(sensors, start=1):
            name = (sensor.findtext("name") or "").strip()
            yield name if name not in {"", "None"} else f"E{number}", "uV"
        return
    sensors = list(_xml(path / "pnsSet.xml").iter("sensor"))
    if len(sensors) != signal.num_channels:
        raise RecordingError("HEADER_INVALID", f"{path}: {len(sensors)} inputs for {signal.num_channels} PNS channels")
    for sensor in sensors:
        yield (sensor.findtext("name") or "").strip(), (sensor.findtext("unit") or "").strip()


def _events(path: Path, begun: datetime | None, repairs: list[str]) -> tuple[Annotation, ...]:
    """Events of every track by their codes; labels, descriptions and keys are free text and stay behind."""
    found: list[Annotation] = []
    for name in sorted(path.glob("Events*.xml")):
        for event in _xml(name).iter("event"):
            date = _date((event.findtext("beginTime") or "").strip())
            if date is None or begun is None or (date.tzinfo is None) != (begun.tzinfo is None):
                repairs.append("an event without a time: left out")
                continue
            delta = date - begun
            onset = Fraction((delta.days * 86400 + delta.seconds) * 10**6 + delta.microseconds, 10**6)
            ticks = (event.findtext("duration") or "0").strip()
            duration = Fraction(int(ticks), 10**6) if ticks.isdigit() else Fraction(0)
            found.append(annotation(onset, duration, (event.findtext("code") or "").strip()))
    return tuple(sorted(found, key=lambda item: item.onset))
