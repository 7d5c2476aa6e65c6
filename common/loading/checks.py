"""Checks that a dataset returns the same sample for the same key: some samples are loaded twice and compared.

This finds randomness that a search for generators cannot: a generator made for every sample, a counter of calls and,
where two workers load the same rows, values that differ between processes (the process id, `hash` of a text) or are
kept from the first use. It does not find effects in few samples only, values that one process keeps for ever (a cache
of random crops with fewer than two workers), values that all processes of a run share (`hash` of a text in forked
workers), and slow changes with the number of calls of `batch`. Such samples change after a restart.
"""

import hashlib
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.batch import Tree, tensors_of
from common.errors import UserError
from common.loading.binding import kept_global_state, refuse_generators
from common.loading.collate import as_tensors, join
from common.loading.keys import Keys

CHECKED_SAMPLES = 8  # of the first batch; a flip that is not keyed is missed once in 256 times
CHECKED_BATCHES = 2  # of a dataset that makes batches
ROUNDING = 1e-4  # of the largest value: matrix products round differently in a smaller batch


def weights_of(dataset: Any) -> Tensor | np.ndarray | None:
    """The weight of every row of the dataset, [n], if it has any."""
    weights = getattr(dataset, "weights", None)
    return weights if weights is None or isinstance(weights, Tensor) else np.asarray(weights)


def check_dataset(dataset: Any, batch_size: int) -> None:
    """Raise UserError for what cannot be loaded by rows, weights that are not one for every row, and own generators."""
    ways = ("batch", "sample", "__getitem__")
    by_row = hasattr(dataset, "__len__") and any(hasattr(dataset, way) for way in ways)
    if not by_row or isinstance(dataset, torch.utils.data.IterableDataset):
        raise UserError(
            f"{type(dataset).__name__} cannot be loaded by row numbers: expected __len__ and one of {', '.join(ways)}"
        )
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: expected a number of samples from 1 up")
    weights = weights_of(dataset)
    if weights is not None and tuple(weights.shape) != (len(dataset),):
        raise UserError(
            f"the weights of {type(dataset).__name__} are an array {list(weights.shape)}: expected a number for each "
            f"of its {len(dataset)} rows"
        )
    if hasattr(dataset, "batch"):
        refuse_generators(dataset)


def digest(sample: Any) -> bytes:
    """sha256 of the arrays, tensors and numbers of a sample."""
    found, waiting = hashlib.sha256(), [sample]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            waiting.extend(part.items())
        elif isinstance(part, (tuple, list)):
            waiting.extend(part)
        elif isinstance(part, Tensor):
            found.update(f"{part.dtype} {tuple(part.shape)}".encode())
            found.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        else:
            array = np.asarray(part)
            found.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    return found.digest()


def compare_samples(dataset: Any, one: dict[int, bytes], other: dict[int, bytes]) -> None:
    """Raises UserError naming the first row whose two digests differ; unreadable rows have no digest."""
    for row in one:
        if one[row] != other.get(row, one[row]):
            raise UserError(
                f"row {row} of {type(dataset).__name__} differs between two loads under one key: it makes a generator "
                "of its own, keeps state (a counter, a cache of random crops) or asks its process (os.getpid, "
                "hash of a text). Draw from the `rng` of sample(index, rng)"
            )


def made_of(dataset: Any, keys: Keys) -> tuple[Tree, Tree]:
    """The samples that the dataset makes; raises UserError where they are no pair, or not one for every key."""
    made = dataset.batch(keys.index, keys)
    if not isinstance(made, (tuple, list)) or len(made) != 2:
        raise UserError(
            f"batch(indices, keys) of {type(dataset).__name__} returned a {type(made).__name__}: expected a "
            "pair (inputs, targets)"
        )
    made = as_tensors(made)
    if wrong := [list(tensor.shape) for tensor in tensors_of(made) if tensor.shape[:1] != (len(keys),)]:
        raise UserError(
            f"batch(indices, keys) of {type(dataset).__name__} returned a tensor {wrong[0]} for {len(keys)} "
            f"indices: expected [{len(keys)}, ...]"
        )
    return made


def check_batch(dataset: Any, keys: Keys) -> None:
    """Load a batch twice, and once in two halves; raises UserError when the samples are not the same."""

    def load(*edges: int) -> list[Tensor]:
        parts = [Keys(keys.seed, keys.epoch, keys.index[a:b], keys.draw[a:b]) for a, b in pairwise(edges) if a < b]
        return tensors_of(join([made_of(dataset, part) for part in parts]))

    if not len(keys):
        return
    ways = {"twice": (0, len(keys)), "in two halves": (0, (len(keys) + 1) // 2, len(keys))}
    with kept_global_state():
        whole = load(0, len(keys))
        for way, edges in ways.items():
            if any(_differ(one, other) for one, other in zip(whole, load(*edges), strict=True)):
                raise UserError(
                    f"a batch of {type(dataset).__name__} differs when it is loaded {way} under the same keys: it "
                    "draws from a generator that is not keyed (np.random, torch.rand, a transform), keeps state, or "
                    "mixes its samples. Draw from the `keys` of batch(indices, keys), one row for every sample"
                )


def _differ(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return True
    if one.is_floating_point() or one.is_complex():
        return not torch.allclose(one, other, ROUNDING, ROUNDING * _largest(one), equal_nan=True)
    return not torch.equal(one, other)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().nan_to_num(0, 0, 0).max()) if tensor.numel() else 0.0
