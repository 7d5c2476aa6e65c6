"""The competition's files in Kaggle's layout: which images there are, their masks, and the rows to submit."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.raw import RawData, visible
from competitions.clouds import rle

CLASSES = ("Fish", "Flower", "Gravel", "Sugar")
MASK_SIZE = (1400, 2100)  # height and width that the runs of train.csv refer to, whatever the size of the images
SUBMISSION_SIZE = (350, 525)  # height and width that the runs of a submission refer to
ENDINGS = (".jpg", ".jpeg", ".png")
COLUMNS = ("Image_Label", "EncodedPixels")
AGAIN = "mend the file, or get it again with make data COMP=clouds"


@dataclass(frozen=True)
class Runs:
    """The masks of n images: one flat array instead of 4n small ones, which worker processes copy at once.

    `runs` int32 [all runs, 2] of (first pixel from 0, length) at MASK_SIZE; `starts` int64 [4n + 1], each mask's first.
    """

    runs: np.ndarray
    starts: np.ndarray

    def of(self, image: int, label: int) -> np.ndarray:
        cell = image * len(CLASSES) + label
        return self.runs[self.starts[cell] : self.starts[cell + 1]].astype(np.int64)

    def masks(self, image: int, size: tuple[int, int]) -> np.ndarray:
        """bool [4, height, width] at any size."""
        return np.stack([rle.decode_to_size(self.of(image, label), *MASK_SIZE, *size) for label in range(len(CLASSES))])

    def present(self) -> np.ndarray:
        """Which classes each image has, bool [n, 4]."""
        return (np.diff(self.starts) > 0).reshape(-1, len(CLASSES))


@dataclass(frozen=True)
class CloudFiles:
    """Everything the files say. Images are sorted by name, so the order of the rows in train.csv changes nothing."""

    images: list[str]  # names of the training images
    train_paths: list[Path]
    runs: Runs
    test_images: list[str]  # in the order of the sample submission
    test_paths: list[Path]
    test_classes: dict[str, list[int]]  # test image -> its classes in the order of the sample's rows


def read(raw: RawData) -> CloudFiles:
    """Read and check all files but the pixels; raises UserError naming the file and the row of the first fault."""
    folder = raw.folder()
    images, runs = _train(raw)
    test_classes = _test(raw)
    train_paths = _paths(folder / "train_images", images, "train.csv")
    test_paths = _paths(folder / "test_images", list(test_classes), "sample_submission.csv")
    for image, labels in test_classes.items():
        missing = [name for label, name in enumerate(CLASSES) if label not in labels]
        if missing:
            raise UserError(f"{raw.path}/sample_submission.csv: {image} has no row for {', '.join(missing)}: {AGAIN}")
    return CloudFiles(images, train_paths, runs, list(test_classes), test_paths, test_classes)


def _table(raw: RawData, name: str) -> Iterator[tuple[int, str, int, str]]:
    """Rows of a CSV as (line, image, class, cell); raises UserError for other columns and unknown classes."""
    rows = raw.rows(name)
    _, header = next(rows, (1, []))
    if tuple(header) != COLUMNS:
        found, expected = ", ".join(header)[:200] or "none", ", ".join(COLUMNS)
        raise UserError(f"{raw.path}/{name} has the columns {found}; expected {expected}: {AGAIN}")
    known = {label: number for number, label in enumerate(CLASSES)}
    for line, row in rows:
        if len(row) != len(COLUMNS):
            raise UserError(f"{raw.path}/{name} line {line} has {len(row)} cells, expected {len(COLUMNS)}: {AGAIN}")
        key, cell = row
        image, _, label = key.rpartition("_")
        if label not in known or not image:
            near = difflib.get_close_matches(label, CLASSES, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(
                f"{raw.path}/{name} line {line}: {key!r} names no class{hint}; expected IMAGE.jpg_CLASS "
                f"with one of {', '.join(CLASSES)}: {AGAIN}"
            )
        yield line, image, known[label], "" if cell.lower() == "nan" else cell


def _train(raw: RawData) -> tuple[list[str], Runs]:
    cells: dict[str, list[np.ndarray | None]] = {}
    for line, image, label, text in _table(raw, "train.csv"):
        masks = cells.setdefault(image, [None] * len(CLASSES))
        where = f"{raw.path}/train.csv line {line} ({image}, {CLASSES[label]})"
        if masks[label] is not None:
            raise UserError(f"{where}: this image and class are there twice: {AGAIN}")
        try:
            runs = rle.parse(text)
        except ValueError as error:
            raise UserError(f"{where}: {error}: {AGAIN}") from None
        if fault := rle.problem(runs, MASK_SIZE[0] * MASK_SIZE[1]):
            raise UserError(f"{where}: {fault}: {AGAIN}")
        masks[label] = runs
    if not cells:
        raise UserError(f"{raw.path}/train.csv has no rows: {AGAIN}")
    for image, masks in cells.items():
        missing = [CLASSES[label] for label, runs in enumerate(masks) if runs is None]
        if missing:
            raise UserError(f"{raw.path}/train.csv: {image} has no row for {', '.join(missing)}: {AGAIN}")
    images = sorted(cells)
    flat = [runs for image in images for runs in cells[image]]
    starts = np.cumsum([0, *map(len, flat)])
    return images, Runs(np.concatenate(flat).astype(np.int32), starts)


def _test(raw: RawData) -> dict[str, list[int]]:
    """Images of the sample submission and the order of their classes; its masks mean nothing."""
    classes: dict[str, list[int]] = {}
    last = None
    for line, image, label, _ in _table(raw, "sample_submission.csv"):
        where = f"{raw.path}/sample_submission.csv line {line} ({image}, {CLASSES[label]})"
        if image in classes and image != last:
            raise UserError(
                f"{where}: the rows of an image are not together, and a submission is written image by image: sort the "
                f"file by {COLUMNS[0]}"
            )
        if label in classes.setdefault(image, []):
            raise UserError(f"{where}: this image and class are there twice: {AGAIN}")
        classes[image].append(label)
        last = image
    return classes


def _paths(folder: Path, images: list[str], table: str) -> list[Path]:
    """Paths of the images; raises UserError for a row without an image, and for an image without a row."""
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: get the files with make data COMP=clouds, or pass DATA=/path/to/folder")
    there = {file.name for file in visible(folder) if file.suffix.lower() in ENDINGS}
    without_image, without_row = sorted(set(images) - there), sorted(there - set(images))
    if without_image:
        raise UserError(
            f"{table} names {_some(without_image)}, not in {folder}: unpack the images again, or remove the rows"
        )
    if without_row:
        raise UserError(f"{folder} holds {_some(without_row)}, not in {table}: remove the images, or add their rows")
    return [folder / image for image in images]


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{rest}"
