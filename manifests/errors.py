"""The three error classes of kymo, told apart by who must act."""

REASONS = frozenset(
    {
        "ANNOTATION_INVALID",  # labels are promised and cannot be read
        "CHANNEL_UNRESOLVED",  # more unresolved labels than the corpus allows
        "CRASHED",  # the decoder died: a signal or an unexpected exception
        "FORMAT_UNSUPPORTED",  # a valid file of a kind that kymo does not read
        "HEADER_INVALID",  # header and file contradict each other
        "INPUT_CHANGED",  # other bytes than those that were scanned; converting again settles it
        "KILLED",  # somebody else ended its process, or the kernel did for want of memory; every run tries again
        "KNOWN_BAD",  # listed in the corpus file with its reason
        "MEMORY",  # the decoder went over its memory limit
        "NOT_A_RECORDING",  # e.g. a git-lfs pointer with the suffix .edf
        "NO_CHANNELS",  # nothing in it that the recipe keeps
        "SIGNAL_INVALID",  # samples that no sensor gives
        "TIMEOUT",  # the decoder went over its time limit
        "TOO_SHORT",  # shorter than one window
        "TRUNCATED",  # fewer bytes than the header promises, nothing left to keep
        "UNREADABLE",  # the file cannot be opened or read: rights, a failing disk
        "UNIT_UNKNOWN",  # an electrical channel without a known unit
    }
)


class ConfigError(Exception):
    """An operator must change a file or a flag. The job ends with exit code 2."""


class ContractError(Exception):
    """An artefact (shard, checkpoint, bundle) breaks its contract. The job stops."""


class RecordingError(Exception):
    """One recording cannot be used. Caught in one place, counted and quarantined; the run goes on.

    Args:
        reason: A code of `REASONS`.
        message: Where, what value, which rule, what to do.
    """

    def __init__(self, reason: str, message: str) -> None:
        if reason not in REASONS:
            raise ValueError(f"reason {reason!r} is not one of {', '.join(sorted(REASONS))}")
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["RecordingError"], tuple[str, str]]:
        """Survive pickling across processes with the reason."""
        return RecordingError, (self.reason, str(self))
