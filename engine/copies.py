"""Local copies of what lies on an object store: decoders only ever see files on a disk."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.files import companions
from engine.recording import split_member
from engine.storage import download, is_remote
from manifests.corpora import Corpus
from manifests.errors import ConfigError, RecordingError


@contextmanager
def local_tables(corpus: Corpus, root: Path, *, work: Path | None = None) -> Iterator[tuple[Path, Path]]:
    """A local folder for copies, and one that holds the tables of a corpus on a store; both go at the end.

    `work` is the folder under which they are made; None: the system's.
    """
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work, prefix="scan-") as name:
        folder = Path(name)
        (folder / "tables").mkdir()
        _copy_tables(corpus, root, folder / "tables")
        yield folder, folder / "tables"


def _copy_tables(corpus: Corpus, root: Path, folder: Path) -> None:
    for pattern in corpus.side_files:
        for name in root.glob(pattern):
            download(name, _inside(name, root, folder))


@contextmanager
def local_copy(path: Path, root: Path, corpus: Corpus, *, work: Path | None) -> Iterator[tuple[Path, Path]]:
    """A recording and its root on a local disk: themselves, or copies under `work` that are removed at the end.

    Decoders only ever see local files. What a decoder says about a copy is said about the original.

    Raises:
        RecordingError: An object whose key would lead out of the folder, or that is gone.
        ConfigError: The store does not answer, or a file of labels lies outside of the root.
    """
    if work is None or not is_remote(root):
        yield path, root
        return
    folder = work / "inputs"
    try:
        _copy_tables(corpus, root, folder)
        for name in companions(path, corpus.reader_of(path), corpus):
            download(name, _inside(name, root, folder))
        copy = _inside(path, root, folder)
        if not split_member(copy)[0].exists():  # a file, or an `.mff` folder
            raise RecordingError("INPUT_CHANGED", f"{path}: no longer there; convert again")
        yield copy, folder
    except FileNotFoundError as error:
        raise RecordingError("INPUT_CHANGED", f"{path}: no longer there ({error}); convert again") from None
    except RecordingError as error:
        raise RecordingError(error.reason, str(error).replace(str(folder), str(root))) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _inside(name: Path, root: Path, folder: Path) -> Path:
    """Place of an object's copy."""
    if root not in name.parents:
        raise ConfigError(f"{name}: lies outside of the corpus root {root}; give a root that holds labels as well")
    relative = str(name).removeprefix(str(root)).lstrip("/")
    if ".." in relative.split("/"):
        raise RecordingError("NOT_A_RECORDING", f"{name}: '..' in a key leads out of its folder; rename the object")
    return folder / relative
