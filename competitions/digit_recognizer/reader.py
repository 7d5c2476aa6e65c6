"""Read the competition's three CSV files: checked cell by cell, then cached as .npy beside the data."""

import hashlib
from dataclasses import dataclass

import numpy as np

from common import tables
from common.errors import UserError, some
from common.files import NOT_NPY, write_npy
from common.raw import RawData
from common.tables import text, whole

SIZE = 28  # pixels of a side
PIXEL_COLUMNS = [f"pixel{number}" for number in range(SIZE * SIZE)]
PIXELS = dict.fromkeys(PIXEL_COLUMNS, whole(0, 255, "uint8"))
FILES = {
    "train.csv": {"label": whole(0, 9, "uint8"), **PIXELS},
    "test.csv": PIXELS,
    "sample_submission.csv": {"ImageId": str, "Label": text(blank=True)},
}
OFFENDERS = 5  # number of wrong ids that an error message names


@dataclass(frozen=True)
class DigitFiles:
    """The content of the files. Row i of test.csv is ImageId i + 1; test rows are in the order of the sample."""

    images: np.ndarray  # uint8 [n, 1, 28, 28], black is 0
    labels: np.ndarray  # int64 [n], 0..9
    test_images: np.ndarray  # uint8 [m, 1, 28, 28]
    test_ids: list[str]  # m ImageIds


def read(raw: RawData) -> DigitFiles:
    """Read and check the files; raises UserError with the file, the line and the column of the first fault."""
    known = set(raw.cache.glob("*.npy"))
    train, test = _pixels(raw, "train.csv"), _pixels(raw, "test.csv")
    ids = _ids(raw.uncounted(), len(test))
    beside = raw.path if raw.path.is_dir() else raw.path.parent
    if raw.cache.parent != beside and set(raw.cache.glob("*.npy")) != known:
        print(f"{beside} cannot be written: the tables are cached in {raw.cache} instead")
    return DigitFiles(
        images=train[:, 1:].reshape(-1, 1, SIZE, SIZE).copy(),
        labels=train[:, 0].astype(np.int64),
        test_images=test.reshape(-1, 1, SIZE, SIZE)[ids - 1],
        test_ids=[str(number) for number in ids],
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


def _ids(raw: RawData, rows: int) -> np.ndarray:
    """ImageIds of the sample submission in its order, int64 [rows]; raises UserError unless they are 1..rows."""
    name = "sample_submission.csv"
    found = tables.read(raw, name, FILES[name], id="ImageId", others="refuse")["ImageId"]
    expected = [str(number) for number in range(1, rows + 1)]
    known, there = set(expected), set(found)
    facts = [
        ("missing", [number for number in expected if number not in there]),
        ("without a row in test.csv", [number for number in found if number not in known]),
    ]
    told = "; ".join(f"{what}: {some(list(map(_shown, names)), OFFENDERS)}" for what, names in facts if names)
    if told:
        raise UserError(
            f"{raw.path}/{name}: expected the ids 1 to {rows}, one for every row of test.csv ({told}): mend the file, "
            f"or get it again with make data COMP={raw.competition}"
        )
    return found.to_numpy(np.int64)


def _shown(name: str) -> str:
    return name[:30] if name.isalnum() else repr(name[:30])
