"""Images and masks as samples: decoded at the working size, augmented, uint8 until they are on the device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.vision.datasets import ImageDataset
from common.vision.store import ImageStore
from competitions.clouds.loss import pack
from competitions.clouds.reader import SUBMISSION_SIZE, Runs


@dataclass(frozen=True)
class Masks:
    """The masks of a row at `size` as uint8 of 0 and 1: [H, W, 4] for the augmentation ..."""

    runs: Runs
    size: tuple[int, int]

    def __getitem__(self, row: int) -> np.ndarray:
        return np.stack([mask.view(np.uint8) for mask in self.runs.masks(row, self.size)], axis=-1)


class Truth(Masks):
    """... or {"masks": [4, 350, 525], "packed": [H, W]}: what is scored, and what the loss is of."""

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        masks = torch.from_numpy(self.runs.masks(row, SUBMISSION_SIZE).view(np.uint8))
        return {"masks": masks, "packed": packed(super().__getitem__(row))}


def packed(mask: np.ndarray) -> Tensor:
    return torch.from_numpy(pack(mask))


def cloud_images(
    paths: Sequence[Path],
    size: tuple[int, int],
    runs: Runs | None = None,
    transform: Callable[..., dict[str, Any]] | None = None,
) -> ImageDataset:
    """Samples of `size` (height, width): input uint8 [3, H, W] and a target that depends on what it is used for.

    With `transform`: uint8 [H, W], one bit per class (see loss.pack).
    With runs but without a transform: {"masks": uint8 [4, 350, 525], "packed": uint8 [H, W]}, the truth at the size
    that is scored and at that of the loss.
    Without runs (test images): an empty tensor.
    """
    images = ImageStore(paths, size, upright=False)
    if runs is None or transform is None:
        return ImageDataset(images, None if runs is None else Truth(runs, size))
    return ImageDataset(images, masks=Masks(runs, size), transform=transform, of_mask=packed)
