"""Read the images: their CSV files are checked cell by cell, then cached as .npy beside the data."""

import hashlib
from dataclasses import dataclass

import numpy as np

from common import tables
from common.files import NOT_NPY, write_npy
from common.raw import RawData
from common.tables import whole

SIZE = 28  # pixels of a side
PIXEL_COLUMNS = [f"pixel{number}" for number in range(SIZE * SIZE)]
PIXELS = dict.fromkeys(PIXEL_COLUMNS, whole(0, 255, "uint8"))
FILES = {"train.csv": {"label": whole(0, 9, "uint8"), **PIXELS}, "test.csv": PIXELS}


@dataclass(frozen=True)
class DigitFiles:
    """The content of the files. Row i of test.csv has the ImageId i + 1."""

    images: np.ndarray  # uint8 [n, 1, 28, 28], black is 0
    labels: np.ndarray  # int64 [n], 0..9
    test_images: np.ndarray  # uint8 [m, 1, 28, 28]


def read(raw: RawData) -> DigitFiles:
    """Read and check the files; raises UserError with the file, the line and the column of the first fault."""
    known = set(raw.cache.glob("*.npy"))
    train, test = _pixels(raw, "train.csv"), _pixels(raw, "test.csv")
    beside = raw.path if raw.path.is_dir() else raw.path.parent
    if raw.cache.parent != beside and set(raw.cache.glob("*.npy")) != known:
        print(f"{beside} cannot be written: the tables are cached in {raw.cache} instead")
    return DigitFiles(  # copies, because the arrays of pandas are read-only
        images=train[:, 1:].reshape(-1, 1, SIZE, SIZE).copy(),
        labels=train[:, 0].astype(np.int64),
        test_images=test.reshape(-1, 1, SIZE, SIZE).copy(),
    )


def _pixels(raw: RawData, name: str) -> np.ndarray:
    """The numbers of a CSV as uint8 [rows, columns], cached by the sha256 of the file."""
    digest = hashlib.sha256(raw.read(name)).hexdigest()
    cached = raw.cache / f"{name.removesuffix('.csv')}-{digest[:16]}.npy"
    if cached.is_file():
        try:
            return np.load(cached)
        except (*NOT_NPY, OSError):  # a damaged cache: parse the CSV and write it again
            pass
    # A blank line would shift the ids of the rows after it.
    numbers = tables.read(raw, name, FILES[name], others="refuse", blank_lines=False).to_numpy()
    write_npy(cached, numbers)
    return numbers
