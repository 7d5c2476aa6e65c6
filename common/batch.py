"""The batch: the samples of one optimizer step, before it is split into micro-batches."""

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, fields, is_dataclass, replace
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError

Tree = Any  # a tensor, None, or a tuple, list, dict or dataclass of trees; every tensor has the batch's B rows


def map_tree(function: Callable[[Tensor], Any], tree: Tree) -> Tree:
    """Apply `function` to every tensor of a tree; containers keep their type, named tuples and dataclasses included."""
    if isinstance(tree, Tensor):
        return function(tree)
    if tree is None:
        return None
    if isinstance(tree, dict):
        mapped = copy(tree)  # an OrderedDict, or the ModelOutput of transformers, stays one
        for key, value in tree.items():
            mapped[key] = map_tree(function, value)
        return mapped
    if isinstance(tree, (tuple, list)):
        values = [map_tree(function, value) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    if is_dataclass(tree):
        entries = {field.name: getattr(tree, field.name) for field in fields(tree) if field.init}
        trees = {name: value for name, value in entries.items() if not isinstance(value, (Number, str))}
        return replace(tree, **{name: map_tree(function, value) for name, value in trees.items()})
    raise TypeError(f"a batch holds tensors in tuples, lists, dicts and dataclasses, not {type(tree).__name__}")


def tensors_of(tree: Tree) -> list[Tensor]:
    """All tensors of a tree, in the order of `map_tree` (dicts by insertion)."""
    if isinstance(tree, Tensor):
        return [tree]
    found: list[Tensor] = []
    map_tree(lambda tensor: found.append(tensor) or tensor, tree)
    return found


def rebuilt(tree: Tree, tensors: Iterable[Tensor]) -> Tree:
    """The tree with its tensors replaced by `tensors`, in the order of `tensors_of`."""
    remaining = iter(tensors)
    return map_tree(lambda _: next(remaining), tree)


def concatenated(trees: Sequence[Tree]) -> Tree:
    """Trees of the same structure, concatenated along their rows."""
    return rebuilt(trees[0], (torch.cat(column) for column in zip(*map(tensors_of, trees), strict=True)))


def on_device(tensor: Tensor, device: torch.device | str, non_blocking: bool = False) -> Tensor:
    """The tensor on `device`; float64 becomes float32 on Apple's GPUs, which do not have it."""
    if tensor.dtype == torch.float64 and torch.device(device).type == "mps":
        tensor = tensor.float()
    return tensor.to(device, non_blocking=non_blocking)


@dataclass(frozen=True)
class Batch:
    """An effective batch of B samples (this process's shard of it when there are several ranks).

    `index` [B] is the row of every sample in its dataset, `weights` [B] an optional weight per sample,
    `number` the batch's place in its epoch and `total` the samples of the batch over all ranks.
    """

    inputs: Tree
    targets: Tree
    index: Tensor
    weights: Tensor | None = None
    epoch: int = 0
    number: int = 0
    total: int | None = None

    def __len__(self) -> int:
        return len(self.index)

    def slice(self, start: int, stop: int) -> "Batch":
        """Samples start..stop as views of the same memory: a micro-batch costs no copy."""
        return map_tree(lambda tensor: tensor[start:stop], self)

    def to(self, device: torch.device | str) -> "Batch":
        return map_tree(lambda tensor: on_device(tensor, device), self)


def check_rows(batch: Batch) -> None:
    """Raise UserError for a batch whose tensors have another number of rows than it has samples."""
    parts = {"inputs": batch.inputs, "targets": batch.targets, "weights": batch.weights}
    for name, tree in parts.items():
        tensors = tensors_of(tree)
        if not tensors and name != "weights":
            raise UserError(f"the {name} of the batch hold no tensor: a loss without targets may be given the inputs")
        for tensor in tensors:
            if tensor.shape[:1] != (len(batch),):
                raise UserError(
                    f"the {name} of a batch of {len(batch)} samples, by its index, hold a tensor {list(tensor.shape)}: "
                    f"expected [{len(batch)}, ...]"
                )
