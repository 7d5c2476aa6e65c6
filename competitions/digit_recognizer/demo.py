"""Demo data: scikit-learn's 1,797 scanned digits in the competition's file format."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common.files import write_csv

TRAIN_ROWS = 1497  # the other 300 are the test rows
BOX, BORDER = 20, 4  # as in the real images: a digit fills a box of 20x20 pixels inside 28x28


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [1797, 784] and labels [1797] of UCI's "Optical Recognition of Handwritten Digits", enlarged."""
    from sklearn.datasets import load_digits

    small, labels = load_digits(return_X_y=True)  # values 0..16
    pixels = torch.from_numpy(small).float().reshape(-1, 1, 8, 8) * (255 / 16)
    large = F.interpolate(pixels, size=(BOX, BOX), mode="bicubic", align_corners=False).clamp(0, 255)
    return F.pad(large, [BORDER] * 4).round().to(torch.uint8).flatten(1).numpy(), labels


def write_demo(folder: Path) -> None:
    """Write train.csv, test.csv and sample_submission.csv; the same bytes every time."""
    pixels, labels = digits()
    columns = [f"pixel{number}" for number in range(pixels.shape[1])]
    train, test = slice(TRAIN_ROWS), slice(TRAIN_ROWS, None)
    rows = np.column_stack([labels[train], pixels[train]])
    write_csv(folder / "train.csv", ["label", *columns], rows.tolist())
    write_csv(folder / "test.csv", columns, pixels[test].tolist())
    rows = [[number, 0] for number in range(1, len(pixels) - TRAIN_ROWS + 1)]
    write_csv(folder / "sample_submission.csv", ["ImageId", "Label"], rows)
