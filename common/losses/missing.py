"""Means over the entries of a sample, some of which may be unknown: their targets are NaN."""

import torch
from torch import Tensor

from common.losses.protocol import full_precision, most_precise


def sample_mean(values: Tensor) -> Tensor:
    """Mean over all axes but the first. [B, ...] -> [B]"""
    return values.flatten(1).mean(1) if values.ndim > 1 else values


def known(targets: Tensor) -> Tensor | None:
    """Mask of the targets that are not NaN; None, at no cost, for integer types, which have no NaN. [B, ...]"""
    return ~targets.isnan() if targets.is_floating_point() else None


def present(targets: Tensor) -> Tensor:
    """Which masks, or labels, are not empty. [B, C, ...] -> bool [B, C]"""
    return (targets > 0)[..., None].flatten(2).any(2)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Sum over entries in the mask, divided by the number of all; its mass is `share`. [B, ...] -> [B]

    `values` must have finite gradients outside the mask too: fill the targets there before computing the loss.
    """
    return sample_mean(values if mask is None else torch.where(mask, values, 0.0))


def share(mask: Tensor | None, targets: Tensor) -> Tensor:
    """The share of every sample's entries that are in the mask: the mass of `masked_mean`. [B, ...] -> [B]"""
    if mask is None:
        return torch.ones(len(targets), device=targets.device)
    count = mask if mask.ndim == 1 else mask.flatten(1).sum(1)
    return most_precise(count) / max(mask[:1].numel(), 1)


def filled(targets: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Targets in the type of the outputs, 0 outside the mask. [B, ...]"""
    targets = targets.to(dtype)
    return targets if mask is None else torch.where(mask, targets, 0.0)


class OfEntries:
    """A loss that is the mean of `entries(outputs, targets) -> [B, ...]` over the entries whose targets are known."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs, mask = full_precision(outputs), known(targets)
        if outputs.shape != targets.shape:
            raise ValueError(f"outputs {list(outputs.shape)} and targets {list(targets.shape)} differ in shape")
        return masked_mean(self.entries(outputs, filled(targets, mask, outputs.dtype)), mask)

    def mass(self, targets: Tensor) -> Tensor:
        return share(known(targets), targets)
