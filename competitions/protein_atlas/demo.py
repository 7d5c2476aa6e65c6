"""Demo data in the competition's file format: cells in four channels, with labels for where the green channel is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from common.files import write_csv

TRAIN_IMAGES, TEST_IMAGES = 640, 96
SIZE = 128  # pixels of a side; the real ones have 512
COLOURS = ("red", "green", "blue", "yellow")


@dataclass(frozen=True)
class Cell:
    """One cell: masks of its body and nucleus, float32 [SIZE, SIZE] of 0 and 1, its centre and its radius in pixels."""

    body: np.ndarray
    nucleus: np.ndarray
    centre: np.ndarray  # x, y
    radius: float  # of the body; that of the nucleus is half as long
    rng: np.random.Generator

    def place(self, low: float, high: float) -> tuple[int, int]:
        """A random point at a distance of `low` to `high` radii from the centre."""
        angle, distance = self.rng.uniform(0, 2 * np.pi), self.radius * self.rng.uniform(low, high)
        x, y = self.centre + distance * np.array([np.cos(angle), np.sin(angle)])
        return int(x), int(y)

    def dots(self, count: int, size: int, low: float, high: float, filled: int = -1) -> np.ndarray:
        plane = blank()
        for _ in range(count):
            cv2.circle(plane, self.place(low, high), size, 1.0, filled)
        return plane

    def lines(self, count: int, length: float, width: int, low: float, high: float, angle: float | None = None):
        plane = blank()
        for _ in range(count):
            start, turn = self.place(low, high), self.rng.uniform(0, 2 * np.pi) if angle is None else angle
            end = int(start[0] + length * np.cos(turn)), int(start[1] + length * np.sin(turn))
            cv2.line(plane, start, end, 1.0, width)
        return plane

    def filaments(self) -> np.ndarray:
        return self.body * (1 - self.nucleus) * self.lines(40, 0.6 * self.radius, 1, 0.3, 0.9)


def blank() -> np.ndarray:
    return np.zeros((SIZE, SIZE), np.float32)


def rim(mask: np.ndarray) -> np.ndarray:
    return cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))


# Label -> its frequency (as in train.csv, the rarest a little more frequent), and its drawing in the green channel.
LABELS: dict[int, tuple[float, Callable[[Cell], np.ndarray]]] = {
    0: (0.41, lambda cell: 0.7 * cell.nucleus),  # nucleoplasm
    25: (0.26, lambda cell: 0.5 * cell.body * (1 - cell.nucleus)),  # cytosol
    21: (0.12, lambda cell: rim(cell.body)),  # plasma membrane
    2: (0.12, lambda cell: cell.nucleus * cell.dots(3, 4, 0.0, 0.3)),  # nucleoli
    23: (0.10, lambda cell: cell.body * (1 - cell.nucleus) * cell.lines(14, 6, 2, 0.6, 0.9)),  # mitochondria
    7: (0.09, lambda cell: cell.dots(1, 8, 0.6, 0.65)),  # Golgi apparatus
    4: (0.06, lambda cell: cell.nucleus * cell.dots(16, 1, 0.0, 0.45)),  # nuclear speckles
    1: (0.04, lambda cell: rim(cell.nucleus)),  # nuclear membrane
    14: (0.035, Cell.filaments),  # microtubules
    12: (0.025, lambda cell: cell.body * cell.lines(9, 1.6 * cell.radius, 1, 0.2, 0.8, angle=0.8)),  # actin filaments
    26: (0.02, lambda cell: cell.body * (1 - cell.nucleus) * cell.dots(5, 3, 0.65, 0.9)),  # cytoplasmic bodies
    27: (0.015, lambda cell: cell.body * cell.dots(5, 4, 0.6, 0.9, filled=1)),  # rods and rings
}


def write_demo(folder: Path) -> None:
    """Write train.csv, sample_submission.csv and four 8-bit PNGs for every image; the same bytes every time."""
    rng = np.random.default_rng(2018)
    rates = np.array([rate for rate, _ in LABELS.values()])
    rows = {"train": [], "test": []}
    for number in range(TRAIN_IMAGES + TEST_IMAGES):
        part = "train" if number < TRAIN_IMAGES else "test"
        name = f"{rng.integers(2**62):016x}-bbac-11e8-b2ba-ac1f6b6435d0"
        count = rng.choice((1, 2, 3), p=(0.55, 0.38, 0.07))
        labels = rng.choice(list(LABELS), count, replace=False, p=rates / rates.sum())
        (folder / part).mkdir(exist_ok=True)
        for colour, plane in zip(COLOURS, draw(rng, labels.tolist()), strict=True):
            cv2.imwrite(str(folder / part / f"{name}_{colour}.png"), plane)
        rows[part].append((name, " ".join(map(str, labels)) if part == "train" else "0"))
    write_csv(folder / "train.csv", ["Id", "Target"], rows["train"])
    write_csv(folder / "sample_submission.csv", ["Id", "Predicted"], rows["test"])


def draw(rng: np.random.Generator, labels: list[int]) -> np.ndarray:
    """An image uint8 [4, SIZE, SIZE]: microtubules, protein, nuclei, endoplasmic reticulum of two to four cells."""
    planes = np.zeros((4, SIZE, SIZE), np.float32)
    for corner in rng.permutation(4)[: rng.integers(2, 5)]:
        centre = SIZE * (0.27 + 0.46 * np.array([corner % 2, corner // 2])) + rng.uniform(-5, 5, 2)
        radius, turn, flat = rng.uniform(24, 30), rng.uniform(0, 180), rng.uniform(0.8, 1)
        axes = [(int(size), int(size * flat)) for size in (radius, radius / 2)]
        place = tuple(int(value) for value in centre)
        body, nucleus = (cv2.ellipse(blank(), place, size, turn, 0, 360, 1.0, -1) for size in axes)
        cell = Cell(body, nucleus, centre, radius, rng)
        green = sum(rng.uniform(0.6, 1) * LABELS[label][1](cell) for label in labels)
        planes += cell.filaments(), green, 0.8 * nucleus, 0.6 * body * (1 - nucleus)
    blurred = np.stack([cv2.GaussianBlur(plane, (3, 3), 0) for plane in planes])
    noise = rng.normal(0, 0.03, planes.shape)
    return np.clip(255 * (rng.uniform(0.6, 1) * blurred + noise), 0, 255).astype(np.uint8)
