"""The work of a worker process: loading a few samples at a time, each under its own key."""

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from contextlib import nullcontext, suppress
from functools import cached_property, partial
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from common.batch import Tree, map_tree
from common.errors import BadImage, UserError
from common.loading.binding import Binding, kept_global_state
from common.loading.checks import digest
from common.loading.collate import collate, join
from common.loading.slots import KNOWN, Slots

PIPE_BYTES = 2**16
PR_SET_PDEATHSIG = 1
LARGE_PICKLE = 2**30  # bytes sent to all workers together when they start


class PieceKey(NamedTuple):
    """Everything that determines a piece, a few consecutive samples of this rank's shard of a batch."""

    epoch: int
    number: int  # of the batch
    index: np.ndarray  # [n] rows of the dataset
    draw: np.ndarray  # [n] how often each row came before in the epoch
    place: np.ndarray  # [n] places of the samples in the batch over all ranks
    total: int  # samples of the batch over all ranks
    following: int  # pieces of the batch that come after this one
    is_last: bool  # whether the batch is the last of its epoch

    def split(self, count: int) -> "list[PieceKey]":
        """Split into at most `count` pieces of one size, the last may be smaller; an empty shard gives one piece."""
        size = max(1, -(-len(self.index) // count))
        cuts = [slice(first, first + size) for first in range(0, len(self.index) or 1, size)]
        return [
            self._replace(
                index=self.index[cut], draw=self.draw[cut], place=self.place[cut], following=len(cuts) - number
            )
            for number, cut in enumerate(cuts, start=1)
        ]


class Piece(NamedTuple):
    """The samples that could be read, their positions in the key, and (row, reason) of the unreadable ones."""

    inputs: Tree
    targets: Tree
    kept: list[int]
    skipped: list[tuple[int, str]]


class CheckKey(NamedTuple):
    """Rows to load and digest; `turned` loads them in reverse order, after the same rows of another epoch."""

    epoch: int
    rows: list[int]
    turned: bool


Key = PieceKey | CheckKey
Answer = Piece | dict[int, bytes]


def joined(
    parts: list[tuple[PieceKey, Piece]], pinned: bool
) -> tuple[Tree, Tree, np.ndarray, np.ndarray, list[tuple[int, str]]]:
    """Inputs, targets, rows and places of the samples of a batch, and the (row, reason) of those left out."""
    inputs, targets = join([(piece.inputs, piece.targets) for _, piece in parts], pinned)
    index = np.concatenate([key.index[piece.kept] for key, piece in parts])
    place = np.concatenate([key.place[piece.kept] for key, piece in parts])
    return inputs, targets, index, place, [entry for _, piece in parts for entry in piece.skipped]


class Reader(torch.utils.data.Dataset):
    """A dataset of single samples: `reader[key]` is the key with a Piece, or with the digests by row for a CheckKey.

    A UserError is returned instead of raised, so that it reaches the main process unchanged.
    """

    def __init__(self, dataset: Any, seed: int, skip_bad_images: bool):
        self.dataset, self.seed, self.skip_bad_images = dataset, seed, skip_bad_images

    def __getitem__(self, key: Key) -> tuple[Key, Answer | UserError]:
        answer = self._digests if isinstance(key, CheckKey) else self._read
        try:
            with nullcontext() if get_worker_info() else kept_global_state():
                return key, answer(key)
        except UserError as error:
            return key, error

    @cached_property
    def _binding(self) -> Binding:
        """Made at the first sample, so in the process that loads: it cannot be sent to another."""
        return Binding(self.dataset, self.seed)

    def _read(self, key: PieceKey) -> Piece:
        samples, kept, skipped = [], [], []
        for position, (index, draw) in enumerate(zip(key.index.tolist(), key.draw.tolist(), strict=True)):
            try:
                samples.append(self._load(key.epoch, index, draw))
                kept.append(position)
            except BadImage as error:
                if not self.skip_bad_images:
                    raise
                skipped.append((index, str(error)))
        inputs, targets = collate(samples or [self._any_sample()])
        if not samples:  # an empty piece needs tensors of the right shapes too, for the engine
            inputs, targets = map_tree(lambda tensor: tensor[:0].clone(), (inputs, targets))
        return Piece(inputs, targets, kept, skipped)

    def _load(self, epoch: int, index: int, draw: int = 0) -> tuple[Tree, Tree]:
        generator = self._binding.rekey(epoch, index, draw)
        try:
            sample = self.dataset.sample(index, generator) if hasattr(self.dataset, "sample") else self.dataset[index]
        except BadImage as error:
            error.row = index
            raise
        if not isinstance(sample, (tuple, list)) or len(sample) != 2:
            raise UserError(
                f"row {index} of {type(self.dataset).__name__} is a {type(sample).__name__}: expected a "
                "pair (input, target)"
            )
        return sample

    def _any_sample(self) -> tuple[Tree, Tree]:
        """The first sample that can be read."""
        for index in range(len(self.dataset)):
            with suppress(BadImage):
                return self._load(0, index)
        raise UserError("not one image of the data can be read: make check, with the same COMP= and DATA=, lists them")

    def _digests(self, key: CheckKey) -> dict[int, bytes]:
        wanted = [(key.epoch, row) for row in key.rows]
        if key.turned:
            wanted = [(key.epoch + 1, row) for row in key.rows] + wanted[::-1]
        found = {}
        for epoch, row in wanted:
            with suppress(BadImage):
                found[row] = digest(self._load(epoch, row))
        return found


def start_worker(tied: bool, slots: Slots, worker: int) -> None:
    """Set up a worker process. It uses one thread, since more would only compete with other workers for the cores.

    `tied` workers are those started by the main thread: the kernel ends them with the thread that made them.
    Large tensors are sent in `slots`.
    """
    import cv2

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    ForkingPickler.register(Tensor, partial(_sent, slots, worker))
    # A worker whose parent was killed may wait for ever at a pipe that other workers keep open.
    if tied and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    end_with_parent()


def end_with_parent() -> None:
    """End this process as soon as the one that started it has ended, which may be killed without notice."""

    def watch() -> None:
        wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Sealed:
    """An answer that has its pickle already; the queue delivers the answer itself.

    The queue pickles in a thread of its own, whose errors are lost: the main process would wait for ever.
    """

    def __init__(self, answer: tuple[Key, Answer | UserError]):
        self._content = bytes(ForkingPickler.dumps(answer))

    def __reduce__(self) -> tuple:
        return pickle.loads, (self._content,)


def _sent(slots: Slots, worker: int, tensor: Tensor) -> tuple:
    if tensor.nbytes > PIPE_BYTES and (slot := slots.lend(tensor, worker)) is not None:
        return _borrowed, (slots.number, slot, tensor.dtype, tensor.shape)
    return _received, (tensor.contiguous().reshape(-1).view(torch.uint8).numpy(), tensor.dtype, tensor.shape)


def _borrowed(number: int, slot: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return KNOWN[number].borrow(slot, dtype, shape)


def _received(content: np.ndarray, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return torch.from_numpy(content).view(dtype).reshape(shape)


def send_generators_whole() -> None:
    """Make torch generators picklable for spawned processes: torch 2.14 sends them by shared memory, which fails."""
    ForkingPickler.register(torch.Generator, lambda g: (_generator, (g.device, g.get_state().numpy().tobytes())))


def _generator(device: torch.device, state: bytes) -> torch.Generator:
    generator = torch.Generator(device)
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    return generator


class _Measure(pickle.Pickler):
    """Counts the bytes of a pickle up to a limit; tensors travel as shared memory and count nothing."""

    def __init__(self, limit: int):
        super().__init__(self)
        self.left = limit

    def write(self, content: bytes) -> None:
        self.left -= len(content)
        if self.left < 0:
            raise OverflowError

    def reducer_override(self, part: Any) -> Any:
        return (str, ()) if isinstance(part, Tensor) else NotImplemented


def is_large_pickle(reader: Reader, workers: int) -> bool:
    """Whether copies of `reader` for all workers take more than a gigabyte; raises UserError if it has no pickle."""
    try:
        _Measure(LARGE_PICKLE // workers).dump(reader)
    except OverflowError:
        return True
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(
            f"{type(reader.dataset).__name__} cannot be sent to worker processes, which are not forked here ({error}): "
            "use --workers 0, or keep functions at the top of a module and open files again in __setstate__"
        ) from error
    return False
