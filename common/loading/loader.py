"""Batches of a dataset, bit-identical for any number of workers, any number of processes and after any restart.

A dataset is any object with `__len__` and one of

    batch(indices [B], keys) -> (inputs, targets)   many samples at once, in the training process: small data as tensors
    sample(index, rng) -> (input, target)           one sample, drawing from the np.random.Generator that it is handed
    __getitem__(index) -> (input, target)           one sample, drawing from generators that it holds, or global ones

Inputs and targets are arrays, tensors or numbers, or tuples and dicts of them. An optional attribute `weights` [n]
gives every row a weight. Images stay uint8 until they are on the device.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from common.batch import Batch, tensors_of
from common.errors import UserError
from common.loading.binding import held_generators
from common.loading.keys import MIX_STREAM, Keys
from common.loading.orders import Order, Plan, shard
from common.loading.worker import BatchKey, BatchReader, Loaded, as_tensors, send_generators_whole, start_worker

PREFETCH_LIMIT = 0.1  # of a card's memory: larger batches wait on the host, and travel in micro-batches


class Loader:
    """Yields this process's shard of every batch; `order` (common.loading.orders) decides what the batches are.

    The shard of rank r of `world` is a contiguous block of whole pairs. `mix` (common.loading.mixing) blends pairs.
    `bad_images="skip"` leaves unreadable images out of their batches and lists them in `skipped`. Batch.total is then
    what this rank knows of; the true size over all ranks is the sum of their lengths, which the engine forms anyway.
    On a CUDA `device` the next batch is copied while the model works; otherwise batches stay where they were made.
    """

    def __init__(
        self,
        dataset: Any,
        order: Order,
        batch_size: int,
        *,
        seed: int,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        keep_tail: bool = True,
        start_method: Literal["fork", "spawn"] | None = None,
        device: torch.device | str | None = None,
        bad_images: Literal["raise", "skip"] = "raise",
        mix: Any = None,
    ):
        self.dataset, self.order, self.batch_size, self.seed = dataset, order, batch_size, seed
        self.rank, self.world, self.keep_tail, self.mix = rank, world, keep_tail, mix
        self.device = torch.device(device or "cpu")
        self.in_batches = hasattr(dataset, "batch")
        self.workers = 0 if self.in_batches else workers
        self._start_method = start_method
        self._skipped: dict[int, str] = {}
        self._planned: tuple[int, Plan] | None = None
        self._torch_loader: torch.utils.data.DataLoader | None = None
        held = held_generators(dataset) if self.in_batches else []
        if held:
            raise UserError(
                f"{held[0][0]} is a {type(held[0][1]).__name__}, but batch(indices, keys) may draw from "
                "`keys` alone: other numbers would depend on which samples come together"
            )
        self._reader = BatchReader(dataset, seed, bad_images == "skip")
        self.batches_per_epoch = len(self._plan(0).bounds(batch_size, keep_tail)) - 1
        if not self.batches_per_epoch:
            raise UserError(
                f"{len(self._plan(0).index)} samples give no batch of {batch_size}: keep the tail, or use "
                "a smaller --batch-size"
            )

    @property
    def skipped(self) -> list[tuple[int, str]]:
        """The samples that were left out so far, sorted: their row and the reason."""
        return sorted(self._skipped.items())

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on; those before it are not loaded."""
        loaded = self._with_batch(epoch, start) if self.in_batches else self._with_reader(epoch, start)
        finished = (self._finished(part) for part in loaded)
        return _one_ahead(finished, self.device) if self.device.type == "cuda" else (batch for batch in finished)

    def close(self) -> None:
        """Stop the worker processes; the next epoch starts new ones."""
        self._torch_loader = None

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _plan(self, epoch: int) -> Plan:
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, self.order(self.seed, epoch)
        return self._planned[1]

    def _keys(self, epoch: int, start: int) -> Iterator[BatchKey]:
        plan = self._plan(epoch)
        bounds = plan.bounds(self.batch_size, self.keep_tail).tolist()
        for number in range(start, len(bounds) - 1):
            total = bounds[number + 1] - bounds[number]
            first, last = shard(total, self.rank, self.world)
            part = slice(bounds[number] + first, bounds[number] + last)
            yield BatchKey(epoch, number, plan.index[part], plan.draw[part], np.arange(first, last), total)

    def _with_batch(self, epoch: int, start: int) -> Iterator[Loaded]:
        weights = getattr(self.dataset, "weights", None)
        for key in self._keys(epoch, start):
            # A shard of no samples still has the shapes of one, for the engine.
            index, draw = (key.index, key.draw) if len(key.index) else (np.zeros(1, np.int64), np.zeros(1, np.int64))
            inputs, targets = as_tensors(self.dataset.batch(index, Keys(self.seed, epoch, index, draw)))
            batch = Batch(
                inputs,
                targets,
                torch.from_numpy(index),
                None if weights is None else torch.as_tensor(weights)[index],
                epoch,
                key.number,
                key.total,
            )
            yield Loaded(batch.slice(0, len(key.index)), key.place, [])

    def _with_reader(self, epoch: int, start: int) -> Iterator[Loaded]:
        """Batches of single samples, from worker processes where there are any; raises their UserErrors here."""
        keys = self._keys(epoch, start)
        try:
            for loaded in self._in_workers(keys) if self.workers else map(self._reader.__getitem__, keys):
                if isinstance(loaded, UserError):
                    raise loaded
                self._skipped |= loaded.skipped
                if not len(loaded.batch) and self.world == 1:  # with others, the engine waits for every shard
                    continue
                yield loaded
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise UserError(
                "a worker process was ended from outside, mostly for want of memory: use fewer --workers "
                f"or a smaller --batch-size ({str(error).splitlines()[0]})"
            ) from error

    def _in_workers(self, keys: Iterator[BatchKey]) -> Iterator[Loaded | UserError]:
        if self._torch_loader is None:
            send_generators_whole()
            # Its own generator: the DataLoader draws a base seed, which must not come from the training's stream.
            self._torch_loader = torch.utils.data.DataLoader(
                self._reader,
                batch_size=None,
                sampler=_Sampler(),
                collate_fn=_as_it_is,
                worker_init_fn=start_worker,
                num_workers=min(self.workers, self.batches_per_epoch),
                persistent_workers=True,
                multiprocessing_context=self._start_method,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator(),
            )
        sampler = self._torch_loader.sampler
        sampler.keys = keys
        arriving = iter(self._torch_loader)
        while (loaded := next(arriving, None)) is not None:
            yield loaded
            if sampler.keys is not keys:
                raise RuntimeError("an epoch went on after another was begun: the workers serve one at a time")

    def _finished(self, loaded: Loaded) -> Batch:
        """The batch on its device, with its pairs blended."""
        batch, place = loaded.batch, loaded.place
        if self.device.type == "cuda":
            batch = _sent(batch, self.device)
        if self.mix is None or not len(batch):
            return batch
        local = {position: row for row, position in enumerate(place.tolist())}
        partner = [local.get(position ^ 1, row) for position, row in local.items()]  # alone: a pair with itself
        keys = Keys(self.seed, batch.epoch, place // 2, batch.number)
        inputs, targets = self.mix(batch.inputs, batch.targets, torch.tensor(partner), keys, MIX_STREAM)
        return replace(batch, inputs=inputs, targets=targets)


class _Sampler:
    """Hands the keys of the epoch at hand to the workers, which live through all epochs."""

    def __init__(self):
        self.keys: Iterator[BatchKey] = iter(())

    def __iter__(self) -> Iterator[BatchKey]:
        return self.keys


def _as_it_is(loaded: Loaded | UserError) -> Loaded | UserError:
    return loaded


def _sent(batch: Batch, device: torch.device) -> Batch:
    """The batch on the card, unless it would take too much of it: then pinned on the host."""
    tensors = tensors_of((batch.inputs, batch.targets))
    if any(tensor.is_cuda for tensor in tensors):
        return batch.to(device)
    pinned = batch if batch.index.is_pinned() else batch.pin_memory()
    limit = PREFETCH_LIMIT * torch.cuda.get_device_properties(device).total_memory
    return pinned.to(device, non_blocking=True) if sum(tensor.nbytes for tensor in tensors) <= limit else pinned


def _one_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yields every batch after the copy of the next one was started on a stream of its own."""
    copies, ahead = torch.cuda.Stream(device), None
    copies.wait_stream(torch.cuda.current_stream(device))  # data that lives on the card may still be on its way
    while True:
        with torch.cuda.stream(copies):
            batch = next(batches, None)
            arrived = torch.cuda.Event()
            arrived.record(copies)
        if ahead is not None:
            ready, its_arrival = ahead
            model_stream = torch.cuda.current_stream(device)
            model_stream.wait_event(its_arrival)
            weights = () if ready.weights is None else (ready.weights,)
            for tensor in tensors_of((ready.inputs, ready.targets, ready.index, *weights)):
                if tensor.is_cuda:  # the memory must not be given to the next copy before the model is done with it
                    tensor.record_stream(model_stream)
            yield ready
        if batch is None:
            return
        ahead = batch, arrived
