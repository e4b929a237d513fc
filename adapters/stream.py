"""The training batches of a task: a pure function of snapshots, seed and step, cut into slices for ranks."""

from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import repeat

from adapters.augment import drop_channels
from adapters.data import TaskData
from adapters.evaluate import collate_task, targets_of
from adapters.sampling import Share
from adapters.update import LabelledBatch
from manifests.tasks import Task
from trainer.batches import ChannelBatch, generator, stable_hash
from trainer.collectives import rank, world_size
from trainer.data import Order, rank_slice
from trainer.read import SnapshotReader, Window


def task_order(data: TaskData, share: Share, *, seed: int) -> Order:
    """Order of a task's training windows, `share.batch` of them in a step.

    Under a cap the windows are permuted all together, so that an epoch is a random part of all of them. Otherwise
    blocks of shards are, which a cache can keep up with.
    """
    train = data.splits["train"]
    whole = None if data.task.cap_per_epoch is None else len(train)
    return Order(train.streams, seed=stable_hash(seed, data.task.id), global_batch=share.batch, block_samples=whole)


def labelled_batches(data: TaskData, share: Share, *, seed: int, start: int) -> Generator[LabelledBatch, None, None]:
    """Endless batches of a task from step `start` on: this rank's slice of each.

    Where a step has fewer windows of the task than there are ranks, the ranks without one get the first window of all
    again and again, as a batch that does not count.
    """
    train = data.splits["train"]
    order = task_order(data, share, seed=seed)
    reader = SnapshotReader(train.streams, num_threads=1, locate=train.locate)

    def work(_: int, windows: list[Window]) -> LabelledBatch:
        batch = collate_task(data.task, windows)
        if data.task.channel_dropout:
            batch = _with_dropped(data.task, batch, windows, seed=seed)
        return LabelledBatch(task=data.task, batch=batch, target=targets_of(data.task, train, windows))

    with closing(reader):
        own = rank_slice(share.batch, rank=rank(), world=world_size())
        if own.start == own.stop:
            yield from _uncounted(data, reader, order)
        yield from reader.stream(order, work, start_batch=start, rank=rank(), world=world_size())


def _uncounted(data: TaskData, reader: SnapshotReader, order: Order) -> Iterator[LabelledBatch]:
    windows = reader.read(order.batch(0)[:1], order=order)
    target = targets_of(data.task, data.splits["train"], windows)
    return repeat(
        LabelledBatch(task=data.task, batch=collate_task(data.task, windows), target=target, is_counted=False)
    )


def _with_dropped(task: Task, batch: ChannelBatch, windows: list[Window], *, seed: int) -> ChannelBatch:
    generators = (generator(seed, "channels", task.id, window.epoch, window.key) for window in windows)
    return drop_channels(task, batch, generators)
