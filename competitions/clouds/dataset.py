"""Images and masks as samples: decoded at the network's input size, augmented, uint8 until they are on the device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from common.vision.datasets import ImageDataset
from common.vision.store import ImageStore
from competitions.clouds.loss import pack
from competitions.clouds.reader import CLASSES, SUBMISSION_SIZE, Runs


@dataclass(frozen=True)
class Masks:
    """The masks of a row at `size` for the augmentation: uint8 [H, W, 4] of 0 and 1, row by row in memory."""

    runs: Runs
    size: tuple[int, int]

    def __getitem__(self, row: int) -> np.ndarray:
        columns = [self.runs.mask(row, label, self.size).T.view(np.uint8) for label in range(len(CLASSES))]
        return cv2.transpose(cv2.merge(columns))  # numpy's stack would keep the columns, and albumentations copy it


class Truth(Masks):
    """The masks of a row for validation: {"masks": [4, 350, 525], scored, "packed": [H, W], for the loss}, uint8."""

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        masks = torch.from_numpy(self.runs.masks(row, SUBMISSION_SIZE).view(np.uint8))
        return {"masks": masks, "packed": packed(super().__getitem__(row))}


def packed(mask: np.ndarray) -> Tensor:
    return torch.from_numpy(pack(mask))


def cloud_images(
    images: ImageStore, runs: Runs, transform: Callable[..., dict[str, Any]] | None = None
) -> ImageDataset:
    """Samples of a store with a size: input uint8 [3, H, W] and a target that depends on its use.

    With `transform` (training): uint8 [H, W], one bit per class (see loss.pack).
    Without (validation): {"masks": uint8 [4, 350, 525], "packed": uint8 [H, W]}, the truth at the size of the
    submission and at that of the loss.
    """
    if transform is None:
        return ImageDataset(images, Truth(runs, images.size))
    return ImageDataset(images, masks=Masks(runs, images.size), transform=transform, of_mask=packed)
