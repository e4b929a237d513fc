"""Coverage-guided fuzzing of the EDF reader with atheris; pytest does not collect it.

    python -m venv /tmp/fuzz && /tmp/fuzz/bin/pip install atheris numpy pydantic pyyaml
    PYTHONPATH=. /tmp/fuzz/bin/python tests/engine/fuzz_edf_header.py -max_total_time=300 -max_len=4096 CORPUS

CORPUS is a folder for inputs; a few small EDF files in it are good seeds. Any input must end as a `Recording` whose
signals can be read, or as a `RecordingError`, and no array may be larger than its file.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["engine"]):
    from engine.readers import edf
    from manifests.errors import RecordingError

PATH = Path(tempfile.mkdtemp(prefix="kymo-fuzz-"), "a.edf")


def check(data: bytes) -> None:
    """Read one input to the end."""
    PATH.write_bytes(data)
    try:
        recording = edf.read_header(PATH, {})
    except RecordingError:
        return
    signals = edf.read_signals(recording, [channel.index for channel in recording.channels])
    if data[:2] != b"\x1f\x8b" and 2 * sum(len(signal) for signal in signals) > len(data):
        raise AssertionError("more samples than bytes")
    ends = [segment.start + segment.duration for segment in recording.segments]
    if any(end > later.start for end, later in zip(ends, recording.segments[1:], strict=False)):
        raise AssertionError("segments overlap")
    for channel in recording.channels:
        if channel.rate * recording.duration != channel.num_samples:
            raise AssertionError("rate times duration is not the number of samples")


if __name__ == "__main__":
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()
