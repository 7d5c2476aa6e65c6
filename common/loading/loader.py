"""Batches of a dataset, bit-identical for any number of workers, any number of processes and after any restart.

A dataset is any object with `__len__` and one of

    batch(indices [B], keys) -> (inputs, targets)   many samples at once, in the training process: small data as tensors
    sample(index, rng) -> (input, target)           one sample, drawing from the np.random.Generator that it is handed
    __getitem__(index) -> (input, target)           one sample, drawing from generators that it holds, or global ones

Inputs and targets are arrays, tensors or numbers, or tuples and dicts of them. An optional attribute `weights` [n]
gives every row a weight. Images stay uint8 until they are on the device. A dataset with `batch` may have `to(device)`,
which moves its tensors and returns it, as modules do: its batches are then made on the card. Samples must be
reproducible; common.loading.checks describes which violations are found.
"""

import math
import weakref
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from common.batch import Batch, Tree, map_tree, tensors_of
from common.loading.checks import (
    CHECKED_BATCHES,
    CHECKED_SAMPLES,
    check_batch,
    check_dataset,
    compare_samples,
    made_of,
    weights_of,
)
from common.loading.keys import Keys
from common.loading.mixing import mix_pairs
from common.loading.orders import Order, Plan, Rows, sequential, shard
from common.loading.stream import Stream, Workers
from common.loading.transfer import beside, to_card
from common.loading.worker import CheckKey, PieceKey, Reader, joined

SAMPLES_AT_ONCE, BYTES_AT_ONCE = 4096, 2**22  # made together on a card, where launching a kernel outlasts its run


def in_order(dataset: Any, rows: Rows, batch_size: int, seed: int, **settings: Any) -> Iterator[Batch]:
    """The batches of `rows`, once and in the given order; `settings` are the Loader's."""
    with Loader(dataset, sequential(rows), batch_size, seed=seed, **settings) as loader:
        yield from loader.epoch(0)


