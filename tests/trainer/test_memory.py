import numpy as np
import torch

from trainer.memory import Buffers, stored_rows

LENGTH = 2_000_003  # longer than what other tests leave behind


def address_of(memory: memoryview) -> int:
    return np.frombuffer(memory, dtype=np.uint8).__array_interface__["data"][0]


def test_a_buffer_is_lent_again_only_when_nothing_refers_to_it() -> None:
    buffers = Buffers(limit=3)
    array = np.frombuffer(buffers.take(100)[10:20], dtype=np.uint8)  # the chain of a window's array
    address = array.__array_interface__["data"][0] - 10
    other = buffers.take(100)
    assert address_of(other) != address
    del array
    assert address_of(buffers.take(80)) == address


def test_the_smallest_buffer_that_is_large_enough_is_lent() -> None:
    buffers = Buffers(limit=3)
    large, small = buffers.take(100_000), buffers.take(1000)
    addresses = address_of(large), address_of(small)
    del large, small
    first, second = buffers.take(500), buffers.take(50_000)
    assert (address_of(second), address_of(first)) == addresses


def test_of_equal_buffers_the_one_lent_last_is_lent_again() -> None:
    buffers = Buffers(limit=3)
    held = [buffers.take(1000) for _ in range(3)]
    last = address_of(held[2])
    del held
    for _ in range(3):
        assert address_of(buffers.take(1000)) == last


def test_rows_of_a_batch_keep_their_memory_and_give_it_back() -> None:
    rows = stored_rows(3, LENGTH)
    assert rows.dtype == torch.int16
    assert rows.shape == (3, LENGTH)
    address = rows.data_ptr()
    part = rows[1:]
    del rows
    other = stored_rows(3, LENGTH)
    assert other.data_ptr() != address  # `part` refers to it
    del part
    assert stored_rows(3, LENGTH).data_ptr() == address  # `other` is still held
    assert stored_rows(0, LENGTH).shape == (0, LENGTH)
