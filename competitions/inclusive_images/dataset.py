"""The targets of every head for an image, and its augmentation."""

from dataclasses import dataclass

import albumentations as A
import cv2
import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

MIRROR = cv2.BORDER_REFLECT_101


@dataclass(frozen=True)
class Targets:
    """The targets of all heads for a row of `labels` uint8 csr [n, m].

    {"labels": uint8 [m]}; with `vectors` [m, D] also {"embedding": float32 [D]}, the sum of the labels' vectors; with
    `counts` also {"count": float32 [1]}, the number of labels.
    """

    labels: csr_matrix
    vectors: np.ndarray | None
    counts: bool

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        columns = self.labels.indices[self.labels.indptr[row] : self.labels.indptr[row + 1]]
        labels = np.zeros(self.labels.shape[1], np.uint8)
        labels[columns] = 1
        targets = {"labels": torch.from_numpy(labels)}
        if self.vectors is not None:
            targets["embedding"] = torch.from_numpy(self.vectors[columns].sum(0))
        if self.counts:
            targets["count"] = torch.tensor([float(len(columns))])
        return targets


@dataclass(frozen=True)
class SoftTargets:
    """Targets from pseudo-labels, scores float32 [m, labels]: with the expected sum of vectors and expected count."""

    scores: Tensor
    vectors: np.ndarray | None
    counts: bool

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        targets = {"labels": self.scores[row]}
        if self.vectors is not None:
            targets["embedding"] = torch.from_numpy(self.scores[row].numpy() @ self.vectors)
        if self.counts:
            targets["count"] = self.scores[row].sum(dim=0, keepdim=True)
        return targets


def resized(size: tuple[int, int]) -> A.Compose:
    """Reduce larger images to `size`; a pixel is the mean of the pixels that it covers, as in an image store."""
    return A.Compose([A.Resize(*size, interpolation=cv2.INTER_AREA)])


def augmentation(strength: str, size: tuple[int, int], larger: bool = False) -> A.Compose | None:
    """The augmentation by name: none, light (mirror, crop) or heavy (also rotation, colour, blur, compression, noise).

    The crops have `size`; those of `larger` images are reduced by the mean of pixels, as in `resized`.

    The competition's test images are of lower quality than its training images: heavy narrows that gap.
    """
    if strength == "none":
        return None
    least, way = 0.5 if strength == "heavy" else 0.7, cv2.INTER_AREA if larger else cv2.INTER_LINEAR
    crop = A.RandomResizedCrop(size=size, scale=(least, 1.0), ratio=(1.0, 1.8), interpolation=way, p=1.0)
    light = [crop, A.HorizontalFlip(p=0.5)]
    if strength == "light":
        return A.Compose(light)
    return A.Compose(
        [
            *light,
            A.Affine(rotate=(-10, 10), shear=(-6, 6), border_mode=MIRROR, p=0.3),
            A.RandomBrightnessContrast(0.25, 0.25, p=0.5),
            A.HueSaturationValue(8, 25, 12, p=0.4),
            A.ToGray(p=0.05),
            A.OneOf(
                [
                    A.GaussianBlur(blur_limit=(3, 5)),
                    A.Downscale(scale_range=(0.4, 0.8)),
                    A.ImageCompression(quality_range=(25, 70)),
                    A.GaussNoise((0.02, 0.08)),
                ],
                p=0.3,
            ),
        ]
    )
