"""Memory: what the CPU's allocator does with freed blocks, telling out of memory from other errors, starting again."""

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

Result = TypeVar("Result")

# What the allocators of CUDA, ROCm, MPS and the CPU say, and what cuDNN and cuBLAS say instead when it is their
# workspace that did not fit. Not all of them raise torch.OutOfMemoryError.
TEXTS = (
    "out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "ALLOCATION_FAILED",  # cuDNN 9: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Unable to find a valid cuDNN algorithm",
    "unable to find an engine",
    "can't allocate memory",
    "not enough memory",
)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEEP_BYTES, GIVE_BACK_BYTES = 1 << 30, 1 << 20


def keep_freed(keep: bool) -> None:
    """Tell glibc to keep freed blocks up to 1 GiB for the next step, or to give back every one above 1 MiB at once.

    Left alone it gives large blocks back and gets them again in every step, cleared page by page, while those below a
    threshold that moves up to 32 MiB leave holes. Kept, a training step is 5 to 14 % faster; given back, the peak does
    not grow with the number of micro-batches. Other C libraries have no such choice, and nothing changes there.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for name in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            mallopt(name, KEEP_BYTES if keep else GIVE_BACK_BYTES)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch can mend the error; a CUDA context broken by anything else must not be used again."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in TEXTS)


def release() -> None:
    """Give cached memory back. Call it outside `except`: the traceback there keeps every activation alive."""
    gc.collect()  # cycles through autograd nodes outlive their last name
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def attempt(work: Callable[[], Result]) -> tuple[Result | None, bool]:
    """(what `work` returns, True), or (None, False) when it ran out of memory, which is free again by then.

    The only place where an out-of-memory error is caught: a smaller attempt belongs behind it, not into an `except`,
    where the traceback would keep the memory of the failed one.
    """
    try:
        return work(), True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    release()
    return None, False


def sizes(count: int, largest: int) -> list[int]:
    """Cut `count` samples into the fewest parts of at most `largest`, as equal as they can be.

    Equal parts leave no last part of one sample, over which BatchNorm could not normalise.
    """
    parts = -(-count // largest)
    return [count * (part + 1) // parts - count * part // parts for part in range(parts)]


class Buffers:
    """The buffers of modules (BatchNorm's running statistics) as they were before the batch, for repeated passes.

    Copied without looking for changes: batch norm writes to its statistics behind the back of autograd's version
    counters. Costs a second copy of the buffers, nothing for modules without any.
    """

    def __init__(self, module: object, apart_from: "Buffers | None" = None):
        modules = list(module.modules()) if isinstance(module, nn.Module) else []
        known = {id(owner) for owner, _ in apart_from._owners} if apart_from is not None else set()
        owners = [(part._buffers, name) for part in modules for name in part._buffers if id(part._buffers) not in known]
        # By owner and name: a module may assign a new tensor to its buffer.
        self._owners = [(owner, name) for owner, name in owners if owner[name] is not None]
        self._copies = self._clones()
        self._normalising = {id(part._buffers) for part in modules if isinstance(part, _NormBase)}
        self._kept = False

    def __bool__(self) -> bool:
        return bool(self._owners)

    def new_batch(self) -> None:
        """The next pass is the first over another batch."""
        self._kept = False

    def begin_pass(self) -> None:
        """Every pass over a batch, repeated or not, starts from the same buffers."""
        if self._owners:
            present = self.present()
            copy_(self._copies, present) if not self._kept else copy_(present, self._copies)
        self._kept = True

    @contextmanager
    def left_as_they_are(self) -> Iterator[None]:
        """A pass in the block starts from the buffers before the batch and leaves those of now."""
        of_now = self._clones()
        yield
        if of_now:
            copy_(self.present(), of_now)

    def statistics(self) -> list[Tensor]:
        """The running statistics of normalisation: what differs between ranks, which see different samples."""
        return [owner[name] for owner, name in self._owners if id(owner) in self._normalising]

    def present(self) -> list[Tensor]:
        return [owner[name] for owner, name in self._owners]

    def _clones(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self.present()]


@torch.no_grad()
def copy_(to: list[Tensor], values: list[Tensor]) -> None:
    """One operation for all tensors of a type: they are many, and small."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in to):
        alike = [pair for pair in zip(to, values, strict=True) if pair[0].dtype == dtype]
        torch._foreach_copy_([tensor for tensor, _ in alike], [value for _, value in alike])
