"""Copies batches to the card: through page-locked memory, on a CUDA stream of their own, while the model works."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from common.batch import Batch, map_tree, tensors_of

PREFETCH_LIMIT = 0.1  # of a card's memory: larger batches stay on the host and are copied in micro-batches


def to_device(array: np.ndarray | Tensor, device: torch.device | str) -> Tensor:
    """The array on the device; the host does not wait for the card."""
    tensor, on_card = torch.as_tensor(array), torch.device(device).type == "cuda"
    return (tensor.pin_memory() if on_card else tensor).to(device, non_blocking=on_card)


def to_card(batch: Batch, device: torch.device) -> Batch:
    """Move inputs, targets and weights to the card; if they would take too much of it, only pin them on the host.

    `index` stays on the host: the card does not need it, and reading it back would wait for the card.
    """
    if all(tensor.device == device for tensor in tensors_of((batch.inputs, batch.targets, batch.weights))):
        return batch
    nbytes = sum(tensor.nbytes for tensor in tensors_of((batch.inputs, batch.targets)) if not tensor.is_cuda)
    fits = nbytes <= PREFETCH_LIMIT * torch.cuda.get_device_properties(device).total_memory

    def move(tensor: Tensor) -> Tensor:
        if tensor.device == device:
            return tensor
        pinned = tensor if tensor.is_pinned() or tensor.is_cuda else tensor.pin_memory()
        return pinned.to(device, non_blocking=True) if fits else pinned

    inputs, targets, weights = map_tree(move, (batch.inputs, batch.targets, batch.weights))
    return replace(batch, inputs=inputs, targets=targets, weights=weights)


def beside(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Make and copy every batch on a CUDA stream of their own, while the card works on the previous batch.

    A batch is requested after the previous step has been launched, so no step waits for the batch after it.
    """
    copies = torch.cuda.Stream(device)
    copies.wait_stream(torch.cuda.current_stream(device))  # data that lives on the card may still be on its way
    while True:
        with torch.cuda.stream(copies):
            batch = next(batches, None)
        if batch is None:
            return
        model_stream = torch.cuda.current_stream(device)
        model_stream.wait_stream(copies)
        for tensor in tensors_of(batch):
            if tensor.is_cuda:  # the memory must not be given to the next copy before the model is done with it
                tensor.record_stream(model_stream)
        yield batch
