"""Training and test-time augmentation: small affine and elastic changes of a whole batch at once, no flips.

All operations are elementwise or per image, so the result for an image does not depend on the rest of its batch.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from common.loading.keys import Keys

SIZE = 28  # pixels of a side
CONTROL_POINTS = 5  # of the elastic field, per side: about one per stroke of a digit


@dataclass(frozen=True)
class Strength:
    """Limits of the random changes, which are uniform in both directions; the elastic shifts are normal instead."""

    rotation: float = 0.0  # degrees
    scale: float = 0.0  # logarithm of the factor, independent for each axis
    shear: float = 0.0  # pixels sideways for each pixel of height
    shift: float = 0.0  # pixels, independent for each axis
    elastic: float = 0.0  # pixels, standard deviation at the control points of a smooth field


def augment(images: Tensor, keys: Keys, strength: Strength) -> Tensor:
    """Rotate, scale, shear, shift and bend every image by its own key; uint8 [B, 1, 28, 28] to the same."""
    device, (x, y) = images.device, _places(images.device)
    # float64 costs nothing for [B] numbers, and keeps the six coefficients exact to float32.
    draws = keys.uniform_on(device, (6,), stream=0) * 2 - 1
    turn = draws[:, 0] * math.radians(strength.rotation)
    stretch_x, stretch_y = (draws[:, 1:3] * strength.scale).exp().unbind(1)
    shear = draws[:, 3] * strength.shear
    cos, sin = turn.cos(), turn.sin()
    coefficients = [
        stretch_x * cos,
        stretch_x * (shear - sin),
        draws[:, 4] * strength.shift,
        stretch_y * sin,
        stretch_y * cos,
        draws[:, 5] * strength.shift,
    ]
    xx, xy, x0, yx, yy, y0 = torch.stack(coefficients).float()[:, :, None, None]
    from_x, from_y = xx * x + xy * y + x0, yx * x + yy * y + y0  # [B, 28, 28]
    if strength.elastic:
        bend = keys.normal_on(device, (2, CONTROL_POINTS, CONTROL_POINTS), stream=1).float() * strength.elastic
        bend = F.interpolate(bend, size=(SIZE, SIZE), mode="bicubic", align_corners=True)  # [B, 2, 28, 28]
        from_x, from_y = from_x + bend[:, 0], from_y + bend[:, 1]
    return _sampled(images, from_x, from_y).round_().to(torch.uint8)


def transformed(images: Tensor, rotation: float = 0.0, scale: float = 1.0) -> Tensor:
    """Every image rotated by `rotation` degrees and enlarged by `scale`; [B, 1, 28, 28] to float32 in 0..255."""
    cos, sin = math.cos(math.radians(rotation)) / scale, math.sin(math.radians(rotation)) / scale
    x, y = _places(images.device)
    from_x, from_y = (grid.expand(len(images), -1, -1) for grid in (cos * x - sin * y, sin * x + cos * y))
    return _sampled(images, from_x, from_y)


@cache
def _places(device: torch.device) -> tuple[Tensor, Tensor]:
    """x and y of every pixel from the centre of the image, [28, 28] each; computed once per device."""
    y, x = torch.meshgrid(*[torch.arange(SIZE, dtype=torch.float32) - (SIZE - 1) / 2] * 2, indexing="ij")
    return x.to(device), y.to(device)


def _sampled(images: Tensor, from_x: Tensor, from_y: Tensor) -> Tensor:
    """Bilinear values of `images` at the coordinates [B, 28, 28], black outside; float32 [B, 1, 28, 28]."""
    grid = torch.stack([from_x, from_y], -1) / (SIZE / 2)
    return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
