"""Host memory that batches are read into, used again and again: a fresh page costs a fault every 4 KiB."""

import threading
import weakref

import numpy as np
import torch

MAX_BUFFERS = 64  # a few batches ahead, of a few modalities each


class Buffers:
    """Byte buffers used again once nothing refers to what was lent.

    What is lent is a view; every array made of its memoryview keeps it alive. Once the view's weak reference is
    dead, the memory below it is free.
    """

    def __init__(self, limit: int) -> None:
        self._lent: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []
        self._limit = limit
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> memoryview:
        """Memory of `num_bytes`, its content undefined: the smallest free buffer that is large enough.

        Of equal ones it is that which was lent last: the processor's cache may still hold it.
        """
        with self._lock:
            fitting = (
                (memory.nbytes, -n)
                for n, (memory, view) in enumerate(self._lent)
                if view() is None and memory.nbytes >= num_bytes
            )
            _, free = min(fitting, default=(0, None))
            spare = num_bytes // 8  # the next batch may be a little larger
            # torch aligns it: the last bits of a sum may depend on where its terms lie.
            memory = (
                torch.empty(num_bytes + spare, dtype=torch.uint8).numpy() if free is None else self._lent.pop(-free)[0]
            )
            view = memory[:num_bytes]
            self._lent = [*self._lent, (memory, weakref.ref(view))][-self._limit :]
            return view.data


_BUFFERS = Buffers(limit=MAX_BUFFERS)


def stored_rows(num_rows: int, num_samples: int) -> torch.Tensor:
    """int16 (num_rows, num_samples) for a batch on the host, pinned where there is CUDA; its content is undefined."""
    if torch.cuda.is_available():
        # torch keeps pinned blocks itself and lends one again when the copies that were begun from it are done.
        return torch.empty(num_rows, num_samples, dtype=torch.int16, pin_memory=True)
    return _rows(num_rows, num_samples, np.int16)


def float_rows(num_rows: int, num_samples: int) -> torch.Tensor:
    """float32 (num_rows, num_samples) for a batch that stays on the host; its content is undefined."""
    return _rows(num_rows, num_samples, np.float32)


def _rows(num_rows: int, num_samples: int, dtype: type[np.generic]) -> torch.Tensor:
    num_bytes = num_rows * num_samples * np.dtype(dtype).itemsize
    return torch.from_numpy(np.frombuffer(_BUFFERS.take(num_bytes), dtype=dtype).reshape(num_rows, num_samples))
