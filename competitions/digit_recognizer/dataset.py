"""All images as one uint8 tensor; batches are cut from it and augmented at once."""

import numpy as np
import torch
from torch import Tensor

from common.loading.keys import Keys
from competitions.digit_recognizer.augment import Strength, augment


class Digits:
    """Inputs uint8 [B, 1, 28, 28] and targets int64 [B]; augmented when a strength is given. Test images: 0."""

    def __init__(self, images: Tensor, labels: Tensor | None = None, strength: Strength | None = None):
        self.images, self.strength = images, strength
        self.labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: np.ndarray, keys: Keys) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(indices)
        images = self.images[rows]
        return augment(images, keys, self.strength) if self.strength else images, self.labels[rows]
