"""Samples of images: uint8 [C, H, W] and a target, augmented by albumentations under the loader's keys."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import BadImage, UserError
from common.vision.decode import full_depth
from common.vision.store import ImageStore

MASKS = 30  # mask files that are looked at; usually the first one suffices


def channels_first(array: np.ndarray) -> Tensor:
    """uint8 [H, W, C] -> a tensor [C, H, W] with memory of its own: rows of an image store are read-only."""
    return torch.from_numpy(np.array(array.transpose(2, 0, 1), order="C"))


def binary(mask: np.ndarray) -> Tensor:
    """A uint8 mask [H, W, K] of 0 and 255 (also if blurred by resizing), or of 0 and 1 -> 0 and 1 [K, H, W]."""
    return channels_first(mask if mask.max(initial=0) <= 1 else mask // 128)


def refuse_lost_masks(dataset: Any) -> None:
    """Raise UserError if `binary` takes the dataset's mask files for empty, such as those that hold class numbers.

    At the files' own size, as resizing may darken what is small. One file that is right suffices.
    """
    if getattr(dataset, "of_mask", None) is not binary or not isinstance(dataset.masks, ImageStore):
        return
    lost = None
    for path in dataset.masks.paths[:MASKS]:
        try:
            pixels = full_depth(path)
        except BadImage:
            continue  # the check of all images reports it
        brightest, bits = int(pixels.max()), 8 * pixels.itemsize
        if brightest >= 2 ** (bits - 1):
            return
        if brightest > (bits == 8):
            lost = lost or f"{path}: the brightest pixel of this mask is {brightest} in {bits} bits"
    if lost:
        raise UserError(
            f"{lost}, so all of it would count as empty: expected 8 bits of 0 and 255, or of 0 and 1. Save the masks "
            f"so, with a file for each class"
        )


class ImageDataset:
    """Samples (uint8 [C, H, W], target) of the images of a store.

    `targets` and `masks` are arrays, lists, or objects that compute `[row]` on demand. The target is `targets[row]`, or
    an empty tensor without targets (test images). With `masks`, whose rows are arrays [H, W, K] of the images' size,
    `transform` changes image and mask together, and the target is `of_mask(mask)`. `transform` is an albumentations
    pipeline or a function with the same arguments; the loader keys the generators that it holds.
    """

    def __init__(
        self,
        images: ImageStore,
        targets: Any = None,
        masks: Any = None,
        transform: Callable[..., dict[str, Any]] | None = None,
        of_mask: Callable[[np.ndarray], Any] = channels_first,
    ):
        self.images, self.targets, self.masks = images, targets, masks
        self.transform, self.of_mask = transform, of_mask

    @property
    def paths(self) -> list[Path]:
        """Every file: of the images, then of masks that are images too."""
        return [*self.images.paths, *getattr(self.masks, "paths", ())]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, Any]:
        sample = {"image": self.images[row]} | ({} if self.masks is None else {"mask": self.masks[row]})
        if self.transform is not None:
            sample = self.transform(**sample | {"image": np.ascontiguousarray(sample["image"])})
        if self.masks is not None:
            return channels_first(sample["image"]), self.of_mask(sample["mask"])
        return channels_first(sample["image"]), torch.empty(0) if self.targets is None else self.targets[row]
