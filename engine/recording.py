"""What a reader tells about a recording: channels, contiguous segments, annotations, repairs."""

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

MEMBER_MARK = "#"  # between a file and one of the recordings in it


def split_member(path: Path) -> tuple[Path, str]:
    """File and name of a recording in it, which is empty where the file is the recording.

    >>> split_member(Path("code15/exams_part0.hdf5#1169160"))
    (PosixPath('code15/exams_part0.hdf5'), '1169160')

    A file that has the mark in its own name is taken as it is.
    """
    name, mark, member = path.name.rpartition(MEMBER_MARK)
    if not mark or not name or path.is_file():
        return path, ""
    return path.with_name(name), member


@dataclass(frozen=True, slots=True, kw_only=True)
class Channel:
    """One recorded signal as its header describes it.

    Attributes:
        index: Position in the file, counted over all signals.
        label: Source label, untouched.
        rate: Exact sampling rate in Hz.
        unit: Physical unit as written in the header.
        prefilter: Filter history as written in the header.
        num_samples: Samples over all segments.
        calibrated: False when the header gives no usable gain; such a channel never reaches a model.
    """

    index: int
    label: str
    rate: Fraction
    unit: str
    prefilter: str
    num_samples: int
    calibrated: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """A labelled interval; onset and duration in seconds from the first sample, exact."""

    onset: Fraction
    duration: Fraction
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stretch without a gap; start in seconds from the recording's start, duration in seconds, exact."""

    start: Fraction
    duration: Fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """A recording's header and annotations; the signals are read on demand.

    >>> recording.channels[0]
    Channel(index=0, label='EEG C3-A2', rate=Fraction(256, 1), unit='uV', ...)

    Attributes:
        path: File that a reader opens (the `.hea` of a WFDB record), `file#member` for one of several in a file.
        channels: Signals in file order, annotation channels left out.
        segments: Contiguous pieces in time order; plain files have one.
        annotations: Labelled intervals that stand in the file itself.
        repairs: Header repairs made on reading, none of which changes a sample value.
        extra: Header items of the format, such as the `Dx` comment of a WFDB record.
        layout: Reader options from the corpus file, for declared layouts.
    """

    path: Path
    channels: tuple[Channel, ...]
    segments: tuple[Segment, ...]
    annotations: tuple[Annotation, ...] = ()
    repairs: tuple[str, ...] = ()
    extra: dict[str, str] = field(default_factory=dict)
    layout: dict[str, object] = field(default_factory=dict)

    @property
    def duration(self) -> Fraction:
        """Recorded time in seconds, gaps left out."""
        return sum((segment.duration for segment in self.segments), Fraction(0))
