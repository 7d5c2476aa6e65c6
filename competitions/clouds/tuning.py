"""Choose the decision rules on out-of-fold predictions, and estimate their Dice on images not used for the choice."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import cv2
import numpy as np

from competitions.clouds import decision
from competitions.clouds.decision import SOURCES, STEPS, Rule, force_best, region_mask, to_tuned
from competitions.clouds.reader import CLASSES

Kept = dict[str, np.ndarray]  # stored predictions: uint8 "presence" [m, 4, 2] and "pixels" [m, 4, 350, 525]
LEVELS = tuple(round(0.2 + 0.05 * step, 2) for step in range(14))  # pixel probabilities 0.20 to 0.85
SIZES = (1, 500, 1000, 2500, 5000, 7500, 10000, 15000, 20000)  # pixels of 183,750
GATES = tuple(round(0.05 * step, 2) for step in range(20))
PAIRS = tuple((bottom, top) for top in range(len(LEVELS)) for bottom in range(top + 1))
STAGES = ("plain", "gate", "threshold", "size", "bottom")  # each tunes one more part of the rule
# Equal scores come in plateaus. Of equal rules the one nearest to one half is taken, as a plateau's edge is unstable.
TIE_BREAK = 1e-6 * (
    np.abs(np.array(GATES) - 0.5)[:, None]
    + np.repeat([abs(LEVELS[top] - 0.5) + abs(LEVELS[bottom] - 0.5) for bottom, top in PAIRS], len(SIZES))
    + np.tile(np.arange(len(SIZES)) / len(SIZES), len(PAIRS))
)  # [gates, pairs * sizes]
SPLITS, REPEATS = 5, 4  # inner cross-validation: parts, and repetitions
OUTER, OUTER_REPEATS = 1000, 2  # outer cross-validation: a seed key different from the inner splits', and repetitions


@dataclass(frozen=True)
class Table:
    """Dice of every image under every (pair of levels, size) for one class, so that the search is a matrix product.

    `empty` float32 [m] is the Dice if the class does not pass the gate, `gain` float32 [m, pairs * sizes] the increase
    if it does, `presence` uint8 [m] the value that is compared with the gate.
    """

    gain: np.ndarray
    empty: np.ndarray
    presence: np.ndarray


def image_dice(pixels: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Dice float32 [pairs, sizes] of one image and class, from `pixels` uint8 [H, W] and `truth` bool [H, W].

    Regions of a lower level contain those of the higher levels. So each level is labelled only once, with the area of
    every region, its overlap with the truth and the largest region of every higher level inside it.
    """
    inside = np.flatnonzero(pixels >= round(LEVELS[0] * STEPS))
    true_inside, true_area = truth.reshape(-1)[inside], int(truth.sum())
    values = pixels.reshape(-1)[inside]
    areas, overlaps, parents = [], [], []  # per level, for its regions; parent: the region one level below around it
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
            inner = np.zeros(len(areas[bottom]), np.int64)  # area of the largest region of level `top` inside
            np.maximum.at(inner, chain, largest)
            alive = inner >= sizes  # [sizes, regions]
            total = alive @ areas[bottom] + true_area
            both = alive @ overlaps[bottom]
            result[position + bottom] = np.where(total > 0, 2 * both / np.maximum(total, 1), 1)
            chain = parents[bottom][chain]
        position += top + 1
    return result


def tables(predictions: Kept, truth: Callable[[int], np.ndarray], source: str = "head") -> list[Table]:
    """One table per class; `truth(i)` is bool [4, H, W] of image i, `source` of the presence "head" or "pixels"."""
    count = len(predictions["pixels"])
    dice = np.zeros((len(CLASSES), count, len(PAIRS), len(SIZES)), np.float32)
    empty = np.zeros((len(CLASSES), count), np.float32)
    presence = np.asarray(predictions["presence"])[:, :, SOURCES.index(source)].T
    for image in range(count):
        pixels, masks = predictions["pixels"][image], truth(image)
        for label in range(len(CLASSES)):
            dice[label, image] = image_dice(pixels[label], masks[label])
            empty[label, image] = not masks[label].any()
    gain = dice.reshape(*empty.shape, -1) - empty[:, :, None]
    return [Table(*arrays) for arrays in zip(gain, empty, presence, strict=True)]


