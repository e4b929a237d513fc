"""Line frequency of a recording, from its signal: what stands out of the spectrum at 50 or 60 Hz."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.read import read_signals
from engine.recording import Channel, Recording

LINES_HZ = (50, 60)
# Above the spectrum around it: more than noise alone makes in ten seconds, and in a minute. Between them lie the weak
# hums of real recordings (eegmmidb 4 to 7 dB at 60 Hz); corpora whose hum was filtered out show -11 to 3 dB.
LEAST_DB, LEAST_LONG_DB = 8.0, 4.0
_LONG_S = 60
LEAST_LEAD_DB = 3.0  # of the stronger line over the other
_CHANNELS = 3  # looked at, evenly spread over those that could show it
_STRETCH_S = 4
_STRETCHES = 64  # evenly spread over the recording
_HALF_HZ = 0.5  # half the width of a line
_NEAR_HZ, _FAR_HZ = 1.5, 5.0  # where its surroundings begin and end


@dataclass(frozen=True, slots=True, kw_only=True)
class Mains:
    """A line frequency in Hz, or None and why; how far each line stands out in dB, by frequency."""

    hz: int | None
    why_not: str
    prominence_db: dict[int, float]


def find_mains(recording: Recording, channels: Sequence[Channel]) -> Mains:
    """Line frequency that stands out in the channels, at most three of which are read, one at a time.

    Args:
        recording: From `read_header`.
        channels: Those that a notch would be applied to.
    """
    able = [channel for channel in channels if channel.rate > 2 * (LINES_HZ[0] + _NEAR_HZ)]
    if not able:
        rates = ", ".join(sorted({f"{float(channel.rate):g} Hz" for channel in channels})) or "no channel"
        return Mains(hz=None, why_not=f"recorded at {rates}, which holds neither 50 nor 60 Hz", prominence_db={})
    chosen = [able[place] for place in np.unique(np.linspace(0, len(able) - 1, _CHANNELS).round().astype(int))]
    found: dict[int, float] = {}
    for channel in chosen:
        (signal,) = read_signals(recording, [channel.index])
        for line, prominence in prominences(signal, float(channel.rate)).items():
            found[line] = max(prominence, found.get(line, -np.inf))
    found = {line: round(float(value), 1) for line, value in found.items()}
    heard = ", ".join(f"{value:g} dB at {line} Hz" for line, value in found.items())
    ranked = sorted(found, key=lambda line: -found[line])
    least = LEAST_LONG_DB if recording.duration >= _LONG_S else LEAST_DB
    if not ranked or found[ranked[0]] < least:
        why = f"no hum stands out of the signal ({heard or 'too short to tell'}; {least:g} dB needed)"
        return Mains(hz=None, why_not=why, prominence_db=found)
    if len(ranked) > 1 and found[ranked[0]] - found[ranked[1]] < LEAST_LEAD_DB:
        return Mains(hz=None, why_not=f"50 and 60 Hz stand out alike ({heard})", prominence_db=found)
    return Mains(hz=ranked[0], why_not="", prominence_db=found)


def prominences(signal: np.ndarray, rate_hz: float) -> dict[int, float]:
    """How far 50 and 60 Hz stand out of the spectrum around them, in dB; a line that the rate cannot hold is absent.

    The spectrum is the median over stretches of 4 s, so that an artefact of some of them does not count.

    Args:
        signal: One channel, (N,); NaN where a sample is missing.
        rate_hz: Its sampling rate.
    """
    length = round(_STRETCH_S * rate_hz)
    if len(signal) < length:
        return {}
    last = len(signal) - length
    starts = np.unique(np.linspace(0, last, min(_STRETCHES, 1 + 2 * last // length)).round().astype(int))
    stretches = np.stack([signal[start : start + length] for start in starts]).astype(np.float64)
    stretches = stretches[np.isfinite(stretches).all(axis=1) & (np.ptp(stretches, axis=1) > 0)]
    if not len(stretches):
        return {}
    stretches -= stretches.mean(axis=1, keepdims=True)
    power = np.median(np.abs(np.fft.rfft(stretches * np.hanning(length), axis=1)) ** 2, axis=0)
    hz = np.fft.rfftfreq(length, 1 / rate_hz)
    found: dict[int, float] = {}
    for line in LINES_HZ:
        away = np.abs(hz - line)
        around = power[(away >= _NEAR_HZ) & (away <= _FAR_HZ) & (hz < 0.98 * rate_hz / 2)]
        if line + _HALF_HZ < 0.98 * rate_hz / 2 and around.size and (level := np.median(around)) > 0:
            found[line] = float(10 * np.log10(max(power[away <= _HALF_HZ].mean() / level, 1e-6)))
    return found
