from collections.abc import Callable
from contextlib import closing
from itertools import islice

import pytest
import torch

from adapters import stream
from adapters.config import AdaptConfig
from adapters.data import TaskData
from adapters.sampling import Share
from adapters.stream import labelled_batches
from adapters.train import load_data
from adapters.update import LabelledBatch

MakeConfig = Callable[..., AdaptConfig]


@pytest.fixture
def rhythm(make_config: MakeConfig) -> TaskData:
    return load_data(make_config())["rhythm"]


def batches(data: TaskData, monkeypatch, *, rank: int, world: int, size: int, start: int = 0) -> list[LabelledBatch]:
    """Three steps as a rank sees them."""
    monkeypatch.setattr(stream, "rank", lambda: rank)
    monkeypatch.setattr(stream, "world_size", lambda: world)
    share = Share(epoch=96, batch=size, weight=1.0)
    with closing(labelled_batches(data, share, seed=5, start=start)) as endless:
        return list(islice(endless, 3))


@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_slices_of_all_ranks_are_the_batch_with_the_same_channels_dropped(rhythm, world, monkeypatch):
    assert rhythm.task.channel_dropout > 0
    whole = batches(rhythm, monkeypatch, rank=0, world=1, size=16)
    parts = [batches(rhythm, monkeypatch, rank=rank, world=world, size=16) for rank in range(world)]
    for step, batch in enumerate(whole):
        mine = [part[step] for part in parts]
        assert all(part.is_counted for part in mine)
        assert torch.equal(torch.cat([part.target for part in mine]), batch.target)
        assert torch.equal(torch.cat([part.batch.mask_BC for part in mine]), batch.batch.mask_BC)
        assert torch.equal(torch.cat([part.batch.signal_BCT for part in mine]), batch.batch.signal_BCT)


def test_a_rank_without_a_window_takes_one_that_does_not_count(rhythm, monkeypatch):
    whole = batches(rhythm, monkeypatch, rank=0, world=1, size=2)
    parts = [batches(rhythm, monkeypatch, rank=rank, world=3, size=2) for rank in range(3)]
    counted = [rank for rank, part in enumerate(parts) if part[0].is_counted]
    assert len(counted) == 2
    (idle,) = set(range(3)) - set(counted)
    assert [len(item.target) for item in parts[idle]] == [1, 1, 1]
    for step in range(3):
        together = torch.cat([parts[rank][step].target for rank in counted])
        assert torch.equal(together, whole[step].target)


def test_a_stream_that_begins_later_goes_on_as_the_first_would(rhythm, monkeypatch):
    first = batches(rhythm, monkeypatch, rank=0, world=1, size=16)
    later = batches(rhythm, monkeypatch, rank=0, world=1, size=16, start=2)
    assert torch.equal(later[0].batch.signal_BCT, first[2].batch.signal_BCT)
    assert not torch.equal(later[1].batch.signal_BCT, first[1].batch.signal_BCT)
