"""Read the competition's files in Kaggle's layout: the images, their masks, and the rows to submit."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common import tables
from common.errors import BadImage, UserError, did_you_mean, quoted, some
from common.raw import RawData
from common.vision import rle
from common.vision.decode import decode
from common.vision.find import find_images, images_of

CLASSES = ("Fish", "Flower", "Gravel", "Sugar")
MASK_SIZE = (1400, 2100)  # height and width that the runs of train.csv refer to, even if the images were resized
SUBMISSION_SIZE = (350, 525)  # height and width that the runs of a submission refer to
CERTAIN = 50  # equal distances between neighbouring columns that are enough to tell the height of the masks


@dataclass(frozen=True)
class Runs:
    """The masks of n images as one flat array instead of 4n small ones, which is fast to copy to worker processes.

    `runs` int32 [all runs, 2] of (first pixel from 0, length) at `size`; `starts` int64 [4n + 1] of each mask in them.
    """

    runs: np.ndarray
    starts: np.ndarray
    size: tuple[int, int] = MASK_SIZE

    def of(self, image: int, label: int) -> np.ndarray:
        cell = image * len(CLASSES) + label
        return self.runs[self.starts[cell] : self.starts[cell + 1]].astype(np.int64)

    def mask(self, image: int, label: int, size: tuple[int, int]) -> np.ndarray:
        """The mask of a class in an image, bool [height, width], at any size; in memory it lies column by column."""
        return rle.decode_to_size(self.of(image, label), *self.size, *size)

    def masks(self, image: int, size: tuple[int, int]) -> np.ndarray:
        """The masks of an image, bool [4, height, width], at any size."""
        return np.stack([self.mask(image, label, size) for label in range(len(CLASSES))])

    def present(self) -> np.ndarray:
        """Which classes each image has, bool [n, 4]."""
        return (np.diff(self.starts) > 0).reshape(-1, len(CLASSES))


@dataclass(frozen=True)
class CloudFiles:
    """The content of the files. Images are sorted by name, so the order of the rows in train.csv does not matter."""

    images: list[str]  # names of the training images
    train_paths: list[Path]
    runs: Runs
    test_images: list[str]  # in the order of the sample submission
    test_paths: list[Path]


def read(raw: RawData, announce: Callable[[str], None] = print) -> CloudFiles:
    """Read and check all files except the pixels; raises UserError with the file and the row of the first fault."""
    train, sample = _cells(raw, "train.csv"), _cells(raw.uncounted(), "sample_submission.csv")
    images, test_images = sorted(train), list(sample)
    train_paths = _paths(raw, "train_images", images, "train.csv")
    test_paths = _paths(raw, "test_images", test_images, "sample_submission.csv")
    for name, cells in (("train.csv", train), ("sample_submission.csv", sample)):
        for image, of_classes in cells.items():
            if missing := [label for label in CLASSES if label not in of_classes]:
                raise UserError(f"{raw.path}/{name}: {quoted(image)} has no row for {', '.join(missing)}: {raw.mend}")
    masks = [_mask(raw, image, label, *train[image][label]) for image in images for label in CLASSES]
    runs = Runs(np.concatenate(masks).astype(np.int32), np.cumsum([0, *map(len, masks)]))
    size = _size_of(raw, runs, train_paths)
    if size != MASK_SIZE:
        runs = replace(runs, size=size)
        announce(
            f"{raw.path}/train.csv: run lengths are read as {size[0]}x{size[1]} masks, not the competition's "
            f"{MASK_SIZE[0]}x{MASK_SIZE[1]}: all fit into them, with columns {size[0]} pixels apart"
        )
    return CloudFiles(images, train_paths, runs, test_images, test_paths)


def _cells(raw: RawData, name: str) -> dict[str, dict[str, tuple[int, str]]]:
    """Image -> class -> (line, cell) of a CSV, in its order; raises UserError for unknown classes and repeated rows."""
    columns = {"Image_Label": str, "EncodedPixels": tables.text(blank=True)}
    table = tables.read(raw, name, columns, id="Image_Label", others="refuse", lines=True)
    found: dict[str, dict[str, tuple[int, str]]] = {}
    for line, key, cell in table.itertuples():
        image, _, label = key.rpartition("_")
        if label not in CLASSES or not image:
            raise UserError(
                f"{raw.path}/{name} line {line}: {key!r} names no class.{did_you_mean(label, CLASSES)} "
                f"Expected IMAGE.jpg_CLASS with one of {', '.join(CLASSES)}: {raw.mend}"
            )
        found.setdefault(image, {})[label] = line, cell
    return found


def _mask(raw: RawData, image: str, label: str, line: int, cell: str) -> np.ndarray:
    """The runs of a cell of train.csv, int64 [n, 2]; raises UserError for invalid ones."""
    cell = "" if cell.lower() == "nan" else cell
    if fault := rle.problem_of_text(cell, MASK_SIZE[0] * MASK_SIZE[1]):
        raise UserError(f"{raw.path}/train.csv line {line} ({image}, {label}): {fault}: {raw.mend}")
    return rle.parse(cell)


def _size_of(raw: RawData, runs: Runs, paths: list[Path]) -> tuple[int, int]:
    """The size that runs refer to: MASK_SIZE, unless the masks were encoded again for resized images.

    The starts of runs in neighbouring columns mostly differ by the height of the mask. If that is not 1400, and no run
    ends beyond a mask of that height, the masks have the size of the images or of a submission. Raises UserError if it
    is neither. Too few runs prove nothing, so MASK_SIZE is assumed.
    """
    starts, ends = runs.runs[:, 0], runs.runs.sum(1)
    apart = np.diff(starts)
    apart = apart[(apart > 0) & (apart <= MASK_SIZE[0])]
    heights = np.bincount(apart, minlength=MASK_SIZE[0] + 1)
    height = int(heights.argmax())
    if heights[height] < max(CERTAIN, len(apart) / 2) or height == MASK_SIZE[0]:
        return MASK_SIZE
    stored = _stored_size(paths)
    for size in (stored, SUBMISSION_SIZE):
        if size[0] == height and ends.max() <= size[0] * size[1]:
            return size
    if ends.max() > height * 2 * MASK_SIZE[1]:
        return MASK_SIZE
    raise UserError(
        f"{raw.path}/train.csv: columns of the run lengths are {height} pixels apart, so masks are that high, but the "
        f"images are {stored[0]}x{stored[1]}: expected run lengths for {MASK_SIZE[0]}x{MASK_SIZE[1]}, or for the size "
        f"of the images: {raw.mend}"
    )


def _stored_size(paths: list[Path]) -> tuple[int, int]:
    """Height and width of the first image that can be read."""
    for path in paths:
        with suppress(BadImage):
            return decode(path, upright=False).shape[:2]
    return MASK_SIZE


def _paths(raw: RawData, folder: str, images: list[str], table: str) -> list[Path]:
    """Paths of the images; raises UserError for a row without an image, and for an image without a row.

    A lenient prediction (see RawData) accepts both.
    """
    paths, place = images_of(raw, folder, images, table), raw.folder() / folder
    if raw.lenient:
        return paths
    if without_row := sorted({file.name for file in find_images(place)} - {path.name for path in paths}):
        raise UserError(f"{place} holds {some(without_row)}, not in {table}: remove the images, or add their rows")
    return paths
