"""Samples to batches: trees of arrays, tensors and numbers become one tree of tensors [B, ...]."""

from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.batch import Tree
from common.errors import UserError

NUMBERS = (bool, int, float)
ARRAYS = (Tensor, np.ndarray, np.generic)


def collate(samples: list[Any]) -> Tree:
    """Stack samples to one tree; dtypes stay."""
    first, kinds = samples[0], {type(sample) for sample in samples}
    if kinds <= set(NUMBERS):
        return torch.tensor(samples)
    if isinstance(first, (dict, tuple, list)):
        _check_containers(samples)
        if isinstance(first, dict):
            return {name: collate([sample[name] for sample in samples]) for name in first}
        return tuple(collate(list(part)) for part in zip(*samples, strict=True))
    if np.ma.MaskedArray in kinds and any(map(np.ma.is_masked, samples)):  # tensors have no mask
        raise UserError("a sample holds a masked array: give it values instead, with .filled(0), or .filled(np.nan)")
    if len(kinds) > 1 or not isinstance(first, ARRAYS) or len({sample.dtype for sample in samples}) > 1:
        samples = _of_one_type(samples)
        first = samples[0]
    _check_alike([tuple(sample.shape) for sample in samples])
    return torch.stack(samples).detach() if isinstance(first, Tensor) else as_tensor(np.stack(samples))


def _of_one_type(samples: list[Any]) -> list[Tensor]:
    """Arrays, tensors and numbers in the one type that torch finds for all of theirs, as `join` does.

    numpy finds another for int64 beside float32: a batch would depend on which of its samples a worker loads together.
    """
    if odd := [type(sample).__name__ for sample in samples if not isinstance(sample, (*ARRAYS, *NUMBERS))]:
        raise UserError(f"a sample holds a {odd[0]}: expected arrays, tensors or numbers in tuples and dicts")
    tensors = [torch.as_tensor(x) if isinstance(x, (Tensor, *NUMBERS)) else as_tensor(x) for x in samples]
    dtype = _common_type(tensors)
    return [tensor.to(dtype) for tensor in tensors]


def _common_type(tensors: list[Tensor]) -> torch.dtype:
    """The type that holds the numbers of all; raises UserError for uint16 beside another, where torch finds none."""
    try:
        return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    except RuntimeError as error:
        found = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
        raise UserError(
            f"the samples of a batch have the types {' and '.join(found)}, which have none in common: convert them to "
            "one, as with .astype(np.int32)"
        ) from error


def _check_containers(samples: list[Any]) -> None:
    """Raises UserError where samples have different keys, or different numbers of parts."""

    def described(sample: Any) -> str:
        if isinstance(sample, dict):
            return f"a dict of {sorted(map(str, sample))}"
        return f"{len(sample)} parts" if isinstance(sample, (tuple, list)) else f"a {type(sample).__name__}"

    found = set(map(described, samples))
    if len(found) > 1:
        raise UserError(f"the samples of a batch hold {' and '.join(sorted(found)[:3])}: expected one kind")


def join(trees: list[Tree], pinned: bool = False) -> Tree:
    """Concatenate trees of tensors [n, ...]; borrowed ones are always copied, with `pinned` to page-locked memory."""
    first = trees[0]
    if isinstance(first, (dict, tuple, list)):
        _check_containers(trees)
    if isinstance(first, dict):
        return {name: join([tree[name] for tree in trees], pinned) for name in first}
    if isinstance(first, (tuple, list)):
        return tuple(join(list(parts), pinned) for parts in zip(*trees, strict=True))
    if len(trees) == 1 and not hasattr(first, "is_borrowed"):
        return first
    _check_alike([tuple(tensor.shape[1:]) for tensor in trees])
    dtype = _common_type(trees)
    if not pinned:
        return torch.cat(trees)
    whole = torch.empty((sum(map(len, trees)), *first.shape[1:]), dtype=dtype, pin_memory=True)
    return torch.cat(trees, out=whole)


def _check_alike(shapes: list[tuple[int, ...]]) -> None:
    if len(set(shapes)) > 1:
        raise UserError(f"the samples of a batch have the shapes {sorted(set(shapes))}: resize or crop them to one")


def as_tensors(tree: Tree) -> Tree:
    """The tree with its arrays, and columns of pandas, converted to tensors."""
    if isinstance(tree, dict):
        return {name: as_tensors(part) for name, part in tree.items()}
    if isinstance(tree, (tuple, list)):
        return tuple(as_tensors(part) for part in tree)
    is_array = hasattr(tree, "__array__") and not isinstance(tree, Tensor)
    return as_tensor(tree) if is_array or isinstance(tree, str) else tree


def as_tensor(array: np.ndarray | np.generic) -> Tensor:
    """The array as a tensor in the same memory; read-only and non-contiguous arrays are copied.

    Raises UserError for texts, dates and objects.
    """
    array = np.asarray(array)
    if array.dtype.kind not in "biufc":
        raise UserError(
            f"an array of {array.dtype}, the first is {str(next(array.flat, ''))[:30]!r}: expected numbers. In "
            f"build(), turn names into class numbers for dataset and metric, and back into names in Submission's `rows`"
        )
    return torch.from_numpy(array if array.flags.writeable and array.flags.forc else array.copy())
