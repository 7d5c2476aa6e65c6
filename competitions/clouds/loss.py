"""The loss of the flags, and the form in which masks travel to it: one byte per pixel, a bit per class."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from common.losses import BCE, BCEDice, Dice, Heads, LovaszHinge, Weighted, kind
from common.losses.protocol import columns_of, mass_of
from competitions.clouds.reader import CLASSES

if TYPE_CHECKING:
    from competitions.clouds.task import CloudConfig


def pack(masks: np.ndarray) -> np.ndarray:
    """Masks of 0 and 1, uint8 [H, W, 4] -> uint8 [H, W]: a window of 16 full-size images then holds 50 MB, not 190."""
    return np.packbits(masks, axis=2, bitorder="little")[:, :, 0]


def unpack(packed: Tensor) -> Tensor:
    """uint8 [B, H, W] -> uint8 [B, 4, H, W] of 0 and 1."""
    bits = torch.arange(len(CLASSES), dtype=torch.uint8, device=packed.device).view(-1, 1, 1)
    return (packed.unsqueeze(1) >> bits) & 1


class OfPackedMasks(nn.Module):
    """A loss whose targets {"pixels": packed [B, H, W], ...} are unpacked when a micro-batch is on the device."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss, self.kind, self.columns = loss, kind(loss), columns_of(loss)

    def forward(self, outputs: Any, targets: dict[str, Tensor], weights: Tensor | None = None) -> Tensor:
        return self.loss(outputs, self._unpacked(targets), weights)

    def mass(self, targets: dict[str, Tensor]) -> Tensor:
        return mass_of(self.loss, self._unpacked(targets))

    def stats(self, outputs: Any, targets: dict[str, Tensor]) -> Tensor:
        return self.loss.stats(outputs, self._unpacked(targets))

    def value(self, sums: Tensor, count: Tensor) -> Tensor:
        return self.loss.value(sums, count)

    def _unpacked(self, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        return targets | {"pixels": unpack(targets["pixels"])}


def build(config: "CloudConfig") -> OfPackedMasks:
    """The weighted sum of both heads' losses; parts of weight 0 cost nothing."""
    pixels = [
        (BCE(), config.bce),
        (Dice(average="batch"), config.dice),
        (LovaszHinge(), config.lovasz),
        (BCEDice(0.75, 0.25, present_only=True), config.present),
    ]
    heads = {"pixels": (Weighted(*[part for part in pixels if part[1]]), 1.0)}
    return OfPackedMasks(Heads(heads | ({"classes": (BCE(), config.classes)} if config.classes else {})))
