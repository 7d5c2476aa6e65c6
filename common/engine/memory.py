"""Memory: the CPU allocator's settings, recognising out-of-memory errors, and buffers to restore before a retry."""

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

Result = TypeVar("Result")

# Error texts of the allocators of CUDA, ROCm, MPS and the CPU, and of cuDNN and cuBLAS when their workspace does not
# fit. Not all of them raise torch.OutOfMemoryError.
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
    """Make glibc keep freed blocks up to 1 GiB for the next step, or return every block above 1 MiB at once.

    By default it returns large blocks to the system and gets them again in every step, cleared page by page. Smaller
    blocks, below a threshold that grows up to 32 MiB, fragment the heap. Keeping blocks makes a training step 5 to
    14 % faster; returning them keeps the peak from growing with the number of micro-batches. Other C libraries do not
    have this setting, and nothing changes there.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for name in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            mallopt(name, KEEP_BYTES if keep else GIVE_BACK_BYTES)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch can mend the error. After any other CUDA error the context must not be used again."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in TEXTS)


def release() -> None:
    """Release cached memory. Call it outside `except`, where the traceback keeps every activation alive."""
    gc.collect()  # reference cycles through autograd nodes are freed by nothing else
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def attempt(work: Callable[[], Result]) -> tuple[Result | None, bool]:
    """Return (result of `work`, True), or (None, False) if it ran out of memory; its memory is then free again.

    Out-of-memory errors are caught only here. Make a smaller attempt after this call and not inside an `except`, where
    the traceback would keep the memory of the failed one.
    """
    try:
        return work(), True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    release()
    return None, False


def sizes(count: int, largest: int) -> list[int]:
    """Cut `count` samples into the fewest parts of at most `largest`, as equal as possible.

    Equal parts avoid a last part of one sample, which BatchNorm could not normalise.
    """
    parts = -(-count // largest)
    return [count * (part + 1) // parts - count * part // parts for part in range(parts)]


class Buffers:
    """A copy of a module's buffers (BatchNorm's running statistics) from before the batch, for repeated passes.

    It is always made, because autograd's version counters do not show that batch norm has changed its statistics.
    It costs the memory of a second set of buffers.
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
        """Declare that the next pass is the first one over another batch."""
        self._kept = False

    def begin_pass(self) -> None:
        """Save the buffers before the first pass over a batch, and restore them before every further pass."""
        if self._kept:
            self._put_back(self._copies)
        elif _alike(present := self.present(), self._copies):
            copy_(self._copies, present)
        else:
            self._copies = self._clones()
        self._kept = True

    @contextmanager
    def left_as_they_are(self) -> Iterator[None]:
        """Put the present buffers back after the block; a pass inside starts from those before the batch."""
        of_now = self._clones()
        yield
        self._put_back(of_now)

    def statistics(self) -> list[Tensor]:
        """The running statistics of normalisation layers: they differ between ranks, which see different samples."""
        return [owner[name] for owner, name in self._owners if id(owner) in self._normalising]

    def present(self) -> list[Tensor]:
        return [owner[name] for owner, name in self._owners]

    def _clones(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self.present()]

    def _put_back(self, copies: list[Tensor]) -> None:
        if _alike(present := self.present(), copies):
            copy_(present, copies)
            return
        for (owner, name), value in zip(self._owners, copies, strict=True):
            owner[name] = value.clone()


def _alike(tensors: list[Tensor], others: list[Tensor]) -> bool:
    """Whether the shapes agree: a queue of features, or a table of positions, grows with what the model sees."""
    return all(one.shape == other.shape for one, other in zip(tensors, others, strict=True))


@torch.no_grad()
def copy_(to: list[Tensor], values: list[Tensor]) -> None:
    """Copy `values` into `to`, with one operation per dtype because buffers are many and small."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in to):
        alike = [pair for pair in zip(to, values, strict=True) if pair[0].dtype == dtype]
        torch._foreach_copy_([tensor for tensor, _ in alike], [value for _, value in alike])
