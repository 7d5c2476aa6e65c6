"""The processes of one training, and the collectives that they use.

torchrun starts the processes and numbers them by environment variables. Votes and other small messages go through the
CPU (gloo), so that they work when a card is full and never wait for it. Gradients on CUDA cards go through nccl.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed

from common.batch import Tree, map_tree, tensors_of
from common.errors import UserError, first_line

PATIENCE = timedelta(hours=1)  # timeout of a collective, for example while the first process predicts held-out rows


def alone(work: Callable[[], Any]) -> Any:
    return work()


@dataclass(frozen=True)
class Ranks:
    """This process among `world` processes. In a single process every method below returns at once.

    Methods that allocate memory take `together` and run through it every part that may fail in one process only: all
    processes then fail together, before the next collective.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # rank among the processes of this computer: it selects the card

    @staticmethod
    def from_environment() -> "Ranks":
        """Connect to the other processes that torchrun started; SINGLE without torchrun. Use it in a `with` block."""
        if not _is_launched():
            return SINGLE
        ranks = Ranks(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
        cards = torch.cuda.device_count()
        if ranks.local_rank < cards:
            torch.cuda.set_device(ranks.local_rank)
        backend = "cpu:gloo,cuda:nccl" if cards else "gloo"
        ranks._with_all(distributed.init_process_group, backend, timeout=PATIENCE)
        return ranks

    @property
    def is_writer(self) -> bool:
        """Whether this is the first process, the only one that writes files and logs."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return flag if self.world == 1 else bool(self.sum_(torch.tensor(float(flag))) > 0)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over the processes, the same bits in each, and return it."""
        if self.world > 1:
            self._with_all(distributed.all_reduce, tensor)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Replace every number of `tensor` by the largest of any process and return it."""
        if self.world > 1:
            self._with_all(distributed.all_reduce, tensor, distributed.ReduceOp.MAX)
        return tensor

    def broadcast(self, value: Any) -> Any:
        """Return the first process's `value` in every process."""
        if self.world == 1:
            return value
        box = [value]
        self._with_all(distributed.broadcast_object_list, box, src=0)
        return box[0]

    def union(self, entries: dict) -> dict:
        """Merge the dictionaries of all processes, in every process."""
        if self.world == 1:
            return entries
        found: list[dict] = [{}] * self.world
        self._with_all(distributed.all_gather_object, found, entries)
        return {key: value for part in found for key, value in part.items()}

    def gather(self, tree: Tree | None, together: Callable = alone) -> tuple[Tree, int]:
        """The rows of all processes in the order of their ranks, and the position of this process's first row.

        Processes may have different numbers of rows. A process that has none, and no tree to show the shapes, passes
        None.
        """
        if self.world == 1:
            return tree, 0
        shapes: list[tuple[Tree, str] | None] = [None] * self.world
        mine = None if tree is None else (map_tree(lambda x: x.to("meta"), tree), tensors_of(tree)[0].device.type)
        self._with_all(distributed.all_gather_object, shapes, mine)
        template, where = next(shape for shape in shapes if shape is not None)
        rows = [0 if shape is None else len(tensors_of(shape[0])[0]) for shape in shapes]
        own = iter([] if tree is None else tensors_of(tree))

        def joined(like: Tensor) -> Tensor:
            # all_gather needs equal sizes, so shares are padded to the longest; they are sent as bytes, because gloo
            # does not support bool.
            def padded() -> tuple[Tensor, list[Tensor]]:
                sent = torch.zeros(max(rows), *like.shape[1:], dtype=like.dtype, device=where)
                sent[: rows[self.rank]] = next(own, sent[:0])
                return sent, [torch.empty_like(sent) for _ in rows]

            sent, received = together(padded)
            self._with_all(distributed.all_gather, [_bytes(part) for part in received], _bytes(sent))
            return together(lambda: torch.cat([part[:n] for part, n in zip(received, rows, strict=True)]))

        return map_tree(joined, template), sum(rows[: self.rank])

    def sum_gradients(self, parameters: Sequence[Tensor], together: Callable = alone) -> None:
        """Sum every parameter's gradient over the processes, with one message per dtype.

        A parameter without a gradient in any process keeps none, so that the optimizer skips it as it would in a
        single process.
        """
        if self.world == 1:
            return
        present = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
        used = [p for p, anywhere in zip(parameters, self.max_(present).tolist(), strict=True) if anywhere]
        for alike in _by_dtype(used):
            flat = self.sum_(together(partial(_flat_gradients, alike)))
            _copy_back(flat, [parameter.grad for parameter in alike])

    def average_(self, tensors: Sequence[Tensor], weight: float, together: Callable = alone) -> None:
        """Replace every tensor by its mean over the processes, weighted by each process's `weight`.

        Integer tensors are counters and become the largest of any process. Sends one message per dtype.
        """
        if self.world == 1 or not tensors:
            return
        total = float(self.sum_(torch.tensor(float(weight))))
        for alike in _by_dtype(tensors):
            flat = together(partial(_flat, alike))
            if flat.is_floating_point():
                mean = self.sum_(flat.mul_(weight)).div_(total)  # in place: memory cannot run out here
                _copy_back(mean, alike)
            else:
                _copy_back(self.max_(flat), alike)

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.any(False)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        # After an error it could wait for the others, who notice the end of this process.
        if kind is None and self.world > 1 and distributed.is_initialized():
            distributed.destroy_process_group()

    def _with_all(self, collective: Callable, *given: Any, **named: Any) -> None:
        """Run a collective of torch.distributed; raises UserError if another process has ended."""
        try:
            collective(*given, **named)
        except RuntimeError as error:
            raise UserError(
                f"process {self.rank} of {self.world} lost the others ({first_line(error)}): one of them was killed or "
                "stopped, its own message says why. Repeat the same command to go on from the last checkpoint"
            ) from error


def _is_launched() -> bool:
    """Whether torchrun started this process among others.

    Clusters and notebooks set some of torchrun's variables too. An incomplete set is ignored, printed and removed from
    the environment, so that no library takes it for a launch.
    """
    numbers = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    given = {name: os.environ.get(name, "") for name in (*numbers, "MASTER_ADDR", "MASTER_PORT")}
    if given["WORLD_SIZE"] == "1":
        return False
    if all(given.values()) and all(given[name].isdecimal() for name in numbers):
        return True
    own = (*numbers, "LOCAL_WORLD_SIZE")  # the last would leave this process only a part of the cores
    found = " ".join(f"{name}={value}" for name in own if (value := os.environ.pop(name, "")))
    if found:
        absent = ", ".join(name for name, value in given.items() if not value) or "numbers in all of them"
        print(
            f"{found} ignored: not started by torchrun, which also sets {absent}. Several processes: make train NPROC=2"
        )
    return False


def _bytes(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).view(-1).view(torch.uint8)


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    return [[x for x in tensors if x.dtype == dtype] for dtype in dict.fromkeys(x.dtype for x in tensors)]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _flat_gradients(parameters: Sequence[Tensor]) -> Tensor:
    """All gradients as one vector; those that are missing become zeros."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)  # lies in memory as the parameter does
    return _flat([parameter.grad for parameter in parameters])


def _copy_back(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))


SINGLE = Ranks()
