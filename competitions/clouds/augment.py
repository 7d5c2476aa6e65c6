"""Training augmentation: albumentations on uint8 images and their four masks, and the blackout of a class."""

from typing import Any

import albumentations as A
import cv2
import numpy as np

MIRROR = cv2.BORDER_REFLECT_101


class Blackout(A.DualTransform):
    """Paint the region of one present class black and remove its pixels from every mask.

    The network then has to predict the class as absent although the rest of the image is unchanged. The presence of
    classes is computed from the masks afterwards, so an overlapping class that vanishes too counts as absent.
    """

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        masks = cv2.split(data["mask"])  # of 0 and 1; an order of magnitude faster than numpy on [H, W, 4]
        present = [mask for mask in masks if cv2.hasNonZero(mask)]
        return {"kept": 1 - self.py_random.choice(present) if present else np.ones_like(masks[0])}

    def apply(self, img: np.ndarray, kept: np.ndarray, **params: Any) -> np.ndarray:
        return cv2.bitwise_and(img, img, mask=kept)

    def apply_to_mask(self, mask: np.ndarray, kept: np.ndarray, **params: Any) -> np.ndarray:
        return cv2.bitwise_and(mask, mask, mask=kept)


def pipeline(strength: str, blackout: float) -> A.Compose:
    """The augmentation by name: none, light (flips, shift, scale, rotation) or strong (also warps, brightness, colour).

    `blackout` is the fraction of the samples that lose a class.
    """
    flips = [A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)]
    place = A.Affine(scale=(0.8, 1.25), translate_percent=(-0.1, 0.1), rotate=(-10, 10), border_mode=MIRROR, p=0.7)
    wide_place = A.Affine(
        scale=(0.7, 1.4),
        translate_percent=(-0.15, 0.15),
        rotate=(-20, 20),
        shear=(-8, 8),
        border_mode=MIRROR,
        p=0.8,
    )
    warp = A.OneOf(
        [
            A.GridDistortion(num_steps=5, distort_limit=0.3, border_mode=MIRROR),
            A.OpticalDistortion(distort_limit=0.5, border_mode=MIRROR),
        ],
        p=0.3,
    )
    light = A.OneOf([A.RandomBrightnessContrast(0.2, 0.3), A.RandomGamma((70, 140))], p=0.5)
    colour = A.OneOf([A.ToGray(), A.ChannelShuffle(), A.HueSaturationValue(10, 25, 10)], p=0.3)
    texture = A.OneOf([A.Sharpen(), A.GaussianBlur(blur_limit=(3, 5)), A.GaussNoise((0.02, 0.08))], p=0.2)
    steps = {
        "none": [],
        "light": [*flips, place],
        "strong": [*flips, wide_place, warp, light, colour, texture],
    }[strength]
    if blackout:
        steps = [*steps, Blackout(p=blackout)]
    return A.Compose(steps)