class Loader:
    """Yields this process's shard of every batch; `order` (common.loading.orders) decides what the batches are.

    The shard of rank r of `world` is a contiguous block of whole pairs. `mix` (common.loading.mixing) blends pairs.
    `bad_images="skip"` leaves unreadable images out of their batches and lists them in `skipped`. Batch.total then
    excludes only those of this rank; the true size is the sum over all ranks, which the engine computes anyway.
    All workers load parts of the same batch. At the end of an epoch they begin the next one, up to `epochs` (None:
    without end). On a CUDA `device` batches are copied to it while the model works; otherwise they stay as made.
    """

    def __init__(
        self,
        dataset: Any,
        order: Order,
        batch_size: int,
        *,
        seed: int,
        workers: int = 0,
        epochs: int | None = None,
        rank: int = 0,
        world: int = 1,
        start_method: Literal["fork", "spawn", "forkserver"] | None = None,
        device: torch.device | str | None = None,
        bad_images: Literal["raise", "skip"] = "raise",
        mix: Any = None,
        log: Callable[[str], Any] = print,
    ):
        check_dataset(dataset, batch_size)
        self.order, self.batch_size, self.seed = order, batch_size, seed
        self.epochs = math.inf if epochs is None else epochs
        self.rank, self.world, self.mix = rank, world, mix
        self.device = torch.device(device or "cpu")
        self.in_batches = hasattr(dataset, "batch")
        self.skipped: dict[int, str] = {}  # rows that were left out so far, and why
        self._planned: tuple[int, Plan] | None = None
        self._is_checked = False
        on_card = self.in_batches and self.device.type != "cpu"
        self._samples_at_once = SAMPLES_AT_ONCE if on_card else 0
        self.dataset = dataset.to(self.device) if on_card and hasattr(dataset, "to") else dataset
        self.batches_per_epoch = len(self._bounds(0)) - 1
        self.workers = 0 if self.in_batches else min(workers, len(self._plan(0).index))
        self._workers = Workers(Reader(dataset, seed, bad_images == "skip"), self.workers, start_method, log)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on; those before it are not loaded."""
        batches = self._with_batch(epoch, start) if self.in_batches else self._with_reader(epoch, start)
        return beside(batches, self.device) if self.device.type == "cuda" else batches

    def close(self) -> None:
        """Stop the worker processes; the next epoch starts new ones."""
        self._workers.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _plan(self, epoch: int) -> Plan:
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, self.order(self.seed, epoch)
        return self._planned[1]

    def _bounds(self, epoch: int) -> np.ndarray:
        return self._plan(epoch).bounds(self.batch_size)

    def _keys(self, epoch: int, start: int) -> Iterator[PieceKey]:
        """A key for every batch: all of this rank's samples in one piece."""
        plan, bounds = self._plan(epoch), self._bounds(epoch).tolist()
        for number in range(start, len(bounds) - 1):
            total = bounds[number + 1] - bounds[number]
            first, last = shard(total, self.rank, self.world)
            rows, places = slice(bounds[number] + first, bounds[number] + last), np.arange(first, last)
            is_last = number == len(bounds) - 2
            yield PieceKey(epoch, number, plan.index[rows], plan.draw[rows], places, total, 0, is_last)

    def _with_batch(self, epoch: int, start: int) -> Iterator[Batch]:
        """Batches that the dataset makes itself; on a card several small ones at once."""
        keys, batches = self._keys(epoch, start), 1  # at once; the first one is not kept waiting
        if not self._is_checked:
            for key in islice(self._keys(epoch, start), CHECKED_BATCHES):
                check_batch(self.dataset, Keys(self.seed, epoch, key.index, key.draw))
            self._is_checked = True
        while several := list(islice(keys, batches)):
            index, draw = (np.concatenate([getattr(key, name) for key in several]) for name in ("index", "draw"))
            if not len(index):  # an empty shard needs tensors of the right shapes too, for the engine
                index = draw = np.zeros(1, np.int64)
            made, done = made_of(self.dataset, Keys(self.seed, epoch, index, draw)), 0
            nbytes = sum(tensor.nbytes for tensor in tensors_of(made)) // len(index)
            batches = max(1, min(self._samples_at_once, BYTES_AT_ONCE // max(1, nbytes)) // self.batch_size)
            for key in several:
                rows = slice(done, done + len(key.index))
                inputs, targets = map_tree(lambda tensor: tensor[rows], made)  # noqa: B023
                done = rows.stop
                yield self._finished(key, inputs, targets, key.index, key.place, key.total)

    def _with_reader(self, epoch: int, start: int) -> Iterator[Batch]:
        """Batches of single samples, put together from pieces."""
        if start >= len(self._bounds(epoch)) - 1:
            return
        stream, parts, digests = self._stream_at(epoch, start), [], []
        while True:
            if self.workers and self._workers.stream is not stream:
                raise RuntimeError(
                    "an earlier epoch was continued after another had begun, or after the loader was closed: the "
                    "workers load one epoch at a time"
                )
            key, answer = stream.receive()
            if isinstance(key, CheckKey):
                digests.append(answer)
                if key.turned:
                    compare_samples(self.dataset, *digests)
                    self._is_checked = True
                continue
            parts.append((key, answer))
            if key.following:
                continue
            inputs, targets, index, place, skipped = joined(parts, self.device.type == "cuda")
            self.skipped |= skipped
            batch, parts = self._finished(key, inputs, targets, index, place, key.total - len(skipped)), []
            stream.position = (epoch + 1, 0) if key.is_last else None
            if len(batch) or self.world > 1:  # with several ranks the engine needs empty shards too
                yield batch
            if key.is_last:
                return

    def _stream_at(self, epoch: int, start: int) -> Stream:
        """The workers' present stream if it has gone on to this epoch, else a new one."""
        stream = self._workers.stream
        if stream is None or stream.position != (epoch, start) or epoch >= self.epochs:
            stream = self._workers.begin(Loader._pieces(weakref.proxy(self), epoch, start))  # its workers end with it
        stream.position = None
        return stream

    def _pieces(self, epoch: int, start: int) -> Iterator[PieceKey | CheckKey]:
        """The keys of an epoch and all later ones, each batch in a piece per worker; and two checks of some rows."""
        unchecked = not self._is_checked
        while True:
            for key in Loader._keys(self, epoch, start):  # a bound method would keep the loader alive
                pieces, checks = key.split(self.workers or 1), []
                if unchecked:
                    rows, unchecked = key.index[:CHECKED_SAMPLES].tolist(), False
                    checks = [CheckKey(epoch, rows, turned) for turned in (False, True)]
                # Checks come second, so that the first batch need not wait, but an epoch must end with a batch.
                yield from checks + pieces if key.is_last else pieces + checks
            epoch, start = epoch + 1, 0
            if epoch >= self.epochs:
                return

    def _finished(
        self, key: PieceKey, inputs: Tree, targets: Tree, index: np.ndarray, place: np.ndarray, total: int
    ) -> Batch:
        """The batch on its device, with its pairs blended."""
        rows, weights = torch.from_numpy(index), weights_of(self.dataset)
        weights = None if weights is None else torch.as_tensor(weights[rows if isinstance(weights, Tensor) else index])
        batch = Batch(inputs, targets, rows, weights, key.epoch, key.number, total)
        if self.device.type == "cuda":
            batch = to_card(batch, self.device)
        return mix_pairs(self.mix, batch, place, self.seed) if self.mix and len(batch) else batch
