"""Demo data in the competition's formats: discs and rings of any size and colour, some of them hard to see."""

from pathlib import Path

import cv2
import numpy as np

TRAIN, TEST, SIDE = 240, 60, 96  # images, and their height and width


def write_demo(folder: Path) -> None:
    """Write train.csv, sample_submission.csv and JPEGs, always the same bytes. CHANGE: to the real files' formats."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[str]] = {"train": ["id,ring"], "test": ["id,ring"]}
    for number in range(TRAIN + TEST):
        part, name, ring = "train" if number < TRAIN else "test", f"image_{number:03}", int(rng.random() < 0.4)
        (folder / part).mkdir(exist_ok=True)
        cv2.imwrite(str(folder / part / f"{name}.jpg"), draw(rng, ring))
        rows[part].append(f"{name},{ring if part == 'train' else 0.5}")
    (folder / "train.csv").write_text("\n".join(rows["train"]) + "\n")
    (folder / "sample_submission.csv").write_text("\n".join(rows["test"]) + "\n")


def draw(rng: np.random.Generator, ring: int) -> np.ndarray:
    """uint8 [96, 96, 3]: a noisy disc or ring on a background of another colour."""
    ground, colour = rng.integers(40, 150, 3), rng.integers(100, 210, 3).tolist()
    image = np.full((SIDE, SIDE, 3), ground, np.uint8)
    x, y, radius = (int(rng.integers(low, high)) for low, high in ((30, 66), (30, 66), (16, 28)))
    cv2.circle(image, (x, y), radius, colour, radius // 3 if ring else -1)
    return np.clip(image + rng.normal(0, 12, image.shape), 0, 255).astype(np.uint8)
