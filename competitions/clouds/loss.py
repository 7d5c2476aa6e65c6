"""The loss that the flags describe, and the packed masks that it takes: one byte per pixel, a bit per class."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.losses import BCE, BCEDice, Dice, LovaszHinge, Weighted
from common.losses.combine import Combined
from competitions.clouds.config import CloudConfig
from competitions.clouds.reader import CLASSES


def pack(masks: np.ndarray) -> np.ndarray:
    """Masks of 0 and 1, uint8 [H, W, 4] -> uint8 [H, W]; the masks of 16 full-size images then take 50 MB, not 190."""
    words = np.ascontiguousarray(masks).view("<u4")[:, :, 0]  # a pixel's four bytes
    # The product brings their lowest bits together as bits 24 to 27; its other terms stay below, and none carries.
    words = words * np.uint32(0x01020408)
    words >>= 24  # in place: another array of this size would take longer than all else
    return words.astype(np.uint8) & 15


def unpack(packed: Tensor) -> Tensor:
    """uint8 [B, H, W] -> uint8 [B, 4, H, W] of 0 and 1."""
    bits = torch.arange(len(CLASSES), dtype=torch.uint8, device=packed.device).view(-1, 1, 1)
    return (packed.unsqueeze(1) >> bits) & 1


class OfPackedMasks(Combined):
    """Losses of the heads "pixels" (masks [B, 4, H, W]) and "classes" (presence [B, 4]), from packed masks [B, H, W].

    It also takes a dict with the packed masks as "packed", because validation rows have the masks at the scored size
    too. Masks are unpacked on the device. A class counts as present if any pixel of it is left after augmentation.
    """

    def forward(self, outputs: Any, packed: Tensor, weights: Tensor | None = None) -> Tensor:
        return super().forward(outputs, _targets(packed), weights)

    def mass(self, packed: Tensor) -> Tensor:
        return super().mass(_targets(packed))

    def stats(self, outputs: Any, packed: Tensor) -> Tensor:
        return super().stats(outputs, _targets(packed))


def _targets(packed: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    masks = unpack(packed["packed"] if isinstance(packed, dict) else packed)
    return {"pixels": masks, "classes": masks.amax((2, 3))}


def build(config: CloudConfig) -> OfPackedMasks:
    """The weighted sum of both heads' losses; parts with weight 0 are not computed."""
    pixels = [
        (BCE(), config.bce),
        (Dice(average="batch"), config.dice),
        (LovaszHinge(), config.lovasz),
        (BCEDice(0.75, 0.25, present_only=True), config.present),
    ]
    heads = [("pixels", Weighted(*[part for part in pixels if part[1]]), 1.0)]
    if config.classes:
        heads.append(("classes", BCE(), config.classes))
    return OfPackedMasks(heads)
