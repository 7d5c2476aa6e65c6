"""All images as one uint8 tensor; a whole batch is selected from it and augmented at once."""

import numpy as np
import torch
from torch import Tensor

from common.loading.keys import Keys
from common.loading.transfer import to_device
from competitions.digit_recognizer.augment import Strength, augment


class Digits:
    """Batches of inputs uint8 [B, 1, 28, 28] and targets int64 [B]; augmented when a strength is given.

    The targets of test images are 0. Those of pseudo-labels are probabilities, float32 [B, 10].
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None, strength: Strength | None = None):
        self.images, self.strength = images, strength
        self.labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> "Digits":
        """Move images and labels to `device`, so that batches are made there; returns self, as modules do."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        return self

    def batch(self, indices: np.ndarray, keys: Keys) -> tuple[Tensor, Tensor]:
        rows = to_device(indices, self.images.device)
        images = self.images[rows]
        return augment(images, keys, self.strength) if self.strength else images, self.labels[rows]
