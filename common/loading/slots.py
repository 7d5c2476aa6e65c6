"""Shared memory in which workers hand over their samples: mapped once, and used again for every batch.

torch sends a tensor between processes as a new piece of shared memory: a connection with a handshake, about 1.5 ms in
the receiving process, and more memory of /dev/shm, of which containers may have only 64 MB. A slot costs neither.
"""

import itertools
import mmap
import os
import tempfile
import weakref
from contextlib import suppress
from multiprocessing.reduction import DupFd
from typing import Any

import torch
from torch import Tensor

SLOTS, SLOT_BYTES = 16, 2**28  # of a worker, of a slot; only what has been used takes memory
KNOWN: "weakref.WeakValueDictionary[int, Slots]" = weakref.WeakValueDictionary()  # in the process that borrows
_numbers = itertools.count()


class Slots:
    """The slots of `workers` processes. A worker lends a tensor; its slot is free when the borrowed one is deleted."""

    def __init__(self, workers: int):
        self.number = next(_numbers)
        KNOWN[self.number] = self
        self._each, self._nbytes, self._flags = SLOTS, SLOT_BYTES, workers * SLOTS * SLOT_BYTES
        self._open(_file(), self._flags + workers * SLOTS)  # a byte for every slot: 1 while it is in use

    def _open(self, file: int, size: int) -> None:
        self._file, self._size = file, size
        weakref.finalize(self, os.close, file)
        try:
            os.ftruncate(file, size)
            self._memory = mmap.mmap(file, size)
        except OSError:  # limits of virtual memory or of files (ulimit -v, -f): everything goes through pipes
            self._memory, self._each = b"", 0

    def __getstate__(self) -> tuple[Any, ...]:
        return self.number, self._each, self._nbytes, self._flags, DupFd(self._file), self._size

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.number, self._each, self._nbytes, self._flags, file, size = state
        self._open(file.detach(), size)

    def lend(self, tensor: Tensor, worker: int) -> int | None:
        """Copy the tensor to a free slot of the worker; None if it has none, or is too large."""
        first = self._flags + worker * self._each
        free = self._memory.find(b"\0", first, first + self._each)
        if free < 0 or tensor.nbytes > self._nbytes:
            return None
        slot = free - self._flags
        self._of(slot, tensor.dtype, tensor.shape).copy_(tensor)
        self._memory[free] = 1
        return slot

    def borrow(self, slot: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        """The tensor in a slot. It is no copy: nothing that shares its memory may outlive it."""
        tensor = self._of(slot, dtype, shape)
        tensor.is_borrowed = True
        weakref.finalize(tensor, _free, self._memory, self._flags + slot, os.getpid())
        return tensor

    def _of(self, slot: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        # Made anew: one that was made in inference mode could not be written to outside it.
        place, nbytes = slot * self._nbytes, shape.numel() * dtype.itemsize
        content = torch.frombuffer(self._memory, dtype=torch.uint8, count=nbytes, offset=place)
        return content.view(dtype).reshape(shape)


def _free(memory: mmap.mmap, flag: int, borrower: int) -> None:
    if os.getpid() == borrower:  # a forked process deletes copies of the borrower's tensors
        memory[flag] = 0


def _file() -> int:
    """The descriptor of a file in memory without a name, so that nothing is left behind, however the processes end."""
    with suppress(AttributeError, OSError):  # macOS has no such files, and some containers refuse them
        return os.memfd_create("samples")
    with tempfile.TemporaryFile() as stream:
        return os.dup(stream.fileno())