@cache
def allowed(stage: str) -> tuple[np.ndarray, np.ndarray]:
    """The choices of a stage: positions in GATES, and positions among the pairs * sizes cells of a table."""
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
    return np.flatnonzero(gates), np.flatnonzero(pairs[:, None] & sizes)


def search(table: Table, rows: np.ndarray, stage: str) -> Rule:
    """The rule with the best mean Dice over `rows`; one matrix product scores thousands of combinations."""
    if not len(rows):
        return Rule()
    gates, cells = allowed(stage)
    least = np.rint(np.array(GATES)[gates, None] * STEPS)
    passes = np.zeros((len(gates), len(table.presence)), np.float32)
    passes[:, rows] = table.presence[rows] >= least
    gain = table.gain if len(cells) == table.gain.shape[1] else table.gain[:, cells]  # the other rows pass no gate
    scores = passes @ gain - TIE_BREAK[np.ix_(gates, cells)]
    gate, cell = np.unravel_index(scores.argmax(), scores.shape)
    pair, size = divmod(int(cells[cell]), len(SIZES))
    bottom, top = PAIRS[pair]
    return Rule(GATES[gates[gate]], LEVELS[top], SIZES[size], LEVELS[bottom])


def regions_dice(pixels: np.ndarray, truth: Callable[[int], np.ndarray], label: int) -> Callable[[Rule], np.ndarray]:
    """A function rule -> Dice float32 [m] of one class without the gate, for rules that are in no table."""

    @cache
    def dice(rule: Rule) -> np.ndarray:
        masks = (region_mask(of_image[label], rule) for of_image in pixels)
        return np.array([decision.dice(mask, truth(row)[label]) for row, mask in enumerate(masks)], np.float32)

    return dice


def dice_of(table: Table, rule: Rule, hulls: Callable[[Rule], np.ndarray] | None = None) -> np.ndarray:
    """Dice [m] of every image under a rule of the grid; `hulls` (see `regions_dice`) is for one that fills hulls."""
    if rule.hull:
        passing = hulls(replace(rule, gate=0.0))
    else:
        pair = PAIRS.index((LEVELS.index(rule.bottom), LEVELS.index(rule.top)))
        passing = table.gain[:, pair * len(SIZES) + SIZES.index(rule.size)] + table.empty
    return np.where(table.presence >= round(rule.gate * STEPS), passing, table.empty)


@dataclass(frozen=True)
class Way:
    """A way to make the rules: which parts are tuned, the source of the presence, and two optional steps."""

    stage: str
    source: str = "head"
    force: bool = False  # the likeliest class of every image counts as present
    hull: bool = False  # regions are filled to their convex hulls for the classes where that is better

    @property
    def name(self) -> str:
        if self.hull or self.force:
            return "convex hulls" if self.hull else "best class forced"
        return self.stage if self.source == "head" or self.stage == "plain" else f"{self.stage} by pixels"


# The simplest first: "pixels" before "head", as the class head is one more possible source of errors.
WAYS = (Way("plain"), *(Way(stage, source) for stage in STAGES[1:] for source in reversed(SOURCES)))


