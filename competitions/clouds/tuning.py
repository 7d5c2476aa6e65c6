"""Choosing the rules on out-of-fold predictions, and measuring what that is worth on images it was not chosen on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np

from competitions.clouds.decision import SOURCES, STEPS, Rule, force_best, in_steps, region_mask, to_learnt
from competitions.clouds.reader import CLASSES

LEVELS = tuple(round(0.2 + 0.05 * step, 2) for step in range(14))  # pixel probabilities 0.20 to 0.85
SIZES = (1, 500, 1000, 2500, 5000, 7500, 10000, 15000, 20000)  # pixels of 183,750
GATES = tuple(round(0.05 * step, 2) for step in range(20))
PAIRS = tuple((bottom, top) for top in range(len(LEVELS)) for bottom in range(top + 1))
STAGES = ("plain", "gate", "threshold", "size", "bottom")  # each frees one more part of the rule
# Of rules with the same score the one nearest to one half is taken: they come in plateaus, and its edge is a bad place.
TIE_BREAK = 1e-6 * (
    np.abs(np.array(GATES) - 0.5)[:, None]
    + np.repeat([abs(LEVELS[top] - 0.5) + abs(LEVELS[bottom] - 0.5) for bottom, top in PAIRS], len(SIZES))
    + np.tile(np.arange(len(SIZES)) / len(SIZES), len(PAIRS))
)  # [gates, pairs * sizes]
SPLITS, REPEATS = 5, 4  # the nested check cuts the images into so many parts, so many times


@dataclass(frozen=True)
class Table:
    """Dice of every image under every (pair of levels, size), for one class: searching is then a matrix product.

    `dice` float32 [m, pairs, sizes] if the class passes the gate, `empty` float32 [m] if it does not,
    `presence` uint8 [m].
    """

    dice: np.ndarray
    empty: np.ndarray
    presence: np.ndarray


def image_dice(pixels: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Dice float32 [pairs, sizes] of one image and class from uint8 [H, W] and bool [H, W].

    Regions of a lower level contain those of the higher ones, so each level is labelled once: a region knows its area,
    its overlap with the truth and the largest region of every higher level inside it.
    """
    inside = np.flatnonzero(pixels >= round(LEVELS[0] * STEPS))
    true_inside, true_area = truth.reshape(-1)[inside], int(truth.sum())
    values = pixels.reshape(-1)[inside]
    areas, overlaps, parents = [], [], []  # per level: of its regions; the region of the level below that holds it
    below = np.zeros(len(inside), np.int32)
    for level in LEVELS:
        above = (pixels >= round(level * STEPS)).view(np.uint8)
        count, labels = cv2.connectedComponents(above) if values.max(initial=0) >= round(level * STEPS) else (1, None)
        labels = np.zeros(len(inside), np.int32) if labels is None else labels.reshape(-1)[inside]
        areas.append(np.bincount(labels, minlength=count)[1:])
        overlaps.append(np.bincount(labels[true_inside], minlength=count)[1:])
        parent = np.zeros(count, np.int64)
        parent[labels] = below
        parents.append(parent[1:] - 1)
        below = labels
    result = np.zeros((len(PAIRS), len(SIZES)), np.float32)
    sizes = np.array(SIZES)[:, None]
    position = 0
    for top in range(len(LEVELS)):
        chain, largest = np.arange(len(areas[top])), areas[top]
        for bottom in range(top, -1, -1):
            inner = np.zeros(len(areas[bottom]), np.int64)  # the largest region of level `top` inside
            np.maximum.at(inner, chain, largest)
            alive = inner >= sizes  # [sizes, regions]
            total = alive @ areas[bottom] + true_area
            both = alive @ overlaps[bottom]
            result[position + bottom] = np.where(total > 0, 2 * both / np.maximum(total, 1), 1)
            chain = parents[bottom][chain]
        position += top + 1
    return result


