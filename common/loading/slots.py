"""Shared memory in which workers hand over their samples: mapped once, and used again for every batch.

torch sends a tensor between processes as a new piece of shared memory: a connection with a handshake, about 1.5 ms in
the receiving process, and more memory of /dev/shm, of which containers may have only 64 MB. A slot costs neither.
"""

import itertools
import mmap
import os
import tempfile
import weakref
from multiprocessing.reduction import DupFd
from typing import Any

import torch
from torch import Tensor

SLOTS, SLOT_BYTES = 16, 2**26  # of a worker, of a slot; only what has been used takes memory
KNOWN: "weakref.WeakValueDictionary[int, Slots]" = weakref.WeakValueDictionary()  # in the process that borrows
_numbers = itertools.count()


class Slots:
    """The slots of `workers` processes. A worker lends a tensor; its slot is free when the borrowed one is deleted."""

    def __init__(self, workers: int):
        self.number = next(_numbers)
        KNOWN[self.number] = self
        self._each, self._nbytes = SLOTS, SLOT_BYTES
        size = workers * SLOTS * (SLOT_BYTES + 1)
        self._open(_file(size), size)

    def _open(self, file: int, size: int) -> None:
        self._file, self._size = file, size
        weakref.finalize(self, os.close, file)
        self._memory = torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8)
        self._taken = self._memory[-size // (self._nbytes + 1) :]  # 1 for every slot in use

    def __getstate__(self) -> tuple[Any, ...]:
        return self.number, self._each, self._nbytes, DupFd(self._file), self._size

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.number, self._each, self._nbytes, file, size = state
        self._open(file.detach(), size)

    def lend(self, tensor: Tensor, worker: int) -> int | None:
        """Copy the tensor to a free slot of the worker; None if it has none, or is too large."""
        own = range(worker * self._each, (worker + 1) * self._each)
        slot = next((slot for slot in own if not self._taken[slot]), None)
        if slot is None or tensor.nbytes > self._nbytes:
            return None
        self._taken[slot] = 1
        self._of(slot, tensor.dtype, tensor.shape).copy_(tensor)
        return slot

    def borrow(self, slot: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        """The tensor in a slot. It is no copy: nothing that shares its memory may outlive it."""
        tensor = self._of(slot, dtype, shape)
        tensor.is_borrowed = True
        weakref.finalize(tensor, self._taken[slot].zero_)
        return tensor

    def _of(self, slot: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        return self._memory[slot * self._nbytes :][: shape.numel() * dtype.itemsize].view(dtype).reshape(shape)


def _file(size: int) -> int:
    """The descriptor of a file in memory without a name, so that nothing is left behind, however the processes end."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("samples")
    else:  # macOS
        with tempfile.TemporaryFile() as stream:
            file = os.dup(stream.fileno())
    os.ftruncate(file, size)
    return file