class Tuner:
    """Makes rules in any Way from some of the images, and measures their Dice on others."""

    def __init__(self, predictions: Kept, truth: Callable[[int], np.ndarray], seed: int = 0):
        self.seed, self.count = seed, len(predictions["pixels"])
        self.tables = {}  # (source, force) -> one table per class
        found = tables(predictions, truth)
        for number, source in enumerate(SOURCES):
            plain = np.asarray(predictions["presence"][:, :, number])
            for force, presence in ((False, plain), (True, force_best(plain))):
                own = [replace(table, presence=presence[:, label]) for label, table in enumerate(found)]
                self.tables[source, force] = own
        self.hulls = [regions_dice(predictions["pixels"], truth, label) for label in range(len(CLASSES))]

    def rule(self, way: Way, label: int, rows: np.ndarray) -> Rule:
        """The best rule of one class on `rows`."""
        table, hulls = self.tables[way.source, way.force][label], self.hulls[label]
        rule = search(table, rows, way.stage)
        filled = replace(rule, hull=True)
        if way.hull and dice_of(table, filled, hulls)[rows].sum() > dice_of(table, rule)[rows].sum():
            return filled
        return rule

    def dice(self, way: Way, train: np.ndarray, held: np.ndarray) -> np.ndarray:
        """Dice [4, len(held)] of the images `held` under rules from the images `train`."""
        rules = [self.rule(way, label, train) for label in range(len(CLASSES))]
        own = zip(self.tables[way.source, way.force], rules, self.hulls, strict=True)
        return np.stack([dice_of(table, rule, hulls)[held] for table, rule, hulls in own])

    def held_out(self, way: Way, rows: np.ndarray) -> np.ndarray:
        """Mean Dice [len(rows)] over REPEATS splits into SPLITS parts; each part is scored by rules from the others."""
        scores = np.zeros((REPEATS, len(CLASSES), len(rows)))
        for repeat in range(REPEATS):
            for train, held in _parts(len(rows), self.seed, repeat):
                scores[repeat][:, held] = self.dice(way, rows[train], rows[held])
        return scores.mean((0, 1))

    def choose(self, rows: np.ndarray) -> tuple[Way, dict[str, np.ndarray]]:
        """The simplest way within one standard error of the best on held-out images, and the held-out Dice of each way.

        Differences are paired by image. Forcing a class and filling hulls must be better by one standard error.
        """
        if not len(rows):  # there is only one image, and it is held out
            return WAYS[0], {}
        dice = {way: self.held_out(way, rows) for way in WAYS}
        best = max(dice, key=lambda way: dice[way].mean())
        chosen = next(way for way in WAYS if not _better(dice[best], dice[way]))
        for extra in ({"force": True}, {"hull": True}):
            way = replace(chosen, **extra)
            dice[way] = self.held_out(way, rows)
            chosen = way if _better(dice[way], dice[chosen]) else chosen
        return chosen, {way.name: of for way, of in dice.items()}

    def score(self) -> float:
        """Mean Dice on held-out images, which are used neither to choose the rules nor to choose the way."""
        scores = np.zeros((OUTER_REPEATS, len(CLASSES), self.count))
        for repeat in range(OUTER_REPEATS):
            for train, held in _parts(self.count, self.seed, OUTER, repeat):
                way, _ = self.choose(train)
                scores[repeat][:, held] = self.dice(way, train, held)
        return float(scores.mean())


def _parts(count: int, *key: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Split positions into SPLITS parts by the seed `key`; yields those outside and inside of each part."""
    part = np.random.default_rng(key).permutation(count) % SPLITS
    for held in range(min(SPLITS, count)):
        yield np.flatnonzero(part != held), np.flatnonzero(part == held)


def _better(new: np.ndarray, old: np.ndarray) -> bool:
    """Whether the mean of `new` exceeds that of `old` by more than the standard error of the difference."""
    difference = new - old
    return bool(difference.mean() > difference.std() / np.sqrt(len(difference)))


def tune(predictions: Kept, truth: Callable[[int], np.ndarray], seed: int = 0) -> dict[str, Any]:
    """Tune the rules of every class on stored predictions, in the way that is best on held-out images.

    Returns plain types: "rules", "presence", "force_best"; "held_out", the Dice of every way on images that its rules
    were not chosen on; and "score", the Dice on images that the way was not chosen on either.
    """
    tuner = Tuner(predictions, truth, seed)
    rows = np.arange(tuner.count)
    way, dice = tuner.choose(rows)
    rules = [tuner.rule(way, label, rows) for label in range(len(CLASSES))]
    return to_tuned(rules, way.force, way.source) | {
        "held_out": {name: float(of.mean()) for name, of in dice.items()},
        "stage": way.stage,
        "score": tuner.score(),
    }
