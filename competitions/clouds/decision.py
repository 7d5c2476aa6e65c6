"""From probabilities to masks: whether a class is present, which regions count, and how far they reach.

Predictions are {"presence": [B, 4, 2], "pixels": [B, 4, 350, 525]}: the probability that the class is present,
estimated by the class head and from the pixels, and the probability of every pixel. Both are averaged over networks and
TTA. Presence computed from averaged pixels would be lower than that of single networks, for which the gate is tuned.
All comparisons use 255 steps, the resolution of the stored out-of-fold predictions, so that a rule tuned on stored
predictions decides the same on fresh ones.
"""

from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from competitions.clouds.reader import CLASSES, SUBMISSION_SIZE

STEPS = 255
SOURCES = ("head", "pixels")  # of the presence, in the order of the predictions


@dataclass(frozen=True)
class Rule:
    """The decision rule of one class. `size` is in pixels at 350x525; gate, top and bottom are probabilities."""

    gate: float = 0.5  # lowest presence; below it the class is absent
    top: float = 0.5  # a region needs connected pixels of at least this probability ...
    size: int = 1  # ... at least this many of them
    bottom: float = 0.5  # it extends over connected pixels of at least this probability
    hull: bool = False  # fill each region to its convex hull


def predict(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits {"pixels" [B, 4, H, W], "classes" [B, 4]} -> predictions.

    The presence from the pixels is the fourth root of the mean of their fourth powers: a few certain pixels make it as
    large as many likely ones.
    """
    pixels = outputs["pixels"].sigmoid()
    shrinks = pixels.shape[-2] > SUBMISSION_SIZE[0]
    pixels = interpolate(pixels, SUBMISSION_SIZE, mode="bilinear", align_corners=False, antialias=shrinks)
    by_pixels = pixels.flatten(2).pow(4).mean(2).pow(0.25)
    return {"presence": torch.stack((outputs["classes"].sigmoid(), by_pixels), dim=2), "pixels": pixels}


def in_steps(values: Tensor) -> np.ndarray:
    """Probabilities -> uint8 of 0 to 255, of the same shape."""
    return (values * STEPS).round().to(torch.uint8).cpu().numpy()


def force_best(presence: np.ndarray) -> np.ndarray:
    """Presence [B, 4] with every image's likeliest class set to certain, as no image of this competition is empty."""
    forced = presence.copy()
    np.put_along_axis(forced, presence.argmax(1)[:, None], STEPS, axis=1)
    return forced


def region_mask(pixels: np.ndarray, rule: Rule) -> np.ndarray:
    """The mask bool [H, W] from probabilities in steps, uint8 [H, W]; ignores the gate."""
    top, bottom = round(rule.top * STEPS), round(rule.bottom * STEPS)
    mask = pixels >= top
    if rule.size > 1 and mask.any():
        count, labels = cv2.connectedComponents(mask.view(np.uint8))
        keep = np.bincount(labels.reshape(-1), minlength=count) >= rule.size
        keep[0] = False
        mask = keep[labels]
    if bottom < top and mask.any():
        count, labels = cv2.connectedComponents((pixels >= bottom).view(np.uint8))
        keep = np.zeros(count, bool)
        keep[labels[mask]] = True
        mask = keep[labels]
    return convex_hulls(mask) if rule.hull and mask.any() else mask


def convex_hulls(mask: np.ndarray) -> np.ndarray:
    """The mask bool [H, W] with every region filled to its convex hull."""
    contours, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    filled = mask.astype(np.uint8)
    for contour in contours:
        cv2.fillConvexPoly(filled, cv2.convexHull(contour), 1)
    return filled.view(bool)


def apply(predictions: dict[str, Tensor], tuned: dict[str, Any]) -> Tensor:
    """Predictions and tuned rules ({} before tuning) -> masks uint8 [B, 4, 350, 525]."""
    presence, pixels = in_steps(predictions["presence"]), in_steps(predictions["pixels"])
    presence = presence[:, :, SOURCES.index(tuned.get("presence", "head"))]
    if tuned.get("force_best", False):
        presence = force_best(presence)
    masks = np.zeros(pixels.shape, np.uint8)
    for label, name in enumerate(CLASSES):
        rule = Rule(**tuned["rules"][name]) if tuned else Rule()
        for row in np.flatnonzero(presence[:, label] >= round(rule.gate * STEPS)):
            masks[row, label] = region_mask(pixels[row, label], rule)
    return torch.from_numpy(masks).to(predictions["pixels"].device)


def to_tuned(rules: list[Rule], force: bool, presence: str = "head") -> dict[str, Any]:
    """The rules in plain types, as they are stored with the run."""
    rules_of = {name: asdict(rule) for name, rule in zip(CLASSES, rules, strict=True)}
    return {"rules": rules_of, "presence": presence, "force_best": force}


def dice(masks: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The competition's Dice of masks bool [..., H, W]: float64 [...], 1 where both masks are empty."""
    both, total = (masks & truth).sum((-2, -1)), masks.sum((-2, -1)) + truth.sum((-2, -1))
    return np.where(total > 0, 2 * both / np.maximum(total, 1), 1.0)