def tables(predictions: np.ndarray, truth: Callable[[int], np.ndarray], source: str = "head") -> list[Table]:
    """One table per class from kept predictions uint8 [m, 4, 2 + pixels]; `truth(i)`: bool [4, H, W] of the i-th.

    `source` is whose word the presence is, the head's or the pixels'.
    """
    count = len(predictions)
    dice = np.zeros((len(CLASSES), count, len(PAIRS), len(SIZES)), np.float32)
    empty = np.zeros((len(CLASSES), count), np.float32)
    presence = np.zeros((len(CLASSES), count), np.uint8)
    for image in range(count):
        words, pixels = in_steps(predictions[image : image + 1])
        masks = truth(image)
        presence[:, image] = words[0, :, SOURCES.index(source)]
        for label in range(len(CLASSES)):
            dice[label, image] = image_dice(pixels[0, label], masks[label])
            empty[label, image] = not masks[label].any()
    return [Table(*arrays) for arrays in zip(dice, empty, presence, strict=True)]


def with_presence(found: Sequence[Table], presence: np.ndarray) -> list[Table]:
    """The tables with another presence uint8 [m, 4]."""
    return [replace(table, presence=presence[:, label]) for label, table in enumerate(found)]


def allowed(stage: str) -> tuple[np.ndarray, np.ndarray]:
    """What a stage may choose: bool [gates] and bool [pairs, sizes]."""
    number = STAGES.index(stage)
    half = LEVELS.index(0.5)
    gates = np.array([gate == 0 or number >= STAGES.index("gate") for gate in GATES])
    pairs = np.array(
        [
            (bottom == top or number >= STAGES.index("bottom")) and (top == half or number >= STAGES.index("threshold"))
            for bottom, top in PAIRS
        ]
    )
    sizes = np.array([size == 1 or number >= STAGES.index("size") for size in SIZES])
    return gates, pairs[:, None] & sizes


def search(table: Table, rows: np.ndarray, stage: str) -> Rule:
    """The rule with the best mean Dice over `rows`; thousands of combinations in one matrix product."""
    if not len(rows):
        return Rule()
    gates, cells = allowed(stage)
    passes = (table.presence[rows] >= np.rint(np.array(GATES)[:, None] * STEPS)).astype(np.float32)  # [gates, m]
    gain = (table.dice[rows] - table.empty[rows, None, None]).reshape(len(rows), -1)
    scores = np.where(gates[:, None] & cells.reshape(-1), passes @ gain - TIE_BREAK, -np.inf)
    gate, cell = np.unravel_index(scores.argmax(), scores.shape)
    pair, size = divmod(int(cell), len(SIZES))
    bottom, top = PAIRS[pair]
    return Rule(GATES[gate], LEVELS[top], SIZES[size], LEVELS[bottom])


class Hulls:
    """Dice [m] of one class under a rule that fills convex hulls: too rarely asked for to have a table of its own."""

    def __init__(self, predictions: np.ndarray, truth: Callable[[int], np.ndarray], label: int):
        self.predictions, self.truth, self.label = predictions, truth, label
        self.known: dict[Rule, np.ndarray] = {}

    def dice(self, rule: Rule) -> np.ndarray:
        """float32 [m], the gate left aside."""
        rule = replace(rule, gate=0.0, hull=True)
        if rule not in self.known:
            self.known[rule] = np.array([self._image(row, rule) for row in range(len(self.predictions))], np.float32)
        return self.known[rule]

    def _image(self, row: int, rule: Rule) -> float:
        pixels = in_steps(self.predictions[row : row + 1])[1][0, self.label]
        mask, truth = region_mask(pixels, rule), self.truth(row)[self.label]
        total = int(mask.sum()) + int(truth.sum())
        return 2 * int((mask & truth).sum()) / total if total else 1.0


