"""Demo data in the competition's formats: bright ellipses under noise, and their run lengths."""

from pathlib import Path

import cv2
import numpy as np

from common.vision import rle

TRAIN, TEST, HEIGHT, WIDTH = 60, 12, 96, 128


def write_demo(folder: Path) -> None:
    """Write train.csv, sample_submission.csv and PNGs, always the same bytes. CHANGE: to the real files' formats."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[str]] = {"train": ["id,rle"], "test": ["id,rle"]}
    for number in range(TRAIN + TEST):
        part, name = "train" if number < TRAIN else "test", f"image_{number:03}"
        image, mask = draw(rng, things=number % 4)
        (folder / part).mkdir(exist_ok=True)
        cv2.imwrite(str(folder / part / f"{name}.png"), image)
        rows[part].append(f"{name},{rle.encode(mask) if part == 'train' else '1 1'}")
    (folder / "train.csv").write_text("\n".join(rows["train"]) + "\n")
    (folder / "sample_submission.csv").write_text("\n".join(rows["test"]) + "\n")


def draw(rng: np.random.Generator, things: int) -> tuple[np.ndarray, np.ndarray]:
    """An image uint8 [96, 128, 3] with `things` ellipses, and its mask uint8 [96, 128] of 0 and 1."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for _ in range(things):
        x, y, a, b = (int(rng.integers(low, high)) for low, high in ((20, 108), (20, 76), (8, 28), (8, 20)))
        cv2.ellipse(mask, (x, y), (a, b), float(rng.uniform(0, 180)), 0, 360, 1, -1)
    ground = cv2.resize(rng.normal(90, 30, (6, 8, 3)), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    image = np.where(mask[:, :, None], ground + 60, ground) + rng.normal(0, 15, ground.shape)
    return np.clip(image, 0, 255).astype(np.uint8), mask
