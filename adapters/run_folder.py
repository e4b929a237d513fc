"""Where a run that learns tasks keeps what it writes: its folder, which one process holds, and its `storage`.

As in pretraining the folder is on a disk. With `storage` the checkpoints lie there alone, and configuration, metrics
and result beside them, so that another machine goes on, and `kymo status` sees the run, from the store.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from adapters.checkpoint import Checkpoint, Identity, check_identity, check_owner, find_checkpoint, save_checkpoint
from adapters.paths import RESULT_FILE, TRAINED_FILE
from adapters.update import RunConfig
from manifests.config import start_run, write_atomically
from trainer.checkpoint_store import claim_attempt, newest_checkpoint, step_of
from trainer.lock import Fence, hold
from trainer.mirror import fetch, send
from trainer.paths import CHECKPOINT_FOLDER, LOCK_FILE
from trainer.process_group import is_launched, run_on_rank_zero
from trainer.storage import answering, location

LOCK_PATIENCE_S = 30.0  # whoever starts ranks again may still be ending the earlier ones

Result = tuple[dict[str, Any], dict[str, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """The places of a run.

    Attributes:
        path: Its folder.
        store: Where its checkpoints and its result lie; `path` where the configuration names no storage.
        identity: Everything that decides the trained numbers, plain data by dotted key.
    """

    path: Path
    store: Path
    identity: Identity

    @property
    def checkpoints(self) -> Path:
        """Folder of all checkpoints."""
        return self.store / CHECKPOINT_FOLDER

    @contextmanager
    def held(self) -> Iterator[None]:
        """The folder, for this run alone; the lock is the first rank's. A collective."""
        patience_s = LOCK_PATIENCE_S if is_launched() else 1.0
        with ExitStack() as stack:

            def take() -> None:
                stack.enter_context(hold(self.path / LOCK_FILE, patience_s=patience_s))

            run_on_rank_zero(take)
            yield

    def begin(self, config: RunConfig) -> "Start":
        """Claim the run for this start and find the newest sound checkpoint. The folder is held. A collective.

        Raises:
            ConfigError: The checkpoints are those of another configuration, encoder or snapshot.
        """
        # Before anything is claimed or written: the places may be another run's.
        run_on_rank_zero(lambda: check_owner(self.checkpoints, identity=self.identity))
        fence = claim_attempt(self.checkpoints)
        saved = run_on_rank_zero(lambda: find_checkpoint(self.checkpoints, identity=self.identity))

        def write_header() -> None:
            start_run(self.path, config)
            if saved is not None:
                self._fetch_rows()

        run_on_rank_zero(write_header)
        return Start(folder=self, fence=fence, saved=saved)

    def read_result(self) -> Result | None:
        """Result and trained tensors of a run that is finished, according to its folder.

        Raises:
            ConfigError: They are those of another configuration, encoder or snapshot.
        """
        path = self.path / RESULT_FILE
        if not path.exists():
            return None
        result = json.loads(path.read_bytes())
        check_identity(path, result["identity"], self.identity)
        return result, load((self.path / TRAINED_FILE).read_bytes())

    def fetch_result(self, config: RunConfig) -> Result | None:
        """As `read_result`; what another machine has finished is brought from the store first. The folder is held."""
        if (found := self.read_result()) is not None or self.store == self.path:
            return found
        with answering(self.store):
            path = self.store / RESULT_FILE
            if not path.exists():
                return None
            content = {name: (self.store / name).read_bytes() for name in (TRAINED_FILE, RESULT_FILE)}
        check_identity(path, json.loads(content[RESULT_FILE])["identity"], self.identity)
        start_run(self.path, config)
        self._fetch_rows()
        for name, data in content.items():
            write_atomically(self.path / name, data)
        return self.read_result()

    def send(self) -> None:
        """Put the small files of the run beside its checkpoints in the store."""
        if self.store != self.path:
            with answering(self.store):
                send(self.path, self.store)

    def _fetch_rows(self) -> None:
        if self.store != self.path:
            with answering(self.store):
                fetch(self.path, self.store)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A start of a run, which writes as long as no later one has claimed the run.

    Attributes:
        folder: The run's places.
        fence: Its claim.
        saved: The checkpoint it goes on from.
    """

    folder: RunFolder
    fence: Fence
    saved: Checkpoint | None

    def save(self, checkpoint: Checkpoint) -> None:
        """Commit a checkpoint, with the small files beside it in the store. Of the first rank alone."""
        folder = self.folder
        save_checkpoint(folder.checkpoints, checkpoint, fence=self.fence, identity=folder.identity)
        folder.send()

    def write_result(self, result: Mapping[str, Any], trained: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Write result and trained tensors, which marks the run as finished; returns the result as it reads back.

        Of the first rank alone.
        """
        folder = self.folder
        whole = {"identity": folder.identity, **result}
        content = {TRAINED_FILE: save(dict(trained)), RESULT_FILE: (json.dumps(whole, indent=2) + "\n").encode()}
        with answering(folder.store):
            self.fence.check()
        folder.send()
        for place in dict.fromkeys((folder.store, folder.path)):
            with answering(place):
                for name, data in content.items():
                    write_atomically(place / name, data)
        return whole


def open_folder(config: RunConfig, *, identity: Identity) -> RunFolder:
    """Places of a run."""
    path = Path(config.run_dir).absolute()
    return RunFolder(path=path, store=location(config.storage or path), identity=identity)


def is_finished(config: RunConfig) -> bool:
    """Whether a run has a result, in its folder or in its store."""
    if (Path(config.run_dir) / RESULT_FILE).exists():
        return True
    if config.storage is None:
        return False
    store = location(config.storage)
    with answering(store):
        return (store / RESULT_FILE).exists()


def saved_step(config: RunConfig) -> int | None:
    """Step of the newest checkpoint of a run, None where there is none."""
    store = location(config.storage or config.run_dir)
    with answering(store):
        newest = newest_checkpoint(store / CHECKPOINT_FOLDER)
    return None if newest is None else step_of(newest)