def dice_of(table: Table, rule: Rule, hulls: Hulls | None = None) -> np.ndarray:
    """Dice [m] of every image under a rule of the grid."""
    if rule.hull:
        passing = hulls.dice(rule)
    else:
        cell = PAIRS.index((LEVELS.index(rule.bottom), LEVELS.index(rule.top))), SIZES.index(rule.size)
        passing = table.dice[:, *cell]
    return np.where(table.presence >= round(rule.gate * STEPS), passing, table.empty)


def choose(table: Table, rows: np.ndarray, stage: str, hulls: Hulls | None = None) -> Rule:
    """The best rule of a stage on `rows`, with filled hulls where that is better still."""
    rule = search(table, rows, stage)
    filled = replace(rule, hull=True)
    if hulls and dice_of(table, filled, hulls)[rows].sum() > dice_of(table, rule)[rows].sum():
        return filled
    return rule


def held_out(
    found: Sequence[Table], stage: str, seed: int, hulls: Sequence[Hulls | None] = (None,) * len(CLASSES)
) -> np.ndarray:
    """Dice [m] of images whose rules were chosen on the other parts of a split into five; mean of four splits."""
    count = len(found[0].empty)
    scores = np.zeros((REPEATS, len(found), count))
    for repeat in range(REPEATS):
        part = np.random.default_rng((seed, repeat)).permutation(count) % SPLITS
        for label, table in enumerate(found):
            for held in range(min(SPLITS, count)):
                rule = choose(table, np.flatnonzero(part != held), stage, hulls[label])
                scores[repeat, label, part == held] = dice_of(table, rule, hulls[label])[part == held]
    return scores.mean((0, 1))


def score_of_the_best(candidates: np.ndarray, seed: int) -> float:
    """Mean of Dice [candidates, m] where each image has the candidate that is best on other images."""
    count = candidates.shape[1]
    scores = np.zeros((REPEATS, count))
    for repeat in range(REPEATS):
        part = np.random.default_rng((seed, repeat, 1)).permutation(count) % SPLITS
        for held in range(min(SPLITS, count)):
            best = candidates[:, part != held].sum(1).argmax()
            scores[repeat, part == held] = candidates[best, part == held]
    return float(scores.mean())


def learn(predictions: np.ndarray, truth: Callable[[int], np.ndarray], seed: int = 0) -> dict[str, Any]:
    """Tune the rules of every class on kept predictions; keeps the stage that is best on images it was not tuned on.

    The result, in plain types: "rules", "presence", "force_best"; "held_out", the nested score of every stage; and
    "score", that of choosing the stage as well, on other images than it is scored on.
    """
    found = tables(predictions, truth)
    by_pixels = with_presence(found, np.asarray(predictions[:, :, SOURCES.index("pixels")]))
    candidates = {stage: ("head", stage, found) for stage in STAGES}
    candidates |= {f"{stage} by pixels": ("pixels", stage, by_pixels) for stage in STAGES if stage != "plain"}
    dice = {name: held_out(of, stage, seed) for name, (_, stage, of) in candidates.items()}  # [m] each
    best = max(dice, key=lambda name: dice[name].mean())
    source, stage, found = candidates[best]

    with_best = with_presence(found, force_best(np.stack([table.presence for table in found], axis=1)))
    dice["best class forced"] = held_out(with_best, stage, seed)
    force = bool(dice["best class forced"].mean() > dice[best].mean())
    best, found = ("best class forced", with_best) if force else (best, found)

    hulls = [Hulls(predictions, truth, label) for label in range(len(CLASSES))]
    dice["convex hulls"] = held_out(found, stage, seed, hulls)
    if dice["convex hulls"].mean() <= dice[best].mean():
        hulls = [None] * len(CLASSES)
    rows = np.arange(len(predictions))
    rules = [choose(table, rows, stage, hull) for table, hull in zip(found, hulls, strict=True)]
    return to_learnt(rules, force, source) | {
        "held_out": {name: float(of.mean()) for name, of in dice.items()},
        "stage": stage,
        "score": score_of_the_best(np.stack(list(dice.values())), seed),
    }
