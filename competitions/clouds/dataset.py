"""Images and masks as samples: decoded at the working size, augmented, uint8 until they are on the device."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.loading import images
from competitions.clouds.loss import pack
from competitions.clouds.reader import SUBMISSION_SIZE, Runs


class CloudImages:
    """Samples of `size` (height, width): input uint8 [3, H, W] and a target that depends on what it is used for.

    With `transform`: uint8 [H, W], one bit per class (see loss.pack).
    With runs but without a transform: {"masks": uint8 [4, 350, 525], "packed": uint8 [H, W]}, the truth at the size
    that is scored and at that of the loss.
    Without runs (test images): an empty tensor.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        size: tuple[int, int],
        runs: Runs | None = None,
        transform: Callable[..., dict[str, Any]] | None = None,
    ):
        self.paths, self.size, self.runs, self.transform = list(paths), size, runs, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[Tensor, Any]:
        image = images.decode(self.paths[row], self.size, upright=False)  # [H, W, 3]
        if self.runs is None:
            return _channels_first(image), torch.empty(0)
        masks = np.stack([mask.view(np.uint8) for mask in self.runs.masks(row, self.size)], axis=-1)  # [H, W, 4]
        if self.transform is None:
            truth = self.runs.masks(row, SUBMISSION_SIZE).view(np.uint8)
            return _channels_first(image), {"masks": torch.from_numpy(truth), "packed": torch.from_numpy(pack(masks))}
        changed = self.transform(image=image, mask=masks)
        return _channels_first(changed["image"]), torch.from_numpy(pack(changed["mask"]))


def _channels_first(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))
