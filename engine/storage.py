"""Where files lie: what differs between a local disk and an object store (`s3://`, any fsspec URL)."""

from pathlib import Path


def is_remote(path: Path) -> bool:
    """Whether a location is on an object store: a `UPath` that is no `pathlib.Path`."""
    return not isinstance(path, Path)
