"""Flips and quarter turns for test-time augmentation: `apply` to the images, `undo` on maps of pixels."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Flip:
    """One of the eight flips and turns of an image [..., H, W]: transposed first (or not), then mirrored along `sides`.

    Predictions without pixels, such as labels, need no `undo`.
    """

    sides: tuple[int, ...] = ()
    transposed: bool = False

    def apply(self, images: Tensor) -> Tensor:
        images = images.transpose(-1, -2) if self.transposed else images
        return images.flip(self.sides) if self.sides else images

    def undo(self, maps: Tensor) -> Tensor:
        maps = maps.flip(self.sides) if self.sides else maps
        return maps.transpose(-1, -2) if self.transposed else maps


MIRRORED = {"as is": Flip(), "left-right": Flip((-1,))}
FLIPS = MIRRORED | {"up-down": Flip((-2,)), "half turn": Flip((-1, -2))}
TURNS = FLIPS | {  # for images whose height is their width
    "transposed": Flip((), True),
    "quarter turn right": Flip((-1,), True),
    "quarter turn left": Flip((-2,), True),
    "transposed half turn": Flip((-1, -2), True),
}
