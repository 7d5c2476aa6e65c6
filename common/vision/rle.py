"""Kaggle's run-length encoded masks: `start length` pairs, column by column from the top left, the first pixel is 1."""

from collections.abc import Sequence
from functools import cache

import cv2
import numpy as np

from common.errors import UserError

LOOKED_UP = 10**7  # numbers below it, at most seven digits, are written by a look-up


def parse(text: str) -> np.ndarray:
    """The runs of a cell as int64 [n, 2] of (first pixel from 0, length); ValueError when it is no list of pairs."""
    text = text.strip()
    if not text.encode().translate(None, b" ").isdigit():  # something is odd, or there are no numbers: look closely
        words = text.split()
        wrong = next((word for word in words if not (word.isascii() and word.isdecimal())), None)
        if wrong is not None:
            raise ValueError(f"{wrong!r} is not a whole number")
        text = " ".join(words)
    numbers = np.fromstring(text, np.int64, sep=" ")  # four times as fast as np.array(text.split())
    if len(numbers) % 2:
        raise ValueError(f"{len(numbers)} numbers, expected pairs of start and length")
    runs = numbers.reshape(-1, 2)
    runs[:, 0] -= 1
    return runs


def problem(runs: np.ndarray, pixels: int) -> str | None:
    """What is wrong with runs [n, 2] in an image of so many pixels, in words with 1-based numbers, or None."""
    if not len(runs):
        return None
    starts, lengths = runs.T
    if lengths.min() < 1:
        at = int(lengths.argmin())
        return f"run {starts[at] + 1} {lengths[at]} has no pixels"
    outside = (starts < 0) | (lengths > pixels - starts)  # their sum may be more than an int64 holds
    if outside.any():
        at = int(outside.argmax())
        return f"run {starts[at] + 1} {lengths[at]} is out of range, pixels are 1 to {pixels}"
    gaps = starts[1:] - (starts + lengths)[:-1]
    if len(gaps) and gaps.min() < 0:
        at = int((gaps < 0).argmax()) + 1
        fault = "is not sorted, it starts before" if starts[at] < starts[at - 1] else "overlaps"
        return f"run {starts[at] + 1} {lengths[at]} {fault} the run {starts[at - 1] + 1} {lengths[at - 1]} before it"
    return None


def problem_of_text(text: str, pixels: int) -> str | None:
    """`problem` of a cell of a CSV."""
    try:
        return problem(parse(text), pixels)
    except ValueError as error:
        return str(error)


def decode(runs: np.ndarray, height: int, width: int) -> np.ndarray:
    """The mask, bool [height, width], of valid runs (see `problem`)."""
    edges = np.stack((runs[:, 0], runs[:, 0] + runs[:, 1]), axis=1).reshape(-1)
    return _between(edges, height * width).reshape(width, height).T


def _between(edges: np.ndarray, size: int) -> np.ndarray:
    """bool [size], true from every even edge up to the odd one after it; edges are sorted."""
    lengths = np.diff(edges, prepend=0, append=size)
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)


def decode_to_size(runs: np.ndarray, height: int, width: int, target_height: int, target_width: int) -> np.ndarray:
    """The mask of a height x width image at another size, bool [target_height, target_width].

    A target pixel is set when the mask covers at least half of its area, computed exactly in integers. The result is
    the full mask reduced by cv2.INTER_AREA and compared with 0.5, but the full mask is never made.
    """
    if (height, width) == (target_height, target_width):
        return decode(runs, height, width)
    # One source pixel is target_height x target_width units, one target pixel is height x width units. `change` holds
    # by how much the covered area grows from one target row to the next, column by column; its running sum is the area.
    columns, tops, bottoms = _within_columns(runs, height)
    row, beyond = np.divmod(np.concatenate((tops, bottoms)) * target_height, height)
    stride = target_height + 2  # a run that ends with the column changes two rows below the mask
    change = np.zeros(target_width * stride, np.int64)
    for step in range(-(-target_width // width) + 1):  # a source column lies in so many target columns at most
        column = columns * target_width // width + step
        left = np.maximum(columns * target_width, column * width)
        right = np.minimum((columns + 1) * target_width, (column + 1) * width)
        overlap = np.maximum(right - left, 0)
        overlap = np.concatenate((overlap, -overlap))
        place = np.tile(np.minimum(column, target_width - 1), 2) * stride + row
        np.add.at(change, place, overlap * (height - beyond))
        np.add.at(change, place + 1, overlap * beyond)
    places = np.flatnonzero(change != 0)
    covered = 2 * np.cumsum(change[places]) >= height * width
    edges = places[np.diff(covered, prepend=False)]
    return _between(edges, target_width * stride).reshape(target_width, stride)[:, :target_height].T


def _within_columns(runs: np.ndarray, height: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs cut at the ends of columns: column, first row, row after the last, each int64 [m]."""
    starts, ends = runs[:, 0], runs[:, 0] + runs[:, 1]
    first, last = starts // height, (ends - 1) // height
    if (first == last).all():
        return first, starts - first * height, ends - first * height
    counts = last - first + 1
    which = np.repeat(np.arange(len(runs)), counts)
    columns = first[which] + np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    tops = np.maximum(starts[which] - columns * height, 0)
    return columns, tops, np.minimum(ends[which] - columns * height, height)


@cache
def _written(bits: int) -> np.ndarray:
    """All numbers of `bits` bits as text, eight bytes with a space: a look-up is five times as fast as formatting."""
    return np.char.add(np.arange(min(1 << bits, LOOKED_UP)).astype("S7"), b" ").view(np.uint64)


def encode(mask: np.ndarray) -> str:
    """The cell for a mask [height, width] of any type: nonzero pixels are set; an empty mask is an empty cell."""
    height, width = mask.shape
    padded = np.zeros(height * width + 2, np.uint8)
    is_set = mask if mask.dtype == bool else mask != 0
    cv2.transpose(is_set.view(np.uint8), padded[1:-1].reshape(width, height))
    runs = np.flatnonzero(padded[1:] != padded[:-1])
    runs[1::2] -= runs[::2]
    runs[::2] += 1
    if height * width >= LOOKED_UP:
        return " ".join(map(str, runs.tolist()))
    return _written((height * width).bit_length())[runs].tobytes().translate(None, b"\0").rstrip().decode()


class RunMasks:
    """The masks of n images for an ImageDataset: row -> uint8 of 0 and 1 [H, W, K] at `size` (height, width).

    `cells` [n][K] are run lengths in masks of the size `full`, in any order, as those of several things in one cell;
    `ids` [n] and `table` name them in messages. Raises UserError for the first cell that is invalid in such a mask.
    """

    def __init__(
        self, cells: Sequence[Sequence[str]], full: tuple[int, int], size: tuple[int, int], ids: Sequence, table: str
    ):
        self.full, self.size = full, size
        self.runs = []
        for name, of_image in zip(ids, cells, strict=True):
            try:
                found = [parse(cell) for cell in of_image]
                found = [runs[runs[:, 0].argsort(kind="stable")] for runs in found]
                fault = next(filter(None, (problem(runs, full[0] * full[1]) for runs in found)), None)
            except ValueError as error:
                fault = str(error)
            if fault:
                raise UserError(
                    f"{table}: the mask of {name}: {fault}, in an image of {full[0]}x{full[1]} (height x width): "
                    f"mend the cell, or the size that the task gives"
                )
            self.runs.append(found)

    def __getitem__(self, row: int) -> np.ndarray:
        masks = [decode_to_size(runs, *self.full, *self.size) for runs in self.runs[row]]
        return np.stack(masks, axis=-1).view(np.uint8)
