"""The batch: the samples of one optimizer step, before anything is cut to fit the memory."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Tree = Any  # a tensor, or a tuple, list or dict of trees; every tensor has the batch's B rows


def map_tree(function: Callable[[Tensor], Any], tree: Tree) -> Tree:
    """Apply `function` to every tensor of a tree and keep the shape of the tree."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tree(function, value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_tree(function, value) for value in tree)
    raise TypeError(f"a batch holds tensors in tuples, lists and dicts, not {type(tree).__name__}")


def tensors_of(tree: Tree) -> list[Tensor]:
    """All tensors of a tree, in a fixed order (dicts by insertion)."""
    found: list[Tensor] = []
    map_tree(found.append, tree)
    return found


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
        return self._map(lambda tensor: tensor[start:stop])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            inputs=map_tree(function, self.inputs),
            targets=map_tree(function, self.targets),
            index=function(self.index),
            weights=None if self.weights is None else function(self.weights),
        )
