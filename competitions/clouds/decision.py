"""From probabilities to masks: is the class there at all, which regions count, and how far do they reach.

Predictions are float [B, 4, 2 + 350 * 525]: how present the class is, in the word of the class head and in that of the
pixels, then the probability of every pixel. A network says all of them, and the mean over networks and views is taken
of each: the presence of averaged pixels would be less than that of each network's, for which the gate is tuned.
All comparisons happen in 255 steps, the resolution in which out-of-fold predictions are kept, so that a rule which
was tuned on kept predictions decides the same on fresh ones.
"""

from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from common.vision.tta import Flip
from competitions.clouds.reader import CLASSES, SUBMISSION_SIZE

STEPS = 255
SOURCES = ("head", "pixels")  # of the presence, in the order of the predictions' first columns
FIRST_PIXEL = len(SOURCES)


@dataclass(frozen=True)
class Rule:
    """How one class is decided. Areas are pixels at 350x525, the rest are probabilities."""

    gate: float = 0.5  # least presence; below it the class is absent
    top: float = 0.5  # a region has pixels of at least this probability ...
    size: int = 1  # ... at least so many, connected
    bottom: float = 0.5  # and reaches as far as the probability stays above this
    hull: bool = False  # fill each region to its convex hull


def predict(outputs: dict[str, Tensor]) -> Tensor:
    """Logits {"pixels" [B, 4, H, W], "classes" [B, 4]} -> predictions [B, 4, 2 + 350 * 525].

    The presence by the pixels is the fourth root of their mean fourth power: large for few certain pixels as for many
    likely ones.
    """
    pixels = outputs["pixels"].sigmoid()
    shrinks = pixels.shape[-2] > SUBMISSION_SIZE[0]
    pixels = interpolate(pixels, SUBMISSION_SIZE, mode="bilinear", align_corners=False, antialias=shrinks)
    pixels = pixels.flatten(2)
    presence = torch.stack((outputs["classes"].sigmoid(), pixels.pow(4).mean(2).pow(0.25)), dim=2)
    return torch.cat((presence, pixels), dim=2)


def unflip(way: Flip, predictions: Tensor) -> Tensor:
    """Predictions of images that were laid down another way (common.vision.tta), the right way round again."""
    pixels = way.undo(predictions[:, :, FIRST_PIXEL:].unflatten(2, SUBMISSION_SIZE))
    return torch.cat((predictions[:, :, :FIRST_PIXEL], pixels.flatten(2)), dim=2) if way.sides else predictions


def in_steps(predictions: Tensor | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Predictions, float or kept uint8 -> presence uint8 [B, 4, 2] and pixels uint8 [B, 4, 350, 525] of 0 to 255."""
    if isinstance(predictions, Tensor):
        predictions = (predictions * STEPS).round().to(torch.uint8).cpu().numpy()
    presence, pixels = predictions[:, :, :FIRST_PIXEL], predictions[:, :, FIRST_PIXEL:]
    return presence, pixels.reshape(*predictions.shape[:2], *SUBMISSION_SIZE)


def force_best(presence: np.ndarray) -> np.ndarray:
    """Presence [B, 4] with the likeliest class of every image certain: no image of this competition is empty."""
    forced = presence.copy()
    np.put_along_axis(forced, presence.argmax(1)[:, None], STEPS, axis=1)
    return forced


def region_mask(pixels: np.ndarray, rule: Rule) -> np.ndarray:
    """The mask bool [H, W] of probabilities in steps uint8 [H, W], the gate left aside."""
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
    """bool [H, W] with every region filled to its convex hull."""
    contours, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    filled = mask.astype(np.uint8)
    for contour in contours:
        cv2.fillConvexPoly(filled, cv2.convexHull(contour), 1)
    return filled.view(bool)


def decide(predictions: Tensor, learnt: dict[str, Any]) -> Tensor:
    """Predictions [B, 4, 2 + 350 * 525] and what the run learnt ({} before it did) -> masks uint8 [B, 4, 350, 525]."""
    presence, pixels = in_steps(predictions)
    presence = presence[:, :, SOURCES.index(learnt.get("presence", "head"))]
    if learnt.get("force_best", False):
        presence = force_best(presence)
    masks = np.zeros(pixels.shape, np.uint8)
    for label, name in enumerate(CLASSES):
        rule = Rule(**learnt["rules"][name]) if learnt else Rule()
        for row in np.flatnonzero(presence[:, label] >= round(rule.gate * STEPS)):
            masks[row, label] = region_mask(pixels[row, label], rule)
    return torch.from_numpy(masks).to(predictions.device)


def to_learnt(rules: list[Rule], force: bool, presence: str = "head") -> dict[str, Any]:
    """Rules in plain types, as the run keeps them."""
    rules_of = {name: asdict(rule) for name, rule in zip(CLASSES, rules, strict=True)}
    return {"rules": rules_of, "presence": presence, "force_best": force}


def dice(masks: Tensor, truth: Tensor) -> Tensor:
    """The competition's Dice of uint8 masks [B, 4, H, W]: float64 [B, 4], 1 where both are empty."""
    both = (masks & truth).flatten(2).sum(2).double()
    total = masks.flatten(2).sum(2).double() + truth.flatten(2).sum(2).double()
    return torch.where(total > 0, 2 * both / total.clamp(min=1), 1.0)
