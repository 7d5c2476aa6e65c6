"""A tiny folder in Kaggle's layout, with images of several kinds and masks at 1400x2100."""

from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest

from common.vision import rle
from competitions.clouds.reader import CLASSES, MASK_SIZE

NAMES = [f"{number:07x}.jpg" for number in (900, 17, 333, 65, 4096, 77)]
TEST_NAMES = ["0000abc.jpg", "0000002.jpg"]


def truth_of(number: int, label: int) -> np.ndarray:
    """bool [1400, 2100]: image `number` has class `label` in a box that moves with both; some have none."""
    mask = np.zeros(MASK_SIZE, bool)
    if (number + label) % 3:
        mask[100 * label : 700 + 50 * number, 300 * number : 300 * number + 900] = True
    return mask


def write_image(path: Path, height: int, width: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), cv2.resize(pixels, (width, height)))


@cache
def train_rows() -> tuple[str, ...]:
    return tuple(
        f"{name}_{label},{rle.encode(truth_of(number, code))}"
        for number, name in enumerate(NAMES)
        for code, label in enumerate(CLASSES)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six training and two test images of 140x210."""
    write_rows(tmp_path, "train.csv", list(train_rows()))
    write_rows(tmp_path, "sample_submission.csv", [f"{name}_{label},1 1" for name in TEST_NAMES for label in CLASSES])
    for number, name in enumerate(NAMES):
        write_image(tmp_path / "train_images" / name, 140, 210, number)
    for number, name in enumerate(TEST_NAMES):
        write_image(tmp_path / "test_images" / name, 140, 210, 50 + number)
    return tmp_path


def write_rows(folder: Path, name: str, rows: list[str]) -> None:
    (folder / name).write_text("\n".join(["Image_Label,EncodedPixels", *rows]) + "\n")


def rows_of(folder: Path, name: str) -> list[str]:
    return (folder / name).read_text().splitlines()[1:]
