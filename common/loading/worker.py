"""What happens inside a worker process: whole batches are loaded, sample by sample, each under its own key."""

import os
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import default_collate

from common.batch import Batch, Tree
from common.errors import BadImage, UserError
from common.loading.binding import Binding, kept_global_state

PIPE_BYTES = 2**16
CHECKED_SAMPLES = 8  # of the first batch; a flip in half of the loads escapes them once in 256
SMALL_BYTES = 2**20  # of a batch's tensor: below it, a second copy is cheaper than a tensor for every sample


class BatchKey(NamedTuple):
    """Everything that decides a rank's shard of a batch."""

    epoch: int
    number: int
    index: np.ndarray  # [B] rows of the dataset
    draw: np.ndarray  # [B] how often each row came before in the epoch
    place: np.ndarray  # [B] places of the samples in the batch over all ranks
    total: int  # samples of the batch over all ranks


class Loaded(NamedTuple):
    """A batch, the places in it that its samples have, and the (row, reason) of samples that were left out."""

    batch: Batch
    place: np.ndarray
    skipped: list[tuple[int, str]]


class BatchReader(torch.utils.data.Dataset):
    """A dataset of single samples, read a batch at a time: `reader[key]` is the batch of a BatchKey.

    Errors that a user can mend are returned instead of raised, so that they cross the process border as they are.
    """

    def __init__(self, dataset: Any, seed: int, skip_bad_images: bool):
        self.dataset, self.seed, self.skip_bad_images = dataset, seed, skip_bad_images
        self._binding: Binding | None = None
        self._process = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_binding": None}

    def __getitem__(self, key: BatchKey) -> Loaded | UserError:
        try:
            if torch.utils.data.get_worker_info():
                return self._read(key)
            with kept_global_state():
                return self._read(key)
        except UserError as error:
            return error

    def _read(self, key: BatchKey) -> Loaded:
        if self._binding is None or self._process != os.getpid():
            self._binding, self._process = Binding(self.dataset, self.seed), os.getpid()
            self._check_repeatable(key)
        samples, kept, skipped = [], [], []
        for position, (index, draw) in enumerate(zip(key.index.tolist(), key.draw.tolist(), strict=True)):
            try:
                samples.append(self._load(key.epoch, index, draw))
                kept.append(position)
            except BadImage as error:
                if not self.skip_bad_images:
                    raise
                skipped.append((index, str(error)))
        index = torch.from_numpy(key.index[kept])
        if not samples:  # a shard of no samples still has the shapes of one, for the engine
            samples, index = [self._any_sample()], torch.zeros(1, dtype=torch.int64)
        inputs, targets = collate(samples)
        weights = getattr(self.dataset, "weights", None)
        weights = None if weights is None else torch.as_tensor(weights)[index]
        batch = Batch(inputs, targets, index, weights, key.epoch, key.number, key.total - len(skipped))
        return Loaded(batch if kept else batch.slice(0, 0), key.place[kept], skipped)

    def _load(self, epoch: int, index: int, draw: int) -> tuple[Tree, Tree]:
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
            try:
                return self._load(0, index, 0)
            except BadImage:
                continue
        raise UserError("not one image of the data can be read: make check, with the same COMP= and DATA=, lists them")

    def _check_repeatable(self, key: BatchKey) -> None:
        """Load some samples twice: catches randomness that no search finds, such as a generator made per sample."""
        for index in key.index[:CHECKED_SAMPLES].tolist():
            try:
                first, second = self._load(key.epoch, index, 0), self._load(key.epoch, index, 0)
            except BadImage:
                continue
            if not _same(first, second):
                raise UserError(
                    f"row {index} of {type(self.dataset).__name__} differs between two loads under one key:"
                    " it makes a generator of its own, or keeps state. Draw from the `rng` of "
                    "sample(index, rng)"
                )


def collate(samples: list[Any]) -> Tree:
    """Samples that are trees of arrays, tensors and numbers to one tree of tensors [B, ...]; dtypes stay."""
    first = samples[0]
    if isinstance(first, dict):
        return {name: collate([sample[name] for sample in samples]) for name in first}
    if isinstance(first, (tuple, list)):
        return tuple(collate(list(part)) for part in zip(*samples, strict=True))
    if isinstance(first, (Tensor, np.ndarray, np.generic)):
        if any(sample.shape != first.shape for sample in samples):
            shapes = sorted({tuple(sample.shape) for sample in samples})
            raise UserError(f"the samples of a batch have the shapes {shapes}: resize or crop them to one shape")
        if isinstance(first, np.ndarray) and first.nbytes * len(samples) < SMALL_BYTES:
            return torch.from_numpy(np.stack(samples))
        # In a worker torch's own collate writes straight into shared memory: one copy less.
        return default_collate(samples if isinstance(first, Tensor) else [as_tensor(sample) for sample in samples])
    if isinstance(first, (bool, int, float)):
        return torch.tensor(samples)
    raise UserError(f"a sample holds a {type(first).__name__}: expected arrays, tensors or numbers in tuples and dicts")


def as_tensors(tree: Tree) -> Tree:
    """The tree that a `batch` returned, with its arrays as tensors."""
    if isinstance(tree, dict):
        return {name: as_tensors(part) for name, part in tree.items()}
    if isinstance(tree, (tuple, list)):
        return tuple(as_tensors(part) for part in tree)
    return as_tensor(tree) if isinstance(tree, np.ndarray) else tree


def as_tensor(array: np.ndarray | np.generic) -> Tensor:
    """The array's memory as a tensor where torch takes it; a copy of read-only arrays and of mirrored views."""
    array = np.asarray(array)
    return torch.from_numpy(array if array.flags.writeable and array.flags.forc else array.copy())


def start_worker(worker: int) -> None:
    """One thread a process: the processes are the parallelism, more threads would only fight over the cores."""
    import cv2

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    ForkingPickler.register(Tensor, _sent)


def _sent(tensor: Tensor) -> tuple:
    """Small tensors travel inside the message: in shared memory each costs a file descriptor and 0.5 ms."""
    if tensor.nbytes > PIPE_BYTES or tensor.dtype == torch.bfloat16:  # numpy does not know the type
        return reduce_tensor(tensor)
    return torch.from_numpy, (tensor.numpy(),)


def send_generators_whole() -> None:
    """Let torch generators travel to spawned processes: torch 2.14 sends their state as shared memory, which fails."""
    ForkingPickler.register(torch.Generator, lambda g: (_generator, (g.device, g.get_state().numpy().tobytes())))


def _generator(device: torch.device, state: bytes) -> torch.Generator:
    generator = torch.Generator(device)
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    return generator


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[name], second[name]) for name in first)
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, Tensor):
        return first.shape == second.shape and torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
    return np.asarray(first).tobytes() == np.asarray(second).tobytes()
