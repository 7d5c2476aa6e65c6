"""Sends keys to worker processes, which live through all epochs, or to this one; pieces come back in the same order."""

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from typing import Any

import torch

from common.errors import UserError, of_killed_worker
from common.loading import worker
from common.loading.slots import Slots
from common.loading.worker import Answer, Key, Reader

PIECES_AHEAD = 3  # per worker: two batches ready and one being loaded


class Stream:
    """The keys that were sent, in order, each with its answer.

    `position` is the (epoch, batch) that comes next, None in the middle of an epoch.
    """

    def __init__(self, answers: Iterator[tuple[Key, Answer | UserError]]):
        self._answers = answers
        self.position: tuple[int, int] | None = None

    def receive(self) -> tuple[Key, Answer]:
        """The next key and its answer; raises UserError if a worker answered with one or was killed."""
        try:
            key, answer = next(self._answers)
        except RuntimeError as error:
            raise of_killed_worker(error) from error
        if isinstance(answer, UserError):
            raise answer
        return key, answer


class Workers:
    """`count` processes that load samples with a Reader, or this process for 0; `begin` sends them new keys."""

    def __init__(self, reader: Reader, count: int, start_method: str | None, log: Callable[[str], Any]):
        self._reader, self._count, self._start_method = reader, count, start_method
        self._log = cache(log)  # every line only once
        self._torch_loader: torch.utils.data.DataLoader | None = None
        self.stream: Stream | None = None  # of the epoch that they load

    def begin(self, keys: Iterator[Key]) -> Stream:
        """The stream that answers `keys`, which must not refer to it.

        A reference cycle would leave the workers to the garbage collector, which deletes their queues first, so that
        joining each worker would time out.
        """
        if not self._count:
            return Stream(map(self._reader.__getitem__, keys))
        iterator = self._iterator()
        if iterator is not None and not all(process.is_alive() for process in iterator._workers):
            self.close()  # one was killed in an earlier epoch
        if self._torch_loader is None:
            self._torch_loader = self._started()
        self._torch_loader.sampler.keys = keys
        self.stream = Stream(iter(self._torch_loader))
        return self.stream

    def close(self) -> None:
        iterator = self._iterator()
        if iterator is not None:
            with suppress(RuntimeError):  # a spawned worker may abort while it ends, which torch reports as a failure
                iterator._shutdown_workers()
        self._torch_loader = self.stream = None

    def _iterator(self) -> Any:
        """That of the workers, or None before they are started."""
        return None if self._torch_loader is None else self._torch_loader._iterator

    def _started(self) -> torch.utils.data.DataLoader:
        worker.send_generators_whole()
        context = torch.multiprocessing.get_context(self._start_method)
        if context.get_start_method() != "fork" and worker.is_large_pickle(self._reader, self._count):
            self._log(
                f"{self._count} workers get copies of {type(self._reader.dataset).__name__}, more than 1 GiB together, "
                "since processes are not forked here: use fewer --workers, or open large arrays in __setstate__"
            )
        is_main = threading.current_thread() is threading.main_thread()
        return torch.utils.data.DataLoader(
            self._reader,
            batch_size=None,
            sampler=_Latest(),
            collate_fn=worker.Sealed,
            worker_init_fn=partial(worker.start_worker, is_main, Slots(self._count)),
            num_workers=self._count,
            prefetch_factor=PIECES_AHEAD,
            persistent_workers=True,
            multiprocessing_context=context,
            # Its own generator: the DataLoader draws a base seed, which must not change the training's numbers.
            generator=torch.Generator(),
        )


class _Latest:
    """Hands the keys of the latest stream to the workers."""

    keys: Iterator[Key]

    def __iter__(self) -> Iterator[Key]:
        return self.keys
